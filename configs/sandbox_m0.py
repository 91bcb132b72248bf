"""The sandbox's M0: a small Llama trained from nothing on the sandbox's corpus."""
from srlm_jax import config as configs


def get_config(size: str = 'tiny'):
  return configs.get('m0', size)
