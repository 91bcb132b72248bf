"""M2: M1 trained with DPO on pairs that M1 generated and judged."""
from srlm_jax import config as configs


def get_config(size: str = '70b'):
  return configs.get('m2', size)
