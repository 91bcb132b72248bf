"""The nine NLP tasks of PAPER table 3, from the results files of lm-evaluation-harness, model beside model.

  python -m srlm_jax.checkpoint.convert --checkpoint=runs/x/m2/model --to_hf=DIR
  lm_eval --model=hf --model_args=pretrained=DIR --output_path=OUT \\
    --tasks=arc_easy,arc_challenge,hellaswag,social_iqa,piqa,gsm8k,mmlu,openbookqa,nq_open
  python -m srlm_jax.eval.harness --results=m1=OUT1/results_X.json --results=m2=OUT2/results_Y.json \\
    --out=nlp.json

Tasks run one by one: give --results of the same model once a file.
"""
from absl import flags

from srlm_jax import cli, InputError, records

# PAPER's name: (lm-eval's names, its metrics); of each the first that a file holds. acc_norm takes the choice
# of the highest log-likelihood a byte. Which metrics the paper took is not in it.
TASKS = {
    'arc_easy': (('arc_easy',), ('acc_norm,none',)),
    'arc_challenge': (('arc_challenge',), ('acc_norm,none',)),
    'hellaswag': (('hellaswag',), ('acc_norm,none',)),
    'siqa': (('social_iqa', 'siqa'), ('acc,none',)),
    'piqa': (('piqa',), ('acc_norm,none',)),
    'gsm8k': (('gsm8k',), ('exact_match,strict-match', 'exact_match,get-answer')),  # the second: its old name
    'mmlu': (('mmlu',), ('acc,none',)),
    'obqa': (('openbookqa',), ('acc_norm,none',)),
    'nq': (('nq_open',), ('exact_match,remove_whitespace',)),
}


def table(models: dict[str, dict[str, tuple]]) -> dict:
  """Per model {task: (metric, percent)} -> scores, differences to the first model, missing tasks, metrics.

  >>> table(dict(m1=dict(piqa=('acc_norm,none', 82.0)), m2=dict(piqa=('acc_norm,none', 81.0))))['differences']
  {'m2': {'piqa': -1.0}}
  """
  first, *others = models
  metrics = {}
  for name, found in models.items():
    for task, (metric, _) in found.items():
      if metrics.setdefault(task, metric) != metric:
        raise InputError(f'{task} was measured by {metrics[task]} for {first} and by {metric} for {name}; '
                         f'run both with one version of lm-eval')
  return dict(
      scores={name: {task: value for task, (_, value) in found.items()} for name, found in models.items()},
      differences={name: {task: round(value - models[first][task][1], 6)
                          for task, (_, value) in models[name].items() if task in models[first]}
                   for name in others},
      missing={name: [task for task in TASKS if task not in found] for name, found in models.items()},
      metrics=metrics)


def read_results(path) -> dict[str, tuple]:
  """A results file -> {task: (metric, percent, shots or None)} of those of the nine tasks that it holds."""
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
      raise InputError(f'{path}: {name} has no {" nor ".join(metrics)}; '
                       f'it has {", ".join(sorted(values)) or "nothing"}')
    value = values[metric]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
      raise InputError(f'{path}: {name} has {metric} = {value!r}, which is not from 0 to 1')
    found[task] = (metric, 100 * value, shots.get(name))
  if not found:
    raise InputError(f'{path} holds none of the tasks {", ".join(TASKS)}')
  return found


def read_models(given: list[str]) -> dict[str, dict[str, tuple]]:
  """Flags NAME=FILE -> per model {task: (metric, percent)}; a task is given once, with equal shots."""
  models, shots = {}, {}
  for text in given:
    name, equals, path = text.partition('=')
    if not (name and equals and path):
      raise InputError(f'--results={text}: write it as --results=NAME=FILE')
    for task, (metric, value, n) in read_results(path).items():
      if task in models.setdefault(name, {}):
        raise InputError(f'--results={text}: {task} of {name} was given before; leave out one file')
      if shots.setdefault(task, n) != n:
        raise InputError(f'--results={text}: {task} was run with {n} shots here and {shots[task]} before; '
                         f'run every model with the same')
      models[name][task] = (metric, value)
  return models


def text_table(result: dict) -> str:
  """A line a task: percent of every model, and in brackets the difference to the first."""
  rows = [['task', *result['scores'], 'metric']]
  for task in TASKS:
    cells = []
    for name, found in result['scores'].items():
      change = result['differences'].get(name, {}).get(task)
      shown = f'{found[task]:.2f}' if task in found else '-'
      cells.append(shown if change is None else f'{shown} ({change:+.2f})')
    rows.append([task, *cells, result['metrics'].get(task, '-')])
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return '\n'.join('  '.join([row[0].ljust(widths[0]),
                              *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)), row[-1]])
                   for row in rows)


def define_flags():
  flags.DEFINE_multi_string('results', None, 'NAME=FILE: a model and a results file of lm-eval; once a file.',
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
      print(f'{name} lacks {", ".join(tasks)}')
  print(f'{f.out}: {len(result["scores"])} models')


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
