"""M2: M1 trained with DPO on pairs that M1 answered and judged."""
from configs import base


def get_config(size: str = '70b'):
  return base.get('m2', size)
