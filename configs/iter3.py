"""M3: M2 trained with DPO on pairs that M2 generated and judged."""
from srlm_jax import config as configs


def get_config(size: str = '70b'):
  return configs.get('m3', size)
