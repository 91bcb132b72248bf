"""M4: M3 trained with DPO on pairs that M3 answered and judged; not in the paper."""
from configs import base


def get_config(size: str = '70b'):
  return base.get('m4', size)
