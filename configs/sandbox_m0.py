"""The sandbox's M0: a small Llama trained from nothing on the sandbox's corpus."""
from configs import base


def get_config(size: str = 'tiny'):
  return base.get('m0', size)
