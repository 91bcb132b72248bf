"""The data that each model was trained on: who wrote and judged it, its yields and its scores."""
from collections import Counter
from collections.abc import Iterable
import dataclasses
import functools

from etils import epath

from srlm_jax import records, schema
from srlm_jax.config import MODELS
from srlm_jax.report import estimates, measures, results, summaries
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import Lengths
from srlm_jax.reward import health, scores as scoring

PROMPTS = 40  # with all their texts in the samples, per round and of the held-out ones
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
  """The records of a round, as far as they exist, and the summaries of its finished stages."""
  model: str
  stages: dict[str, summaries.Started]
  attempts: list[schema.Attempt]
  responses: list[schema.Response]
  judgements: list[schema.Judgement]   # texts only of the prompts of `first`
  pairs: list[schema.Pair]
  positives: list[schema.Positive]

  def summary(self, stage: str):
    """The summary of a stage; None if it has not finished."""
    return self.stages[stage].summary if stage in self.stages else None

  @property
  def quorum(self) -> int | None:
    """Judgements that a score needs; None if no stage that has started says it."""
    found = [stage.config.judge_quorum for stage in self.stages.values()]
    return next((quorum for quorum in found if quorum), None)

  @functools.cached_property
  def scores(self) -> dict[str, scoring.Score]:
    """{response id: its score}; {} if the quorum is not known."""
    return scoring.by_response(self.judgements, self.quorum) if self.quorum else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Audit:
  """audit.json: what is shown of it."""
  judged: schema.Count = 0
  prompts: schema.Count | None = None
  pairs: schema.Count = 0
  right: schema.Number | None = None
  wrong: schema.Number | None = None
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
  folder = epath.Path(workdir) / model
  responses = list(results.shards(folder / 'respond', 'responses', schema.Response))
  shown = {*first({r.prompt_id for r in responses})}
  return Data(
      model=model, stages=stages, responses=responses,
      attempts=results.lines(folder / 'prompts' / 'attempts.jsonl', schema.Attempt),
      judgements=[j if j.prompt_id in shown else dataclasses.replace(j, text='', thinking='')
                  for j in results.shards(folder / 'judge', 'judgements', schema.Judgement)],
      pairs=results.lines(folder / 'pairs' / 'pairs.jsonl', schema.Pair),
      positives=results.lines(folder / 'pairs' / 'positives.jsonl', schema.Positive))


def first(names: Iterable[str]) -> list[str]:
  """The ids of the prompts whose texts are shown: those with the smallest hash."""
  return sorted(names, key=records.digest)[:PROMPTS]


def of(data: Data, workdir, params: dict[str, str]) -> Round:
  """The numbers of a round. params: {hash of parameters: model} of the run's models."""
  judge, pairs = data.summary('judge'), data.summary('pairs')
  audit = results.read(epath.Path(workdir) / data.model / 'audit' / 'audit.json', _Audit) or (
      _Audit())
  def known(stage: str) -> str:
    return params.get(data.stages[stage].params, '') if stage in data.stages else ''
  by = data.stages['judge'].config.judge_by if 'judge' in data.stages else ''
  return Round(
      model=data.model, writer=known('respond'),
      judge=by if by not in ('', 'model') else known('judge'),
      funnel=tuple(funnel(data)), scale=(judge.lowest, judge.highest) if judge else None,
      judge_mean=_audited(audit, 'judge_mean') or _judge_mean(data), parsed=estimates.share(
          measures.parsed(data.judgements).values()),
      oracle_mean=_audited(audit, 'oracle_mean'),
      judge_scores=histogram(data.judgements, judge), oracle_scores=audit.oracle_histogram,
      right=_share(audit.right, audit.pairs), wrong=_share(audit.wrong, audit.pairs),
      characters=measures.lengths(len(r.response) for r in data.responses),
      tokens=measures.lengths(r.n_tokens for r in data.responses),
      chosen=measures.lengths(len(p.chosen) for p in data.pairs),
      rejected=measures.lengths(len(p.rejected) for p in data.pairs),
      pairs=pairs, warnings=tuple(warnings(data)))


def funnel(data: Data) -> list[Yield]:
  """What each stage of a round made, from the wanted prompts to the pairs, or the EFT examples.

  Stages that have not started are left out; an unfinished one is counted from its records.
  """
  made = []
  if 'prompts' in data.stages:
    made += _prompts(data)
  if data.responses:
    finish = Counter(r.finish for r in data.responses)
    made += [Yield(label='responses', count=finish.total()),
             Yield(label='finished responses', count=finish[schema.EOS], lost=_positive({
                 'cut at the length limit': finish[schema.CUT],
                 'prompt too long': finish[schema.TOO_LONG]}))]
  if data.judgements:
    unparsed = health.unparsed(data.judgements)
    count = len(data.judgements)
    made += [Yield(label='judgements', count=count),
             Yield(label='parsed judgements', count=count - unparsed.total(), lost=dict(unparsed))]
  if data.responses and (scored := data.scores):
    good = sum(score.mean is not None for score in scored.values())
    made.append(Yield(label='scored candidates', count=good, lost=_positive({
        f'fewer than {data.quorum} scores': len(scored) - good})))
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
    dropped, wanted = Counter(a.reason for a in data.attempts), stage.config.prompts_count
    attempts, accepted = dropped.total(), dropped.pop('', 0)
  made = [] if wanted is None else [Yield(label='prompts wanted', count=wanted)]
  return [*made, Yield(label='attempts', count=attempts),
          Yield(label='accepted prompts', count=accepted, lost=dict(dropped))]


def histogram(judgements: list[schema.Judgement], judge: schema.JudgeSummary | None):
  """{whole score: count}, from the lowest to the highest score of the judge's scale if known."""
  found = scoring.histogram(j.score for j in judgements if j.score is not None)
  if not judge or not found or judge.highest - judge.lowest > 10:
    return found
  scale = range(round(judge.lowest), round(judge.highest) + 1)
  return {str(score): found.get(str(score), 0) for score in scale}


def warnings(data: Data) -> list[str]:
  """A sentence for each statistic of the data that indicates a known failure."""
  model, found = data.model, []
  found += health.warn_judgements(f'{model}/judge', data.judgements)
  found += health.warn_responses(f'{model}/respond', data.responses)
  if data.responses and data.judgements and data.quorum:
    found += health.warn_ties(f'{model}/judge', data.responses, data.judgements, data.quorum)
  if (pairs := data.summary('pairs')) and not pairs.positives:
    found += health.warn_pairs(f'{model}/pairs', data.pairs, pairs.prompts)
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
  writers = {r.id: r.prompt_id for r in data.responses}
  groups = {}
  for name, score in data.scores.items():
    if score.mean is not None:
      groups.setdefault(writers.get(name, name), []).append(score.mean)
  return estimates.mean(groups.values())


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
