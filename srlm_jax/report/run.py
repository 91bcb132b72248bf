"""One workdir as plain data: everything that the report shows of it."""
from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from etils import epath
import numpy as np

from srlm_jax import catalog, model_files, schema
from srlm_jax.config import MODELS, OPTIONAL
from srlm_jax.report import (
  differences,
  doubts,
  external,
  measures,
  results,
  rounds,
  samples,
  steps,
  summaries,
)
from srlm_jax.report.differences import Difference, WinTieLoss
from srlm_jax.report.doubts import Doubt
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import Evaluated, Lengths
from srlm_jax.report.rounds import Round
from srlm_jax.reward import scores as scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
  """A line of metrics.jsonl: a logged training step, counted from 0. None: not written."""
  step: schema.Count
  loss: schema.Number | None = None
  margin: schema.Number | None = None
  accuracy: schema.Number | None = None
  chosen_reward: schema.Number | None = None
  rejected_reward: schema.Number | None = None
  chosen_logp: schema.Number | None = None
  rejected_logp: schema.Number | None = None
  grad_norm: schema.Number | None = None
  tokens_per_second: schema.Number | None = None
  alarm_chosen_falling: schema.Count | None = None
  alarm_margin_without_accuracy: schema.Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
  """A stage that has started."""
  owner: str                 # data, or a model
  stage: str
  seconds: float | None      # None: not finished
  # Sampled, or trained on (to 3 digits); None: not known. As the seconds, those sampled are of the
  # last start of the stage, but of all starts for responses.
  tokens: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopping:
  """How the checkpoint of a model was selected."""
  step: int | None                       # that later stages use; 0: the model it starts from
  wins: tuple[schema.StepWins, ...]      # comparisons of early stopping, in order


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Selected:
  """selected.json."""
  step: schema.Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One workdir. Dictionaries by model have only the models with such data."""
  name: str
  size: str
  seed: int | None
  facts: tuple[str, ...]           # sentences: size, models, the judge
  stopped: str                     # why the loop stopped early, or ''
  is_sandbox: bool
  models: tuple[str, ...]          # trained, in order
  rows: list[dict]                 # see results.of_models: the tables of the loop
  values: dict[str, dict[str, Value]]   # {model: {key of measures.MEASURES: value}}
  answer: str                      # did it get better? one sentence
  steps: tuple[steps.Step, ...]
  doubts: tuple[Doubt, ...]        # reasons to doubt the whole run
  wins: tuple[WinTieLoss, ...]     # every pair of models that was compared
  rounds: tuple[Round, ...]
  eft: dict[str, schema.EftSummary]
  training: dict[str, schema.TrainingSummary]
  curves: dict[str, list[Metrics]]
  characters: dict[str, Lengths]   # of the held-out answers, by model
  tokens: dict[str, Lengths]
  oracle_scores: dict[str, dict[str, int]]  # histogram of the held-out answers, by model
  costs: tuple[StageCost, ...]
  unfinished: tuple[str, ...]      # OWNER/STAGE that started and did not finish
  missing: tuple[str, ...]         # what the report could show and the run does not have
  external: external.External
  samples: tuple[samples.Samples, ...]
  held_out: samples.HeldOut
  warnings: tuple[str, ...]        # sentences of the health checks
  stopping: dict[str, Stopping] = dataclasses.field(default_factory=dict)
  # For comparisons with other runs; empty, and None, after them.
  evaluated: dict[str, Evaluated]
  ranked: np.ndarray | None        # see differences.pairs
  differences: dict[tuple[str, str], list[Difference]]

  @property
  def judges(self) -> frozenset[str]:
    """Who scored the candidates of the rounds."""
    return frozenset(r.judge for r in self.rounds if r.judge)


def read(workdir, name: str, rows: list[dict], stopped: str, has_control: bool) -> Run:
  """Reads a run, finished or not, from the files that exist.

  rows: see `results.of_models`; stopped: why the loop stopped early, or ''; has_control: whether a
  run with a random judge is shown beside it. Raises InputError, with the path, for a damaged file.
  """
  workdir = epath.Path(workdir)
  stages = {(owner, part): stage for owner in ('data', *MODELS) for part in catalog.NAMES
            if (stage := summaries.started(workdir / owner / part))}
  data = [made for model in MODELS if (made := _round(workdir, model, stages))]
  outside = external.read(workdir)
  models = tuple(row['model'] for row in rows)
  found = [measures.read(workdir, model) for model in models]
  values = {e.model: measures.of_model(e, outside) for e in found}
  ranked = differences.pairs(results.each(
      workdir / 'data' / 'seeds' / 'ranked.jsonl', schema.RankedPrompt))
  made_rounds = tuple(made for made, _ in data)
  by_model = {e.model: e for e in found}
  made = {(a, b): differences.between(by_model[a], by_model[b], ranked, outside)
          for a, b in steps.pairs(models)}
  made_steps = tuple(steps.of_models(models, made, values, made_rounds))
  curves = _by_model(lambda folder: results.lines(folder / 'model' / 'metrics.jsonl', Metrics),
                     workdir)
  unfinished = tuple('/'.join(key) for key, stage in stages.items() if stage.seconds is None)
  warnings = (*(w for r in made_rounds for w in r.warnings), *_warnings(found, stages, curves))
  is_sandbox = any(part == 'oracle' for _, part in stages) or any(len(e.graded) for e in found)
  facts = doubts.Facts(
      has_outside=any(step.decided_by for step in made_steps if step.about == 'answers'),
      judges=frozenset(r.judge for r in made_rounds), has_control=has_control, seeds=1,
      is_sandbox=is_sandbox, stopped=stopped, unfinished=unfinished, warnings=len(warnings))
  answered = [e for e in found if e.answers]
  return Run(
      name=name, size=summaries.run_results(workdir).size, stopped=stopped, rows=rows,
      seed=_last(stages, 'seed'), is_sandbox=is_sandbox, models=models, values=values,
      facts=tuple(_facts(workdir, models, stages)), answer=steps.answer(made_steps),
      steps=made_steps, doubts=tuple(doubts.of_run(facts)),
      wins=tuple(differences.wins(found, outside)), rounds=made_rounds,
      eft=_by_model(lambda folder: summaries.summary(folder / 'eft'), workdir),
      training=_by_model(lambda folder: summaries.summary(folder / 'model'), workdir),
      curves=curves, stopping=_by_model(_stopping, workdir),
      characters={e.model: measures.lengths(e.answers.rows['characters']) for e in answered},
      tokens={e.model: measures.lengths(e.answers.rows['tokens']) for e in answered},
      oracle_scores={e.model: scoring.histogram(e.graded['score']) for e in found
                     if len(e.graded)},
      costs=tuple(_costs(workdir, stages, _sampled(made_rounds, found))), unfinished=unfinished,
      missing=tuple(_missing(models, stages, found, outside, curves)), external=outside,
      samples=tuple(shown for _, shown in data if shown.prompts),
      held_out=_held_out(answered), warnings=warnings, evaluated=by_model, ranked=ranked,
      differences=made)


def _round(workdir, model: str, stages: dict[tuple[str, str], summaries.Started]) -> (
    tuple[Round, samples.Samples] | None):
  """The data of a model: its numbers and its samples. Its records are in memory only here."""
  own = {name: stage for (owner, name), stage in stages.items() if owner == model}
  if not (data := rounds.read(workdir, model, own)):
    return None
  return rounds.of(data, workdir, rounds.names(stages)), data.samples


def _held_out(found: Sequence[Evaluated]) -> samples.HeldOut:
  """The samples of the models that answered."""
  graded = {e.model: e.graded for e in found}
  def oracle(model: str, prompt: str) -> float | None:
    score = graded[model]['score'][graded[model]['id'] == hash(prompt)].tolist()
    return score[0] if score else None
  ids = [e.answers.rows['id'] for e in found]
  total = len(np.unique(np.concatenate(ids))) if ids else 0
  return samples.held_out({e.model: e.texts for e in found}, oracle, total)


def _by_model(read_one: Callable[[epath.Path], Any], workdir) -> dict:
  return {model: found for model in MODELS if (found := read_one(workdir / model))}


def _stopping(folder) -> Stopping | None:
  """From the folder of a model; None if no checkpoint was compared or selected."""
  selected = results.read(folder / 'model' / model_files.SELECTED, _Selected)
  wins = results.lines(folder / 'stopping' / 'wins.jsonl', schema.StepWins)
  return Stopping(step=selected and selected.step, wins=tuple(wins)) if selected or wins else None


def _last(stages: dict, key: str):
  """The value of a config key in the last stage that records it; None if no stage does."""
  values = [getattr(stage.config, key) for stage in stages.values()]
  return next((value for value in reversed(values) if value not in (None, '')), None)


def _facts(workdir, models: Sequence[str], stages: dict) -> list[str]:
  """Sentences on the size, the models and the judge."""
  size = summaries.run_results(workdir).size
  size = f', size {size}' if size else ''
  model = f', model {name}' if (name := _last(stages, 'model')) else ''
  found = [f'A run of self-rewarding training{size}{model}. It contains the models '
           f'{", ".join(models)}.']
  if template := _last(stages, 'judge_template'):
    sentence = f'Judge: template {template}'
    if scales := [stage.summary for (_, name), stage in stages.items()
                  if name == 'judge' and stage.summary]:
      sentence += f', scores {scales[0].lowest:g} to {scales[0].highest:g}'
    n, quorum = _last(stages, 'judge_n'), _last(stages, 'judge_quorum')
    if n and quorum:
      sentence += f'; {n} judgements per response, of which {quorum} must have a score'
    found.append(f'{sentence}.')
  return found


def _warnings(found: list[Evaluated], stages: dict, curves: dict[str, list[Metrics]]) -> list[str]:
  """Warnings of the evaluations and of the trainings; those of the data are in the rounds."""
  made = []
  for e in found:
    made += e.warnings
  for (owner, name), stage in stages.items():
    summary = stage.summary
    if name == 'model' and summary and sum(summary.dropped.values()) > summary.examples:
      dropped = ', '.join(f'{n} {reason}' for reason, n in summary.dropped.items())
      made.append(f'{owner}/model: trained on {summary.examples:,} examples; dropped {dropped}.')
  for model, lines in curves.items():
    if lines[-1].alarm_chosen_falling:
      made.append(f'{model}/model: at the end the chosen responses are less likely than at first.')
    if lines[-1].alarm_margin_without_accuracy:
      made.append(f'{model}/model: at the end a few pairs produce the mean margin.')
  return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tokens:
  """A response: its number of tokens."""
  n_tokens: schema.Count


def _sampled(made: Sequence[Round], found: list[Evaluated]) -> dict[tuple[str, str], int]:
  """{(model, stage): tokens of its responses} of the stages whose responses were read."""
  return {(r.model, 'respond'): round(r.tokens.mean * r.tokens.count) for r in made if r.tokens} | {
      (e.model, 'answers'): int(e.answers.rows['tokens'].sum()) for e in found if e.answers}


def _costs(workdir, stages: dict, sampled: dict[tuple[str, str], int]) -> list[StageCost]:
  """Seconds and tokens of the stages that have started, in their order."""
  made = []
  for (owner, name), stage in stages.items():
    folder, tokens = workdir / owner / name, sampled.get((owner, name))
    if name == 'model':
      rows = results.read(folder / 'rows.json', schema.Rows)
      if rows and stage.summary:
        tokens = round(stage.summary.steps * rows.shape[0] * rows.shape[1] *
                       stage.summary.padding_free)
    elif tokens is None:  # those of the responses are of all starts
      tokens = sum(r.n_tokens for r in results.shards(folder, 'responses', _Tokens)
                   ) or stage.generated
    made.append(StageCost(owner=owner, stage=name, seconds=stage.seconds, tokens=tokens))
  return made


def _missing(models: Sequence[str], stages: dict, found: list[Evaluated],
             outside: external.External, curves: dict) -> list[str]:
  """What the report could show and the run does not have, by name."""
  made = [f'model {model}' for model in MODELS if model not in (*models, *OPTIONAL)]
  for e in found:
    if e.model != 'm0':
      made += [f'{e.model}: {what} ({e.model}/{file})' for what, file, exists in (
          ('training curves', 'model/metrics.jsonl', e.model in curves),
          ('answers to held-out prompts', 'answers', e.answers),
          ('agreement with human ranks', 'agreement', (e.model, 'agreement') in stages))
               if not exists]
  made += [f'{what} (eval/{file})' for what, file, exists in (
      ('head to head by an outside judge', 'A_B/head_to_head.json', outside.head_to_head),
      ('AlpacaEval', 'alpaca_MODEL.json', outside.alpaca),
      ('MT-Bench', 'mt_bench.json', outside.mt_bench),
      ('lm-evaluation-harness', 'harness.json', outside.harness),
      ('data distributions', 'distributions.json', outside.distributions)) if not exists]
  return made
