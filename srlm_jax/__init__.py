"""Self-rewarding language models (Yuan et al. 2024) in JAX."""
import difflib
import signal
import sys

if sys.argv[:1] == ['-m'] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  # This is `python -m srlm_jax.PROGRAM`, and Ctrl-C ends it at once until `cli.run_app` starts.
  signal.signal(signal.SIGINT, signal.SIG_DFL)


class InputError(Exception):
  """What the user gave cannot be used; the message is one sentence: what, where, and what to do.

  A very long message, which quotes a long value, is cut in its middle.
  """
  MOST = 1200  # characters

  def __init__(self, message: str):
    if len(message) > self.MOST:
      half = self.MOST // 2 - 10
      message = f'{message[:half]} [..] {message[-half:]}'
    super().__init__(message)


def closest(word: str, words) -> str:
  """' (did you mean "x"?)', or nothing."""
  found = difflib.get_close_matches(word, list(words), n=1)
  return f' (did you mean "{found[0]}"?)' if found else ''
