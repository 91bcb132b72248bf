"""Reads the fields of a Hugging Face config.json; a wrong value is an InputError with its name."""
from srlm_jax import InputError

# Bounds far above those of any model; a file that exceeds them is damaged.
SIZE = 2**24           # of a dimension, the context or the vocabulary
LAYERS = 2**12
NUMBER = 1e-30, 1e30   # float32 holds them and their inverses


def _is_id(x, least: int = 0) -> bool:
  return type(x) is int and least <= x < SIZE


# What a field must be: a predicate, and its description for error messages.
TEXT = (lambda x: isinstance(x, str), 'a string')
TEXTS = (lambda x: isinstance(x, list) and all(isinstance(v, str) for v in x),
         'a list of strings')
FLAG = (lambda x: type(x) is bool, 'true or false')
COUNT = (lambda x: type(x) is int and 1 <= x <= SIZE, f'an integer from 1 to {SIZE}')
ID = (_is_id, f'an integer from 0 to {SIZE - 1}')
ID_OR_NONE = (lambda x: _is_id(x, -1), f'an integer from -1 to {SIZE - 1}')
IDS = (lambda x: _is_id(x) or isinstance(x, list) and all(map(_is_id, x)),
       f'an integer from 0 to {SIZE - 1} or a list of such integers')
SPREAD = (lambda x: type(x) in (int, float) and 0 <= x <= NUMBER[1],
          f'a number from 0 to {NUMBER[1]:g}')
# The names that transformers writes; it does not read them with the prefix "torch.".
DTYPE = (lambda x: x in ('float32', 'bfloat16', 'float16', 'float64'),
         'float32, bfloat16, float16 or float64')


def take(f: dict, name: str, allowed, must: str, *default, where: str = ''):
  """Removes a field from `f` -> its value, or the default; InputError if missing or not allowed."""
  if name not in f and not default:
    raise InputError(f'{where}{name} is missing; it must be {must}')
  value = f.pop(name, *default)
  if not allowed(value):
    raise InputError(f'{where}{name} = {short(value)} must be {must}')
  return value


def size(f, name, *default, most=SIZE, where='') -> int:
  """Removes a field from `f` -> its value, an integer of at least 1."""
  return take(f, name, lambda x: type(x) is int and 1 <= x <= most,
              f'an integer from 1 to {most}', *default, where=where)


def number(f, name, *default, low=NUMBER[0], high=NUMBER[1], where='') -> float:
  """Removes a field from `f` -> its value as a float."""
  return float(take(f, name, lambda x: type(x) in (int, float) and low <= x <= high,
                    f'a number from {low:g} to {high:g}', *default, where=where))


def flag(f, name) -> bool:
  """Removes a field that defaults to false."""
  return take(f, name, *FLAG, False)


def short(value) -> str:
  """The value's repr for an error message, shortened to one short line."""
  found = repr(value)
  return found if len(found) <= 60 else f'{found[:40]}...{found[-10:]}'
