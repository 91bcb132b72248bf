"""The nine NLP tasks of PAPER table 3: compares models by lm-evaluation-harness results.

  python -m srlm_jax.checkpoint.convert --checkpoint=runs/x/m2/model --to_hf=DIR
  lm_eval --model=hf --model_args=pretrained=DIR --output_path=OUT \\
    --tasks=arc_easy,arc_challenge,hellaswag,social_iqa,piqa,gsm8k,mmlu,openbookqa,nq_open
  python -m srlm_jax.eval.harness --out=nlp.json \\
    --results=m1=OUT1/results_X.json --results=m2=OUT2/results_Y.json

If the tasks of one model are in several files, repeat --results with the same name.
"""
import dataclasses

from absl import flags

from srlm_jax import cli, InputError, records

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


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of one model on one task."""
  metric: str
  percent: float
  shots: int | None = None


def table(models: dict[str, dict[str, Result]]) -> dict:
  """{model: {task: Result}} -> scores in percent, differences, missing tasks, metrics.

  The differences are to the first model. Raises InputError if two models have different metrics.

  >>> m1, m2 = Result('acc_norm,none', 82.0), Result('acc_norm,none', 81.0)
  >>> table(dict(m1=dict(piqa=m1), m2=dict(piqa=m2)))['differences']
  {'m2': {'piqa': -1.0}}
  """
  first, *others = models
  metrics = {}
  for name, results in models.items():
    for task, result in results.items():
      if metrics.setdefault(task, result.metric) != result.metric:
        raise InputError(f'{task} was measured by {metrics[task]} for {first} and by '
                         f'{result.metric} for {name}; run both with the same version of lm-eval')
  return dict(
      scores={name: {task: result.percent for task, result in results.items()}
              for name, results in models.items()},
      differences={name: {task: round(result.percent - models[first][task].percent, 6)
                          for task, result in models[name].items() if task in models[first]}
                   for name in others},
      missing={name: [task for task in TASKS if task not in results]
               for name, results in models.items()},
      metrics=metrics)


def read_results(path) -> dict[str, Result]:
  """A results file of lm-eval -> {task: Result} for the tasks of TASKS in it."""
  data = records.read_json(path, 'give a results file of lm-eval')
  results = data.get('results') if isinstance(data, dict) else None
  if not isinstance(results, dict):
    raise InputError(f'{path} has no "results"; give a results file of lm-eval, not its samples')
  shots = data.get('n-shot') if isinstance(data.get('n-shot'), dict) else {}
  found = {}
  for task, (names, metrics) in TASKS.items():
    name = next((n for n in names if n in results), None)
    if name is None:
      continue
    values = results[name] if isinstance(results[name], dict) else {}
    metric = next((m for m in metrics if m in values), None)
    if metric is None:
      raise InputError(f'{path}: {name} has no {" or ".join(metrics)}; '
                       f'it has {", ".join(sorted(values)) or "no metrics"}')
    value = values[metric]
    if not records.is_number(value) or not 0 <= value <= 1:
      raise InputError(f'{path}: {name} has {metric} = {value!r}, which is not between 0 and 1; '
                       f'give the results file as lm-eval wrote it')
    found[task] = Result(metric, 100 * value, shots.get(name))
  if not found:
    raise InputError(f'{path} holds none of the tasks {", ".join(TASKS)}; '
                     f'run lm-eval with at least one of them')
  return found


def read_models(given: list[str]) -> dict[str, dict[str, Result]]:
  """Flags NAME=FILE -> {model: {task: Result}}.

  Raises InputError if a model has a task twice, or if two models have different numbers of shots.
  """
  models, shots = {}, {}
  for text in given:
    name, equals, path = text.partition('=')
    if not (name and equals and path):
      raise InputError(f'--results={text}: write it as --results=NAME=FILE')
    results = models.setdefault(name, {})
    for task, result in read_results(path).items():
      if task in results:
        raise InputError(f'--results={text}: {name} already has results for {task}; leave out one '
                         f'file')
      if shots.setdefault(task, result.shots) != result.shots:
        raise InputError(f'--results={text}: {task} was run with {result.shots} shots here and '
                         f'{shots[task]} shots before; run all models with the same number')
      results[task] = result
  return models


def text_table(result: dict) -> str:
  """One line per task: percent per model, and in brackets the difference to the first model."""
  rows = [['task', *result['scores'], 'metric']]
  for task in TASKS:
    cells = []
    for name, scores in result['scores'].items():
      change = result['differences'].get(name, {}).get(task)
      shown = f'{scores[task]:.2f}' if task in scores else '-'
      cells.append(shown if change is None else f'{shown} ({change:+.2f})')
    rows.append([task, *cells, result['metrics'].get(task, '-')])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for first, *cells, last in rows:
    aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True)]
    lines.append('  '.join([first.ljust(widths[0]), *aligned, last]))
  return '\n'.join(lines)


def define_flags():
  flags.DEFINE_multi_string(
      'results', None, 'NAME=FILE: a model and its lm-eval results file. Repeat the flag per file.',
      required=True)
  flags.DEFINE_string('out', None, 'JSON file to write.', required=True)


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  result = table(read_models(f.results))
  records.write(f.out, [result])
  print(text_table(result))
  for name, tasks in result['missing'].items():
    if tasks:
      print(f'{name} has no results for {", ".join(tasks)}')
  print(f'{f.out}: {len(result["scores"])} models')


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
