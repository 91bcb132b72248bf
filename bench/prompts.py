"""How long the ROUGE-L filter takes for 20,000 prompts, and what its index saves against comparing with every prompt.

`python bench/prompts.py` filters two kinds of prompts as the stage does, on one core, each against all that were
accepted before: made up from a vocabulary whose words are as unevenly frequent as English ones, half of them by
changing some words of an earlier one (zipf); and instructions of the sandbox, which are all alike. It prints the
seconds of all 20,000, how many pairs of the 200 million were compared word for word, and on the first 400 prompts the
ratio to rouge-score against every prompt (brute force) and whether the two accept the same, as a table and as one line
of JSON.
"""
import json
import platform
import time

import numpy as np

from srlm_jax import config as configs
from srlm_jax.data import similar
from srlm_jax.sample import prompts
from srlm_jax.sandbox import world

COUNT, CHECKED, VOCABULARY, CHANGED = 20_000, 400, 20_000, (0.1, 0.6)


def make(count: int, seed: int) -> list[str]:
  """Prompts of 4 to 60 words; word i has probability proportional to 1 / (i + 3) (Zipf)."""
  rng = np.random.default_rng(seed)
  words = np.asarray([f'w{i}' for i in range(VOCABULARY)])
  share = 1 / (np.arange(VOCABULARY) + 3)
  share /= share.sum()
  made = []
  for i in range(count):
    if i and i % 2:
      text = made[rng.integers(i)].copy()
      changed = rng.random(len(text)) < rng.uniform(*CHANGED)
      text[changed] = rng.choice(words, changed.sum(), p=share)
    else:
      text = rng.choice(words, int(np.clip(rng.lognormal(2.8, 0.6), 4, 60)), p=share)
    made.append(text)
  return [' '.join(text) for text in made]


class BruteForce:
  """`similar.Index` by rouge-score against every text."""

  def __init__(self):
    self.texts = []

  def add(self, text):
    self.texts.append(similar.tokens(text))

  def find(self, text, limit):
    mine = similar.tokens(text)
    return next((known for known in self.texts if similar.rouge_l(known, mine) > limit), None)


def accepted(index, texts: list[str], limit: float) -> tuple[list[str], float]:
  """What the filter lets in, and the seconds it took."""
  started, kept = time.perf_counter(), []
  for text in texts:
    if index.find(text, limit) is None:
      index.add(text)
      kept.append(text)
  return kept, time.perf_counter() - started


def row(name: str, texts: list[str], limit: float) -> dict:
  """One kind of prompts: all of them through the index, the first by brute force too."""
  brute, brute_seconds = accepted(BruteForce(), texts[:CHECKED], limit)
  ours, seconds_checked = accepted(similar.Index(), texts[:CHECKED], limit)
  index = similar.Index()
  kept, seconds = accepted(index, texts, limit)
  return dict(kind=name, limit=limit, accepted=len(kept), seconds=round(seconds, 1), compared=index.compared,
              brute_force_ratio=round(brute_seconds / seconds_checked, 1), same=brute == ours)


def whole_filter(texts: list[str]) -> float:
  """Seconds of all filters of the stage, with 500 prompts held out."""
  screen = prompts.Filter(configs.get('m2').prompts, [], texts[:500])
  started = time.perf_counter()
  for text in texts[500:]:
    screen(text, 'eos')
  return round(time.perf_counter() - started, 1)


def main():
  rng = np.random.default_rng(0)
  texts, dense = make(COUNT, 0), [world.instruction(rng) for _ in range(COUNT)]
  rows = [row('zipf', texts, configs.get('m2').prompts.rouge),
          row('sandbox', dense, configs.get('m2', 'tiny').prompts.rouge)]
  found = dict(prompts=COUNT, checked=CHECKED, rows=rows, whole_filter_seconds=whole_filter(texts),
               machine=platform.processor() or platform.machine())
  print(f'{"prompts":>8} {"limit":>6} {"accepted":>9} {"seconds":>8} {"compared":>9} {"brute force":>12} {"same":>6}')
  for r in rows:
    print(f'{r["kind"]:>8} {r["limit"]:6} {r["accepted"]:9,} {r["seconds"]:8} {r["compared"]:9,} '
          f'{r["brute_force_ratio"]:10}x {r["same"]!s:>7}')
  print(f'all filters, 500 prompts held out, zipf: {found["whole_filter_seconds"]} s')
  print(json.dumps(found))


if __name__ == '__main__':
  main()
