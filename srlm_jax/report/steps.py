"""Did a model get better than another one of the run, and can the answer be believed?

The differences are paired by prompt where the records allow it. A verdict needs a measure from
outside: the sandbox's oracle, an outside judge, or the ranks of people. The scores that the models
give themselves decide nothing.
"""
from collections.abc import Iterable
import dataclasses
import itertools
from typing import Literal

from srlm_jax import records, schema
from srlm_jax.report import doubts, estimates, external, measures
from srlm_jax.report.doubts import Doubt
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import MEASURES, Evaluated

BETTER, WORSE, SAME, UNMEASURED = 'better', 'worse', 'no difference seen', 'not measured'
Verdict = Literal['better', 'worse', 'no difference seen', 'not measured']
# The measures that decide a verdict: the first one that exists.
DECIDING = dict(answers=('oracle', 'head_to_head', 'alpaca_controlled', 'alpaca'),
                judge=('pairwise_all',))
SHOWN = dict(answers=(*DECIDING['answers'], 'mt_bench', 'characters', 'tokens'),
             judge=('pairwise_all', 'pairwise', 'oracle_pairwise', 'parsed'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """A measure of a model minus that of another one."""
  measure: str           # key of measures.MEASURES
  model: str
  against: str
  change: Value          # for head_to_head: the win rate minus one half
  ours: float | None     # the two values on the same prompts
  theirs: float | None
  paired: bool           # by prompt; else the models are taken as measured on different prompts
  judge: str = ''        # name of the outside judge, if the file has it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """A model compared with an earlier one: its answers, or its judgements."""
  model: str
  against: str
  about: Literal['answers', 'judge']
  verdict: Verdict
  sentence: str                        # the verdict with its number, interval and count
  decided_by: str                      # key of measures.MEASURES; '' if not measured
  differences: tuple[Difference, ...]  # the deciding one first
  doubts: tuple[Doubt, ...]            # of this step alone; those of the run are in Run.doubts


@dataclasses.dataclass(frozen=True, kw_only=True)
class WinTieLoss:
  """On how many prompts the answer of a was better than, as good as, or worse than that of b."""
  a: str
  b: str
  by: str               # 'oracle', or the name of the judge
  count: int
  wins: int
  ties: int
  losses: int
  rate: Value           # win rate, 0 to 1: ties count half
  source: str = ''      # file in WORKDIR/eval, for an outside judge
  details: external.HeadToHead | None = None


def pairs(models: list[str]) -> list[tuple[str, str]]:
  """(model, against): consecutive models, then each later one against the SFT baseline.

  >>> pairs(['sft', 'm1', 'm2'])
  [('m1', 'sft'), ('m2', 'm1'), ('m2', 'sft')]
  """
  steps = [(model, before) for before, model in itertools.pairwise(models)]
  if 'sft' in models:
    later = models[models.index('sft') + 1:]
    steps += [(model, 'sft') for model in later if (model, 'sft') not in steps]
  return steps
