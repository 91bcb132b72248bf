"""The nine NLP tasks of PAPER table 3: runs lm-evaluation-harness and compares models.

  python -m srlm_jax.eval.harness --out=runs/x/eval/harness.json \\
    --model=m1=runs/x/m1/model --model=m2=runs/x/m2/model

lm_eval's results of each model are written beside it, as runs/x/eval/lm_eval/m1.json, and a model
is not evaluated again as long as it, the arguments and the local tasks are the same. Results of
lm_eval itself can be compared too: --results=NAME=FILE. If the tasks of one model are in several
files, repeat --results with the same name.
"""
from collections import Counter
from collections.abc import Sequence
import dataclasses

from absl import flags
from etils import epath

from srlm_jax import cli, InputError, records, schema
from srlm_jax.eval import lm

# The paper's task name: (lm-eval's names, its metrics), both in order of preference. acc_norm takes
# the choice with the highest log-likelihood per byte. The paper does not name its metrics.
TASKS = {
    'arc_easy': (('arc_easy',), ('acc_norm,none',)),
    'arc_challenge': (('arc_challenge',), ('acc_norm,none',)),
    'hellaswag': (('hellaswag',), ('acc_norm,none',)),
    'siqa': (('social_iqa', 'siqa'), ('acc,none',)),
    'piqa': (('piqa',), ('acc_norm,none',)),
    # get-answer is the former name of strict-match.
    'gsm8k': (('gsm8k',), ('exact_match,strict-match', 'exact_match,get-answer')),
    'mmlu': (('mmlu',), ('acc,none',)),
    'obqa': (('openbookqa',), ('acc_norm,none',)),
    'nq': (('nq_open',), ('exact_match,remove_whitespace',)),
}
# The metric of any other task, the first that it has, with any filter.
OTHER_METRICS = 'acc_norm', 'acc', 'exact_match'


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of one model on one task, in percent."""
  metric: str
  percent: float
  standard_error: float | None = None  # None: lm-eval gives none
  # Of the results file; None if it does not say.
  shots: int | None = None
  count: int | None = None    # documents
  limit: float | None = None  # lm-eval's --limit, if any
  chat: str = ''              # chat format of the prompts, if any


def table(models: dict[str, dict[str, Result]], tasks: Sequence[str] = ()) -> schema.Harness:
  """{model: {task: Result}} -> their table. The differences are to the first model.

  `tasks`: those that should be there; default: the paper's. Raises InputError if two models have
  different metrics.

  >>> m1, m2 = Result('acc_norm,none', 82.0), Result('acc_norm,none', 81.0)
  >>> table(dict(m1=dict(piqa=m1), m2=dict(piqa=m2))).differences
  {'m2': {'piqa': -1.0}}
  """
  first, *others = models
  metrics, shots, counts, limits, chats = {}, {}, {}, {}, {}
  for name, results in models.items():
    for task, result in results.items():
      for found, key, value in ((shots, task, result.shots), (counts, task, result.count),
                                (limits, name, result.limit), (chats, name, result.chat or None)):
        if value is not None:
          found[key] = value
      if metrics.setdefault(task, result.metric) != result.metric:
        raise InputError(f'{task} was measured by {metrics[task]} for {first} and by '
                         f'{result.metric} for {name}; run both with the same version of lm-eval')
  return schema.Harness(
      scores={name: {task: result.percent for task, result in results.items()}
              for name, results in models.items()},
      standard_errors={
          name: {task: result.standard_error for task, result in results.items()
                 if result.standard_error is not None} for name, results in models.items()},
      differences={name: {task: round(result.percent - models[first][task].percent, 6)
                          for task, result in models[name].items() if task in models[first]}
                   for name in others},
      missing={name: [task for task in tasks or TASKS if task not in results]
               for name, results in models.items()},
      metrics=metrics, shots=shots, counts=counts, limits=limits, chats=chats)


def read_results(path, tasks: Sequence[str] = ()) -> dict[str, Result]:
  """A results file of lm-eval -> {task: Result} for the tasks of TASKS, or for `tasks`, in it."""
  data = records.read_json(path, 'give a results file of lm-eval')
  results = data.get('results') if isinstance(data, dict) else None
  if not isinstance(results, dict):
    raise InputError(f'{path} has no "results"; give a results file of lm-eval, not its samples')
  shots, counts, subtasks, config = (
      data[key] if isinstance(data.get(key), dict) else {}
      for key in ('n-shot', 'n-samples', 'group_subtasks', 'config'))
  limit = config.get('limit')
  limit = limit if records.is_number(limit) and 0 < limit < 2**53 else None
  # lm-eval writes the source of a template, that of the tokenizer.
  chat = config.get('chat') or ('tokenizer' if data.get('chat_template') else '')
  found = {}
  for task in tasks or TASKS:
    names, metrics = TASKS.get(task, ((task,), ()))
    name = next((n for n in names if n in results), None)
    if name is None:
      continue
    values = results[name] if isinstance(results[name], dict) else {}
    metrics = metrics or [key for metric in OTHER_METRICS for key in values
                          if key.partition(',')[0] == metric]
    metric = next((m for m in metrics if m in values), None)
    if metric is None:
      raise InputError(f'{path}: {name} has no {" or ".join(metrics or OTHER_METRICS)}; '
                       f'it has {", ".join(sorted(values)) or "no metrics"}')
    value = values[metric]
    if not records.is_number(value) or not 0 <= value <= 1:
      raise InputError(f'{path}: {name} has {metric} = {value!r}, which is not between 0 and 1; '
                       f'give the results file as lm-eval wrote it')
    error = values.get(metric.replace(',', '_stderr,'))  # 'N/A' where there is none
    error = 100 * error if records.is_number(error) and 0 <= error <= 1 else None
    found[task] = Result(metric, 100 * value, error, _whole(shots.get(name)),
                         _count(name, counts, subtasks), limit, str(chat))
  if not found:
    raise InputError(f'{path} holds none of the tasks {", ".join(tasks or TASKS)}; '
                     f'run lm-eval with at least one of them')
  return found


def _count(name: str, counts: dict, subtasks: dict) -> int | None:
  """The documents of a task, or of all tasks of a group; None if the file does not say."""
  parts, todo, seen = [], [name], set()
  while todo:  # a group may contain groups
    if not isinstance(part := todo.pop(), str) or part in seen:
      return None
    seen.add(part)
    inside = subtasks.get(part)
    if inside and not isinstance(inside, list):
      return None
    todo += inside or ()
    if not inside:
      count = counts[part].get('effective') if isinstance(counts.get(part), dict) else None
      parts.append(_whole(count))
  return None if None in parts else sum(parts)


def _whole(value) -> int | None:
  """A count of the file; None if it is none."""
  return value if type(value) is int and 0 <= value < 2**53 else None


def read_models(given: Sequence[str], tasks: Sequence[str] = ()) -> dict[str, dict[str, Result]]:
  """Flags NAME=FILE -> {model: {task: Result}}.

  Raises InputError if a model has a task twice, or if two models have different numbers of shots or
  of documents.
  """
  models, shots, counts = {}, {}, {}
  for name, path in (_named('results', text, 'FILE') for text in given):
    results = models.setdefault(name, {})
    for task, result in read_results(path, tasks).items():
      if task in results:
        raise InputError(f'{path}: {name} already has results for {task}; leave out one file')
      if shots.setdefault(task, result.shots) != result.shots:
        raise InputError(f'{path}: {task} was run with {result.shots} shots here and '
                         f'{shots[task]} shots before; run all models with the same number')
      if result.count and counts.setdefault(task, result.count) != result.count:
        raise InputError(f'{path}: {task} was run on {result.count} documents here and on '
                         f'{counts[task]} before; run all models with the same --limit')
      results[task] = result
  return models


def text_table(result: schema.Harness) -> str:
  """One line per task: percent per model with its standard error, and in brackets the difference to
  the first model."""
  rows = [['task', *result.scores, 'metric']]
  for task in {**dict.fromkeys(result.metrics), **dict.fromkeys(sum(result.missing.values(), []))}:
    cells = []
    for name, scores in result.scores.items():
      error = result.standard_errors[name].get(task)
      change = result.differences.get(name, {}).get(task)
      cells.append((f'{scores[task]:.2f}' if task in scores else '-')
                   + ('' if error is None else f' ± {error:.2f}')
                   + ('' if change is None else f' ({change:+.2f})'))
    rows.append([task, *cells, result.metrics.get(task, '-')])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for first, *cells, last in rows:
    aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True)]
    lines.append('  '.join([first.ljust(widths[0]), *aligned, last]))
  return '\n'.join(lines)


def run(models: Sequence[str], folder: epath.Path, what: lm.Run, options: lm.Options) -> list[str]:
  """Runs lm_eval for models NAME=DIR -> NAME=FILE, the results file of each.

  A results file of the same model, arguments and local tasks is kept. Raises InputError for a name
  that occurs twice, and if there is no such model or task, before it evaluates any.
  """
  named = [_named('model', text, 'DIR') for text in models]
  for name, count in Counter(name for name, _ in named).items():
    if count > 1:
      raise InputError(f'--model={name}=DIR is given {count} times; give every model its own name')
  lm.check_tasks(what)
  made_of = [lm.made_of(checkpoint, what, options) for _, checkpoint in named]
  found = []
  for (name, checkpoint), identity in zip(named, made_of, strict=True):
    path = folder / f'{name}.json'
    if _is_of(path, identity):
      print(f'{path}: already there')
    else:
      text = lm.evaluate(checkpoint, what, options)
      with records.replacing(path) as file:
        file.write(text)
    found.append(f'{name}={path}')
  return found


def _is_of(path: epath.Path, made_of: dict) -> bool:
  """Whether there is a results file of the same run."""
  if not path.exists():
    return False
  found = records.read_json(path, 'delete it')
  config = found.get('config') if isinstance(found, dict) else None
  return isinstance(config, dict) and config.get('made_of') == made_of


def _named(flag: str, text: str, what: str) -> tuple[str, str]:
  """The value NAME=PATH of a flag -> (name, path)."""
  name, equals, path = text.partition('=')
  if not (name and equals and path):
    raise InputError(f'--{flag}={text}: write it as --{flag}=NAME={what}')
  return name, path


def define_flags():
  lm.define_flags('Tasks of the table, separated by commas; default: the nine of the paper.')
  flags.DEFINE_multi_string(
      'model', None, 'NAME=DIR: a checkpoint or a Hugging Face folder to evaluate. Repeat the flag '
      'per model; the others are compared with the first.')
  flags.DEFINE_multi_string(
      'results', None, 'NAME=FILE: a model and its lm-eval results file. Repeat the flag per file.')
  flags.DEFINE_string('out', None, 'JSON file to write.', required=True)


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  if not f.model and not f.results:
    raise InputError('no model is given; name one or more: --model=NAME=DIR or --results=NAME=FILE')
  out, tasks, given = epath.Path(f.out), f.tasks or (), f.results or ()
  # Mistakes are found before a model is evaluated.
  if both := {text.partition('=')[0] for text in f.model or ()} & read_models(given, tasks).keys():
    raise InputError(f'--model and --results both name {min(both)}; use another name for one')
  wanted = [TASKS[task][0][0] if task in TASKS else task for task in tasks or TASKS]
  made = f.model and run(f.model, out.parent / 'lm_eval', lm.from_flags(lm.Run, tasks=wanted),
                         lm.from_flags(lm.Options))
  result = table(read_models([*(made or ()), *given], tasks), tasks)
  records.write(out, [result])
  print(text_table(result))
  for name, limit in result.limits.items():
    print(f'{name}: with --limit={limit:g}, so not on all documents')
  for name, missing in result.missing.items():
    if missing:
      print(f'{name} has no results for {", ".join(missing)}')
  print(f'{out}: {len(result.scores)} models')


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
