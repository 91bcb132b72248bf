"""Reads what the page shows of one run: the records and summaries of its stages."""
from collections import Counter
from collections.abc import Callable
import dataclasses
from typing import Any

from etils import epath

from srlm_jax import catalog, records, schema
from srlm_jax.config import MODELS
from srlm_jax.report import results, samples as sampling, summaries
from srlm_jax.reward import scores as scoring

_DATA_STAGES = ('prompts', 'respond', 'judge', 'pairs')  # they make an iteration's training data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
  """metrics.jsonl: what is plotted of a training step."""
  step: int
  loss: float | None = None
  grad_norm: float | None = None
  margin: float | None = None
  accuracy: float | None = None
  chosen_reward: float | None = None
  rejected_reward: float | None = None
  chosen_logp: float | None = None
  rejected_logp: float | None = None
  tokens_per_second: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
  """audit.json: mean scores of the same candidates, by the run's judge and by the oracle."""
  judge_mean: float | None = None
  oracle_mean: float | None = None


@dataclasses.dataclass
class Iteration:
  """The data that a model was trained on: records, and summaries of stages, if they finished."""
  model: str
  prompts: schema.PromptsSummary | None = None
  responses: list[schema.Response] = dataclasses.field(default_factory=list)
  judgements: list[schema.Judgement] = dataclasses.field(default_factory=list)
  judge: schema.JudgeSummary | None = None
  quorum: int | None = None
  pairs: list[schema.Pair] = dataclasses.field(default_factory=list)
  pairs_summary: schema.PairsSummary | None = None
  samples: list[sampling.Sample] = dataclasses.field(default_factory=list)
  audit: Audit | None = None


@dataclasses.dataclass
class Run:
  """The contents of a run. Dictionaries by model contain only the models with such a file."""
  workdir: str = ''
  size: str = ''
  stopped: str = ''  # why the loop stopped early, or ''
  rows: list[dict] = dataclasses.field(default_factory=list)  # see results.of_models
  stages: dict[tuple[str, str], summaries.Started] = dataclasses.field(default_factory=dict)
  iterations: list[Iteration] = dataclasses.field(default_factory=list)
  curves: dict[str, list[Metrics]] = dataclasses.field(default_factory=dict)
  judged_eval: dict[str, list[schema.Judgement]] = dataclasses.field(default_factory=dict)
  answers: dict[str, dict[str, schema.Response]] = dataclasses.field(
      default_factory=dict)  # by prompt id
  graded: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by prompt id
  eft: dict[str, schema.EftSummary] = dataclasses.field(default_factory=dict)

  def summary(self, owner: str, name: str):
    """The summary of a stage; None if it has not finished."""
    return self.stages[owner, name].summary if (owner, name) in self.stages else None

  @property
  def models(self) -> list[str]:
    return [row['model'] for row in self.rows]

  @property
  def total_seconds(self) -> float:
    return sum(stage.seconds or 0 for stage in self.stages.values())


def collect(workdir, rows: list[dict], stopped: str) -> Run:
  """Reads the contents of the page from the files that exist."""
  workdir = epath.Path(workdir)
  folders = {(owner, name): workdir / owner / name
             for owner in ('data', *MODELS) for name in catalog.NAMES}
  stages = {key: stage for key, folder in folders.items() if (stage := summaries.started(folder))}

  def by_model(read: Callable[[epath.Path], Any]) -> dict:
    return {model: found for model in MODELS if (found := read(workdir / model))}

  return Run(
      workdir=workdir.name, stopped=stopped, rows=rows, stages=stages,
      size=summaries.run_results(workdir).size,
      iterations=[_iteration(workdir / model, stages) for model in MODELS
                  if any((model, name) in stages for name in _DATA_STAGES)],
      curves=by_model(lambda folder: results.lines(
          folder / 'model' / 'metrics.jsonl', Metrics)),
      judged_eval=by_model(lambda folder: _shards(
          folder / 'judge_eval', 'judgements', schema.Judgement)),
      answers=by_model(lambda folder: {r.prompt_id: r for r in _shards(
          folder / 'answers', 'responses', schema.Response)}),
      graded=by_model(results.graded),
      eft=by_model(lambda folder: summaries.summary(folder / 'eft')))


def _iteration(folder, stages: dict[tuple[str, str], summaries.Started]) -> Iteration:
  """Reads the data that one model was trained on."""
  own = {name: stage for (owner, name), stage in stages.items() if owner == folder.name}
  quorums = [quorum for stage in own.values() if (quorum := stage.config.judge_quorum)]
  quorum = quorums[0] if quorums else None
  judgements = _shards(folder / 'judge', 'judgements', schema.Judgement)
  responses = _shards(folder / 'respond', 'responses', schema.Response)
  pairs = results.lines(folder / 'pairs' / 'pairs.jsonl', schema.Pair)
  return Iteration(
      model=folder.name, prompts=_prompts(folder, own['prompts']) if 'prompts' in own else None,
      responses=responses, judgements=judgements,
      judge=own['judge'].summary if 'judge' in own else None, quorum=quorum, pairs=pairs,
      pairs_summary=summaries.summary(folder / 'pairs'),
      samples=_samples(folder, responses, judgements, quorum, pairs),
      audit=results.read(folder / 'audit' / 'audit.json', Audit))


def _samples(folder, responses, judgements, quorum: int | None, pairs) -> list[sampling.Sample]:
  """Those of the data of a model, with the candidates of the older model if there are some."""
  judgements = judgements + _shards(folder / 'judge_older', 'judgements', schema.Judgement)
  scores = scoring.by_response(judgements, quorum or 1)
  return sampling.of_data(
      folder.name, responses + _shards(folder / 'respond_older', 'responses', schema.Response),
      judgements, {id: score.mean for id, score in scores.items()}, pairs)


def _prompts(folder, stage: summaries.Started) -> schema.PromptsSummary:
  """The summary of the prompts stage; counted from its attempts if the stage has not finished."""
  if stage.summary:
    return stage.summary
  attempts = results.lines(folder / 'prompts' / 'attempts.jsonl', schema.Attempt)
  reasons = Counter(attempt.reason for attempt in attempts)
  return schema.PromptsSummary(
      wanted=stage.config.prompts_count, attempts=reasons.total(), prompts=reasons.pop('', 0),
      near_held_out=0, shortened=0, dropped=reasons)


def _shards(folder, stem: str, kind: type[records.Record]) -> list[records.Record]:
  """The records of all shards; [] if there are none."""
  paths = sorted(folder.glob(f'{stem}-*-of-*.jsonl'))
  return [r for path in paths for r in results.lines(path, kind)]
