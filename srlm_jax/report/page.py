"""The report as one HTML page of tables, charts and samples, which needs no other file.

`python -m srlm_jax.report --workdir=runs/demo` makes the page again from the files of the run.
"""
import base64
from collections.abc import Iterable
import functools
import hashlib

from etils import epath
import jinja2
import markupsafe

from srlm_jax import InputError, records, schema
from srlm_jax.report import charts, contents, external, paper, plots, steps
from srlm_jax.report.contents import Contents
from srlm_jax.report.measures import Lengths, MEASURES
from srlm_jax.report.rounds import Round
from srlm_jax.report.run import Run

# What is said of a text by the reason why it ends, if not by itself.
_FINISHES = {schema.CUT: 'cut', schema.TOO_LONG: 'not sampled: prompt too long'}
# HTML cannot hold NUL, and the other control characters are invisible.
_INVISIBLE = {code: '\ufffd' for code in range(32) if chr(code) not in '\t\n\r'}
# Verdict -> class of the style sheet.
_KINDS = {steps.BETTER: 'better', steps.WORSE: 'worse', steps.SAME: 'unclear',
          steps.UNMEASURED: 'unclear'}
_COMPARED = ('oracle', 'head_to_head', 'alpaca_controlled', 'alpaca', 'mt_bench', 'pairwise_all',
             'pairwise', 'oracle_pairwise', 'parsed', 'characters')  # drawn with a line per run


def remake(workdirs: Iterable, out=None):
  """Writes the report of runs, finished or not, from their files; returns its path.

  workdirs: one run or several, or the folder of a study; out: by default report.html in the only
  workdir. Raises InputError for a folder without a model, a damaged file, and several workdirs
  without `out`.
  """
  workdirs = [*workdirs]
  if not out and len(workdirs) > 1:
    raise InputError('several workdirs need --out=FILE.html, the page to write')
  return _write(out or epath.Path(workdirs[0]) / 'report.html', contents.read(workdirs))


def write(workdir, rows: list[dict], stopped: str):
  """Writes WORKDIR/report.html; returns its path.

  `rows`: see `results.of_models`; `stopped`: why the loop stopped early, or ''.
  """
  return _write(epath.Path(workdir) / 'report.html', contents.of_run(workdir, rows, stopped))


def _write(path, found: Contents):
  path = epath.Path(path)
  html = render(found)
  with records.replacing(path) as file:
    file.write(html)
  return path


def render(found: Contents) -> str:
  """The contents -> HTML. All texts are escaped."""
  style, script = map(_source, ('style.css', 'script.js'))
  html = _environment().get_template('page.html').render(
      contents=found, policy=_policy(style, script), style=markupsafe.Markup(style),
      script=markupsafe.Markup(script))
  html = html.encode('utf-8', 'replace').decode()  # a folder name may not be UTF-8
  return html.translate(_INVISIBLE)


def _source(name: str) -> str:
  return (epath.resource_path('srlm_jax') / 'report' / name).read_text()


@functools.cache
def _environment() -> jinja2.Environment:
  """The templates, with the functions that they call."""
  made = jinja2.Environment(
      loader=jinja2.FunctionLoader(_source), autoescape=True, trim_blocks=True, lstrip_blocks=True,
      undefined=jinja2.StrictUndefined)
  made.filters |= dict(number=number, counts=counts, fixed=fixed, p_value=p_value,
                       share='{:.0%}'.format)
  made.globals |= dict(
      measures=MEASURES, charts=charts, finishes=_FINISHES, kinds=_KINDS,
      **{f.__name__: f for f in (
          verdict, steps.doubts_of, sections_of, selection_of, keys_of, models_of, papers_about,
          funnels, rounds_table, kept_of, tasks_of, sample_models, side_by_side, bins_of,
          ngram_headings, permuted)})
  return made


def _policy(style: str, script: str) -> str:
  """The Content-Security-Policy that allows this style sheet and this script, and nothing else."""
  def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
  return (f"default-src 'none'; style-src {hash_of(style)}; script-src {hash_of(script)}; "
          f"base-uri 'none'; form-action 'none'")


def counts(dropped: dict[str, int]) -> str:
  """Counts by reason as text.

  >>> counts({'held out': 3, 'too long': 1})
  '3 held out, 1 too long'
  """
  return ', '.join(f'{n:,} {reason}' for reason, n in dropped.items()) or 'nothing'


def number(value: float | str | None) -> str:
  """A number with thousands separators.

  >>> number(1234567), number(0.1 + 0.2), number(None)
  ('1,234,567', '0.3', '-')
  """
  if value is None:
    return '-'
  if isinstance(value, float):
    return f'{value:,.4f}'.rstrip('0').rstrip('.')
  return value if isinstance(value, str) else f'{value:,}'


def fixed(value: float | None, digits: int = 2) -> str:
  """
  >>> fixed(25.7525), fixed(2552.0, 1), fixed(None)
  ('25.75', '2,552.0', '-')
  """
  return '-' if value is None else f'{value:,.{digits}f}'


def p_value(value: float | None) -> str:
  """
  >>> p_value(0.034), p_value(1e-9), p_value(None)
  ('0.034', '<0.0001', '-')
  """
  if value is None:
    return '-'
  return f'{value:.2g}' if value >= 1e-4 else '<0.0001'


def verdict(found: Iterable[steps.Step]) -> str:
  """The class of the verdict that the answer is about."""
  step = steps.deciding(found)
  return _KINDS[step.verdict] if step else 'unclear'


def permuted(value: float, draws: int) -> str:
  """The p-value of a permutation test.

  >>> permuted(0.001, 999), permuted(0.25, 999)
  ('≤0.001', '0.25')
  """
  smallest = 1 / (draws + 1)
  return f'≤{smallest:.2g}' if value <= smallest else p_value(value)


def sections_of(run: Run) -> dict[str, str]:
  """{id: title} of the sections that the run has data for."""
  outside = run.external
  there = dict(
      verdict=('Verdict', True), models=('Models', True),
      answers=('By round', charts.by_round(run) or run.wins),
      external=('Other judges', any((outside.head_to_head, outside.alpaca, outside.mt_bench,
                                     outside.harness))),
      scores=('Scores and lengths', charts.scores(run) or charts.lengths(run)),
      training=('Training', run.curves), data=('Data', run.rounds or run.eft),
      map=('Distributions', outside.distributions), time=('Time', run.costs),
      samples=('Samples', run.held_out.prompts or any(s.prompts for s in run.samples)))
  return {name: title for name, (title, is_there) in there.items() if is_there}


def selection_of(run: Run, model: str) -> str:
  """Why the training of a model ended early, and which checkpoint later stages use; or ''."""
  sentences, found = [], run.stopping.get(model)
  if model in run.training and (why := run.training[model].stopped):
    sentences.append(f'Training ended early: {why}.')
  if found and found.step is not None:
    step = f'the checkpoint of step {found.step:,}' if found.step else (
        'the model that training started from')
    sentences.append(f'Later stages use {step}.')
  return ' '.join(sentences)


def keys_of(values: Iterable[dict], about: str = '') -> list[str]:
  """The keys of MEASURES, all or those about `answers` or `judge`, that some of `values` have."""
  values = list(values)
  return [key for key, measure in MEASURES.items()
          if about in ('', measure.about) and any(key in found for found in values)]


def models_of(run: Run, keys: Iterable[str], outside: list[external.Measured]) -> list[str]:
  """The models that have a value for some of the keys, or of an outside judge or benchmark."""
  return [model for model in run.models if any(key in run.values.get(model, {}) for key in keys)
          or any(model in row.values for row in outside)]


def papers_about(found: Contents, about: str) -> list[paper.Table]:
  """The paper's tables about `answers` or `judge`; '': those about neither."""
  return [table for table in found.paper
          if about == next((MEASURES[key].about for key in table.measures if key in MEASURES), '')]


def funnels(run: Run) -> list[plots.Chart]:
  return [chart for found in run.rounds if (chart := charts.funnel(found))]


def rounds_table(run: Run) -> dict[str, list[str]]:
  """{name: a cell per round} of what the funnel and the pairs of the rounds say."""
  columns = [_of_round(found) for found in run.rounds]
  names = dict.fromkeys(name for column in sorted(columns, key=len, reverse=True)
                        for name in column)
  return {name: [column.get(name, '-') for column in columns] for name in names}


def _of_round(found: Round) -> dict[str, str]:
  cells = {'written by': found.writer, 'judged by': found.judge}
  for step in found.funnel:
    cells[step.label] = number(step.count)
    if step.lost:
      cells[f'lost on the way to {step.label}'] = '\n'.join(
          f'{n:,} {reason}' for reason, n in step.lost.items())
  for name, value in (('mean score by its judge', found.judge_mean),
                      ('mean score by the oracle', found.oracle_mean),
                      ('pairs that the oracle orders alike', found.right),
                      ('pairs that the oracle orders the other way', found.wrong),
                      ('judgements with a score', found.parsed)):
    if value:
      cells[name] = number(round(value.value, 3))
  for name, lengths in (('characters, all', found.characters), ('chosen', found.chosen),
                        ('rejected', found.rejected)):
    cells |= _lengths(name, lengths)
  if pairs := found.pairs:
    cells |= {'pairs per 1,000 prompts': number(pairs.pairs_per_1000_prompts),
              'chosen minus rejected: score': number(pairs.margin),
              'chosen minus rejected: characters':
                  number(pairs.chosen_minus_rejected_characters)}
  return {name: cell for name, cell in cells.items() if cell}


def _lengths(name: str, found: Lengths | None) -> dict[str, str]:
  return {f'mean length, {name}': f'{found.mean:,.1f}'} if found else {}


def kept_of(made: schema.EftSummary) -> list[str]:
  """The EFT examples of each score after downsampling."""
  return [number(made.scores.get(score, 0)) for score in made.scores_before]


def tasks_of(found: schema.Harness) -> list[str]:
  return list(dict.fromkeys(task for scores in found.scores.values() for task in scores))


def sample_models(run: Run) -> dict[str, str]:
  """{value: title} of the filter by model."""
  found = {f'data-of-{s.model}': f'data of {s.model}' for s in run.samples if s.prompts}
  models = dict.fromkeys(model for p in run.held_out.prompts for model in p.answers)
  return found | ({'held-out': 'held out'} if models else {}) | {
      model: f'held out, answered by {model}' for model in models}


def side_by_side(found: Contents) -> list[plots.Chart]:
  runs = *found.arms, *found.runs
  made = charts.judges_and_answers(runs), *(charts.of_runs(runs, key) for key in _COMPARED)
  return [chart for chart in made if chart]


def bins_of(found: schema.Distributions) -> list[str]:
  """The names of the bins by number of words.

  >>> bins_of(schema.Distributions(word_bins=(0, 10, 20)))
  ['0 to 9', '10 to 19', 'from 20']
  """
  starts = found.word_bins
  return [f'{low} to {high - 1}' for low, high in zip(starts, starts[1:], strict=False)
          ] + [f'from {starts[-1]}']


def ngram_headings(found: schema.Distributions) -> list[str]:
  return [f'distinct {d.n}-grams' for d in found.sets[0].distinct] if found.sets else []
