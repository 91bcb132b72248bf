"""Self-rewarding language models (Yuan et al. 2024) in JAX."""


class InputError(Exception):
  """What the user gave cannot be used; the message is one sentence: what, where, and what to do."""
