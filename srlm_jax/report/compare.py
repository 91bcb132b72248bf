"""Several runs: paired differences between them, and the seeds of a study as one."""
from collections.abc import Iterable, Sequence
import dataclasses
import itertools
import re
import statistics

from etils import epath
import numpy as np

from srlm_jax.config import MODELS
from srlm_jax.report import differences, doubts, estimates, external, measures, results, steps
from srlm_jax.report.differences import Difference
from srlm_jax.report.doubts import Doubt
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import Evaluated
from srlm_jax.report.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Across:
  """A measure of a model in one run, or arm, minus that of the same model in another one."""
  model: str
  measure: str          # key of measures.MEASURES
  run: str              # names of the runs or arms
  against: str
  change: Value         # over prompts between runs; over seeds between arms
  ours: float
  theirs: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """The runs of a study that differ in their seeds only, as one. Intervals are over seeds."""
  name: str
  changes: tuple[str, ...]               # the --set flags of these runs
  seeds: tuple[int, ...]
  models: tuple[str, ...]                # that a run has
  judges: frozenset[str]                 # who scored the candidates
  values: dict[str, dict[str, Value]]    # {model: {measure: mean over seeds}}
  answer: str                            # did it get better? one sentence
  steps: tuple[steps.Step, ...]
  doubts: tuple[Doubt, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Study:
  """NAME.json of a study: what is shown of it."""
  changes: tuple[str, ...] = ()


def from_first(first: Run, run: Run) -> tuple[list[Across], str]:
  """Differences of a run from the first one, and why the others are refused; '' if none is."""
  made = []
  for model in (model for model in run.evaluated if model in first.evaluated):
    pair = run.evaluated[model], first.evaluated[model]
    if why := _other_prompts(*pair):
      return made, f'{run.name} and {first.name}: {why}'
    found = differences.between(*pair, run.ranked, external.External())
    made += [Across(model=model, measure=d.measure, run=run.name, against=first.name,
                    change=d.change, ours=d.ours, theirs=d.theirs) for d in found]
  return made, ''


def _other_prompts(a: Evaluated, b: Evaluated) -> str:
  """Why two evaluations cannot be paired by prompt; '' if they can."""
  for what, ours, theirs in (
      ('answered other held-out prompts', *(x.answers.rows['asked_id'] for x in (a, b))),
      ('judged other ranked replies', *(x.replies['id'] for x in (a, b)))):
    same = len(np.intersect1d(ours, theirs))
    if same < min(len(ours), len(theirs)):  # an unfinished run has a part of them
      return (f'{a.model} {what} ({len(ours):,} and {len(theirs):,}, of which {same:,} are the '
              f'same), so no difference is paired by prompt; make both runs from the same data')
  return ''


def study(folder) -> dict[str, dict[int, epath.Path]]:
  """{name: {seed: run}} of a study's folder: its subfolders NAME-SEED with a model.

  {} if the folder is a run itself, or has no such subfolder.
  """
  folder, found = epath.Path(folder), {}
  if results.trained(folder) or not folder.is_dir():
    return {}
  for path in sorted(folder.iterdir()):
    if (match := re.fullmatch(r'(.+)-(\d+)', path.name)) and results.trained(path):
      found.setdefault(match[1], {})[int(match[2])] = path
  return {name: dict(sorted(runs.items())) for name, runs in found.items()}


def arms(folder, found: dict[str, dict[int, Run]], has_control: bool) -> list[Arm]:
  """The {name: {seed: run}} of a study's folder -> each name's runs as one; the loop first."""
  changes = {name: results.read(epath.Path(folder) / f'{name}.json', _Study) or _Study()
             for name in found}
  return [_arm(name, changes[name].changes, found[name], has_control) for name in _ordered(found)]


def _ordered(names: Iterable[str]) -> list[str]:
  return sorted(names, key=lambda name: (name != 'loop', name))


def _arm(name: str, changes: tuple[str, ...], runs: dict[int, Run], has_control: bool) -> Arm:
  first = next(iter(runs.values()))
  judges = frozenset(judge for run in runs.values() for judge in run.judges)
  models = tuple(m for m in MODELS if any(m in run.models for run in runs.values()))
  values = {model: over_seeds([run.values.get(model, {}) for run in runs.values()])
            for model in models}
  gains = {pair: _gains([run.differences.get(pair, ()) for run in runs.values()])
           for pair in steps.pairs(models)}
  made = tuple(dataclasses.replace(step, doubts=step.doubts + _of_seeds(step, runs.values()))
               for step in steps.of_models(models, gains, values, []))
  facts = doubts.Facts(
      has_outside=any(step.decided_by for step in made if step.about == 'answers'), judges=judges,
      has_control=has_control, seeds=len(runs), is_sandbox=first.is_sandbox,
      stopped='; '.join(filter(None, (run.stopped for run in runs.values()))),
      unfinished=tuple(f'{run.name}/{stage}' for run in runs.values() for stage in run.unfinished),
      warnings=sum(len(run.warnings) for run in runs.values()))
  return Arm(name=name, changes=changes, seeds=tuple(runs), models=models, judges=judges,
             values=values, answer=steps.answer(made), steps=made,
             doubts=tuple(doubts.of_run(facts)))


def _of_seeds(step: steps.Step, runs: Iterable[Run]) -> tuple[Doubt, ...]:
  """The doubts on the verdicts of outside judges in each run, with the name of the run."""
  return tuple(
      Doubt(kind=doubt.kind, sentence=f'{run.name}: {doubt.sentence}') for run in runs
      for own in run.steps
      if (own.model, own.against, own.about) == (step.model, step.against, step.about)
      for doubt in own.doubts if doubt.kind in doubts.OF_VERDICTS)


def over_seeds(rows: list[dict[str, Value]]) -> dict[str, Value]:
  """{measure: value} of each seed -> {measure: its mean over the seeds that have it}."""
  return {key: estimates.mean(([row[key].value] for row in rows if key in row), 'seeds')
          for key in measures.MEASURES if any(key in row for row in rows)}


def _gains(rows: list[Sequence[Difference]]) -> list[Difference]:
  """The differences of two models in each run -> their means over the seeds that have them."""
  grouped = {}
  for row in rows:
    for d in row:
      grouped.setdefault((d.measure, d.judge), []).append(d)
  return [dataclasses.replace(
      same[0], file=None, change=estimates.mean(([d.change.value] for d in same), 'seeds'),
      **{side: statistics.fmean(getattr(d, side) for d in same) for side in ('ours', 'theirs')})
      for same in grouped.values()]


def between_arms(found: dict[str, dict[int, Run]]) -> tuple[list[Across], list[str]]:
  """Differences between every two arms, paired by seed, and why some are refused.

  A seed of both arms counts if the runs answer the same held-out prompts.
  """
  made, refused = [], []
  for against, name in itertools.combinations(_ordered(found), 2):
    seeds = [seed for seed in found[name] if seed in found[against]]
    pairs = [(found[name][seed], found[against][seed]) for seed in seeds]
    if why := _refused(pairs):
      refused.append(f'{name} and {against}: {why}')
      continue
    for model in MODELS:
      made += _over_seeds(name, against, model, pairs)
  return made, refused


def _over_seeds(name: str, against: str, model: str, pairs: list[tuple[Run, Run]]) -> list[Across]:
  made = []
  for key in measures.MEASURES:
    values = [[run.values.get(model, {}).get(key) for run in pair] for pair in pairs]
    both = [(ours.value, theirs.value) for ours, theirs in values if ours and theirs]
    if both:
      change = estimates.mean(([ours - theirs] for ours, theirs in both), 'seeds')
      ours, theirs = map(statistics.fmean, zip(*both, strict=True))
      made.append(Across(model=model, measure=key, run=name, against=against, change=change,
                         ours=ours, theirs=theirs))
  return made


def _refused(pairs: list[tuple[Run, Run]]) -> str:
  """Why two arms cannot be paired by seed; '' if they can."""
  if not pairs:
    return 'no seed has a run of both, so nothing is paired by seed'
  for a, b in pairs:
    for model in a.evaluated:
      if model in b.evaluated and (why := _other_prompts(a.evaluated[model], b.evaluated[model])):
        return why
  return ''
