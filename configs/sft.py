"""The SFT baseline: M0 trained on IFT."""
from srlm_jax import config as configs


def get_config(size: str = '70b'):
  return configs.get('sft', size)
