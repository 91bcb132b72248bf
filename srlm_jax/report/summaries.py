"""Reads the JSON summaries of a run and checks the values that the report uses.

A damaged summary raises InputError with its path, instead of an error while the page is made.
"""
from collections.abc import Callable
import dataclasses
import json

from srlm_jax import InputError, records, stage
from srlm_jax.config import MODELS
from srlm_jax.report import results


@dataclasses.dataclass(frozen=True)
class Fields:
  """The fields of a JSON object that the report uses, by type."""
  numbers: tuple[str, ...] = ()
  nullable: tuple[str, ...] = ()  # a number, null or absent
  counts: tuple[str, ...] = ()  # a JSON object of numbers


# Fields of done.json by stage, in addition to `seconds` and `positives`.
_DONE = dict(
    prompts=Fields(numbers=('wanted', 'attempts', 'prompts'), counts=('dropped',)),
    judge=Fields(numbers=('lowest', 'highest')),
    pairs=Fields(numbers=('pairs', 'prompts', 'pairs_per_1000_prompts'),
                 nullable=('margin', 'chosen_minus_rejected_characters'), counts=('dropped',)),
    eft=Fields(numbers=('examples', 'replies'), counts=('dropped', 'scores_before', 'scores')),
    model=Fields(numbers=('steps', 'examples'), counts=('dropped',)))
# Keys of the manifest's config.
_NUMBERS = ('judge.n', 'judge.quorum', 'prompts.count')
_TEXTS = ('judge.template', 'model')


def read(path, fields: Fields) -> dict:
  """The JSON object of a file with checked fields; {} if there is no file."""
  found = results.read(path)
  if not found:
    return {}
  for key in fields.numbers:
    _check(path, found, key, records.is_number)
  for key in fields.nullable:
    if found.get(key) is not None:
      _check(path, found, key, records.is_number)
  for key in fields.counts:
    _check(path, found, key, _are_counts)
  return found


def done(path) -> dict:
  """The done.json of a stage; {} if there is none."""
  fields = _DONE.get(path.parent.name, Fields())
  return read(path, Fields(('seconds', *fields.numbers), ('positives', *fields.nullable),
                           fields.counts))


def manifest(path) -> dict:
  """The manifest of a stage."""
  found = results.read(path)
  if found and found.get('format') != stage.FORMAT:
    raise InputError(f'{path}: written by another version of srlm_jax; '
                     f'make the page with that version')
  _check(path, found, 'config', lambda value: isinstance(value, dict))
  for keys, is_valid in ((_NUMBERS, records.is_number), (_TEXTS, _is_text)):
    for key in keys:
      if key in found['config'] and not is_valid(found['config'][key]):
        raise _damaged(path, f'config.{key}', found['config'][key])
  return found


def run_results(path) -> dict:
  """results.json, with `models` and `stopped` added if they are absent."""
  found = dict(models=[], stopped='') | results.read(path)
  _check(path, found, 'models', lambda models: isinstance(models, list) and all(
      isinstance(row, dict) and 'model' in row for row in models))
  _check(path, found, 'stopped', _is_text)
  return found


def check_table(workdir):
  """Raises InputError if a value in the tables of `results` is not a number."""
  for file in dict.fromkeys(column.file for column in results.COLUMNS if column.file):
    keys = tuple(column.key for column in results.COLUMNS if column.file == file)
    for model in MODELS:
      path = workdir / model / file
      found = dict(intervals={}) | read(path, Fields(nullable=keys))
      _check(path, found, 'intervals', _are_intervals)


def _check(path, found: dict, key: str, is_valid: Callable):
  if not is_valid(found.get(key)):
    raise _damaged(path, key, found.get(key))


def _is_text(value) -> bool:
  return isinstance(value, str)


def _are_counts(value) -> bool:
  return isinstance(value, dict) and all(map(records.is_number, value.values()))


def _are_intervals(value) -> bool:
  """Whether the value is {key: null or two numbers}."""
  return isinstance(value, dict) and all(
      pair is None or isinstance(pair, list) and len(pair) == 2
      and all(map(records.is_number, pair)) for pair in value.values())


def _damaged(path, key: str, value) -> InputError:
  what = f'no "{key}"' if value is None else f'"{key}" is {json.dumps(value)[:40]}'
  return InputError(f'{path}: {what}; correct or delete the file, and run the loop again')
