"""The results of a run as one HTML page of tables, charts and samples.

`python -m srlm_jax.report --workdir=runs/demo` makes the page again from the files of the run.
"""
import base64
from collections import Counter
import hashlib

from etils import epath
import jinja2
import markupsafe

from srlm_jax import catalog, InputError, records, schema
from srlm_jax.config import MODELS
from srlm_jax.report import charts, results, run as runs, samples, summaries
from srlm_jax.reward import health

# What is said of a text by the reason why it ends, if not by itself.
_FINISHES = {schema.CUT: 'cut', schema.TOO_LONG: 'not sampled: prompt too long'}


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
  html = render(runs.collect(workdir, rows, stopped))
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


def render(run: runs.Run) -> str:
  """Run -> HTML. All texts of models are escaped."""
  folder = epath.resource_path('srlm_jax') / 'report'
  style, script = ((folder / name).read_text() for name in ('style.css', 'script.js'))
  environment = jinja2.Environment(
      loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text()), autoescape=True,
      trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
  environment.filters |= dict(number=_number, counts=counts)
  shown = [sample for i in run.iterations for sample in i.samples]
  shown += samples.held_out(run.answers, run.graded)
  return environment.get_template('page.html').render(
      run=run, policy=_policy(style, script), style=markupsafe.Markup(style),
      script=markupsafe.Markup(script), head=head(run), warnings=warnings(run),
      tables=results.tables(run.rows), lengths=charts.lengths(run), scores=charts.scores(run),
      training={model: charts.training(lines) for model, lines in run.curves.items()},
      funnels=[chart for i in run.iterations if (chart := charts.funnel(i))],
      yields=yields_table(run), eft_table=eft_table, seconds=charts.seconds(run),
      seconds_table=seconds_table(run), samples=shown, rule=samples.RULE,
      sample_models=list(dict.fromkeys(name for sample in shown for name in sample.models)),
      finishes=_FINISHES)


def _policy(style: str, script: str) -> str:
  """The Content-Security-Policy that allows this style sheet and this script, and nothing else."""
  def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
  return (f"default-src 'none'; style-src {hash_of(style)}; script-src {hash_of(script)}; "
          f"base-uri 'none'; form-action 'none'")


def head(run: runs.Run) -> list[str]:
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


def warnings(run: runs.Run) -> list[str]:
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


def yields_table(run: runs.Run) -> list[list[str]]:
  """What each step of the iterations made or dropped: a row per count, a column per model."""
  found = {i.model: yields(i) for i in run.iterations}
  labels = dict.fromkeys(label for column in found.values() for label in column)
  rows = [[label, *(column.get(label, '') for column in found.values())] for label in labels]
  return [['', *found], *rows] if rows else []


def yields(iteration: runs.Iteration) -> dict[str, str]:
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
  return {label: _number(value) for label, value in found.items()}


def eft_table(made: schema.EftSummary) -> list[list[str]]:
  """The EFT examples of each score, before and after downsampling."""
  return [['score', *made.scores_before],
          ['before', *map(_number, made.scores_before.values())],
          ['kept', *(_number(made.scores.get(score, 0)) for score in made.scores_before)]]


def seconds_table(run: runs.Run) -> list[list[str]]:
  """A row per stage, a column per model."""
  owners = list(dict.fromkeys(owner for owner, _ in run.stages))
  def cell(owner: str, name: str) -> str:
    if (owner, name) not in run.stages:
      return ''
    seconds = run.stages[owner, name].seconds
    return 'unfinished' if seconds is None else _number(seconds)
  return [['', *owners], *([name, *(cell(owner, name) for owner in owners)]
                           for name in catalog.NAMES if name in {n for _, n in run.stages})]


def _last(run: runs.Run, key: str):
  """The value of a config key in the last stage that records it; None if no stage does."""
  values = [getattr(stage.config, key) for stage in run.stages.values()]
  return next((value for value in reversed(values) if value), None)


def _judge_sentence(run: runs.Run, template: str) -> str:
  sentence = f'Judge: template {template}'
  made = [found for owner, name in run.stages
          if name == 'judge' and (found := run.summary(owner, name))]
  if made:
    sentence += f', scores {made[0].lowest:g} to {made[0].highest:g}'
  n, quorum = _last(run, 'judge_n'), _last(run, 'judge_quorum')
  if n and quorum:
    sentence += f'; {n} judgements per response, of which {quorum} must have a score'
  return sentence + '.'


def _number(value) -> str:
  """A number with thousands separators; counts by reason as one line each."""
  if isinstance(value, dict):
    return '\n'.join(f'{n:,} {reason}' for reason, n in value.items()) or 'none'
  if value is None:
    return '-'
  return value if isinstance(value, str) else f'{value:,}'
