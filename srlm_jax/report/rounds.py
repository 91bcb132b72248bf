"""The data that each model was trained on: who wrote and judged it, its yields and its scores."""
from collections import Counter
import dataclasses
import functools

from etils import epath
import numpy as np

from srlm_jax import schema
from srlm_jax.config import MODELS
from srlm_jax.report import estimates, keyed, measures, results, samples, summaries, tallies
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import Lengths
from srlm_jax.reward import health

STAGES = ('prompts', 'respond', 'judge', 'pairs')  # they make a round's training data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yield:
  """A bar of the funnel: what is left, and what was lost on the way to it."""
  label: str
  count: int
  lost: dict[str, int] = dataclasses.field(default_factory=dict)  # reason: count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
  """The data of one iteration. None or empty: the run does not have it."""
  model: str                      # trained on this data
  writer: str                     # the model that wrote the responses; '' if not known
  judge: str                      # the model or program that scored them; '' if not known
  funnel: tuple[Yield, ...]       # prompts wanted, attempts, accepted, .. pairs
  scale: tuple[float, float] | None        # lowest and highest score of the judge
  judge_mean: Value | None        # mean score of a candidate, by its judge
  oracle_mean: Value | None       # mean oracle score of the same candidates (sandbox)
  judge_scores: dict[str, int]    # histogram of the judgements' scores
  oracle_scores: dict[str, int]   # histogram of the candidates' oracle scores (sandbox)
  right: Value | None             # share of pairs whose chosen response the oracle prefers
  wrong: Value | None             # share of pairs whose rejected response the oracle prefers
  parsed: Value | None            # share of judgements with a score
  characters: Lengths | None      # of the candidates
  tokens: Lengths | None
  chosen: Lengths | None          # in characters
  rejected: Lengths | None
  pairs: schema.PairsSummary | None
  warnings: tuple[str, ...]       # of the health checks


@dataclasses.dataclass
class Data:
  """What is kept of the records of a round, and the summaries of its finished stages."""
  model: str
  stages: dict[str, summaries.Started]
  attempts: Counter                # {reason why it was rejected, '' if accepted: attempts}
  responses: tallies.Responses
  judgements: tallies.Judgements
  pairs: tallies.Pairs
  texts: samples.OfRound

  def summary(self, stage: str):
    """The summary of a stage; None if it has not finished."""
    return self.stages[stage].summary if stage in self.stages else None

  @property
  def quorum(self) -> int | None:
    """Judgements that a score needs; None if no stage that has started says it."""
    found = [stage.config.judge_quorum for stage in self.stages.values()]
    return next((quorum for quorum in found if quorum), None)

  @functools.cached_property
  def scores(self) -> np.ndarray:
    """A table of the judged responses and their scores; empty if the quorum is not known."""
    return self.judgements.by_response(self.quorum)[:None if self.quorum else 0]

  @property
  def samples(self) -> samples.Samples:
    return self.texts.made(self.model, self.responses.health.prompts, self.quorum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Audit:
  """audit.json: what is shown of it."""
  judged: schema.Count = 0
  prompts: schema.Count | None = None
  pairs: schema.Count = 0
  right: schema.Share | None = None
  wrong: schema.Share | None = None
  judge_mean: schema.Number | None = None
  oracle_mean: schema.Number | None = None
  intervals: dict[str, tuple[schema.Number, schema.Number] | None] = dataclasses.field(
      default_factory=dict)
  oracle_histogram: dict[str, schema.Count] = dataclasses.field(default_factory=dict)


def read(workdir, model: str, stages: dict[str, summaries.Started]) -> Data | None:
  """The data that a model was trained on, from its folder; None without any of STAGES.

  stages: those of the model that have started.
  """
  if not any(name in stages for name in STAGES):
    return None
  folder, texts = epath.Path(workdir) / model, samples.OfRound()
  return Data(
      model=model, stages=stages, texts=texts,
      attempts=Counter(a.reason for a in results.each(
          folder / 'prompts' / 'attempts.jsonl', schema.Attempt)),
      responses=tallies.responses(texts.responses(results.shards(
          folder / 'respond', 'responses', schema.Response))),
      judgements=tallies.judgements(texts.judgements(results.shards(
          folder / 'judge', 'judgements', schema.Judgement))),
      pairs=tallies.pairs(texts.pairs(results.each(
          folder / 'pairs' / 'pairs.jsonl', schema.Pair))))


def of(data: Data, workdir, params: dict[str, str]) -> Round:
  """The numbers of a round. params: {hash of parameters: model} of the run's models."""
  judge, pairs = data.summary('judge'), data.summary('pairs')
  audit = results.read(epath.Path(workdir) / data.model / 'audit' / 'audit.json', _Audit) or (
      _Audit())
  def known(stage: str) -> str:
    return params.get(data.stages[stage].params, '') if stage in data.stages else ''
  parsed = data.judgements.by_prompt()
  by = data.stages['judge'].config.judge_by if 'judge' in data.stages else ''
  return Round(
      model=data.model, writer=known('respond'),
      judge=by if by not in ('', 'model') else known('judge'),
      funnel=tuple(funnel(data)), scale=(judge.lowest, judge.highest) if judge else None,
      judge_mean=_audited(audit, 'judge_mean') or _judge_mean(data), parsed=estimates.share_of(
          parsed['parsed'], parsed['judgements']),
      oracle_mean=_audited(audit, 'oracle_mean'),
      judge_scores=histogram(data), oracle_scores=audit.oracle_histogram,
      right=_share(audit.right, audit.pairs), wrong=_share(audit.wrong, audit.pairs),
      characters=measures.lengths(data.responses.rows['characters']),
      tokens=measures.lengths(data.responses.rows['tokens']),
      chosen=measures.lengths(data.pairs.rows['chosen']),
      rejected=measures.lengths(data.pairs.rows['rejected']),
      pairs=pairs, warnings=tuple(warnings(data)))


def funnel(data: Data) -> list[Yield]:
  """What each stage of a round made, from the wanted prompts to the pairs, or the EFT examples.

  Stages that have not started are left out; an unfinished one is counted from its records.
  """
  made = []
  if 'prompts' in data.stages:
    made += _prompts(data)
  if data.responses:
    finish = data.responses.health.finish
    made += [Yield(label='responses', count=finish.total()),
             Yield(label='finished responses', count=finish[schema.EOS], lost=_positive({
                 'cut at the length limit': finish[schema.CUT],
                 'prompt too long': finish[schema.TOO_LONG]}))]
  if data.judgements:
    unparsed, count = data.judgements.health.unparsed, len(data.judgements)
    made += [Yield(label='judgements', count=count),
             Yield(label='parsed judgements', count=count - unparsed.total(), lost=dict(unparsed))]
  if data.responses and len(data.scores):
    lost = int(np.isnan(data.scores['score']).sum())
    made.append(Yield(label='scored candidates', count=len(data.scores) - lost, lost=_positive({
        f'fewer than {data.quorum} scores': lost})))
  if pairs := data.summary('pairs'):
    kind = 'positives' if pairs.positives else 'pairs'
    made.append(Yield(label=kind, count=getattr(pairs, kind), lost=pairs.dropped))
  if eft := data.summary('eft'):
    made.append(Yield(label='EFT examples', count=eft.examples, lost=eft.dropped))
  return made


def _prompts(data: Data) -> list[Yield]:
  """The wanted prompts, the attempts at them and the accepted ones."""
  stage = data.stages['prompts']
  if summary := stage.summary:
    wanted, attempts, accepted = summary.wanted, summary.attempts, summary.prompts
    dropped = summary.dropped
  else:
    dropped, wanted = data.attempts.copy(), stage.config.prompts_count
    attempts, accepted = dropped.total(), dropped.pop('', 0)
  made = [] if wanted is None else [Yield(label='prompts wanted', count=wanted)]
  return [*made, Yield(label='attempts', count=attempts),
          Yield(label='accepted prompts', count=accepted, lost=dict(dropped))]


def histogram(data: Data) -> dict[str, int]:
  """{whole score: count}, from the lowest to the highest score of the judge's scale if known."""
  found, judge = data.judgements.health.histogram, data.summary('judge')
  if not judge or not found or judge.highest - judge.lowest > 10:
    return found
  scale = range(round(judge.lowest), round(judge.highest) + 1)
  return {str(score): found.get(str(score), 0) for score in scale}


def warnings(data: Data) -> list[str]:
  """A sentence for each statistic of the data that indicates a known failure."""
  model, ties = data.model, health.Ties()
  found = data.judgements.health.warnings(f'{model}/judge')
  found += data.responses.health.warnings(f'{model}/respond')
  for means in keyed.groups(*_scored(data)):
    ties.add(means.tolist())
  found += ties.warnings(f'{model}/judge')
  if (pairs := data.summary('pairs')) and not pairs.positives:
    found += data.pairs.health.warnings(f'{model}/pairs', pairs.prompts)
  return found


def names(stages: dict[tuple[str, str], summaries.Started]) -> dict[str, str]:
  """{(model, stage)} that have started -> {hash of parameters: model}.

  The parameters are those with which training ended, and those of the checkpoint that is evaluated.
  """
  trained = {stage.summary.params: model for (model, part), stage in stages.items()
             if part == 'model' and stage.summary}
  chosen = {stage.params: model for (model, part), stage in stages.items()
            if part in ('answers', 'judge_eval')}
  return {params: model for params, model in (trained | chosen).items() if params}


def is_control(workdir) -> bool:
  """Whether the candidates of a run were scored at random."""
  folder = epath.Path(workdir)
  stages = [summaries.started(folder / model / 'judge') for model in MODELS]
  return any(stage.config.judge_by == 'random' for stage in stages if stage)


def _judge_mean(data: Data) -> Value | None:
  """The mean over the candidates that have a score."""
  return estimates.mean_of(*keyed.totals(*_scored(data)))


def _scored(data: Data) -> tuple[np.ndarray, np.ndarray]:
  """The prompt ids and the scores of the candidates that have a score.

  A judged response that is not there, as in an unfinished run, is a prompt of its own.
  """
  scored = data.scores[~np.isnan(data.scores['score'])]
  responses = keyed.distinct(data.responses.rows)
  place, prompts = keyed.find(responses['id'], scored['id']), scored['id'].copy()
  prompts[place >= 0] = responses['prompt_id'][place[place >= 0]]
  return prompts, scored['score']


def _audited(audit: _Audit, name: str) -> Value | None:
  """A mean of the candidates that both the judge and the oracle scored."""
  if (value := getattr(audit, name)) is None:
    return None
  low, high = audit.intervals.get(name) or (None, None)
  if audit.prompts is None:
    return Value(value=value, count=audit.judged, of='candidates')
  return Value(value=value, low=low, high=high, count=audit.prompts)


def _share(value: float | None, pairs: int) -> Value | None:
  """A share of pairs, of which every prompt gives at most one, with its interval."""
  if value is None or not pairs:
    return None
  return Value(value=value, count=pairs, of='pairs', **estimates.wilson(value, pairs))


def _positive(counts: dict[str, int]) -> dict[str, int]:
  return {reason: n for reason, n in counts.items() if n}
