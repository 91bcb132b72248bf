"""M0 of the sandbox: a small Llama trained from scratch on the corpus of the sandbox."""
from srlm_jax import config as configs


def get_config(size: str = 'tiny'):
  return configs.get('m0', size)
