"""M3: M2 trained with DPO on pairs that M2 answered and judged."""
from configs import base


def get_config(size: str = '70b'):
  return base.get('m3', size)
