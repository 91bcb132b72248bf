"""The measures of a model: what each one is, and its values with intervals and counts."""
from collections.abc import Sequence
import dataclasses
import statistics
from typing import Literal

from etils import epath
import numpy as np

from srlm_jax import schema
from srlm_jax.report import estimates, external, results, samples, summaries, tallies
from srlm_jax.report.estimates import Value

Source = Literal['oracle', 'people', 'outside judge', 'benchmark', 'own judge', 'count']


@dataclasses.dataclass(frozen=True)
class Measure:
  """What a number is. `source` is who measures: `own judge` alone never shows an improvement."""
  title: str
  unit: str               # '0 to 5', 'share', 'percent', 'correlation', 'characters', 'tokens', ..
  source: Source
  about: Literal['answers', 'judge']
  better: Literal[1, 0, -1]  # 1: higher is better; 0: says nothing about quality
  digits: int


MEASURES = dict(
    oracle=Measure('oracle score', '0 to 5', 'oracle', 'answers', 1, 2),
    greedy=Measure('oracle score, greedy answers', '0 to 5', 'oracle', 'answers', 1, 2),
    head_to_head=Measure('win rate, head to head', 'share', 'outside judge', 'answers', 1, 3),
    alpaca_controlled=Measure('AlpacaEval 2, length-controlled win rate', 'percent',
                              'outside judge', 'answers', 1, 2),
    alpaca=Measure('AlpacaEval 2, win rate', 'percent', 'outside judge', 'answers', 1, 2),
    mt_bench=Measure('MT-Bench', '1 to 10', 'outside judge', 'answers', 1, 2),
    characters=Measure('length of an answer', 'characters', 'count', 'answers', 0, 1),
    tokens=Measure('length of an answer', 'tokens', 'count', 'answers', 0, 1),
    finished=Measure('answers that end', 'share', 'count', 'answers', 0, 3),
    pairwise=Measure('pairs ordered as people did', 'share', 'people', 'judge', 1, 3),
    pairwise_all=Measure('pairs ordered as people did, unscored ones as errors', 'share',
                         'people', 'judge', 1, 3),
    five_best=Measure('replies scored highest that people ranked first', 'share', 'people',
                      'judge', 1, 3),
    exact_match=Measure('prompts ordered exactly as people did', 'share', 'people', 'judge', 1, 3),
    spearman=Measure('Spearman correlation with people', 'correlation', 'people', 'judge', 1, 3),
    kendall_tau=Measure('Kendall tau with people', 'correlation', 'people', 'judge', 1, 3),
    ties=Measure('pairs with equal scores', 'share', 'own judge', 'judge', 0, 3),
    parsed=Measure('judgements with a score', 'share', 'count', 'judge', 0, 3),
    oracle_pairwise=Measure('pairs ordered as the oracle does', 'share', 'oracle', 'judge', 1, 3),
    oracle_pairwise_all=Measure('pairs ordered as the oracle does, unscored ones as errors',
                                'share', 'oracle', 'judge', 1, 3),
    oracle_ties=Measure('pairs graded apart with equal scores', 'share', 'oracle', 'judge', 0, 3),
    oracle_exact=Measure('scores equal to the oracle\'s', 'share', 'oracle', 'judge', 1, 3),
    ceiling=Measure('pairs that the oracle orders as people did', 'share', 'oracle', 'judge', 0,
                    3))
# Keys of agreement.json -> the key of its count there, and what that counts.
_AGREEMENT = dict(
    pairwise=('pairwise_accuracy', 'pairs', 'pairs'),
    pairwise_all=('pairwise_accuracy_all', 'pairs_all', 'pairs'),
    ties=('ties', 'pairs', 'pairs'), five_best=('five_best', 'fives', 'replies'),
    exact_match=('exact_match', 'prompts', 'prompts'),
    spearman=('spearman', 'prompts', 'prompts'),
    kendall_tau=('kendall_tau', 'prompts', 'prompts'))
_ORACLE = dict(
    oracle_pairwise=('judge_pairwise', 'judge_pairs', 'pairs'),
    oracle_pairwise_all=('judge_pairwise_all', 'judge_pairs_all', 'pairs'),
    oracle_ties=('judge_ties', 'judge_pairs', 'pairs'),
    oracle_exact=('judge_exact', 'judge_replies', 'replies'),
    ceiling=('ceiling', 'ceiling_pairs', 'pairs'))


def _kind(keys: dict, *more: str) -> type:
  """A dataclass of the numbers of a JSON file, all of which may be absent, and their intervals."""
  names = dict.fromkeys([*more, *(key for row in keys.values() for key in row[:2])])
  return dataclasses.make_dataclass('Numbers', [
      *((name, schema.Number | None, None) for name in names),
      ('intervals', dict[str, tuple[schema.Number, schema.Number] | None], dataclasses.field(
          default_factory=dict))])


_AGREEMENT_FILE = _kind(_AGREEMENT, 'parse_rate')
_ORACLE_FILE = _kind(_ORACLE, 'score', 'standard_error', 'prompts', 'greedy',
                     'greedy_standard_error', 'characters', 'finished')


@dataclasses.dataclass
class Evaluated:
  """What is kept of the records of a model's evaluation; empty where the run does not have them.

  The tables are those of `keyed`, and distinct.
  """
  model: str
  folder: epath.Path
  answers: tallies.Responses        # to the held-out prompts; the ids are those of the prompts
  graded: np.ndarray                # oracle scores of these answers: prompt id, score
  replies: np.ndarray               # the judged ranked replies: id, score; NaN without one
  parsed: np.ndarray                # of the prompts of these replies: id, judgements, parsed ones
  quorum: int | None                # judgements that a score needs; None: not known
  warnings: tuple[str, ...] = ()    # of the health checks
  texts: samples.OfAnswers = dataclasses.field(default_factory=samples.OfAnswers)


def read(workdir, model: str) -> Evaluated:
  """The evaluation of a model, as far as it exists."""
  folder, texts = epath.Path(workdir) / model, samples.OfAnswers()
  started = summaries.started(folder / 'agreement')
  quorum = started.config.eval_quorum if started else None
  answers = tallies.answers(texts.answers(results.shards(
      folder / 'answers', 'responses', schema.Response)))
  judged = tallies.judgements(results.shards(
      folder / 'judge_eval', 'judgements', schema.Judgement))
  return Evaluated(
      model=model, folder=folder, answers=answers, graded=results.graded(folder), texts=texts,
      quorum=quorum, replies=judged.by_response(quorum), parsed=judged.by_prompt(),
      warnings=(
          *judged.health.warnings(f'{model}/judge_eval'),
          *answers.health.warnings(f'{model}/answers')))


def of_model(found: Evaluated, outside: external.External) -> dict[str, Value]:
  """{key of MEASURES: value} of the measures that exist."""
  made, answers = _of_files(found), found.answers.rows
  ones = np.ones(len(answers))
  made |= dict(
      oracle=_mean(found.graded['score']) or made.get('oracle'),
      characters=_mean(answers['characters']) or made.get('characters'),
      tokens=_mean(answers['tokens']),
      finished=estimates.share_of(found.answers.finished, ones),
      parsed=estimates.share_of(found.parsed['parsed'], found.parsed['judgements']) or made.get(
          'parsed'))
  made |= outside.of_model(found.model)
  return {key: value for key in MEASURES if (value := made.get(key)) is not None}


def _mean(values: np.ndarray) -> Value | None:
  """The mean of a number per prompt."""
  return estimates.mean_of(values, np.ones(len(values)))


def _of_files(found: Evaluated) -> dict[str, Value | None]:
  """The measures in agreement.json and oracle.json."""
  made = {}
  if file := results.read(found.folder / 'agreement' / 'agreement.json', _AGREEMENT_FILE):
    made |= _named(file, _AGREEMENT)
    if file.parse_rate is not None:
      made['parsed'] = Value(value=file.parse_rate, of='judgements')
  if file := results.read(found.folder / 'oracle' / 'oracle.json', _ORACLE_FILE):
    made |= _named(file, _ORACLE)
    count = None if file.prompts is None else int(file.prompts)
    made |= dict(oracle=_with_error(file.score, file.standard_error, count),
                 greedy=_with_error(file.greedy, file.greedy_standard_error, count),
                 characters=_with_error(file.characters, None, count))
  return made


def _with_error(value, error, count) -> Value | None:
  if value is None:
    return None
  return Value(value=value, count=count) if error is None or count is None else (
      estimates.around(value, error, count))


def _named(file, keys: dict[str, tuple[str, str, str]]) -> dict[str, Value | None]:
  """The numbers of a file that has intervals and counts."""
  made = {}
  for key, (name, counted, of) in keys.items():
    value, count = getattr(file, name), getattr(file, counted)
    low, high = file.intervals.get(name) or (None, None)
    made[key] = None if value is None else Value(
        value=value, low=low, high=high, count=None if count is None else int(count), of=of)
  return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
  """The lengths of texts: number of texts, mean, and quantiles."""
  count: int
  mean: float
  low: float     # 5 % of the texts are shorter
  quarter: float
  median: float
  three_quarters: float
  high: float    # 95 % of the texts are shorter
  most: float


def lengths(values: Sequence[int] | np.ndarray) -> Lengths | None:
  """Lengths in characters or tokens -> their mean and quantiles; None without any.

  A quantile is the value with linear interpolation between neighbours (numpy's default).

  >>> lengths([1, 2, 3, 4, 5]).quarter
  2.0
  """
  if not len(values):
    return None
  low, quarter, median, three_quarters, high, most = np.quantile(
      values, (0.05, 0.25, 0.5, 0.75, 0.95, 1)).tolist()
  return Lengths(count=len(values), mean=statistics.fmean(values), low=low, quarter=quarter,
                 median=median, three_quarters=three_quarters, high=high, most=most)
