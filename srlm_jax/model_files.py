"""The files of a model folder: config.json, tokenizer files, and steps/N/{params,train,hash}.

Converted models (step 0, parameters only) and trained models have the same layout.
`checkpoint.store` reads and writes the arrays in `params` and `train`.
"""
from collections.abc import Iterator
import dataclasses

from etils import epath

from srlm_jax import config as configs, InputError, records, storage

TOKENIZER = ('tokenizer.model', 'tokenizer.json', 'tokenizer_config.json',
             'special_tokens_map.json', 'generation_config.json', 'chat_template.jinja',
             'added_tokens.json', 'tokenizer.*.json', 'additional_chat_templates/*.jinja')
SELECTED = 'selected.json'  # the step that checkpoint selection chose
SOURCE = 'source.json'      # hashes of the Hugging Face folder that a model was converted from
LORA = 'lora.json'          # of a model whose steps hold a LoRA adapter, see `Adapter`
HASH_FORMAT = 3  # of steps/N/hash; 1 missed changes that cancel out, 2 did not cover the files


@dataclasses.dataclass(frozen=True)
class ParamHashes:
  """Hashes of a model's parameters. `stored` identifies the model."""
  stored: str    # in the dtype on disk
  float32: str   # cast to float32
  bfloat16: str  # cast to bfloat16


@dataclasses.dataclass(frozen=True)
class StepHashes:
  """The hashes saved with a step, in steps/N/hash."""
  params: ParamHashes
  files: dict[str, str]     # {name: hash} of config.json and the tokenizer files
  train: str | None = None  # of the optimizer state and step; None if they were not saved

  def to_json(self) -> dict:
    fields = dict(format=HASH_FORMAT, **dataclasses.asdict(self.params), files=self.files)
    if self.train is not None:
      fields['train'] = self.train
    return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
  """lora.json: the LoRA adapter in the steps of a model folder, and the model that it changes."""
  rank: int
  alpha: float
  targets: tuple[str, ...]  # names of config.LORA_TARGETS
  base: str    # the folder of that model: absolute, or NAME/model in the workdir of this folder
  step: int    # its step
  params: str  # the recorded hash of its parameters

  @property
  def identity(self) -> str:
    """What the adapted model depends on besides the adapter's arrays; its hash covers this."""
    return f'lora {self.rank} {self.alpha} {" ".join(self.targets)} on {self.params}'


def steps(folder) -> list[int]:
  """The completely saved steps of a checkpoint folder, in ascending order."""
  path = epath.Path(folder) / 'steps'
  found = path.iterdir() if path.exists() else ()
  return sorted(int(p.name) for p in found
                if p.name.isascii() and p.name.isdigit() and storage.is_committed(p))


def latest(folder) -> int:
  """The selected step of a checkpoint folder, or the last one if none was selected.

  Raises InputError if there is no step.
  """
  if not (found := steps(folder)):
    raise InputError(f'no checkpoint in {folder}; train or convert that model first')
  selected = epath.Path(folder) / SELECTED
  if not selected.exists():
    return found[-1]
  advice = 'delete it, and run the selection again'
  chosen = records.read_json(selected, advice)
  step = chosen.get('step') if isinstance(chosen, dict) else None
  if type(step) is not int or step not in found:  # True == 1
    raise InputError(f'{selected} names the step {configs.show(step)}, and there is {found}; '
                     f'{advice}')
  return step


def find_step(folder, step: int | None = None) -> int:
  """-> `step`, by default that of `latest`. Raises InputError if the folder does not have it."""
  if step is None:
    return latest(folder)
  if step not in (found := steps(folder)):
    have = f'has the steps {", ".join(map(str, found))}' if found else 'has none'
    raise InputError(f'{folder} {have}, not step {step}; name one that exists')
  return step


def exists(folder) -> bool:
  """Whether the folder has a checkpoint."""
  try:
    return latest(folder) >= 0
  except InputError:
    return False


def recorded_hash(folder, step: int | None = None) -> str:
  """The recorded hash of a checkpoint's parameters, without reading them."""
  return read_hashes(folder, step).params.stored


def names(folder) -> list[str]:
  """config.json and the tokenizer files of a model folder, those that exist."""
  folder = epath.Path(folder)
  patterns = ('config.json', *TOKENIZER)
  return [str(path.relative_to(folder)) for pattern in patterns
          for path in sorted(folder.glob(pattern))]


def hashes(folder) -> dict[str, str]:
  """{name: hash} of config.json, the tokenizer files, source.json and lora.json of a model."""
  folder = epath.Path(folder)
  found = [*names(folder), *(name for name in (SOURCE, LORA) if (folder / name).exists())]
  return {name: records.hash_file(folder / name) for name in found}


def has_chat_template(folder) -> bool:
  """Whether the tokenizer in a model folder has a chat template.

  Raises InputError if tokenizer_config.json is damaged.
  """
  folder = epath.Path(folder)
  path = folder / 'tokenizer_config.json'
  if (folder / 'chat_template.jinja').exists():
    return True
  fields = records.read_json(path, 'download it again') if path.exists() else {}
  return isinstance(fields, dict) and bool(fields.get('chat_template'))


def adapter(rank: int, alpha: float, targets, base, folder) -> Adapter:
  """The description of a new adapter in `folder` for the latest step of the model `base`."""
  base = storage.absolute(base)
  step = latest(base)
  inside = _is_of_workdir(folder) and _is_of_workdir(base) and _workdir(folder) == _workdir(base)
  return Adapter(rank=rank, alpha=float(alpha), targets=tuple(targets), step=step,
                 params=recorded_hash(base, step),
                 base=str(base.relative_to(_workdir(base)) if inside else base))


def read_adapter(folder) -> Adapter | None:
  """Reads lora.json; None for a model without adapter. Raises InputError if it is damaged."""
  path = epath.Path(folder) / LORA
  if not path.exists():
    return None
  advice = f'restore it, or delete {folder} and train that model again'
  found = records.read_object(path, Adapter, advice)
  if not (1 <= found.rank < 2**24 and found.step >= 0 and found.targets and
          {*found.targets} <= {*configs.LORA_TARGETS} and '\0' not in found.base):
    raise InputError(f'{path} describes no adapter: {configs.show(found)}; {advice}')
  return found


def base_folder(folder, adapter: Adapter):
  """The folder of the model that the adapter in `folder` changes."""
  if '://' in adapter.base:
    return epath.Path(adapter.base)
  return _workdir(folder) / adapter.base  # an absolute path replaces what is before it


def bases(folder) -> Iterator[tuple[str, epath.Path]]:
  """Yields (`base` in lora.json, folder) of the models of the same workdir below an adapter.

  Ends before the first of another workdir, whose `base` in lora.json is relative to that one.
  """
  for adapter, base in _chain(folder):
    if adapter.base.startswith('/') or '://' in adapter.base:
      return
    yield adapter.base, base


def _chain(folder) -> Iterator[tuple[Adapter, epath.Path]]:
  """Yields the adapter in `folder` and the folder that it changes, then the same for that one, ...

  Raises InputError for an adapter that changes itself.
  """
  seen = {storage.absolute(folder)}
  while adapter := read_adapter(folder):
    folder = base_folder(folder, adapter)
    if (where := storage.absolute(folder)) in seen:
      raise InputError(f'{where} is a LoRA adapter that changes itself, by {LORA} there and in '
                       f'{len(seen)} folders; restore it from a copy')
    seen.add(where)
    yield adapter, folder


def _is_of_workdir(folder) -> bool:
  """Whether the folder is WORKDIR/NAME/model of a model of a run."""
  folder = storage.absolute(folder)
  return folder.name == 'model' and folder.parent.name in configs.MODELS


def _workdir(folder):
  return storage.absolute(folder).parent.parent


def read_source(folder) -> dict[str, list[str]]:
  """Reads source.json of a converted model -> {file: [hash, stamp]} of its source folder.

  Raises InputError if the file is damaged.
  """
  path, advice = epath.Path(folder) / SOURCE, f'delete {folder} and convert that model again'
  found = records.read_json(path, advice)
  if not isinstance(found, dict) or not all(
      isinstance(entry, list) and len(entry) == 2 for entry in found.values()):
    raise InputError(f'{path} is damaged; {advice}')
  return found


def copy(source, folder):
  """Copies config.json and the tokenizer files from `source` to `folder`.

  Raises InputError for a folder in place of a file.
  """
  source, folder = epath.Path(source), epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for name in names(source):
    (folder / name).parent.mkdir(exist_ok=True)
    if (source / name).is_dir():
      raise InputError(f'{source / name} is a folder; delete it, or download the file again')
    (source / name).copy(folder / name, overwrite=True)


def read_hashes(folder, step: int | None = None) -> StepHashes:
  """The hashes saved with a step, by default with the step that `latest` returns.

  Raises InputError if they are missing or damaged, if config.json or a tokenizer file changed after
  the step was saved, or if the model that an adapter changes is not the one that it was made for.
  """
  step = find_step(folder, step)
  found = _parse_hashes(epath.Path(folder) / 'steps' / str(step) / 'hash' / 'metadata')
  before, now = found.files, hashes(folder)
  if changed := sorted(n for n in {*before, *now} if before.get(n) != now.get(n)):
    raise InputError(f'{folder}: {", ".join(changed)} changed after the model was made; restore '
                     f'the original files, or delete {folder} and convert or train that model '
                     f'again')
  for _ in _chain(folder):  # before the check, which also checks the models below
    pass
  if adapter := read_adapter(folder):
    _check_base(folder, adapter)
  return found


def _check_base(folder, adapter: Adapter):
  base = base_folder(folder, adapter)
  begin = f'{folder} is a LoRA adapter for step {adapter.step} of {base} with the parameters '
  if adapter.step not in steps(base):
    raise InputError(f'{begin}{adapter.params}, which does not exist; restore that model')
  if (now := recorded_hash(base, adapter.step)) != adapter.params:
    raise InputError(f'{begin}{adapter.params}, and it has {now}; restore that model, or delete '
                     f'{folder} and train it again')


def _parse_hashes(path) -> StepHashes:
  advice = 'the checkpoint is damaged, restore it from a copy'
  if not path.exists():
    raise InputError(f'{path} does not exist; {advice}')
  found = records.read_json(path, advice)
  if not isinstance(found, dict) or found.get('format') != HASH_FORMAT:
    raise InputError(f'{path} does not have hash format {HASH_FORMAT}: an older version wrote this '
                     f'checkpoint; convert or train that model again')
  names = [field.name for field in dataclasses.fields(ParamHashes)]
  if not all(isinstance(found.get(name), str) for name in names) or not isinstance(
      found.get('files'), dict):
    raise InputError(f'{path} must have the fields {", ".join(names)} and files; {advice}')
  params = ParamHashes(**{name: found[name] for name in names})
  return StepHashes(params, found['files'], found.get('train'))
