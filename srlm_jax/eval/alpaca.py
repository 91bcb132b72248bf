"""AlpacaEval 2: our answers in the form that it reads, and the win rate from the annotations that it writes.

  python -m srlm_jax.eval.alpaca --answers=runs/x/m2/answers --generator=m2 --out=outputs.json
  alpaca_eval --model_outputs=outputs.json --output_path=DIR      (its own program, with its own judge)
  python -m srlm_jax.eval.alpaca --annotations=DIR/.../annotations.json --out=win_rate.json

The published win rates need answers to AlpacaEval's own 805 instructions.
"""
import json
import math
import statistics

from absl import flags

from srlm_jax import cli, InputError, records


def outputs(answers, generator: str, dataset: str) -> list[dict]:
  """Records of MODEL/answers -> AlpacaEval's model outputs."""
  return [dict(instruction=a['prompt'], output=a['response'], generator=generator, dataset=dataset)
          for a in answers]


def win_rate(annotations: list[dict]) -> dict:
  """Annotations -> win rate of generator_2 in percent, its standard error, mean length of its outputs.

  A preference runs from 1 (generator_1) to 2 (generator_2), 1.5 is a draw, and so is the 0 of old files; one
  that is None, where the judge's reply could not be read, counts in `missing` alone.

  >>> win_rate([dict(preference=2.0, output_2='ab'), dict(preference=0, output_2='abcd')])['win_rate']
  75.0
  """
  given = [a['preference'] for a in annotations if not _missing(a['preference'])]
  wins = [(p or 1.5) - 1 for p in given]
  return dict(
      win_rate=100 * sum(wins) / len(wins) if wins else None,
      standard_error=100 * statistics.stdev(wins) / math.sqrt(len(wins)) if len(wins) > 1 else None,
      wins=sum(w > 0.5 for w in wins), draws=sum(w == 0.5 for w in wins), losses=sum(w < 0.5 for w in wins),
      count=len(wins), missing=len(annotations) - len(wins),
      characters=sum(len(a['output_2']) for a in annotations) / len(annotations))


def read_annotations(path) -> list[dict]:
  """The annotations of one model against the baseline, checked."""
  hint = 'give the annotations.json of alpaca_eval'
  annotations = records.read_json(path, hint)
  if not isinstance(annotations, list) or not annotations:
    raise InputError(f'{path}: not a list of annotations; {hint}')
  for i, a in enumerate(annotations):
    for field in ('preference', 'generator_2', 'output_2'):
      if not isinstance(a, dict) or field not in a:
        raise InputError(f'{path}: annotation {i} has no field "{field}"; {hint}')
    p = a['preference']
    number = isinstance(p, int | float) and not isinstance(p, bool)
    if not _missing(p) and not (number and (p == 0 or 1 <= p <= 2)):
      raise InputError(f'{path}: annotation {i} has the preference {p!r}, which is not from 1 to 2')
    if not isinstance(a['output_2'], str):
      raise InputError(f'{path}: annotation {i} has an output_2 that is no string')
    if a['generator_2'] != annotations[0]['generator_2']:
      raise InputError(f'{path}: annotations of both {annotations[0]["generator_2"]} and {a["generator_2"]}; '
                       f'give those of one model')
  return annotations


def _missing(preference) -> bool:
  return preference is None or isinstance(preference, float) and math.isnan(preference)


def _read_answers(folder) -> list[dict]:
  answers = list(records.read_shards(folder, 'responses', 'id', 'prompt', 'response'))
  if not answers:
    raise InputError(f'{folder} holds no answer; answer the held-out prompts first')
  if len({a['prompt'] for a in answers}) < len(answers):
    raise InputError(f'{folder} answers a prompt twice, and AlpacaEval knows answers by their prompt; '
                     f'keep one of each')
  return answers


def define_flags():
  flags.DEFINE_string('answers', '', 'MODEL/answers, to be turned into model outputs.')
  flags.DEFINE_string('generator', '', 'Name of the model in AlpacaEval\'s tables; with --answers.')
  flags.DEFINE_string('dataset', 'heldout', 'Name of the set of prompts; with --answers.')
  flags.DEFINE_string('annotations', '', 'AlpacaEval\'s annotations.json, to be turned into a win rate.')
  flags.DEFINE_string('out', None, 'JSON file to write.', required=True)


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  if bool(f.answers) == bool(f.annotations) or bool(f.answers) != bool(f.generator):
    raise InputError('give --answers=MODEL/answers --generator=NAME, or --annotations=FILE')
  if f.answers:
    made = outputs(_read_answers(f.answers), f.generator, f.dataset)
    said = f'{len(made)} outputs of {f.generator}'
  else:
    annotations = read_annotations(f.annotations)
    made = dict(generator=annotations[0]['generator_2'], **win_rate(annotations))
    said = ', '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in made.items())
  with records.replacing(f.out) as file:
    file.write(json.dumps(made, ensure_ascii=False, indent=1) + '\n')
  print(f'{f.out}: {said}')


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
