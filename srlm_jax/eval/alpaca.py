"""AlpacaEval 2: exports answers in its input format and computes the win rate from its annotations.

  python -m srlm_jax.eval.alpaca --answers=runs/x/m2/answers --generator=m2 --out=outputs.json
  alpaca_eval --model_outputs=outputs.json --output_path=DIR   (AlpacaEval's program and judge)
  python -m srlm_jax.eval.alpaca --annotations=DIR/.../annotations.json --out=win_rate.json

To compare with published win rates, answer AlpacaEval's own 805 instructions.
"""
from collections.abc import Iterable
import dataclasses
import json
import math
import statistics

from absl import flags
import msgspec

from srlm_jax import cli, InputError, records, schema, stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotation:
  """annotations.json of AlpacaEval: the judge's preference between two outputs.

  It ranges from 1 (generator_1 wins) to 2 (generator_2 wins). 1.5 is a draw, as is the 0 of older
  files. If it is None or NaN, the judge's reply could not be parsed.
  """
  preference: float | None
  generator_2: str
  output_2: str


def outputs(answers: Iterable[schema.Response], generator: str, dataset: str) -> list[dict]:
  """MODEL/answers -> AlpacaEval's model outputs."""
  return [dict(instruction=a.prompt, output=a.response, generator=generator, dataset=dataset)
          for a in answers]


def win_rate(annotations: list[Annotation]) -> dict:
  """Annotations -> statistics of generator_2.

  win_rate and standard_error are in percent, characters is the mean length of its outputs. A
  preference that could not be parsed counts as `missing` and is excluded from the win rate.

  >>> win = Annotation(preference=2.0, generator_2='m2', output_2='ab')
  >>> draw = Annotation(preference=0.0, generator_2='m2', output_2='abcd')
  >>> win_rate([win, draw])['win_rate']
  75.0
  """
  given = [a.preference for a in annotations if not _is_missing(a.preference)]
  wins = [(p or 1.5) - 1 for p in given]
  return dict(
      win_rate=100 * sum(wins) / len(wins) if wins else None,
      standard_error=100 * statistics.stdev(wins) / math.sqrt(len(wins)) if len(wins) > 1 else None,
      wins=sum(w > 0.5 for w in wins), draws=sum(w == 0.5 for w in wins),
      losses=sum(w < 0.5 for w in wins),
      count=len(wins), missing=len(annotations) - len(wins),
      characters=sum(len(a.output_2) for a in annotations) / len(annotations))


def read_annotations(path) -> list[Annotation]:
  """Reads and checks the annotations of one model against the baseline."""
  hint = 'give the annotations.json of alpaca_eval'
  found = records.read_json(path, hint)
  try:
    annotations = msgspec.convert(found, list[Annotation])
  except msgspec.ValidationError as error:
    raise InputError(f'{path}: not a list of annotations ({records.sentence(error)}); '
                     f'{hint}') from error
  if not annotations:
    raise InputError(f'{path}: no annotations; {hint}')
  for i, a in enumerate(annotations):
    p = a.preference
    if not (_is_missing(p) or p == 0 or 1 <= p <= 2):
      raise InputError(f'{path}: annotation {i} has the preference {p!r}, which is not between '
                       f'1 and 2; {hint}')
    if a.generator_2 != annotations[0].generator_2:
      raise InputError(f'{path}: annotations of both {annotations[0].generator_2} and '
                       f'{a.generator_2}; give those of one model')
  return annotations


def _is_missing(preference: float | None) -> bool:
  return preference is None or math.isnan(preference)


def _read_answers(folder) -> list[schema.Response]:
  stage.check_records(folder)
  answers = list(records.read_shards(folder, 'responses', schema.Response))
  if not answers:
    raise InputError(f'{folder} holds no answers; answer the held-out prompts first')
  if len({a.prompt for a in answers}) < len(answers):
    raise InputError(f'{folder} holds several answers to one prompt, but AlpacaEval identifies '
                     f'answers by their prompt; keep one answer per prompt')
  return answers


def define_flags():
  flags.DEFINE_string('answers', '', 'MODEL/answers, to export as model outputs.')
  flags.DEFINE_string(
      'generator', '', 'Name of the model in AlpacaEval\'s tables; with --answers.')
  flags.DEFINE_string('dataset', 'heldout', 'Name of the prompt set; with --answers.')
  flags.DEFINE_string(
      'annotations', '', 'AlpacaEval\'s annotations.json, to compute the win rate from.')
  flags.DEFINE_string('out', None, 'JSON file to write.', required=True)


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  if bool(f.answers) == bool(f.annotations) or bool(f.answers) != bool(f.generator):
    raise InputError('give --answers=MODEL/answers --generator=NAME, or --annotations=FILE')
  if f.answers:
    result = outputs(_read_answers(f.answers), f.generator, f.dataset)
    summary = f'{len(result)} outputs of {f.generator}'
  else:
    annotations = read_annotations(f.annotations)
    result = dict(generator=annotations[0].generator_2, **win_rate(annotations))
    summary = ', '.join(
        f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in result.items())
  with records.replacing(f.out) as file:
    file.write(json.dumps(result, ensure_ascii=False, indent=1) + '\n')
  print(f'{f.out}: {summary}')


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
