"""Did a model get better than an earlier one of the run, and can the answer be believed?

A verdict needs a measure from outside: the sandbox's oracle, an outside judge, or the ranks of
people. The scores that the models give themselves decide nothing.
"""
from collections.abc import Iterable, Sequence
import dataclasses
import itertools
from typing import Literal

from srlm_jax.report import doubts
from srlm_jax.report.differences import Difference
from srlm_jax.report.doubts import Doubt
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import MEASURES
from srlm_jax.report.rounds import Round

BETTER, WORSE, SAME, UNMEASURED = 'better', 'worse', 'no difference seen', 'not measured'
# The measures that decide a verdict: the first one that exists. All have an interval.
DECIDING = dict(answers=('oracle', 'head_to_head', 'alpaca_controlled', 'alpaca'),
                judge=('pairwise_all',))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """A model compared with an earlier one: its answers, or its judgements."""
  model: str
  against: str
  about: Literal['answers', 'judge']
  verdict: Literal['better', 'worse', 'no difference seen', 'not measured']
  sentence: str                        # the verdict with its number, interval and count
  decided_by: str                      # key of measures.MEASURES; '' if not measured
  differences: tuple[Difference, ...]  # those in the deciding measure first
  doubts: tuple[Doubt, ...]            # of this step alone; those of the run are in Run.doubts


def pairs(models: Sequence[str]) -> list[tuple[str, str]]:
  """(model, against): consecutive models, then each later one against the SFT baseline.

  >>> pairs(['sft', 'm1', 'm2'])
  [('m1', 'sft'), ('m2', 'm1'), ('m2', 'sft')]
  """
  steps = [(model, before) for before, model in itertools.pairwise(models)]
  if 'sft' in models:
    later = models[models.index('sft') + 1:]
    steps += [(model, 'sft') for model in later if (model, 'sft') not in steps]
  return steps


def of_models(models: Sequence[str], made: dict[tuple[str, str], list[Difference]],
              values: dict[str, dict[str, Value]], rounds: list[Round]) -> list[Step]:
  """The steps between models, in order; about answers and about judging.

  made: {(model, against): their differences} of `pairs`; values: see measures.of_model. M0 is left
  out where nothing compares it: a run need not evaluate it.
  """
  steps = []
  for model, against in pairs(models):
    for about in DECIDING:
      own = [d for d in made.get((model, against), ()) if MEASURES[d.measure].about == about]
      if own or against != 'm0':
        parsed = {name: values.get(name, {}).get('parsed') for name in (model, against)}
        steps.append(_step(model, against, about, own, parsed, rounds))
  return steps


def deciding(steps: Iterable[Step]) -> Step | None:
  """The step that the answer is about: the answers of the last model, if possible against SFT."""
  about = [step for step in steps if step.about == 'answers']
  return next((step for step in reversed(about) if step.against == 'sft'),
              about[-1] if about else None)


def doubts_of(steps: Iterable[Step]) -> tuple[Doubt, ...]:
  """The doubts on the answer: those on its step, and what the other steps say against it."""
  steps = list(steps)
  if not (last := deciding(steps)):
    return ()
  found = list(last.doubts)
  for step in steps:
    if step.about == 'answers' and step is not last:
      if step.verdict == WORSE:
        found.append(Doubt(kind='worse_between', sentence=step.sentence))
      found += [doubt for doubt in step.doubts if doubt.kind == 'only_own_judge']
  return tuple(dict.fromkeys(found))


def answer(steps: Iterable[Step]) -> str:
  """Did the run get better? One sentence on the answers of the last model."""
  if not (last := deciding(steps)):
    return 'There are no two models to compare.'
  start = {BETTER: 'Yes', WORSE: 'No', SAME: 'Not that one can see', UNMEASURED: 'Not known'}
  return f'{start[last.verdict]}: {last.sentence}'


def _step(model: str, against: str, about: str, own: list[Difference],
          parsed: dict[str, Value | None], rounds: list[Round]) -> Step:
  keys = DECIDING[about]
  able = sorted((d for d in own if d.measure in keys and not d.undecided),
                key=lambda d: (keys.index(d.measure), d.judge))
  if not able:
    return Step(model=model, against=against, about=about, verdict=UNMEASURED, decided_by='',
                sentence=_unmeasured(model, against, about, own), differences=tuple(own), doubts=())
  # Several outside judges decide only if they agree.
  first = [d for d in able if d.measure == able[0].measure]
  signs = {d.sign for d in first}
  verdict = {1: BETTER, -1: WORSE, 0: SAME}[first[0].sign if len(signs) == 1 else 0]
  made = (doubts.of_answers(first[0], own, rounds) if about == 'answers' else
          doubts.of_judge(first[0], own, parsed))
  return Step(model=model, against=against, about=about, verdict=verdict,
              sentence=_sentence(first, verdict, about), decided_by=first[0].measure,
              differences=(*first, *(d for d in own if d not in first)), doubts=tuple(made))


def _sentence(first: list[Difference], verdict: str, about: str) -> str:
  """`first`: the differences in the measure that decides."""
  verb = 'answers' if about == 'answers' else 'judges'
  model, against = first[0].model, first[0].against
  what = (f'{model} {verb} {verdict} than {against}' if verdict != SAME else
          f'{model} {verb} neither better nor worse than {against}')
  if len({d.sign for d in first}) > 1:
    what += ', because the outside judges disagree'
  return f'{what}: {"; ".join(map(doubts.stated, first))}.'


def _unmeasured(model: str, against: str, about: str, own: list[Difference]) -> str:
  if without := [d for d in own if d.measure in DECIDING[about]]:
    return (f'{model} against {against}: {doubts.stated(without[0])}; {without[0].undecided}.')
  if about == 'judge':
    return f'No ranks of people compare {model} with {against} as judges.'
  return (f'No outside measure compares the answers of {model} and {against}; the scores that '
          f'models give themselves do not show an improvement.')
