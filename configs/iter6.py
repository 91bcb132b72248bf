"""M6: M5 trained with DPO on pairs that M5 generated and judged; not in the paper."""
from srlm_jax import config as configs


def get_config(size: str = '70b'):
  return configs.get('m6', size)
