"""M1: M0 trained on IFT and EFT; its EFT is judged by the SFT baseline."""
from configs import base


def get_config(size: str = '70b'):
  return base.get('m1', size)
