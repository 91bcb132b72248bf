"""Reasons to doubt a result, each computed from the files of the run."""
from collections.abc import Iterator
import dataclasses

from srlm_jax.report import estimates
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
OF_VERDICTS = ('inconsistent', 'left_out', 'other_answers')  # kinds of doubts on a file of a judge


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
    if MEASURES[other.measure].better and other.sign * deciding.sign < 0:
      yield Doubt(kind='disagree', sentence=f'Another measure says the opposite: {stated(other)}.')
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
  if deciding.sign and (not both or both.sign != deciding.sign):
    what = (f'On the pairs that both models scored there is no such difference: {stated(both)}.'
            if both else 'No pair has scores of both models.')
    yield Doubt(kind='only_unscored', sentence=what)


def stated(difference: Difference) -> str:
  """The difference, or the win rate, with its interval, what it measures and on how much.

  >>> change = Value(value=0.25, low=0.125, high=0.375, count=400)
  >>> def made(measure, **more):
  ...   return stated(Difference(measure=measure, model='m2', against='m1', change=change, ours=3.5,
  ...                            theirs=3.0, paired=True, **more))
  >>> made('oracle')
  '+0.25 [+0.12, +0.38] points in the oracle score, on 400 prompts'
  >>> made('head_to_head', judge='gpt')
  'win rate 0.750 [0.625, 0.875] head to head, judged by gpt, on 400 prompts'
  """
  change, measure = difference.change, MEASURES[difference.measure]
  is_rate = difference.measure == 'head_to_head'
  form = f'{"" if is_rate else "+"}.{measure.digits}f'
  def text(x: float) -> str:
    return format(x + 0.5 if is_rate else x, form)
  number = text(change.value)
  if change.low is not None and change.high is not None:
    number += f' [{text(change.low)}, {text(change.high)}]'
  on = '' if change.count is None else f', on {change.counted}'
  if is_rate:
    return f'win rate {number} head to head, judged by {difference.judge}{on}'
  unit = {'0 to 5': ' points', '1 to 10': ' points', 'percent': ' percentage points',
          'characters': ' characters', 'tokens': ' tokens'}.get(measure.unit, '')
  the = 'the ' if measure.title[0].islower() else ''
  share = 'share of ' if measure.unit == 'share' else ''
  return f'{number}{unit} in {the}{share}{measure.title}{on}'


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
                'is on this page, so what training gives without a judge is not known.')
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
    yield Doubt(kind='warnings', sentence=f'The health checks give {run.warnings} warnings.')


def _of_number(deciding: Difference) -> Iterator[Doubt]:
  change = deciding.change
  few = FEW_SEEDS if change.of == 'seeds' else FEW
  if change.count is not None and change.count < few:
    yield Doubt(kind='few', sentence=f'Only {change.counted} were compared, fewer than {few}.')
  if not deciding.sign:
    why = (f'The sign test has p = {deciding.file.p_value:.2g}' if deciding.is_chance and
           change.sign and deciding.file.p_value is not None else 'The interval includes '
           f'{"one half" if deciding.measure == "head_to_head" else 0}')
    yield Doubt(kind='includes_zero', sentence=f'{why}, so the true difference may be in either '
                f'direction: {stated(deciding)}.')
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
  if rise and rise.sign > 0 and deciding.sign <= 0:
    yield Doubt(kind='only_own_judge', sentence=f'The scores that the models give their own '
                f'candidates rose from {theirs.judge_mean.value:.2f} ({theirs.writer}) to '
                f'{ours.judge_mean.value:.2f} ({ours.writer}), and the '
                f'{MEASURES[deciding.measure].title} did not: this looks like reward hacking.')


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
    if file.a != difference.model:
      seen.reverse()
    for model, was, now in zip((difference.model, difference.against), seen,
                               (lengths.ours, lengths.theirs), strict=True):
      if was is not None and abs(was - now) > 1e-6 * now:
        yield Doubt(kind='other_answers', sentence=f'The answers of {model} that {judge} compared '
                    f'have {was:,.1f} characters on average, those of the run {now:,.1f}: compare '
                    f'them again.')
