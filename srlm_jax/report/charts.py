"""The charts of the page, from the contents of the report."""
from collections.abc import Sequence
import itertools

from srlm_jax import schema
from srlm_jax.config import MODELS
from srlm_jax.report import external, plots
from srlm_jax.report.compare import Arm
from srlm_jax.report.differences import Difference
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import Lengths, Measure, MEASURES
from srlm_jax.report.plots import Chart, Point, Row
from srlm_jax.report.rounds import Round
from srlm_jax.report.run import Metrics, Run
from srlm_jax.report.steps import Step

_MAX_BARS = 11  # a scale with more values is drawn without the unused ones
# Curves of training: title, fields of `Metrics` with their names, level of a dashed rule.
_CURVES = (
    ('loss', {'loss': 'loss'}, None),
    ('reward', {'chosen_reward': 'chosen', 'rejected_reward': 'rejected'}, 0),
    ('log-probability', {'chosen_logp': 'chosen', 'rejected_logp': 'rejected'}, None),
    ('reward margin', {'margin': 'reward margin'}, 0),
    ('accuracy', {'accuracy': 'accuracy'}, 0.5),
    ('gradient norm', {'grad_norm': 'gradient norm'}, None))
# Steps of the funnel -> what they are a part of.
_PART_OF = {'accepted prompts': 'attempts', 'finished responses': 'responses',
            'parsed judgements': 'judgements', 'scored candidates': 'responses',
            'pairs': 'accepted prompts', 'positives': 'responses'}


def style(model: str) -> str:
  """The class of a model's colour, the same in every chart of models.

  Prompts have the colour of the model that is trained on them.
  """
  model = dict(ift='sft', eft='m1').get(model, model)
  return f's{(MODELS.index(model) - 1) % plots.SERIES}' if model in MODELS else 's5'


def differences(steps: Sequence[Step], about: str) -> list[Chart]:
  """The differences that decide, of answers or of judges: a chart per measure and outside judge."""
  found = {}
  for step in steps:
    for d in step.differences:
      if step.about == about and step.decided_by == d.measure:
        group, name = found.setdefault((d.measure, d.judge), {}), f'{d.model} - {d.against}'
        group[name if name not in group else f'{name} ({len(group)})'] = d
  return [_win_rates(judge, group) if key == 'head_to_head' else
          plots.intervals(f'difference in {MEASURES[key].title}', {
              name: _point(0, d.change) for name, d in group.items()}, MEASURES[key].digits)
          for (key, judge), group in found.items()]


def _win_rates(judge: str, group: dict[str, Difference]) -> Chart:
  points = {name.replace(' - ', ' / '): Point(0, 0.5 + d.change.value, *(
      None if x is None else 0.5 + x for x in (d.change.low, d.change.high)))
            for name, d in group.items()}
  return plots.intervals(f'win rate, head to head, by {judge}', points, 3, level=0.5)


def win_tie_loss(run: Run) -> list[Chart]:
  """A chart per judge of answers: shares of prompts won, tied and lost."""
  by_judge = {}
  for found in run.wins:
    is_judge = found.source and found.by != 'program'
    by_judge.setdefault(external.outside(found.by) if is_judge else found.by, []).append(found)
  return [_outcomes(f'win, tie and loss, by {by}', {
      f'{w.a} / {w.b}': (w.wins, w.ties, w.losses) for w in found})
          for by, found in by_judge.items()]


def stopping(found: Sequence[schema.StepWins]) -> Chart:
  """Checkpoints against those before, as early stopping compared them."""
  return _outcomes('checkpoints compared: win, tie and loss', {
      f'step {w.step} / {w.before or "start"}': (w.wins, w.ties, w.losses) for w in found})


def _outcomes(title: str, found: dict[str, tuple[int, int, int]]) -> Chart:
  """{label: wins, ties and losses} as shares."""
  rows = [Row(label, [n / sum(counts) for n in counts],
              ' / '.join(f'{100 * n / sum(counts):.0f}' for n in counts) + ' %')
          for label, counts in found.items() if sum(counts)]
  return plots.rows(title, rows, series=('win', 'tie', 'loss'), styles=('win', 'tie', 'loss'),
                    whole=1)


def by_round(run: Run) -> list[Chart]:
  """Measures by model: the answers; the judge against people and the oracle; its mean score."""
  made = [_by_model(run, 'held-out answers, score of the oracle', {'oracle': 'oracle'}),
          _by_model(run, 'the judge against people and the oracle', {
              'pairwise_all': 'people: pairs ordered alike',
              'oracle_pairwise': 'oracle: pairs ordered alike', 'parsed': 'parse rate'})]
  if rows := run.external.win_rates:
    models = [model for model in run.models if any(model in row.values for row in rows)]
    made.append(plots.lines('win rate against sft, head to head', {
        row.by: [_point(x, row.values[m]) for x, m in enumerate(models) if m in row.values]
        for row in rows}, names=models, level=0.5) if models else None)
  means = {'judge of the round': [
      _point(x, r.judge_mean) for x, r in enumerate(run.rounds) if r.judge_mean],
           'oracle': [_point(x, r.oracle_mean) for x, r in enumerate(run.rounds) if r.oracle_mean]}
  if means := {name: points for name, points in means.items() if points}:
    made.append(plots.lines('mean score of the candidates, by model trained on them', means,
                            names=[r.model for r in run.rounds]))
  return [chart for chart in made if chart]


def _by_model(run: Run, title: str, keys: dict[str, str]) -> Chart | None:
  models = [model for model in run.models if any(key in run.values.get(model, {}) for key in keys)]
  series = {name: points for key, name in keys.items() if (points := [
      _point(x, value) for x, model in enumerate(models)
      if (value := run.values[model].get(key))])}
  return plots.lines(title, series, names=models) if series else None


def _point(x: float, value: Value) -> Point:
  return Point(x, value.value, value.low, value.high)


def training(lines: Sequence[Metrics]) -> list[Chart]:
  """The curves of one model: loss; with pairs also rewards, log-probs, margin and accuracy."""
  made = []
  for title, fields, level in _CURVES:
    series = {name: points for field, name in fields.items() if (points := [
        Point(line.step + 1, value) for line in lines
        if (value := getattr(line, field)) is not None])}
    if series:
      made.append(plots.lines(title, series, level=level))
  return made


def scores(run: Run) -> list[Chart]:
  """Histograms: the judge's and the oracle's scores of each round, the oracle's of the answers."""
  made = []
  for r in run.rounds:
    bars = {name: _on_scale(counts, r.scale) for name, counts in (
        ('judge', r.judge_scores), ('oracle', r.oracle_scores)) if counts}
    if bars:
      made.append(plots.bars(f'scores in the data of {r.model}', bars))
  if answers := {model: _on_scale(counts, (0, 5)) for model, counts in run.oracle_scores.items()
                 if counts}:
    made.append(plots.bars('scores of the held-out answers, by the oracle', answers,
                           {model: style(model) for model in answers}))
  return made


def _on_scale(bars: dict[str, int], scale: tuple[float, float] | None) -> dict[str, float]:
  """Counts -> shares, with the unused scores of a scale with few values, if all are on it."""
  if scale and 0 < (size := round(scale[1]) - round(scale[0]) + 1) <= _MAX_BARS:
    values = [str(value) for value in range(round(scale[0]), round(scale[0]) + size)]
    if bars.keys() <= {*values}:
      bars = {value: bars.get(value, 0) for value in values}
  total = sum(bars.values()) or 1
  return {name: count / total for name, count in bars.items()}


def funnel(found: Round) -> Chart | None:
  """What is left after each step of making a model's data, as a share of what it is a part of.

  A count that is part of no other one has no bar.
  """
  count = {step.label: step.count for step in found.funnel}
  made = []
  for step in found.funnel:
    whole = count.get(_PART_OF.get(step.label, ''))
    bar = [step.count / whole] if whole else [1.0] if step.label in _PART_OF.values() else []
    made.append(Row(step.label, bar,
                    f'{step.count:,}' + (f' = {step.count / whole:.1%}' if whole else '')))
  return plots.rows(f'data of {found.model}', made, styles=(style(found.model),), whole=1
                    ) if made else None


def lengths(run: Run) -> list[Chart]:
  """Quantiles of the lengths of the answers, and of the responses of each round."""
  pairs = {name: found for r in run.rounds for name, found in (
      (f'{r.model} all', r.characters), (f'{r.model} chosen', r.chosen),
      (f'{r.model} rejected', r.rejected)) if found}
  return [_boxes(title, found) for title, found in (
      ('held-out answers, characters', run.characters), ('held-out answers, tokens', run.tokens),
      ('responses of the training data, characters', pairs)) if found]


def _boxes(title: str, found: dict[str, Lengths]) -> Chart:
  """A name begins with its model."""
  return plots.boxes(title, {
      name: (x.low, x.quarter, x.median, x.three_quarters, x.high) for name, x in found.items()},
      {name: style(name.partition(' ')[0]) for name in found})


def seconds(run: Run) -> Chart | None:
  """Seconds per stage, a colour per model; stages below 1 % of the total are left out."""
  owners = list(dict.fromkeys(cost.owner for cost in run.costs))
  taken = {(cost.owner, cost.stage): cost.seconds or 0 for cost in run.costs}
  total = sum(taken.values())
  found = []
  for name in dict.fromkeys(cost.stage for cost in run.costs):
    values = [taken.get((owner, name), 0) for owner in owners]
    if sum(values) > total / 100:
      found.append(Row(name, values, f'{sum(values):,.1f} s'))
  found.sort(key=lambda row: -sum(row.values))
  return plots.rows('seconds per stage', found, series=owners,
                    styles=[style(owner) for owner in owners]) if found else None


def map_of(found: schema.Distributions) -> Chart | None:
  """Prompts of all sets on the first two principal components."""
  if not found.points:
    return None
  titles = {s.name: s.title or s.name for s in found.sets}
  points = sorted(found.points, key=lambda p: [*titles, p.set].index(p.set))
  by_set = {name: [Point(p.x, p.y) for p in group]
            for name, group in itertools.groupby(points, lambda p: p.set)}
  shares = [f' ({share:.0%} of the variance)' for share in found.explained_variance] + ['', '']
  return plots.scatter(
      'map of the prompts', {titles.get(name, name): dots for name, dots in by_set.items()},
      (f'first component{shares[0]}', f'second component{shares[1]}'),
      {titles.get(name, name): style(name) for name in by_set})


def nearest_seeds(found: schema.Distributions) -> Chart | None:
  """Shares of the prompts of each set by ROUGE-L to the nearest seed prompt."""
  titles = {s.name: s.title or s.name for s in found.sets}
  sets = [n for n in found.nearest if n.rouge_shares]
  shares = {titles.get(n.set, n.set): {f'{i / 10:g}': share
                                       for i, share in enumerate(n.rouge_shares)} for n in sets}
  return plots.bars('ROUGE-L to the nearest seed prompt: from each value to the next', shares, {
      titles.get(n.set, n.set): style(n.set) for n in sets}) if sets else None


def of_runs(runs: Sequence[Run | Arm], key: str) -> Chart | None:
  """A measure by model, a line per run or arm."""
  measure: Measure = MEASURES[key]
  names = [m for m in MODELS if any(key in run.values.get(m, {}) for run in runs)]
  series = {run.name: points for run in runs if (points := [
      _point(x, value) for x, m in enumerate(names) if (value := run.values.get(m, {}).get(key))])}
  by = 'counted' if measure.source == 'count' else f'by {measure.source}'
  return plots.lines(f'{measure.title}, {by}', series, names=names) if series else None


def judges_and_answers(runs: Sequence[Run | Arm]) -> Chart | None:
  """The judge over the answers, both measured by the oracle: a line per run or arm from M1 on."""
  series = {}
  for run in runs:
    found = {m: (run.values[m]['oracle'], run.values[m]['oracle_pairwise_all']) for m in MODELS[2:]
             if {'oracle', 'oracle_pairwise_all'} <= run.values.get(m, {}).keys()}
    if len(found) > 1:
      series[run.name] = {m: _point(answers.value, judge) for m, (answers, judge) in found.items()}
  return plots.paths('the judge over the answers', series, (
      'score of the answers by the oracle, 0 to 5', MEASURES['oracle_pairwise_all'].title)
                     ) if series else None
