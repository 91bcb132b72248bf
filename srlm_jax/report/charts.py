"""The charts of the page, from the contents of a run."""
from collections import Counter
from collections.abc import Iterator
import itertools
import statistics

from srlm_jax import schema
from srlm_jax.config import MODELS
from srlm_jax.report import plots, run as runs
from srlm_jax.report.plots import Chart, Point, Row
from srlm_jax.reward import health, scores as scoring

_MAX_BARS = 11  # a judge's scale with more values is drawn without the unused ones
# Curves of training: title, fields of `runs.Metrics` with their names, level of a dashed rule.
_CURVES = (
    ('loss', {'loss': 'loss'}, None),
    ('reward', {'chosen_reward': 'chosen', 'rejected_reward': 'rejected'}, 0),
    ('log-probability', {'chosen_logp': 'chosen', 'rejected_logp': 'rejected'}, None),
    ('reward margin', {'margin': 'margin'}, 0),
    ('accuracy', {'accuracy': 'accuracy'}, 0.5),
    ('gradient norm', {'grad_norm': 'gradient norm'}, None))


def style(model: str) -> str:
  """The class of a model's colour, the same in every chart."""
  return f's{(MODELS.index(model) - 1) % plots.SERIES}' if model in MODELS else 's5'


def training(lines: list[runs.Metrics]) -> list[Chart]:
  """The curves of one model: loss; with pairs also rewards, log-probs, margin and accuracy."""
  made = []
  for title, fields, level in _CURVES:
    series = {name: points for field, name in fields.items() if (points := [
        Point(line.step + 1, value) for line in lines
        if (value := getattr(line, field)) is not None])}
    if series:
      made.append(plots.lines(title, series, level=level))
  return made


def scores(run: runs.Run) -> list[Chart]:
  """The judge's scores in the data of each model, then on the ranked replies by each model."""
  scales = [i.judge for i in run.iterations if i.judge]
  judged = {f'scores in the data of {i.model}': i.judgements for i in run.iterations}
  judged |= {f'scores of ranked replies, by {model}': rows
             for model, rows in run.judged_eval.items()}
  return [plots.bars(title, _on_scale(bars, scales), style(title.split()[-1]))
          for title, rows in judged.items()
          if (bars := scoring.histogram(j.score for j in rows if j.score is not None))]


def _on_scale(bars: dict[str, int], scales: list[schema.JudgeSummary]) -> dict[str, int]:
  """Adds the unused scores of the judge's scale, if it has few values."""
  for judge in scales[:1]:
    scale = range(round(judge.lowest), round(judge.highest) + 1)
    if 0 < len(scale) <= _MAX_BARS:
      return {str(value): bars.get(str(value), 0) for value in scale}
  return bars


def funnel(iteration: runs.Iteration) -> Chart | None:
  """What is left after each step of making a model's data; a bar is a share of its first step."""
  made = [Row(name, [count / max(steps[0][1], 1)],
              f'{count:,}' + (f' = {count / steps[0][1]:.1%}' if i and steps[0][1] else ''))
          for steps in _steps(iteration) for i, (name, count) in enumerate(steps)]
  return plots.rows(f'from attempts to pairs, {iteration.model}', made, whole=1,
                    styles=(style(iteration.model),)) if made else None


def _steps(i: runs.Iteration) -> Iterator[list[tuple[str, int]]]:
  """Counts of the same kind, each a part of the one before."""
  if i.prompts:
    yield [('attempts', i.prompts.attempts), ('prompts', i.prompts.prompts)]
  if i.responses:
    finish = Counter(r.finish for r in i.responses)
    yield [('responses', finish.total()), ('finished', finish[schema.EOS])]
  if i.judgements:
    parsed = len(i.judgements) - health.unparsed(i.judgements).total()
    yield [('judgements', len(i.judgements)), ('with a score', parsed)]
  if i.pairs_summary:
    kept = ('positives', i.pairs_summary.positives) if i.pairs_summary.positives else (
        'pairs', i.pairs_summary.pairs)
    yield [('prompts judged', i.pairs_summary.prompts), kept]


def lengths(run: runs.Run) -> list[Chart]:
  """Mean length of the held-out answers, and of chosen and rejected responses, in characters."""
  made = []
  if answers := [(model, statistics.fmean(len(r.response) for r in by_id.values()))
                 for model, by_id in run.answers.items()]:
    made.append(plots.rows('characters per held-out answer',
                           [Row(model, [mean], f'{mean:,.1f}') for model, mean in answers]))
  pairs = [row for i in run.iterations if i.pairs for row in (
      _mean_row(f'{i.model} chosen', [len(p.chosen) for p in i.pairs]),
      _mean_row(f'{i.model} rejected', [len(p.rejected) for p in i.pairs]))]
  if pairs:
    made.append(plots.rows('characters per response of a pair', pairs))
  return made


def _mean_row(label: str, values: list[int]) -> Row:
  return Row(label, [statistics.fmean(values)], f'{statistics.fmean(values):,.1f}')


def seconds(run: runs.Run) -> Chart | None:
  """Seconds per stage, a colour per model; stages below 1 % of the total are left out."""
  taken = {key: stage.seconds for key, stage in run.stages.items() if stage.seconds}
  owners = list(dict.fromkeys(owner for owner, _ in taken))
  total = sum(taken.values())
  found = []
  for name in dict.fromkeys(name for _, name in taken):
    values = [taken.get((owner, name), 0) for owner in owners]
    if sum(values) >= total / 100:
      found.append(Row(name, values, f'{sum(values):,.1f} s'))
  found.sort(key=lambda row: -sum(row.values))
  return plots.rows('seconds per stage', found, series=owners,
                    styles=[style(owner) for owner in owners]) if found else None


def map_of(found: schema.Distributions) -> Chart | None:
  """Prompts of all sets on the first two principal components."""
  titles = {s.name: s.title or s.name for s in found.sets}
  points = sorted(found.points, key=lambda p: [*titles].index(p.set) if p.set in titles else -1)
  series = {titles.get(name, name): [Point(p.x, p.y) for p in group]
            for name, group in itertools.groupby(points, lambda p: p.set)}
  shares = [f' ({share:.0%} of the variance)' for share in found.explained_variance] + ['', '']
  return plots.scatter('map of the prompts', series, (
      f'first component{shares[0]}', f'second component{shares[1]}')) if series else None
