"""The results of a run as one HTML page of tables, plots and samples.

`python -m srlm_jax.report --workdir=runs/demo` makes the page again from the files of the run.
"""
from collections import Counter
from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from etils import epath
import jinja2

from srlm_jax import catalog, InputError, records
from srlm_jax.config import MODELS
from srlm_jax.report import plots, results, summaries
from srlm_jax.reward import health, scores as scoring

PROMPTS_SHOWN = 3  # held-out prompts with the responses of all models
JUDGEMENTS_SHOWN, PAIRS_SHOWN = 2, 2  # per iteration
_DATA_STAGES = ('prompts', 'respond', 'judge', 'pairs')  # they make an iteration's training data
_MAX_BARS = 11  # a judge's scale with more values is plotted without the unused ones


class StageFiles(NamedTuple):
  """The summaries of a stage that has started."""
  manifest: dict
  done: dict  # {} if the stage has not finished


@dataclasses.dataclass
class Iteration:
  """The data that a model was trained on: records, and summaries as in done.json ({} if absent)."""
  model: str
  prompts: dict = dataclasses.field(default_factory=dict)
  responses: list[dict] = dataclasses.field(default_factory=list)
  judgements: list[dict] = dataclasses.field(default_factory=list)
  judge: dict = dataclasses.field(default_factory=dict)
  quorum: int | None = None
  samples: list[tuple[dict, dict | None]] = dataclasses.field(default_factory=list)
  pairs: list[dict] = dataclasses.field(default_factory=list)
  pairs_done: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Run:
  """The contents of the page. Dictionaries by model contain only the models with such a file."""
  workdir: str = ''
  size: str = ''
  stopped: str = ''  # why the loop stopped early, or ''
  rows: list[dict] = dataclasses.field(default_factory=list)  # see results.of_models
  stages: dict[tuple[str, str], StageFiles] = dataclasses.field(default_factory=dict)
  iterations: list[Iteration] = dataclasses.field(default_factory=list)
  curves: dict[str, list[dict]] = dataclasses.field(default_factory=dict)  # metrics by step
  judged_eval: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
  answers: dict[str, dict[str, dict]] = dataclasses.field(default_factory=dict)  # by prompt id
  oracle: dict[str, dict] = dataclasses.field(default_factory=dict)
  graded: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by prompt id
  eft: dict[str, dict] = dataclasses.field(default_factory=dict)

  def done(self, owner: str, stage: str) -> dict:
    """The done.json of a stage; {} if it has not finished."""
    return self.stages[owner, stage].done if (owner, stage) in self.stages else {}

  @property
  def total_seconds(self) -> float:
    return sum(files.done.get('seconds', 0) for files in self.stages.values())


def remake(workdir):
  """Writes report.html from the files of a run, finished or not; returns its path.

  Raises InputError if the run has no model or a damaged file.
  """
  workdir = epath.Path(workdir)
  summaries.check_table(workdir)
  rows, before = results.of_models(workdir), summaries.run_results(workdir / 'results.json')
  if not rows:
    raise InputError(f'{workdir} contains no model; make one with the loop: '
                     f'python -m srlm_jax.loop --help')
  is_current = [row['model'] for row in before['models']] == [row['model'] for row in rows]
  return write(workdir, rows, before['stopped'] if is_current else '')


def write(workdir, rows: list[dict], stopped: str):
  """Writes WORKDIR/report.html, which needs no other file; returns its path.

  `rows`: see `results.of_models`; `stopped`: why the loop stopped early, or ''.
  """
  path = epath.Path(workdir) / 'report.html'
  html = render(collect(workdir, rows, stopped))
  html = html.encode('utf-8', 'replace').decode()  # unpaired surrogates in damaged texts
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
  stages = {key: StageFiles(summaries.manifest(folder / 'manifest.json'),
                            summaries.done(folder / 'done.json'))
            for key, folder in folders.items() if (folder / 'manifest.json').exists()}

  def by_model(read: Callable[[epath.Path], Any]) -> dict:
    return {model: found for model in MODELS if (found := read(workdir / model))}

  oracle_fields = summaries.Fields(numbers=('score', 'standard_error'))
  return Run(
      workdir=workdir.name, stopped=stopped, rows=rows, stages=stages,
      size=summaries.run_results(workdir / 'results.json').get('size', ''),
      iterations=[_iteration(workdir / model, stages) for model in MODELS
                  if any((model, name) in stages for name in _DATA_STAGES)],
      curves=by_model(lambda folder: results.lines(
          folder / 'model' / 'metrics.jsonl', 'step', optional=('loss', 'margin', 'accuracy'))),
      judged_eval=by_model(lambda folder: _shards(
          folder / 'judge_eval', 'judgements', 'score', 'reason')),
      answers=by_model(lambda folder: {r['prompt_id']: r for r in _shards(
          folder / 'answers', 'responses', 'prompt_id', 'prompt', 'response', 'finish')}),
      oracle=by_model(lambda folder: summaries.read(
          folder / 'oracle' / 'oracle.json', oracle_fields)),
      graded=by_model(results.graded),
      eft=by_model(lambda folder: summaries.done(folder / 'eft' / 'done.json')))


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
      prompts_shown=PROMPTS_SHOWN, pairs_shown=PAIRS_SHOWN)


def head(run: Run) -> list[str]:
  """Sentences on the run: size, models, why it stopped, unfinished stages and the judge."""
  made = [row['model'] for row in run.rows]
  missing = [model for model in MODELS if model not in (*made, 'm4')]  # m4 is optional
  config = {}  # of all stages
  for files in run.stages.values():
    config |= {key: value for key, value in files.manifest['config'].items() if value != ''}
  size = f', size {run.size}' if run.size else ''
  model = f', model {config["model"]}' if 'model' in config else ''
  sentences = [f'A run of self-rewarding training{size}{model}. It contains the models '
               f'{", ".join(made)}.']
  if run.stopped:
    untrained = missing[0] if missing else 'a model'
    sentences.append(f'It stopped, and {untrained} was not trained: {run.stopped}.')
  elif missing:
    sentences.append(f'It does not contain {", ".join(missing)}.')
  if unfinished := [f'{owner}/{name}' for (owner, name), files in run.stages.items()
                    if not files.done]:
    sentences.append(f'Started but not finished: {", ".join(unfinished)}.')
  if 'judge.template' in config:
    sentences.append(_judge_sentence(run, config))
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
    if i.pairs_done and not i.pairs_done.get('positives'):
      found += health.warn_pairs(f'{i.model}/pairs', i.pairs, i.pairs_done['prompts'])
  for (owner, name), files in run.stages.items():
    done = files.done
    if name == 'model' and done and sum(done['dropped'].values()) > done['examples']:
      found.append(f'{owner}/model: trained on {done["examples"]:,} examples; '
                   f'dropped {counts(done["dropped"])}.')
  return found


def yields(iteration: Iteration) -> dict[str, str]:
  """Label -> the number of records that each step of an iteration made or dropped, as text."""
  prompts, judgements, pairs = iteration.prompts, iteration.judgements, iteration.pairs_done
  found = {}
  if prompts:
    found |= {'prompts wanted': prompts['wanted'], 'attempts': prompts['attempts'],
              'prompts accepted': prompts['prompts'], 'attempts dropped': prompts['dropped']}
  if finish := Counter(r['finish'] for r in iteration.responses):
    found |= {'responses': finish.total(), 'finished': finish['eos'],
              'cut at the length limit': finish['length'], 'prompt too long': finish['too_long']}
  if judgements:
    unparsed = health.unparsed(judgements)
    found |= {'judgements': len(judgements), 'parsed': len(judgements) - unparsed.total(),
              'not parsed': unparsed}
  if pairs:
    if pairs.get('positives'):
      found['positives'] = pairs['positives']
    found |= {'pairs': pairs['pairs'], 'pairs per 1,000 prompts': pairs['pairs_per_1000_prompts'],
              'prompts without a pair': pairs['dropped'],
              'chosen minus rejected: score': pairs.get('margin'),
              'chosen minus rejected: characters': pairs.get('chosen_minus_rejected_characters')}
  return {label: _text(value) for label, value in found.items()}


def training_plots(run: Run) -> list[tuple[str, str]]:
  """(image, description) of each training curve; images are data URIs."""
  made = []
  for model, lines in run.curves.items():
    for name, level in (('loss', None), ('margin', 0), ('accuracy', 0.5)):
      if points := [(line['step'] + 1, line[name]) for line in lines if name in line]:
        (first, a), (last, b) = points[0], points[-1]
        made.append((plots.curve(f'{model}: {name}', points, level),
                     f'{name} of {model}: {a:.4g} at step {first}, {b:.4g} at step {last}'))
  return made


def score_plots(run: Run) -> list[tuple[str, str]]:
  """(image, description) of the judge's scores in each iteration."""
  made = []
  for i in run.iterations:
    bars = scoring.histogram(j['score'] for j in i.judgements if j['score'] is not None)
    if not bars:
      continue
    if i.judge:
      scale = range(round(i.judge['lowest']), round(i.judge['highest']) + 1)
      if 0 < len(scale) <= _MAX_BARS:
        bars = {str(value): bars.get(str(value), 0) for value in scale}
    made.append((plots.bars(f'{i.model}: scores', bars), f'scores for {i.model}: {bars}'))
  return made


def answer_plots(run: Run) -> list[tuple[str, str]]:
  """(image, description) of the oracle scores and the lengths of the held-out responses."""
  made = []
  if scores := {model: round(found['score'], 3) for model, found in run.oracle.items()}:
    errors = [found['standard_error'] for found in run.oracle.values()]
    made.append((plots.bars('oracle score, 0 to 5', scores, '%.2f', errors),
                 f'oracle score: {scores}'))
  if lengths := {model: round(sum(len(r['response']) for r in by_id.values()) / len(by_id), 1)
                 for model, by_id in run.answers.items()}:
    made.append((plots.bars('characters per answer', lengths, '%.0f'), f'characters: {lengths}'))
  return made


def _iteration(folder, stages: dict[tuple[str, str], StageFiles]) -> Iteration:
  """Reads the data that one model was trained on."""
  model = folder.name
  own = {name: files for (owner, name), files in stages.items() if owner == model}
  empty = StageFiles({}, {})
  quorums = [files.manifest['config']['judge.quorum'] for files in own.values()
             if 'judge.quorum' in files.manifest['config']]
  judgements = _shards(folder / 'judge', 'judgements', 'response_id', 'j', 'score', 'reason',
                       'text', 'finish')
  responses = {r['id']: r for r in _shards(
      folder / 'respond', 'responses', 'id', 'prompt_id', 'prompt', 'response', 'finish')}
  # One sample of each kind: every judgement index, with a score and without.
  kinds = {(j['j'], j['score'] is None): j for j in reversed(judgements)}
  samples = [kinds[kind] for kind in sorted(kinds)][:JUDGEMENTS_SHOWN]
  pair_fields = [side + field for side in ('chosen', 'rejected')
                 for field in ('', '_score', '_finish')]
  return Iteration(
      model=model, prompts=_prompts(folder, own.get('prompts', empty)),
      responses=list(responses.values()), judgements=judgements,
      judge=own.get('judge', empty).done, quorum=quorums[0] if quorums else None,
      samples=[(j, responses.get(j['response_id'])) for j in samples],
      pairs=results.lines(folder / 'pairs' / 'pairs.jsonl', 'prompt', *pair_fields),
      pairs_done=summaries.done(folder / 'pairs' / 'done.json'))


def _prompts(folder, files: StageFiles) -> dict:
  """The summary of the prompts stage; counted from its attempts if the stage has not finished."""
  if files.done or not files.manifest:
    return files.done
  attempts = results.lines(folder / 'prompts' / 'attempts.jsonl', 'dropped')
  reasons = Counter(attempt['dropped'] for attempt in attempts)
  return dict(wanted=files.manifest['config'].get('prompts.count'), attempts=reasons.total(),
              prompts=reasons.pop('', 0), dropped=reasons)


def _judge_sentence(run: Run, config: dict) -> str:
  sentence = f'Judge: template {config["judge.template"]}'
  done = [files.done for (_, name), files in run.stages.items() if name == 'judge' and files.done]
  if done:
    sentence += f', scores {done[0]["lowest"]:g} to {done[0]["highest"]:g}'
  if {'judge.n', 'judge.quorum'} <= config.keys():
    sentence += (f'; {config["judge.n"]} judgements per response, of which '
                 f'{config["judge.quorum"]} must have a score')
  return sentence + '.'


def _text(value) -> str:
  """A number with thousands separators; counts by reason as one line each."""
  if isinstance(value, dict):
    return '\n'.join(f'{n:,} {reason}' for reason, n in value.items()) or 'none'
  if value is None:
    return '-'
  return value if isinstance(value, str) else f'{value:,}'


def _shards(folder, stem: str, *fields: str) -> list[dict]:
  """The records of all shards; [] if there are none."""
  paths = sorted(folder.glob(f'{stem}-*-of-*.jsonl'))
  return [r for path in paths for r in results.lines(path, *fields)]
