"""Times of the sides of a benchmark."""
from collections.abc import Callable
import statistics
import time


def seconds(side: Callable) -> float:
  """-> wall-clock seconds of one call."""
  start = time.perf_counter()
  side()
  return time.perf_counter() - start


def medians(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
  """{name: a function that returns seconds} -> {name: their median}.

  Runs alternate, so that slow periods of the machine affect all sides.
  """
  taken = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
  return {name: statistics.median(one[name] for one in taken) for name in sides}
