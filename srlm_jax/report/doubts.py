"""Reasons to doubt a result, each computed from the files of the run."""
from collections.abc import Iterator
import dataclasses

from srlm_jax.report import estimates, external
from srlm_jax.report.differences import Difference
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import MEASURES
from srlm_jax.report.rounds import Round
from srlm_jax.reward import health

FEW = 100           # prompts, or questions; fewer give a doubt
FEW_SEEDS = 3
LONGER = 1.2        # ratio of the mean lengths of answers
INCONSISTENT = 0.3  # share of prompts on which the judge's verdict depends on the order
LOST = 0.1          # share of prompts without two verdicts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doubt:
  """`kind` names the rule, for tests and styles; `sentence` is for readers."""
  kind: str
  sentence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
  """What the doubts on a whole run depend on."""
  has_outside: bool             # a measure from outside compares the answers of two models
  judges: frozenset[str]        # who scored the candidates of the rounds
  has_control: bool             # a run with a random judge is shown beside it
  seeds: int
  is_sandbox: bool
  stopped: str = ''             # why the loop stopped early, or ''
  unfinished: tuple[str, ...] = ()  # OWNER/STAGE
  warnings: int = 0             # sentences of the health checks


def of_answers(deciding: Difference, all_of_step: list[Difference],
               rounds: list[Round]) -> Iterator[Doubt]:
  """Doubts on a difference between the answers of two models."""
  yield from _of_number(deciding)
  by_key = {d.measure: d for d in all_of_step}
  for other in all_of_step:
    if MEASURES[other.measure].better and other.change.sign * deciding.change.sign < 0:
      yield Doubt(kind='disagree', sentence=f'The {MEASURES[other.measure].title} says the '
                  f'opposite: {signed(other)}.')
  if (length := by_key.get('characters')) and length.theirs:
    if length.change.sign > 0 and length.ours > LONGER * length.theirs:
      yield Doubt(kind='longer', sentence=f'The answers grew from {length.theirs:,.0f} to '
                  f'{length.ours:,.0f} characters; judges tend to prefer long answers.')
  yield from _of_own_judge(deciding, rounds)
  for difference in all_of_step:
    if difference.file:
      yield from _of_verdicts(difference, by_key.get('characters'))


def of_judge(deciding: Difference, all_of_step: list[Difference],
             parsed: dict[str, Value | None]) -> Iterator[Doubt]:
  """Doubts on a difference between two judges; `parsed`: their parse rates, by model."""
  yield from _of_number(deciding)
  for model, rate in parsed.items():
    if rate and rate.value < health.PARSED:
      yield Doubt(kind='parse_rate', sentence=f'Only {rate.value:.0%} of the judgements of {model} '
                  f'have a score; replies without one count as errors.')
  both = {d.measure: d for d in all_of_step}.get('pairwise')
  if deciding.change.sign and (not both or both.change.sign != deciding.change.sign):
    what = (f'On the pairs that both models scored there is no such difference: {signed(both)}.'
            if both else 'No pair has scores of both models.')
    yield Doubt(kind='only_unscored', sentence=what)


def signed(difference: Difference) -> str:
  """The change with its interval and count.

  >>> change = Value(value=0.5, low=0.25, high=0.75, count=400)
  >>> signed(Difference(measure='oracle', model='m2', against='m1', change=change, ours=3.5,
  ...                   theirs=3.0, paired=True))
  '+0.50 [+0.25, +0.75] on 400 prompts'
  """
  change, digits = difference.change, MEASURES[difference.measure].digits
  text = f'{change.value:+.{digits}f}'
  if change.low is not None:
    text += f' [{change.low:+.{digits}f}, {change.high:+.{digits}f}]'
  if change.count is None:
    return text
  return f'{text} on {change.count:,} {change.of if change.count != 1 else change.of[:-1]}'


def of_run(run: Facts) -> Iterator[Doubt]:
  """Doubts on all results of a run, or of an arm of a study."""
  if not run.has_outside:
    yield Doubt(kind='no_outside', sentence='Nothing outside of the models measures their answers; '
                'compare them with srlm_jax.eval.head_to_head or AlpacaEval.')
  if run.judges & {'random'}:
    yield Doubt(kind='is_control', sentence='The scores of the candidates were drawn at random: '
                'this is the control, and no gain may come from its judge.')
  elif run.is_sandbox and not run.has_control:
    yield Doubt(kind='no_control', sentence='No run with a random judge (--ablation=random_judge) '
                'is shown beside it, so what training gives without a judge is not known.')
  if run.seeds == 1:
    yield Doubt(kind='one_seed', sentence='One seed: another training may differ by more than the '
                'intervals over prompts say; srlm_jax.study runs several.')
  if run.is_sandbox:
    yield Doubt(kind='sandbox', sentence='The task is the toy task of the sandbox, whose grades '
                'are exact; nothing follows for other tasks and models.')
  if run.stopped:
    yield Doubt(kind='stopped', sentence=f'The run stopped early: {run.stopped}.')
  if run.unfinished:
    yield Doubt(kind='unfinished', sentence=f'Not finished: {", ".join(run.unfinished)}.')
  if run.warnings:
    yield Doubt(kind='warnings', sentence=f'{run.warnings} of the health checks give warnings.')


def _of_number(deciding: Difference) -> Iterator[Doubt]:
  change = deciding.change
  few = FEW_SEEDS if change.of == 'seeds' else FEW
  if change.count is not None and change.count < few:
    yield Doubt(kind='few', sentence=f'Only {change.count} {change.of} were compared, fewer than '
                f'{few}.')
  if change.low is None:
    yield Doubt(kind='no_interval', sentence='The difference has no interval.')
  elif not change.sign:
    yield Doubt(kind='includes_zero', sentence=f'The interval includes 0, so the true '
                f'difference may be in either direction: {signed(deciding)}.')
  if not deciding.paired:
    yield Doubt(kind='not_paired', sentence='Only the means of both models are known, so the '
                'difference is not paired by prompt.')


def _of_own_judge(deciding: Difference, rounds: list[Round]) -> Iterator[Doubt]:
  """The judge's own mean rose from one round to the next, and the outside measure did not."""
  own = {r.writer: r for r in rounds if r.judge_mean and r.writer and r.judge == r.writer}
  ours, theirs = own.get(deciding.model), own.get(deciding.against)
  if not ours or not theirs:
    return
  rise = estimates.apart(ours.judge_mean, theirs.judge_mean)
  if rise and rise.sign > 0 and deciding.change.sign <= 0:
    yield Doubt(kind='only_own_judge', sentence=f'The scores that the models give their own '
                f'candidates rose from {theirs.judge_mean.value:.2f} to '
                f'{ours.judge_mean.value:.2f}, and the {MEASURES[deciding.measure].title} did '
                f'not: this looks like reward hacking.')


def _of_verdicts(difference: Difference, lengths: Difference | None) -> Iterator[Doubt]:
  """An outside judge contradicts itself, gave too few verdicts, or saw other answers."""
  file, judge = difference.file, difference.judge
  if file.inconsistent > INCONSISTENT * file.count:
    yield Doubt(kind='inconsistent', sentence=f'On {file.inconsistent:,} of {file.count:,} prompts '
                f'the verdict of {judge} depends on which answer it saw first.')
  every = file.left_out + file.count
  if file.left_out > LOST * every:
    yield Doubt(kind='left_out', sentence=f'{file.left_out:,} of {every:,} prompts are left out, '
                f'because {judge} gave no verdict on them.')
  if lengths and lengths.change.count != every:
    yield Doubt(kind='other_answers', sentence=f'{judge} compared answers to {every:,} prompts, '
                f'and the run has {lengths.change.count:,}.')
  elif lengths and not file.left_out:
    seen = [file.characters_a, file.characters_b]
    if external.model_name(file.a) != difference.model:
      seen.reverse()
    for model, was, now in zip((difference.model, difference.against), seen,
                               (lengths.ours, lengths.theirs), strict=True):
      if was is not None and abs(was - now) > 1e-6 * now:
        yield Doubt(kind='other_answers', sentence=f'The answers of {model} that {judge} compared '
                    f'have {was:,.1f} characters on average, those of the run {now:,.1f}: compare '
                    f'them again.')
