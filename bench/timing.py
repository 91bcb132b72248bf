"""Times of the sides of a benchmark. Needs only the standard library, because peers use it too."""
import argparse
from collections.abc import Callable
import json
import os
import pathlib
import statistics
import time
from typing import NamedTuple


def parser(doc: str) -> argparse.ArgumentParser:
  """The flags that benchmarks share; `doc`: the docstring of the program."""
  made = argparse.ArgumentParser(description=doc,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  made.add_argument('--json', help='also writes the JSON to this file')
  made.add_argument('--quick', action='store_true', help='runs every path on tiny inputs')
  return made


def report(found: dict, path: str | None):
  """Prints what a benchmark found as a line of JSON, and writes it to a file if there is a path."""
  line = json.dumps(found)
  if path:
    pathlib.Path(path).write_text(line + '\n')
  print(line)


class Cost(NamedTuple):
  """What a run takes."""
  seconds: float  # of wall-clock time
  cpu: float      # CPU seconds, user and system, of all threads


def seconds(side: Callable) -> float:
  """-> wall-clock seconds of one call."""
  return cost(side).seconds


def cost(side: Callable, cpu: Callable[[], float] = time.process_time) -> Cost:
  """-> the cost of one call; `cpu` returns the CPU seconds so far."""
  start, used = time.perf_counter(), cpu()
  side()
  return Cost(time.perf_counter() - start, cpu() - used)


def tree_cpu_seconds(pid='self') -> float:
  """-> CPU seconds of a process and its descendants so far, in steps of 0.01 s; Linux only."""
  folder = pathlib.Path('/proc', str(pid))
  fields = (folder / 'stat').read_text().rpartition(')')[2].split()
  ticks = sum(map(int, fields[11:15]))  # user and system, of itself and of its ended children
  children = ' '.join(file.read_text() for file in folder.glob('task/*/children')).split()
  return ticks / os.sysconf('SC_CLK_TCK') + sum(map(tree_cpu_seconds, children))


def medians(sides: dict[str, Callable[[], Cost]], rounds: int) -> dict[str, Cost]:
  """{name: a function that runs and returns its cost} -> {name: the median of each part}.

  Runs alternate, so that slow periods of the machine affect all sides.
  """
  taken = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
  return {name: Cost(*map(statistics.median, zip(*(one[name] for one in taken), strict=True)))
          for name in sides}
