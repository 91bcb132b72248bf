"""M1: M0 trained on IFT and EFT. The SFT baseline judges the EFT data."""
from srlm_jax import config as configs


def get_config(size: str = '70b'):
  return configs.get('m1', size)
