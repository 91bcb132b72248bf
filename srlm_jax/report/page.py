"""What a run found, as one HTML page of tables, plots and samples.

`python -m srlm_jax.report --workdir=runs/demo` makes the page again from the files of the run.
"""
import base64
from collections import Counter
import io
import json

from etils import epath
import jinja2
import matplotlib
from matplotlib import figure, ticker

from srlm_jax import catalog, InputError, records, stage
from srlm_jax.report import results
from srlm_jax.reward import health, scores as scoring

SAMPLES = dict(prompts=3, judgements=2, pairs=2)  # shown: held-out prompts; of each iteration the others
# What the page reads of done.json, by stage: numbers; numbers or null; counts by name.
DONE = dict(
    prompts=('wanted attempts prompts', '', 'dropped'), judge=('lowest highest', '', ''),
    pairs=('pairs prompts pairs_per_1000_prompts', 'margin chosen_minus_rejected_characters',
           'dropped'),
    eft=('examples replies', '', 'dropped scores_before scores'),
    model=('steps examples', '', 'dropped'))
NUMBERS = ('judge.n', 'judge.quorum', 'prompts.count')  # and of the manifest's config; and texts
TEXTS = ('judge.template', 'model')


def remake(workdir):
  """Writes report.html from the files of a run, finished or not; returns its path."""
  check_table(epath.Path(workdir))
  rows, before = results.of_models(workdir), _results(epath.Path(workdir) / 'results.json')
  if not rows:
    raise InputError(f'{workdir} holds no model; the loop makes them: python -m srlm_jax.loop --help')
  same = [r['model'] for r in before.get('models', ())] == [r['model'] for r in rows]  # else older
  return write(workdir, rows, before['stopped'] if same else '')


def counts(dropped: dict) -> str:
  return ', '.join(f'{n} {why}' for why, n in dropped.items()) or 'nothing dropped'


def write(workdir, rows, stopped: str):
  """Writes workdir/report.html, one page that needs no other file; returns its path."""
  path = epath.Path(workdir) / 'report.html'
  page = render(dict(collect(workdir), rows=rows, stopped=stopped))
  page = page.encode('utf-8', 'replace').decode()  # half a character (\ud800) in a damaged text
  with records.replacing(path) as file:
    file.write(page)
  return path


def collect(workdir) -> dict:
  """All that the page shows, read from the files that are there."""
  workdir = epath.Path(workdir)
  stages = {(owner, name): (_manifest(folder / 'manifest.json'), _done(folder / 'done.json'))
            for owner in ('data', *results.MODELS) for name in catalog.NAMES
            if ((folder := workdir / owner / name) / 'manifest.json').exists()}
  parts = dict(
      curves=lambda folder: results.lines(folder / 'model' / 'metrics.jsonl', 'step',
                                          optional=('loss', 'margin', 'accuracy')),
      judged_eval=lambda folder: _shards(folder / 'judge_eval', 'judgements', 'score', 'reason'),
      answers=lambda folder: {r['prompt_id']: r for r in _shards(
          folder / 'answers', 'responses', 'prompt_id', 'prompt', 'response', 'finish')},
      oracle=lambda folder: _numbers(folder / 'oracle' / 'oracle.json', 'score standard_error'),
      graded=results.graded,
      eft=lambda folder: _done(folder / 'eft' / 'done.json'))
  return dict(
      workdir=workdir.name, size=_results(workdir / 'results.json').get('size', ''), stages=stages,
      iterations=[_iteration(workdir / m, stages) for m in results.MODELS
                  if any((m, n) in stages for n in results.DATA)],
      **{part: {m: found for m in results.MODELS if (found := read(workdir / m))} for part, read in parts.items()})


def _iteration(folder, stages) -> dict:
  """What one model's data was made from: its records, and the counts of prompts and pairs."""
  manifest, prompts = stages.get((folder.name, 'prompts'), ({}, {}))
  if manifest and not prompts:  # killed, or at work
    fates = Counter(a['dropped'] for a in results.lines(
        folder / 'prompts' / 'attempts.jsonl', 'dropped'))
    prompts = dict(wanted=manifest['config'].get('prompts.count'), attempts=fates.total(),
                   prompts=fates.pop('', 0), dropped=fates)
  judgements = _shards(folder / 'judge', 'judgements', 'response_id', 'j', 'score', 'reason',
                       'text', 'finish')
  first = {(j['j'], j['score'] is None): j for j in reversed(judgements)}  # with a score and without
  shown = [first[kind] for kind in sorted(first)][:SAMPLES['judgements']]
  responses = {r['id']: r for r in _shards(
      folder / 'respond', 'responses', 'id', 'prompt_id', 'prompt', 'response', 'finish')}
  pairs = results.lines(folder / 'pairs' / 'pairs.jsonl', 'prompt', *(
      side + field for side in ('chosen', 'rejected') for field in ('', '_score', '_finish')))
  return dict(model=folder.name, prompts=prompts, responses=list(responses.values()), judgements=judgements,
              judge=stages.get((folder.name, 'judge'), ({}, {}))[1],
              quorum=next((manifest['config']['judge.quorum'] for (owner, _), (manifest, _) in stages.items()
                           if owner == folder.name and 'judge.quorum' in manifest['config']), None),
              shown=[(j, responses.get(j['response_id'])) for j in shown],
              made=_done(folder / 'pairs' / 'done.json'), pairs=pairs)


def render(page: dict) -> str:
  """What `collect` found, with `rows` and `stopped` -> HTML; every text of a model is escaped."""
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
  environment.filters['text'] = _text
  template = environment.from_string((epath.resource_path('srlm_jax') / 'report' / 'page.html').read_text())
  made = {i['model']: yields(i) for i in page['iterations']}
  labels = dict.fromkeys(label for found in made.values() for label in found)  # in order, each once
  return template.render(page, head=head(page), warnings=warnings(page), tables=results.tables(page['rows']),
                         labels=labels, yields=made, plots=plots(page), names=catalog.NAMES, shown=SAMPLES)


def head(page: dict) -> list[str]:
  """What ran, which models there are, where it stopped and why: a few sentences."""
  made = [r['model'] for r in page['rows']]
  missing = [m for m in results.MODELS if m not in (*made, 'm4')]  # m4 is made where it is asked for
  config = {}  # of all stages
  for manifest, _ in page['stages'].values():
    config |= {key: value for key, value in manifest['config'].items() if value != ''}
  model = config.get('model', '')
  size = f', size {page["size"]}' * bool(page['size']) + f', model {model}' * bool(model)
  text = [f'A run of self-rewarding training{size}. It holds the models {", ".join(made)}.']
  if page['stopped']:
    text.append(f'It stopped, and {(missing or ["a model"])[0]} was not trained: {page["stopped"]}.')
  elif missing:
    text.append(f'It does not hold {", ".join(missing)}.')
  if begun := [f'{owner}/{name}' for (owner, name), (_, done) in page['stages'].items() if not done]:
    text.append(f'Begun and not finished: {", ".join(begun)}.')
  if 'judge.template' in config:
    scale = next((f', scores {done["lowest"]:g} to {done["highest"]:g}'
                  for (_, name), (_, done) in page['stages'].items() if name == 'judge' and done), '')
    judged = (f'; {config["judge.n"]} judgements per response, of which {config["judge.quorum"]} must have a score'
              if {'judge.n', 'judge.quorum'} <= config.keys() else '')
    text.append(f'Judge: template {config["judge.template"]}{scale}{judged}.')
  return text


def warnings(page: dict) -> list[str]:
  """A sentence for each number that looks like a known failure."""
  judged = {f'{i["model"]}/judge': i['judgements'] for i in page['iterations']}
  judged |= {f'{m}/judge_eval': judgements for m, judgements in page['judged_eval'].items()}
  texts = {f'{i["model"]}/respond': i['responses'] for i in page['iterations']}
  texts |= {f'{m}/answers': answers.values() for m, answers in page['answers'].items()}
  found = [sentence for title, judgements in judged.items() for sentence in health.warn_judgements(title, judgements)]
  found += [sentence for title, made in texts.items() for sentence in health.warn_responses(title, made)]
  for i in page['iterations']:
    if i['responses'] and i['judgements'] and i['quorum']:
      found += health.warn_ties(f'{i["model"]}/judge', i['responses'], i['judgements'], i['quorum'])
    if i['made'] and not i['made'].get('positives'):
      found += health.warn_pairs(f'{i["model"]}/pairs', i['pairs'], i['made']['prompts'])
  for (owner, name), (_, done) in page['stages'].items():
    if name == 'model' and done and sum(done['dropped'].values()) > done['examples']:
      found.append(f'{owner}/model: trained on {done["examples"]:,} examples; dropped {counts(done["dropped"])}.')
  return found


def yields(iteration: dict) -> dict[str, str]:
  """What each step of one iteration was given and gave, by label; a reason a line."""
  prompts, judgements, made = iteration['prompts'], iteration['judgements'], iteration['made']
  finish, unparsed = Counter(r['finish'] for r in iteration['responses']), health.unparsed(judgements)
  found = {}
  if prompts:
    found = {'prompts wanted': prompts['wanted'], 'attempts': prompts['attempts'],
             'prompts accepted': prompts['prompts'], 'attempts dropped': prompts['dropped']}
  if finish:
    found |= {'responses': finish.total(), 'finished': finish['eos'],
              'cut at the length limit': finish['length'], 'prompt too long': finish['too_long']}
  if judgements:
    found |= {'judgements': len(judgements), 'parsed': len(judgements) - unparsed.total(),
              'not parsed': unparsed}
  if made:
    found |= {'positives': made['positives']} if made.get('positives') else {}
    found |= {'pairs': made['pairs'], 'pairs per 1,000 prompts': made['pairs_per_1000_prompts'],
              'prompts without a pair': made['dropped'],
              'chosen minus rejected: score': made.get('margin'),
              'chosen minus rejected: characters': made.get('chosen_minus_rejected_characters')}
  return {label: _text(value) for label, value in found.items()}


def plots(page: dict) -> dict[str, list[tuple[str, str]]]:
  """{section: [(image as a data URI, the same in words)]}."""
  made = dict(training=[], scores=[], answers=[])
  for model, lines in page['curves'].items():
    for name, level in (('loss', None), ('margin', 0), ('accuracy', 0.5)):
      if points := [(line['step'] + 1, line[name]) for line in lines if name in line]:
        (first, a), (last, b) = points[0], points[-1]
        made['training'].append((_curve(f'{model}: {name}', points, level),
                                 f'{name} of {model}: {a:.4g} at step {first}, {b:.4g} at step {last}'))
  for i in page['iterations']:
    if scores := scoring.histogram(j['score'] for j in i['judgements'] if j['score'] is not None):
      values = range(round(i['judge']['lowest']), round(i['judge']['highest']) + 1) if i['judge'] else ()
      bars = {str(v): scores.get(str(v), 0) for v in values} if 0 < len(values) <= 11 else scores
      made['scores'].append((_bars(f'{i["model"]}: scores', bars), f'scores for {i["model"]}: {bars}'))
  if scores := {m: round(o['score'], 3) for m, o in page['oracle'].items()}:
    errors = [o['standard_error'] for o in page['oracle'].values()]
    made['answers'].append((_bars('oracle score, of 5', scores, '%.2f', errors), f'oracle score: {scores}'))
  if lengths := {m: round(sum(len(r['response']) for r in by_id.values()) / len(by_id), 1)
                 for m, by_id in page['answers'].items()}:
    made['answers'].append((_bars('characters an answer', lengths, '%.0f'), f'characters: {lengths}'))
  return made


def _curve(title: str, points, level: float | None) -> str:
  fig, ax = _axes(title)
  ax.plot(*zip(*points, strict=True), '.-' if len(points) < 30 else '-', color='#2a5d9c', linewidth=1.4)
  if level is not None:
    ax.axhline(level, color='#999', linewidth=0.8, linestyle='--')
  ax.set_xlabel('step')
  ax.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  return _uri(fig)


def _bars(title: str, values: dict, form='%d', errors=None) -> str:
  fig, ax = _axes(title)
  bars = ax.bar(list(values), list(values.values()), yerr=errors, color='#2a5d9c', width=0.7, capsize=3)
  ax.bar_label(bars, fmt=form, fontsize=8, padding=2)
  ax.margins(y=0.15)
  return _uri(fig)


def _axes(title: str):
  fig = figure.Figure(figsize=(3.4, 2.3), layout='constrained')
  ax = fig.subplots()
  ax.set_title(title, fontsize=10)
  ax.tick_params(labelsize=8)
  ax.spines[['top', 'right']].set_visible(False)
  return fig, ax


def _uri(fig) -> str:
  file = io.BytesIO()
  with matplotlib.rc_context({'svg.hashsalt': 'srlm_jax'}):  # the same page from the same files
    fig.savefig(file, format='svg', metadata=dict(Date=None))
  return 'data:image/svg+xml;base64,' + base64.b64encode(file.getvalue()).decode()


def _text(value) -> str:
  """A number with its thousands apart; of a dict an entry a line."""
  if isinstance(value, dict):
    return '\n'.join(f'{n:,} {why}' for why, n in value.items()) or 'none'
  return '-' if value is None else value if isinstance(value, str) else f'{value:,}'


def check_table(workdir):
  """Raises InputError where a value that the table of models shows is not a number."""
  for file in {file for _, file, _, _ in results.COLUMNS if file}:
    keys = ' '.join(key for _, of, key, _ in results.COLUMNS if of == file)
    for model in results.MODELS:
      intervals = _numbers(workdir / model / file, nullable=keys).get('intervals', {})
      if not isinstance(intervals, dict) or not all(
          pair is None or isinstance(pair, list) and len(pair) == 2 and all(map(records.is_number, pair))
          for pair in intervals.values()):
        raise _damaged(workdir / model / file, 'intervals', intervals)


def _results(path) -> dict:
  """results.json, checked for what the page reads of it."""
  found = results.read(path)
  models, stopped = found.get('models', []), found.get('stopped', '')
  if not isinstance(models, list) or not all(isinstance(m, dict) and 'model' in m for m in models):
    raise _damaged(path, 'models', models)
  if not isinstance(stopped, str):
    raise _damaged(path, 'stopped', stopped)
  return dict(found, models=models, stopped=stopped)


def _manifest(path) -> dict:
  """The manifest of a stage, checked for what the page reads of its config."""
  found = results.read(path)
  if found and found.get('format') != stage.FORMAT:
    raise InputError(f'{path}: written by another version of srlm_jax; make the page with that version')
  config = found.get('config')
  if not isinstance(config, dict):
    raise _damaged(path, 'config', config)
  for keys, is_right in ((NUMBERS, records.is_number), (TEXTS, lambda value: isinstance(value, str))):
    for key in keys:
      if key in config and not is_right(config[key]):
        raise _damaged(path, f'config.{key}', config[key])
  return found


def _done(path) -> dict:
  """The done.json of a stage, checked for what the page reads of it; {} where there is none."""
  numbers, nullable, counts = DONE.get(path.parent.name, ('', '', ''))
  return _numbers(path, f'seconds {numbers}', f'positives {nullable}', counts)


def _numbers(path, numbers: str = '', nullable: str = '', counts: str = '') -> dict:
  """The JSON object of a file, of which `numbers` must be numbers, `nullable` numbers, null or
  absent, and `counts` numbers by name; {} where there is no file."""
  found = results.read(path)
  for key in found and numbers.split():
    if not records.is_number(found.get(key)):
      raise _damaged(path, key, found.get(key))
  for key in nullable.split():
    if found.get(key) is not None and not records.is_number(found[key]):
      raise _damaged(path, key, found[key])
  for key in found and counts.split():
    if not isinstance(found.get(key), dict) or not all(map(records.is_number, found[key].values())):
      raise _damaged(path, key, found.get(key))
  return found


def _damaged(path, key: str, value) -> InputError:
  what = f'no "{key}"' if value is None else f'"{key}" is {json.dumps(value)[:40]}'
  return InputError(f'{path}: {what}; mend or delete the file, and run the loop again')


def _shards(folder, stem: str, *fields: str) -> list[dict]:
  paths = sorted(folder.glob(f'{stem}-*-of-*.jsonl'))
  return [r for path in paths for r in results.lines(path, *fields)]
