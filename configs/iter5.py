"""M5: M4 trained with DPO on pairs that M4 generated and judged; not in the paper."""
from srlm_jax import config as configs


def get_config(size: str = '70b'):
  return configs.get('m5', size)
