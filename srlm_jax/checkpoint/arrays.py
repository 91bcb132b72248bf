"""The stored arrays of a checkpoint, read with TensorStore."""
import contextlib
import itertools

import tensorstore as ts

from srlm_jax import InputError, storage

INDEX = 'cache_pool#index'  # TensorStore's name of the memory for the index of a checkpoint
INDEX_BYTES = 2**26         # which all its arrays share
DESCRIPTION = '.zarray'     # the JSON that describes an array
MOST_DESCRIPTION = 2**14    # bytes; those of a checkpoint have a few hundred


def spec(folder, name: str) -> dict:
  """TensorStore's spec of an array in an Orbax folder."""
  return dict(driver='zarr', kvstore=dict(
      driver='ocdbt', base=storage.kvstore(folder), path=f'{name}/'))


def check(folder):
  """Raises InputError if the description of an array in an Orbax folder is too long.

  TensorStore parses it recursively: JSON that is nested too deep would end the process.
  """
  try:
    store = ts.KvStore.open(dict(driver='ocdbt', base=storage.kvstore(folder))).result()
    names = [name for name in store.list().result() if name.endswith(DESCRIPTION.encode())]
    for name, read in [(name, store.read(name)) for name in names]:
      if len(read.result().value) > MOST_DESCRIPTION:
        raise InputError(_damaged(folder, f'{name.decode(errors="replace")} is too long'))
  except ValueError as error:
    raise InputError(_damaged(folder, error)) from error


def open_all(params, shapes: dict[str, tuple]) -> dict:
  """{name: shape} -> {name: array of a checkpoint}, not yet read.

  Raises InputError if one is missing or misshapen.
  """
  if not params.exists():
    raise InputError(f'{params} does not exist; train or convert that model first')
  check(params)
  context = ts.Context({INDEX: dict(total_bytes_limit=INDEX_BYTES)})
  return {name: _open(params, name, shape, context) for name, shape in shapes.items()}


def _open(params, name: str, shape: tuple, context):
  try:
    found = spec(params, name)
    found['kvstore']['cache_pool'] = INDEX  # and not for the arrays themselves
    array = ts.open(found, read=True, context=context).result()
  except ValueError as error:
    if 'NOT_FOUND' not in str(error):
      raise InputError(_damaged(params, error)) from error
    raise InputError(f'{params} has no array {name}, which its config.json requires; '
                     f'restore the config.json of this checkpoint') from error
  if array.shape != shape:
    raise InputError(f'{params}: array {name} has shape {list(array.shape)}, '
                     f'but its config.json requires {list(shape)}; '
                     f'restore the config.json of this checkpoint')
  chunk = array.chunk_layout.read_chunk.shape
  # TensorStore would take the memory of a whole chunk, and end the process if there is not enough.
  if any(part > max(size, 1) for part, size in zip(chunk, shape, strict=True)):
    raise InputError(_damaged(params, f'the chunks {list(chunk)} of {name} are larger than it'))
  return array


def read(array):
  """A stored array or a part of it as a numpy array; InputError if it is damaged."""
  with _reading():
    return array.read().result()


def read_into(target, array):
  """Reads a stored array into `target`, memory of its shape, chunk by chunk; errors as `read`."""
  axes = [[slice(i, min(i + step, size)) for i in range(0, size, step)]
          for size, step in zip(array.shape, array.chunk_layout.read_chunk.shape, strict=True)]
  for index in itertools.product(*axes):
    with _reading():
      target[index] = array[index].read().result()


@contextlib.contextmanager
def _reading():
  try:
    yield
  except ValueError as error:
    raise InputError(_damaged('an array of a checkpoint', error)) from error


def _damaged(what, error) -> str:
  error = ' '.join(str(error).split())[:300]
  return f'{what} cannot be read ({error}); the checkpoint is damaged, restore it from a copy'
