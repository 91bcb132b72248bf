"""Time of the ROUGE-L filter on 20,000 prompts, and its speed-up over brute force.

`python bench/prompts.py` filters two sets of prompts as the stage does, on one core. Each prompt is
compared with all prompts accepted before it.

  zipf     random words with the frequencies of English (Zipf); every second prompt is an earlier
           one with some words changed
  sandbox  instructions of the sandbox, which all resemble one another

It prints the seconds for all prompts, the number of pairs (of 200 million) that were compared word
for word, and, for the first 400 prompts, the speed-up over rouge-score against every prompt (brute
force) and whether both accept the same prompts. The last line is the same as JSON.
"""
import json
import platform
import time

import numpy as np

from srlm_jax import config as configs
from srlm_jax.data import similar
from srlm_jax.sample import prompts
from srlm_jax.sandbox import world

COUNT = 20_000
CHECKED = 400          # prompts that brute force filters too
VOCABULARY = 20_000    # words
CHANGED = (0.1, 0.6)   # range of the fraction of words that differ from the earlier prompt
HELD_OUT = 500


def make(count: int, seed: int) -> list[str]:
  """-> prompts of 4 to 60 words; word i has probability proportional to 1 / (i + 3)."""
  rng = np.random.default_rng(seed)
  words = np.asarray([f'w{i}' for i in range(VOCABULARY)])
  frequency = 1 / (np.arange(VOCABULARY) + 3)
  frequency /= frequency.sum()
  made = []
  for i in range(count):
    if i and i % 2:
      text = made[rng.integers(i)].copy()
      changed = rng.random(len(text)) < rng.uniform(*CHANGED)
      text[changed] = rng.choice(words, changed.sum(), p=frequency)
    else:
      length = int(np.clip(rng.lognormal(2.8, 0.6), 4, 60))
      text = rng.choice(words, length, p=frequency)
    made.append(text)
  return [' '.join(text) for text in made]


class BruteForce:
  """The interface of `similar.Index`, by rouge-score against every text."""

  def __init__(self):
    self.texts = []

  def add(self, text):
    self.texts.append(similar.tokens(text))

  def find(self, text, limit):
    words = similar.tokens(text)
    return next((known for known in self.texts if similar.rouge_l(known, words) > limit), None)


def accepted(index, texts: list[str], limit: float) -> tuple[list[str], float]:
  """-> the texts that the filter accepts, and the seconds it took."""
  started, kept = time.perf_counter(), []
  for text in texts:
    if index.find(text, limit) is None:
      index.add(text)
      kept.append(text)
  return kept, time.perf_counter() - started


def measure(name: str, texts: list[str], limit: float) -> dict:
  """-> the result for one set of prompts."""
  brute, brute_seconds = accepted(BruteForce(), texts[:CHECKED], limit)
  ours, seconds_checked = accepted(similar.Index(), texts[:CHECKED], limit)
  index = similar.Index()
  kept, seconds = accepted(index, texts, limit)
  return dict(kind=name, limit=limit, accepted=len(kept), seconds=round(seconds, 1),
              compared=index.compared, same=brute == ours,
              brute_force_ratio=round(brute_seconds / seconds_checked, 1))


def whole_filter(texts: list[str]) -> float:
  """-> seconds of all filters of the stage, with the first prompts held out."""
  screen = prompts.Filter(configs.get('m2').prompts, [], texts[:HELD_OUT])
  started = time.perf_counter()
  for text in texts[HELD_OUT:]:
    screen(text, 'eos')
  return round(time.perf_counter() - started, 1)


def main():
  rng = np.random.default_rng(0)
  zipf, sandbox = make(COUNT, 0), [world.instruction(rng) for _ in range(COUNT)]
  rows = [measure('zipf', zipf, configs.get('m2').prompts.rouge),
          measure('sandbox', sandbox, configs.get('m2', 'tiny').prompts.rouge)]
  found = dict(prompts=COUNT, checked=CHECKED, rows=rows, whole_filter_seconds=whole_filter(zipf),
               machine=platform.processor() or platform.machine())
  print(f'{"prompts":>8} {"limit":>6} {"accepted":>9} {"seconds":>8} {"compared":>9} '
        f'{"speed-up":>9} {"same":>6}')
  for r in rows:
    print(f'{r["kind"]:>8} {r["limit"]:6} {r["accepted"]:9,} {r["seconds"]:8} {r["compared"]:9,} '
          f'{r["brute_force_ratio"]:8}x {r["same"]!s:>6}')
  print(f'all filters, {HELD_OUT} prompts held out, zipf: {found["whole_filter_seconds"]} s')
  print(json.dumps(found))


if __name__ == '__main__':
  main()
