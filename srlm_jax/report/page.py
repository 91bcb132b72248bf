"""The results of a run as one HTML page of tables, plots and samples.

`python -m srlm_jax.report --workdir=runs/demo` makes the page again from the files of the run.
"""
from collections import Counter
from collections.abc import Callable
import dataclasses
from typing import Any

from etils import epath
import jinja2

from srlm_jax import catalog, InputError, records, schema
from srlm_jax.config import MODELS
from srlm_jax.report import plots, results, summaries
from srlm_jax.reward import health, scores as scoring

PROMPTS_SHOWN = 3  # held-out prompts with the responses of all models
JUDGEMENTS_SHOWN, PAIRS_SHOWN = 2, 2  # per iteration
_DATA_STAGES = ('prompts', 'respond', 'judge', 'pairs')  # they make an iteration's training data
_MAX_BARS = 11  # a judge's scale with more values is plotted without the unused ones
# What is added to the heading of a text, by the reason why it ends.
_FINISHES = {schema.EOS: '', schema.CUT: ', cut', schema.TOO_LONG: ', not sampled: prompt too long'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
  """metrics.jsonl: what is plotted of a training step."""
  step: int
  loss: float | None = None
  margin: float | None = None
  accuracy: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle:
  """oracle.json: what is plotted of it."""
  score: float
  standard_error: float


@dataclasses.dataclass
class Iteration:
  """The data that a model was trained on: records, and summaries of stages, if they finished."""
  model: str
  prompts: schema.PromptsSummary | None = None
  responses: list[schema.Response] = dataclasses.field(default_factory=list)
  judgements: list[schema.Judgement] = dataclasses.field(default_factory=list)
  judge: schema.JudgeSummary | None = None
  quorum: int | None = None
  samples: list[tuple[schema.Judgement, schema.Response | None]] = dataclasses.field(
      default_factory=list)
  pairs: list[schema.Pair] = dataclasses.field(default_factory=list)
  pairs_summary: schema.PairsSummary | None = None


@dataclasses.dataclass
class Run:
  """The contents of the page. Dictionaries by model contain only the models with such a file."""
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
  oracle: dict[str, Oracle] = dataclasses.field(default_factory=dict)
  graded: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by prompt id
  eft: dict[str, schema.EftSummary] = dataclasses.field(default_factory=dict)

  def summary(self, owner: str, name: str):
    """The summary of a stage; None if it has not finished."""
    return self.stages[owner, name].summary if (owner, name) in self.stages else None

  @property
  def total_seconds(self) -> float:
    return sum(stage.seconds or 0 for stage in self.stages.values())


def remake(workdir):
  """Writes report.html from the files of a run, finished or not; returns its path.

  Raises InputError if the run has no model or a damaged file.
  """
  workdir = epath.Path(workdir)
  rows, before = results.of_models(workdir), summaries.run_results(workdir)
  if not rows:
    raise InputError(f'{workdir} contains no model; make one with the loop: '
                     f'python -m srlm_jax.loop --help')
  is_current = [row.model for row in before.models] == [row['model'] for row in rows]
  return write(workdir, rows, before.stopped if is_current else '')


def write(workdir, rows: list[dict], stopped: str):
  """Writes WORKDIR/report.html, which needs no other file; returns its path.

  `rows`: see `results.of_models`; `stopped`: why the loop stopped early, or ''.
  """
  path = epath.Path(workdir) / 'report.html'
  html = render(collect(workdir, rows, stopped))
  html = html.encode('utf-8', 'replace').decode()  # a folder name may not be UTF-8
  with records.replacing(path) as file:
    file.write(html)
  return path


def counts(dropped: dict[str, int]) -> str:
  """Counts by reason as text.

  >>> counts({'held out': 3, 'too long': 1})
  '3 held out, 1 too long'
  """
  return ', '.join(f'{n} {reason}' for reason, n in dropped.items()) or 'nothing dropped'


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
      oracle=by_model(lambda folder: results.read(folder / 'oracle' / 'oracle.json', Oracle)),
      graded=by_model(results.graded),
      eft=by_model(lambda folder: summaries.summary(folder / 'eft')))


def render(run: Run) -> str:
  """Run -> HTML. All texts of models are escaped."""
  environment = jinja2.Environment(autoescape=True, trim_blocks=True,
                                   undefined=jinja2.StrictUndefined)
  environment.filters['text'] = _text
  source = (epath.resource_path('srlm_jax') / 'report' / 'page.html').read_text()
  yields_by_model = {iteration.model: yields(iteration) for iteration in run.iterations}
  labels = list(dict.fromkeys(label for found in yields_by_model.values() for label in found))
  return environment.from_string(source).render(
      run=run, head=head(run), warnings=warnings(run), tables=results.tables(run.rows),
      labels=labels, yields=yields_by_model, training_plots=training_plots(run),
      score_plots=score_plots(run), answer_plots=answer_plots(run), stage_names=catalog.NAMES,
      prompts_shown=PROMPTS_SHOWN, pairs_shown=PAIRS_SHOWN, finishes=_FINISHES)


def head(run: Run) -> list[str]:
  """Sentences on the run: size, models, why it stopped, unfinished stages and the judge."""
  made = [row['model'] for row in run.rows]
  missing = [model for model in MODELS if model not in (*made, 'm4')]  # m4 is optional
  size = f', size {run.size}' if run.size else ''
  model = f', model {name}' if (name := _last(run, 'model')) else ''
  sentences = [f'A run of self-rewarding training{size}{model}. It contains the models '
               f'{", ".join(made)}.']
  if run.stopped:
    untrained = missing[0] if missing else 'a model'
    sentences.append(f'It stopped, and {untrained} was not trained: {run.stopped}.')
  elif missing:
    sentences.append(f'It does not contain {", ".join(missing)}.')
  if unfinished := [f'{owner}/{name}' for (owner, name), stage in run.stages.items()
                    if stage.seconds is None]:
    sentences.append(f'Started but not finished: {", ".join(unfinished)}.')
  if template := _last(run, 'judge_template'):
    sentences.append(_judge_sentence(run, template))
  return sentences


def warnings(run: Run) -> list[str]:
  """A sentence for each statistic that indicates a known failure."""
  judged = {f'{i.model}/judge': i.judgements for i in run.iterations}
  judged |= {f'{model}/judge_eval': found for model, found in run.judged_eval.items()}
  responses = {f'{i.model}/respond': i.responses for i in run.iterations}
  responses |= {f'{model}/answers': by_id.values() for model, by_id in run.answers.items()}
  found = []
  for title, rows in judged.items():
    found += health.warn_judgements(title, rows)
  for title, rows in responses.items():
    found += health.warn_responses(title, rows)
  for i in run.iterations:
    if i.responses and i.judgements and i.quorum:
      found += health.warn_ties(f'{i.model}/judge', i.responses, i.judgements, i.quorum)
    if i.pairs_summary and not i.pairs_summary.positives:
      found += health.warn_pairs(f'{i.model}/pairs', i.pairs, i.pairs_summary.prompts)
  for (owner, name), stage in run.stages.items():
    made = stage.summary
    if name == 'model' and made and sum(made.dropped.values()) > made.examples:
      found.append(f'{owner}/model: trained on {made.examples:,} examples; '
                   f'dropped {counts(made.dropped)}.')
  return found


def yields(iteration: Iteration) -> dict[str, str]:
  """Label -> the number of records that each step of an iteration made or dropped, as text."""
  prompts, judgements, pairs = iteration.prompts, iteration.judgements, iteration.pairs_summary
  found = {}
  if prompts:
    found |= {'prompts wanted': prompts.wanted, 'attempts': prompts.attempts,
              'prompts accepted': prompts.prompts, 'attempts dropped': prompts.dropped}
  if finish := Counter(r.finish for r in iteration.responses):
    found |= {'responses': finish.total(), 'finished': finish[schema.EOS],
              'cut at the length limit': finish[schema.CUT],
              'prompt too long': finish[schema.TOO_LONG]}
  if judgements:
    unparsed = health.unparsed(judgements)
    found |= {'judgements': len(judgements), 'parsed': len(judgements) - unparsed.total(),
              'not parsed': unparsed}
  if pairs:
    if pairs.positives:
      found['positives'] = pairs.positives
    found |= {'pairs': pairs.pairs, 'pairs per 1,000 prompts': pairs.pairs_per_1000_prompts,
              'prompts without a pair': pairs.dropped,
              'chosen minus rejected: score': pairs.margin,
              'chosen minus rejected: characters': pairs.chosen_minus_rejected_characters}
  return {label: _text(value) for label, value in found.items()}


def training_plots(run: Run) -> list[tuple[str, str]]:
  """(image, description) of each training curve; images are data URIs."""
  made = []
  for model, lines in run.curves.items():
    for name, level in (('loss', None), ('margin', 0), ('accuracy', 0.5)):
      if points := [(line.step + 1, value) for line in lines
                    if (value := getattr(line, name)) is not None]:
        (first, a), (last, b) = points[0], points[-1]
        made.append((plots.curve(f'{model}: {name}', points, level),
                     f'{name} of {model}: {a:.4g} at step {first}, {b:.4g} at step {last}'))
  return made


def score_plots(run: Run) -> list[tuple[str, str]]:
  """(image, description) of the judge's scores in each iteration."""
  made = []
  for i in run.iterations:
    bars = scoring.histogram(j.score for j in i.judgements if j.score is not None)
    if not bars:
      continue
    if i.judge:
      scale = range(round(i.judge.lowest), round(i.judge.highest) + 1)
      if 0 < len(scale) <= _MAX_BARS:
        bars = {str(value): bars.get(str(value), 0) for value in scale}
    made.append((plots.bars(f'{i.model}: scores', bars), f'scores for {i.model}: {bars}'))
  return made


def answer_plots(run: Run) -> list[tuple[str, str]]:
  """(image, description) of the oracle scores and the lengths of the held-out responses."""
  made = []
  if scores := {model: round(found.score, 3) for model, found in run.oracle.items()}:
    errors = [found.standard_error for found in run.oracle.values()]
    made.append((plots.bars('oracle score, 0 to 5', scores, '%.2f', errors),
                 f'oracle score: {scores}'))
  if lengths := {model: round(sum(len(r.response) for r in by_id.values()) / len(by_id), 1)
                 for model, by_id in run.answers.items()}:
    made.append((plots.bars('characters per answer', lengths, '%.0f'), f'characters: {lengths}'))
  return made


def _iteration(folder, stages: dict[tuple[str, str], summaries.Started]) -> Iteration:
  """Reads the data that one model was trained on."""
  own = {name: stage for (owner, name), stage in stages.items() if owner == folder.name}
  quorums = [quorum for stage in own.values() if (quorum := stage.config.judge_quorum)]
  judgements = _shards(folder / 'judge', 'judgements', schema.Judgement)
  responses = {r.id: r for r in _shards(folder / 'respond', 'responses', schema.Response)}
  # One sample of each kind: every judgement index, with a score and without.
  kinds = {(j.index, j.score is None): j for j in reversed(judgements)}
  samples = [kinds[kind] for kind in sorted(kinds)][:JUDGEMENTS_SHOWN]
  return Iteration(
      model=folder.name, prompts=_prompts(folder, own['prompts']) if 'prompts' in own else None,
      responses=list(responses.values()), judgements=judgements,
      judge=own['judge'].summary if 'judge' in own else None,
      quorum=quorums[0] if quorums else None,
      samples=[(j, responses.get(j.response_id)) for j in samples],
      pairs=results.lines(folder / 'pairs' / 'pairs.jsonl', schema.Pair),
      pairs_summary=summaries.summary(folder / 'pairs'))


def _prompts(folder, stage: summaries.Started) -> schema.PromptsSummary:
  """The summary of the prompts stage; counted from its attempts if the stage has not finished."""
  if stage.summary:
    return stage.summary
  attempts = results.lines(folder / 'prompts' / 'attempts.jsonl', schema.Attempt)
  reasons = Counter(attempt.reason for attempt in attempts)
  return schema.PromptsSummary(
      wanted=stage.config.prompts_count, attempts=reasons.total(), prompts=reasons.pop('', 0),
      near_held_out=0, shortened=0, dropped=reasons)


def _last(run: Run, key: str):
  """The value of a config key in the last stage that records it; None if no stage does."""
  values = [getattr(stage.config, key) for stage in run.stages.values()]
  return next((value for value in reversed(values) if value), None)


def _judge_sentence(run: Run, template: str) -> str:
  sentence = f'Judge: template {template}'
  made = [found for owner, name in run.stages
          if name == 'judge' and (found := run.summary(owner, name))]
  if made:
    sentence += f', scores {made[0].lowest:g} to {made[0].highest:g}'
  n, quorum = _last(run, 'judge_n'), _last(run, 'judge_quorum')
  if n and quorum:
    sentence += f'; {n} judgements per response, of which {quorum} must have a score'
  return sentence + '.'


def _text(value) -> str:
  """A number with thousands separators; counts by reason as one line each."""
  if isinstance(value, dict):
    return '\n'.join(f'{n:,} {reason}' for reason, n in value.items()) or 'none'
  if value is None:
    return '-'
  return value if isinstance(value, str) else f'{value:,}'


def _shards(folder, stem: str, kind: type[records.Record]) -> list[records.Record]:
  """The records of all shards; [] if there are none."""
  paths = sorted(folder.glob(f'{stem}-*-of-*.jsonl'))
  return [r for path in paths for r in results.lines(path, kind)]
