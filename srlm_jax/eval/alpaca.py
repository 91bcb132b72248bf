"""AlpacaEval 2: the win rates of a model, from the annotations of alpaca_eval.

  python -m srlm_jax.sample.respond --config=iter2 --workdir=RUN --prompts=alpaca_eval.json
  alpaca_eval --model_outputs=RUN/m2/answers_to_alpaca_eval/model_outputs.json --output_path=DIR
  python -m srlm_jax.eval.alpaca --annotations=DIR/.../annotations.json --length_controlled \\
    --out=RUN/eval/alpaca_m2.json

The second command is AlpacaEval's program, with its judge. To compare with published win rates,
answer AlpacaEval's own 805 instructions.
"""
from collections.abc import Sequence
import dataclasses
import json
import math
import statistics
import warnings

from absl import flags
import msgspec

from srlm_jax import cli, InputError, records, schema

# AlpacaEval's instructions, and the hash of `records.digest` of them in order.
COUNT, DIGEST = 805, '6b093cbb6a6153c3'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotation:
  """annotations.json of AlpacaEval: the judge's preference between two outputs.

  It ranges from 1 (generator_1 wins) to 2 (generator_2 wins). 1.5 is a draw, as is the 0 of older
  files. If it is None or NaN, the judge's reply could not be parsed.
  """
  instruction: str
  preference: float | None
  generator_1: str | None = None
  generator_2: str
  output_1: str = ''
  output_2: str


def win_rate(annotations: Sequence[Annotation]) -> schema.AlpacaEval:
  """Annotations of one model -> its statistics, without those that are controlled for length.

  A preference that could not be parsed counts as `missing` and is excluded from the win rates.

  >>> win = Annotation(instruction='a', preference=1.9, generator_2='m2', output_2='ab')
  >>> draw = Annotation(instruction='b', preference=0.0, generator_2='m2', output_2='abcd')
  >>> found = win_rate([win, draw])
  >>> found.win_rate, found.discrete_win_rate
  (70.0, 75.0)
  """
  given = [a.preference for a in annotations if not _is_missing(a.preference)]
  shares = [(p or 1.5) - 1 for p in given]
  wins, draws = sum(w > 0.5 for w in shares), sum(w == 0.5 for w in shares)
  count = len(shares)
  return schema.AlpacaEval(
      generator=annotations[0].generator_2,
      win_rate=100 * sum(shares) / count if count else None,
      standard_error=100 * statistics.stdev(shares) / math.sqrt(count) if count > 1 else None,
      discrete_win_rate=100 * (wins + draws / 2) / count if count else None,
      wins=wins, draws=draws, losses=count - wins - draws,
      count=count, missing=len(annotations) - count,
      characters=sum(len(a.output_2) for a in annotations) / len(annotations))


def length_controlled(annotations: Sequence[Annotation]) -> tuple[float, float]:
  """Annotations -> (length-controlled win rate, its standard error), in percent.

  It is computed by alpaca_eval. Raises InputError if the instructions are not AlpacaEval's 805 in
  their order, which alpaca_eval assumes; if alpaca_eval is not installed; or if its table of
  reference annotations, which it downloads once, cannot be had.
  """
  if (records.digest(*(a.instruction for a in annotations)) != DIGEST
      or len(annotations) != COUNT):
    raise InputError(f'the length-controlled win rate is defined for AlpacaEval\'s {COUNT} '
                     f'instructions in their order, and these {len(annotations)} annotations are '
                     f'of others; leave out --length_controlled')
  if all(_is_missing(a.preference) for a in annotations):
    raise InputError('no annotation has a preference, so there is no length-controlled win rate; '
                     'leave out --length_controlled')
  try:
    from alpaca_eval import metrics
  except ImportError as error:
    raise InputError(f'the length-controlled win rate needs alpaca_eval ({error}); install the '
                     f"extra: pip install -e '.[eval]'") from error
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of pandas and scikit-learn, about alpaca_eval's code
    try:
      found = metrics.get_length_controlled_winrate(
          [dataclasses.asdict(a) for a in annotations], save_weights_dir=None,
          is_warn_extreme_changes=False)
    except OSError as error:
      why = str(error).partition('\n')[0]
      raise InputError(f'alpaca_eval cannot read df_gamed.csv of its data set '
                       f'tatsu-lab/alpaca_eval ({why}); connect to the Hugging Face hub once, or '
                       f'set HF_HOME to a cache that has it') from error
  return float(found['length_controlled_winrate']), float(found['lc_standard_error'])


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


def define_flags():
  flags.DEFINE_string('annotations', None, 'AlpacaEval\'s annotations.json.', required=True)
  flags.DEFINE_bool('length_controlled', False,
                    'Compute the length-controlled win rate too; needs alpaca_eval.')
  flags.DEFINE_string('out', None, 'JSON file to write.', required=True)


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  annotations = read_annotations(f.annotations)
  result = win_rate(annotations)
  if f.length_controlled:
    rate, error = length_controlled(annotations)
    result = dataclasses.replace(result, length_controlled=rate,
                                 length_controlled_standard_error=error)
  with records.replacing(f.out) as file:
    file.write(json.dumps(dataclasses.asdict(result), ensure_ascii=False, indent=1) + '\n')
  shown = {key: value for key, value in dataclasses.asdict(result).items() if value is not None}
  summary = ', '.join(
      f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in shown.items())
  print(f'{f.out}: {summary}')


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
