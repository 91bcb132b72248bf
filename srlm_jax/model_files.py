"""A model's folder as files: config.json, the tokenizer's files, and steps/N/{params,train,hash}.

Every model of a run is such a folder, a converted one (step 0, parameters alone) like a trained
one. What is inside of `params` and `train` is the business of `checkpoint.store`.
"""
import hashlib
import json

from etils import epath

from srlm_jax import InputError, records

TOKENIZER = ('tokenizer.model', 'tokenizer.json', 'tokenizer_config.json',
             'special_tokens_map.json', 'generation_config.json', 'chat_template.jinja')
SELECTED = 'selected.json'  # in a folder, of whose steps one was chosen
SOURCE = 'source.json'  # of a converted model: hashes of the Hugging Face folder it came from
HASH_FORMAT = 3  # of a step's `hash`; format 1 missed changes that cancel, and 2 had no `files`


def steps(folder) -> list[int]:
  """The whole steps of a checkpoint folder, in order."""
  place = epath.Path(folder) / 'steps'
  return sorted(int(p.name) for p in place.iterdir() if p.name.isdigit()) if place.exists() else []


def latest(folder) -> int:
  """The step that stands for the model of a checkpoint folder: the selected one, or else the last."""
  if not (found := steps(folder)):
    raise InputError(f'no checkpoint in {folder}; train or convert that model first')
  selected = epath.Path(folder) / SELECTED
  return json.loads(selected.read_text())['step'] if selected.exists() else found[-1]


def exists(folder) -> bool:
  try:
    return latest(folder) >= 0
  except InputError:
    return False


def recorded_hash(folder, step: int | None = None) -> str:
  """The name of a checkpoint's parameters, without reading them."""
  return read_hashes(folder, step)['stored']


def hashes(folder) -> dict[str, str]:
  """{name: hash} of config.json and the tokenizer's files of a model folder, without which parameters mean nothing."""
  paths = ((name, epath.Path(folder) / name) for name in ('config.json', *TOKENIZER))
  return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in paths if path.exists()}


def read_source(folder) -> dict[str, list[str]]:
  """The source.json of a converted model: {file: [hash, stamp]} of what it was converted from."""
  path, advice = epath.Path(folder) / SOURCE, f'delete {folder} and convert that model again'
  found = records.read_json(path, advice)
  if not isinstance(found, dict) or not all(
      isinstance(entry, list) and len(entry) == 2 for entry in found.values()):
    raise InputError(f'{path} is damaged; {advice}')
  return found


def copy(source, folder):
  """Copies config.json and the tokenizer's files, without which parameters mean nothing."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for name in ('config.json', *TOKENIZER):
    if (epath.Path(source) / name).exists():
      (epath.Path(source) / name).copy(folder / name, overwrite=True)


def read_hashes(folder, step: int | None = None) -> dict:
  """The hashes that were saved with a step, by default that of `latest`.

  `stored`: of the parameters as stored, which is their name; `float32` and `bfloat16`: of the
  parameters in that dtype; `train`: of what only training needs, if it was saved; `files`: {name:
  hash} of the model's files. Raises InputError if these files changed since then.
  """
  step = latest(folder) if step is None else step
  path = epath.Path(folder) / 'steps' / str(step) / 'hash' / 'metadata'
  advice = 'the checkpoint is damaged, restore it from a copy'
  if not path.exists():
    raise InputError(f'{path} does not exist; {advice}')
  found = records.read_json(path, advice)
  if not isinstance(found, dict) or found.get('format') != HASH_FORMAT:
    raise InputError(f'{path} has another hash format than {HASH_FORMAT}: an older version wrote this '
                     f'checkpoint; convert or train that model again')
  if not isinstance(found.get('stored'), str) or not isinstance(found.get('files'), dict):
    raise InputError(f'{path} lacks "stored" or "files"; {advice}')
  before, now = found['files'], hashes(folder)
  if changed := sorted(n for n in {*before, *now} if before.get(n) != now.get(n)):
    raise InputError(f'{folder}: {", ".join(changed)} changed after the model was made; restore '
                     f'what was there, or delete {folder} and make that model again')
  return found
