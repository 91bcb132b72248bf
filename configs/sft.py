"""The SFT baseline: M0 trained on IFT."""
from configs import base


def get_config(size: str = '70b'):
  return base.get('sft', size)
