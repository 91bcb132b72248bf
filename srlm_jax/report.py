"""What a run found: the table of all models, and one HTML page of tables, plots and samples.

`python -m srlm_jax.report --workdir=runs/demo` makes the page again from the files of the run.
"""
import base64
from collections import Counter
import io
import json
import statistics

from absl import flags
from etils import epath
import jinja2
import matplotlib
from matplotlib import figure, ticker

from srlm_jax import InputError
from srlm_jax.data import health, scores as scoring

# Column of the table: (heading, stage, key of its JSON, digits).
COLUMNS = (
    ('oracle 0-5', 'oracle/oracle.json', 'score', 2),
    ('+-', 'oracle/oracle.json', 'standard_error', 2),
    ('greedy', 'oracle/oracle.json', 'greedy', 2),
    ('gain', '', 'gain', 2),
    ('of gain +-', '', 'gain_error', 2),
    ('wins', '', 'wins', 2),
    ('losses', '', 'losses', 2),
    ('answer chars', 'oracle/oracle.json', 'characters', 1),
    ('judge: pairwise', 'agreement/agreement.json', 'pairwise_accuracy', 3),
    ('ties', 'agreement/agreement.json', 'ties', 3),
    ('exact', 'agreement/agreement.json', 'exact_match', 3),
    ('spearman', 'agreement/agreement.json', 'spearman', 3),
    ('kendall', 'agreement/agreement.json', 'kendall_tau', 3),
    ('parsed', 'agreement/agreement.json', 'parse_rate', 3),
    ('pairs', 'pairs/done.json', 'pairs', 0),
    ('right', 'audit/audit.json', 'right', 2),
    ('wrong', 'audit/audit.json', 'wrong', 2),
    ('judge mean', 'audit/audit.json', 'judge_mean', 2),
    ('oracle mean', 'audit/audit.json', 'oracle_mean', 2),
)
ON_PAGE = ('exact', 'spearman', 'kendall')  # columns that the terminal's table is too narrow for
MODELS = ('m0', 'sft', 'm1', 'm2', 'm3', 'm4')  # in the order of their training
DATA = ('prompts', 'respond', 'judge', 'pairs')
STAGES = ('seeds', *DATA, 'judge_again', 'respond_older', 'judge_older', 'implicit', 'meta_judge', 'health', 'audit',
          'eft', 'model', 'judge_eval', 'agreement', 'answers', 'answers_greedy', 'oracle')
SAMPLES = dict(prompts=3, judgements=2, pairs=2)  # shown: held-out prompts; of each iteration the others


def define_flags():
  flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)


def main(argv):
  from srlm_jax import stage  # here, for stage loads JAX, which the page does without
  stage.refuse_arguments(argv)
  stage.say(str(remake(flags.FLAGS.workdir)))


def remake(workdir):
  """Writes report.html from the files of a run, finished or not; returns its path."""
  rows, before = results(workdir, MODELS), _read(epath.Path(workdir) / 'results.json')
  if not rows:
    raise InputError(f'{workdir} holds no model; the loop makes them: python -m srlm_jax.loop --help')
  same = [r['model'] for r in before.get('models', ())] == [r['model'] for r in rows]  # else older
  return write(workdir, rows, before['stopped'] if same else '')


def results(workdir, models: list[str]) -> list[dict]:
  """One row a model that was trained: every column's number, None where the run has none."""
  rows = []
  for model in models:
    folder = epath.Path(workdir) / model
    if (folder / 'model' / 'done.json').exists() or model == 'm0' and (folder / 'model' / 'config.json').exists():
      paired = compared(workdir, model, [r['model'] for r in rows])
      numbers = {heading: (_read(folder / file) if file else paired).get(key) for heading, file, key, _ in COLUMNS}
      rows.append(dict(model=model, **numbers))
  return rows


def compared(workdir, model: str, before: list[str]) -> dict:
  """Graded answers of a model prompt by prompt: the mean gain over the model before it with its standard error, and the
  shares of prompts on which it wins and loses against the SFT baseline; {} where there is nothing to compare."""
  graded = {m: {r['prompt_id']: r['score'] for r in _lines(epath.Path(workdir) / m / 'oracle' / 'graded.jsonl')}
            for m in (*before, model)}
  mine, found = graded.pop(model), {}
  if mine and before and (last := graded[before[-1]]):
    gains = [mine[p] - last[p] for p in mine if p in last]
    found = dict(gain=statistics.fmean(gains), gain_error=statistics.stdev(gains) / len(gains) ** 0.5)
  if mine and (base := graded.get('sft')):
    found |= dict(wins=statistics.fmean(mine[p] > base[p] for p in mine),
                  losses=statistics.fmean(mine[p] < base[p] for p in mine))
  return found


def seconds(workdir) -> dict[str, float]:
  """What every kind of stage took, of all models together."""
  spent = Counter()
  for owner in ('data', *MODELS):
    for name in STAGES:
      spent[name] += _read(epath.Path(workdir) / owner / name / 'done.json').get('seconds', 0)
  return {name: taken for name, taken in spent.items() if taken >= 0.5}


def text_table(rows: list[dict], but=ON_PAGE) -> str:
  """The rows as aligned text; without the columns `but`, and those that have no number."""
  lines = _cells(rows, but)
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return '\n'.join('  '.join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def counts(dropped: dict) -> str:
  return ', '.join(f'{n} {why}' for why, n in dropped.items()) or 'nothing dropped'


def write(workdir, rows, stopped: str):
  """Writes workdir/report.html, one page that needs no other file; returns its path."""
  (path := epath.Path(workdir) / 'report.html').write_text(render(dict(collect(workdir), rows=rows, stopped=stopped)))
  return path


def collect(workdir) -> dict:
  """All that the page shows, read from the files that are there."""
  workdir = epath.Path(workdir)
  stages = {(owner, name): (_read(folder / 'manifest.json'), _read(folder / 'done.json'))
            for owner in ('data', *MODELS) for name in STAGES
            if ((folder := workdir / owner / name) / 'manifest.json').exists()}
  parts = dict(
      curves=lambda folder: _lines(folder / 'model' / 'metrics.jsonl'),
      judged_eval=lambda folder: _shards(folder / 'judge_eval', 'judgements'),
      answers=lambda folder: {r['prompt_id']: r for r in _shards(folder / 'answers', 'responses')},
      oracle=lambda folder: _read(folder / 'oracle' / 'oracle.json'),
      graded=lambda folder: {r['prompt_id']: r['score'] for r in _lines(folder / 'oracle' / 'graded.jsonl')},
      eft=lambda folder: _read(folder / 'eft' / 'done.json'))
  return dict(
      workdir=workdir.name, size=_read(workdir / 'results.json').get('size', ''), stages=stages,
      iterations=[_iteration(workdir / m, stages) for m in MODELS if any((m, n) in stages for n in DATA)],
      **{part: {m: found for m in MODELS if (found := read(workdir / m))} for part, read in parts.items()})


def _iteration(folder, stages) -> dict:
  """What one model's data was made from: its records, and the counts of prompts and pairs."""
  manifest, prompts = stages.get((folder.name, 'prompts'), ({}, {}))
  if manifest and not prompts:  # killed, or at work
    fates = Counter(a['dropped'] for a in _lines(folder / 'prompts' / 'attempts.jsonl'))
    prompts = dict(wanted=manifest['config']['prompts']['count'], attempts=fates.total(),
                   prompts=fates.pop('', 0), dropped=fates)
  judgements = _shards(folder / 'judge', 'judgements')
  first = {(j['j'], j['score'] is None): j for j in reversed(judgements)}  # with a score and without
  shown = [first[kind] for kind in sorted(first)][:SAMPLES['judgements']]
  responses = {r['id']: r for r in _shards(folder / 'respond', 'responses')}
  return dict(model=folder.name, prompts=prompts, responses=list(responses.values()), judgements=judgements,
              judge=stages.get((folder.name, 'judge'), ({}, {}))[1],
              quorum=stages[folder.name, 'judge'][0]['config']['judge']['quorum'] if judgements else 0,
              shown=[(j, responses.get(j['response_id'])) for j in shown],
              made=_read(folder / 'pairs' / 'done.json'), pairs=_lines(folder / 'pairs' / 'pairs.jsonl'))


def render(page: dict) -> str:
  """What `collect` found, with `rows` and `stopped` -> HTML; every text of a model is escaped."""
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
  environment.filters['text'] = _text
  template = environment.from_string((epath.resource_path('srlm_jax') / 'report.html').read_text())
  made = {i['model']: yields(i) for i in page['iterations']}
  labels = dict.fromkeys(label for found in made.values() for label in found)  # in order, each once
  return template.render(page, head=head(page), warnings=warnings(page), table=_cells(page['rows']),
                         labels=labels, yields=made, plots=plots(page), names=STAGES, shown=SAMPLES)


def head(page: dict) -> list[str]:
  """What ran, which models there are, where it stopped and why: a few sentences."""
  made = [r['model'] for r in page['rows']]
  missing = [m for m in MODELS[:MODELS.index('m4')] if m not in made]  # m4 is made where it is asked for
  configs = [manifest['config'] for manifest, _ in page['stages'].values()]
  model = next((c['model'] for c in configs if c.get('model')), '')
  size = f', size {page["size"]}' * bool(page['size']) + f', model {model}' * bool(model)
  text = [f'A run of self-rewarding training{size}. It holds the models {", ".join(made)}.']
  if page['stopped']:
    text.append(f'It stopped, and {(missing or ["a model"])[0]} was not trained: {page["stopped"]}.')
  elif missing:
    text.append(f'It does not hold {", ".join(missing)}.')
  if begun := [f'{owner}/{name}' for (owner, name), (_, done) in page['stages'].items() if not done]:
    text.append(f'Begun and not finished: {", ".join(begun)}.')
  if judge := next((c['judge'] for c in configs if 'judge' in c), None):
    scale = next((f', scores {done["lowest"]:g} to {done["highest"]:g}'
                  for (_, name), (_, done) in page['stages'].items() if name == 'judge' and done), '')
    text.append(f'Judge: template {judge["template"]}{scale}; '
                f'{judge["n"]} judgements a response, of which {judge["quorum"]} must have a score.')
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
    if i['responses'] and i['judgements']:
      found += health.warn_ties(f'{i["model"]}/judge', i['responses'], i['judgements'], i['quorum'])
    if i['made'] and not i['made'].get('positives'):
      found += health.warn_pairs(f'{i["model"]}/pairs', i['pairs'], i['made']['prompts'])
  for (owner, name), (_, done) in page['stages'].items():
    if name == 'model' and done and sum(done['dropped'].values()) > done['rows']:
      found.append(f'{owner}/model: trained on {done["rows"]:,} rows; dropped {counts(done["dropped"])}.')
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
              'prompts without a pair': made['dropped'], 'chosen minus rejected: score': made['margin'],
              'chosen minus rejected: characters': made['chosen_minus_rejected_characters']}
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


def _cells(rows: list[dict], but=()) -> list[list[str]]:
  shown = [(h, digits) for h, _, _, digits in COLUMNS if h not in but and any(r[h] is not None for r in rows)]
  return [['model', *(heading for heading, _ in shown)], *(
      [row['model'], *('-' if row[h] is None else f'{row[h]:.{d}f}' for h, d in shown)] for row in rows)]


def _shards(folder, stem: str) -> list[dict]:
  return [r for path in sorted(folder.glob(f'{stem}-*-of-*.jsonl')) for r in _lines(path)]


def _lines(path) -> list[dict]:
  """The whole lines of a file, without the one at which a kill cut it; none where there is no file."""
  data = path.read_bytes() if path.exists() else b''
  return [json.loads(line) for line in data.split(b'\n')[:-1] if line.strip()]


def _read(path) -> dict:
  return json.loads(path.read_text()) if path.exists() else {}


if __name__ == '__main__':
  from srlm_jax import stage
  define_flags()
  stage.run_app(main)
