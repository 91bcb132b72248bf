"""A stage: a folder WORKDIR/OWNER/NAME with manifest.json, records, and done.json.

The manifest is written first and says what the stage was made with; done.json is written last. A
finished stage that is run again with the same config and inputs does nothing.
"""
from collections.abc import Iterator
import dataclasses
import hashlib
import json
import re
import time

from etils import epath

from srlm_jax import (
  catalog,
  config as configs,
  environment,
  hosts,
  InputError,
  metrics,
  model_files,
  preemption,
  records,
  storage,
)

FORMAT = 3  # of manifest.json


class Stage:
  """One stage's folder.

  Use: `s = Stage(..)`; return if `s.done`; check the input; `s.begin()`; work; `s.finish()`.
  `models` are the checkpoint folders that it runs. In `config`, open keys have the values with
  which the stage was started before.
  """

  def __init__(self, spec: catalog.Spec, config, workdir, template: str = '', more_inputs=()):
    """`template`: text that the output depends on; `more_inputs`: files beside those of `spec`.

    Raises InputError if the folder was made with something else, if a stage that it reads from has
    not finished, or if a file of a finished stage has changed.
    """
    self.spec, self._workdir = spec, workdir
    self.folder = spec.folder(workdir, config)
    path = self.folder / 'manifest.json'
    before = read_manifest(path) if path.exists() else None
    self.config = config = _chosen_before(spec, config, before) if before else config
    _refuse_open(spec, config)
    self.title = f'{self.folder.parent.name}/{spec.name}'
    preemption.stop_at_start(self.title)
    self.started, self._generated = time.time(), 0
    models = {role: finished_model(workdir, name) for role, name in spec.models(config).items()}
    self.models = list(models.values())
    inputs = [*spec.inputs(workdir, config), *more_inputs]
    self.has_inputs = bool(inputs)
    entries = {epath.Path(path): records.describe(path) for path in inputs}
    saved = {role: model_files.read_hashes(folder) for role, folder in models.items()}
    self._manifest = json.loads(json.dumps(dict(
        format=FORMAT, stage=self.title,
        params='-'.join(step.params.stored for step in saved.values()),
        model_files={f'{role}/{file}': name
                     for role, step in saved.items() for file, name in step.files.items()},
        inputs=_names(entries, workdir),
        template=hashlib.sha256(template.encode()).hexdigest()[:16],
        config=spec.recorded(config))))
    self.done = (self.folder / 'done.json').exists()
    if self.done:
      require_finished(self.folder)
    if before:
      self._compare(before)
    written = {folder: _written(folder) for folder in dict.fromkeys(p.parent for p in entries)}
    for source, entry in entries.items():
      _check_file(source, written[source.parent], entry)
    if self.done:
      check_records(self.folder)
      hosts.log(f'{self.title}: already done')

  def read(self, file: str) -> Iterator:
    """The records of an input, STAGE/FILE as in the catalog, as objects of `catalog.KINDS`.

    Yields nothing for a missing file of `reads_if_there`. Raises Undeclared if the stage does not
    declare this input, and InputError if it is missing.
    """
    path, kind = self._first(file), catalog.KINDS[file.partition('/')[2]]
    if file in self.spec.reads_if_there and not path.exists():
      return iter(())
    if file.endswith(catalog.SHARDS):
      return records.read_shards(path.parent, catalog.stem(file.partition('/')[2]), kind)
    return records.read(path, kind)

  def path(self, file: str):
    """The path of an input for an error message; for shards, a pattern."""
    return self._first(file).parent / file.partition('/')[2]

  def has(self, file: str) -> bool:
    """Whether the input STAGE/FILE exists."""
    return self._first(file).exists()

  def _first(self, file: str):
    """The path of an input, or of its first shard."""
    self.spec.check_input(file, self.config)
    return catalog.paths(file, self._workdir, self.config)[0]

  def _compare(self, before: dict):
    """Raises InputError if an earlier manifest differs from this one.

    A config key that the older manifest lacks had its default value. A key that the stage no longer
    reads, and the environment, are not compared.
    """
    before, now = {key: x for key, x in before.items() if key != 'environments'}, self._manifest
    for old, new in configs.RENAMED.items():
      if old in before['config']:
        before['config'][new] = before['config'].pop(old)
    if missing := now['config'].keys() - before['config'].keys():
      default = configs.get(self.config.name, self.config.size)
      values = {key: catalog.look_up(default, key) for key in missing}
      before['config'] |= json.loads(json.dumps(values))
    before['config'] = {key: before['config'][key] for key in now['config']}
    for change in _changes(before, now):
      raise InputError(f'{self.folder} was made with another {change}; delete that folder or use '
                       f'another --workdir')

  def begin(self, config=None):
    """Writes the manifest, before anything else of the stage.

    `config`: with values for its open keys. The manifest also lists every environment in which the
    stage was started or resumed, with the keys that were chosen for it.
    """
    hosts.sync(f'{self.title} was looked up')  # no host may find a manifest that is half written
    if config is not None:
      self.config = config
      self._manifest['config'] = json.loads(json.dumps(self.spec.recorded(config)))
    now = environment.record()
    if chosen := [key for key in configs.OPEN if key in self.spec.unrecorded]:
      now['config'] = {key: catalog.look_up(catalog.unwrap(self.config), key) for key in chosen}
    if hosts.is_first_host():
      path = self.folder / 'manifest.json'
      before = read_manifest(path).get('environments', []) if path.exists() else []
      storage.make_folder(self.folder)
      environments = [*(other for other in before if other != now), now]
      write_json(path, dict(self._manifest, environments=environments))
    params = self._manifest['params']
    hosts.log(f'{self.title}: starts, parameters {params}' if params else f'{self.title}: starts')
    hosts.sync(f'{self.title} begins')

  def add(self, seconds: float = 0.0, generated: int = 0):
    """Adds to what done.json says of the work; all hosts must call it.

    seconds: that the stage took before it was made; negative for those of another stage
    generated: tokens that were sampled
    """
    self.started -= seconds
    self._generated += generated

  def finish(self, typed=None, **summary):
    """Marks the stage done; the summary is kept in done.json, its numbers and texts are printed.

    typed: a summary of `catalog.SUMMARIES`, instead of numbers by name. done.json also has
    `seconds` and, if a model sampled, `generated` tokens: both since the last start of the stage.
    """
    if typed is not None:
      summary = dataclasses.asdict(typed)
    hosts.sync(f'{self.title} ends')
    seconds = round(time.time() - self.started, 1)
    if hosts.is_first_host():
      spent = dict(seconds=seconds)
      if self._generated:
        spent['generated'] = self._generated
      storage.sync(self.folder)
      files = records.contents(self.folder)
      write_json(self.folder / 'done.json', dict(summary, files=files, **spent))
      metrics.show_finished(self._workdir, self.title)
    hosts.sync(f'{self.title} is done')  # every host may read done.json
    shown = [f'{key} {value}' for key, value in summary.items()
             if value != '' and not isinstance(value, dict | list | None)]
    hosts.log(', '.join([f'{self.title}: done in {seconds} s', *shown]))


def _refuse_open(spec: catalog.Spec, config):
  """Raises InputError if a key has no value that the programs choose at their start."""
  for key in (*configs.FROM_M0, 'train.select'):
    if key in spec.keys and configs.is_open(value := catalog.look_up(catalog.unwrap(config), key)):
      raise InputError(f'config.{key} is {value}, which leaves it to be chosen; call base.fit '
                       f'first, or give a value')


def _chosen_before(spec: catalog.Spec, config, manifest: dict):
  """The config with the values of an earlier start for the keys that it leaves open.

  Those that depend on the devices are of the last start on the same devices. The sizes of a mesh
  are taken together or, if the config now gives another one of them, not at all.
  """
  now, full = environment.devices(), catalog.unwrap(config)
  here = [e for e in manifest.get('environments', []) if now.items() <= e.items()]
  found = {**manifest['config'], **(here[-1].get('config', {}) if here else {})}
  wanted = {key: catalog.look_up(full, key) for key in configs.OPEN
            if key in spec.keys + spec.unrecorded}
  kept = {key: found[key] for key, value in wanted.items()
          if configs.is_open(value) and type(found.get(key)) is type(value)}
  changed = {key.partition('.')[0] for key, value in wanted.items() if 'mesh.' in key
             and not configs.is_open(value) and value != found.get(key, value)}
  return catalog.replace(config, {key: value for key, value in kept.items()
                                  if key.partition('.')[0] not in changed})


def model_folder(workdir, name: str):
  """The checkpoint folder of a model: of the run, by its name, or any, by its path."""
  if not name:
    raise InputError('this config names no model for this stage (config.sampler is empty); the '
                     'stage is for m1 and later models')
  return epath.Path(name) if '/' in name else epath.Path(workdir) / name / 'model'


def finished_model(workdir, name: str):
  """The checkpoint folder of a model that a stage runs.

  Raises InputError if its training has not finished, if a checkpoint is still to be selected, or
  if its checkpoint is not the one that training or the selection ended with.
  """
  folder = model_folder(workdir, name)
  require_finished(folder)
  selected = (folder / model_files.SELECTED).exists()
  if (by := trained_with(folder, 'train.select')) and not selected:
    program = 'stopping' if by == 'wins' else 'selection'
    raise InputError(f'{folder} was trained with train.select, and no checkpoint is selected yet; '
                     f'run python -m srlm_jax.{program} with the config of {name}')
  if (folder / 'done.json').exists() and not selected:
    wanted, found = finished(folder).get('params'), model_files.recorded_hash(folder)
    if found != wanted:
      raise InputError(f'the last step of {folder} has the parameters {found}, but training ended '
                       f'with {wanted}; restore its steps, or delete {folder} and train again')
  return folder


def trained_with(folder, key: str) -> str:
  """The value of a config key for the training of the model in `folder`; '' if there is none."""
  path = epath.Path(folder) / 'manifest.json'
  return read_manifest(path)['config'].get(key, '') if path.exists() else ''


def read_manifest(path) -> dict:
  """The manifest of a stage; raises InputError if it has another format."""
  advice = 'delete that folder or use another --workdir'
  found = records.read_json(path, advice)
  is_ours = isinstance(found, dict) and found.get('format') == FORMAT
  if not is_ours or not isinstance(found.get('config'), dict) or not _are_environments(
      found.get('environments', [])):
    raise InputError(f'{path} is damaged, or was written by another version of srlm_jax (this one '
                     f'writes format {FORMAT}); {advice}')
  return found


def _are_environments(found) -> bool:
  return isinstance(found, list) and all(
      isinstance(e, dict) and isinstance(e.get('config', {}), dict) for e in found)


def require_finished(folder):
  """Raises InputError if a stage started in this folder and has not finished.

  A folder without manifest.json and done.json was not made by a stage, and is not checked.
  """
  folder = epath.Path(folder)
  manifest, done = ((folder / file).exists() for file in ('manifest.json', 'done.json'))
  if manifest and not done:
    raise InputError(f'{folder} is not finished; run that stage again, it resumes where it stopped')
  if done and not manifest:
    raise InputError(f'{folder} has a done.json and no manifest.json; restore it, or delete '
                     f'{folder} and run that stage again')
  if done:
    finished(folder)


def finished(folder) -> dict:
  """The done.json of a stage: `files` {name: [records, hash]}, `seconds`, and its summary."""
  path = epath.Path(folder) / 'done.json'
  advice = 'delete it, and run that stage again'
  found = records.read_json(path, advice)
  is_whole = isinstance(found, dict) and isinstance(found.get('files'), dict)
  if not is_whole or 'seconds' not in found:
    raise InputError(f'{path} lacks "files" or "seconds": it is damaged, or from an older version; '
                     f'{advice}')
  for name, entry in found['files'].items():
    if not re.fullmatch(f'({records.ANSWERS}/)?[^/\0]{{1,255}}', name) or name in ('.', '..'):
      raise InputError(f'{path} names the file {name!r}, which no stage writes; {advice}')
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
      raise InputError(f'{path}: the entry of {name} is {str(entry)[:40]}, not a count and a hash; '
                       f'{advice}')
  return found


def summary(folder):
  """The summary of a finished stage, of the kind in `catalog.SUMMARIES`."""
  finished(folder)
  path = epath.Path(folder) / 'done.json'
  kind = catalog.SUMMARIES[path.parent.name]
  return records.read_object(path, kind, 'delete it, and run that stage again')


def write_json(path, value):
  """Writes a whole file, or nothing."""
  with storage.replacing(path) as file:
    file.write(json.dumps(value, indent=1) + '\n')


def seeds(workdir):
  """The folder of the run's seed data: ift.jsonl, ranked.jsonl, heldout.jsonl."""
  return epath.Path(workdir) / 'data' / 'seeds'


def check_records(folder):
  """Raises InputError if the stage in this folder has not finished, or if its files have changed.

  A folder that was not made by a stage is not checked.
  """
  folder = epath.Path(folder)
  if (files := _written(folder)) is not None:
    there = *folder.glob('*.jsonl'), *folder.glob(f'{records.ANSWERS}/*.jsonl')
    for path in sorted({*there, *(folder / name for name in files)}):
      _check_file(path, files)


def _written(folder) -> dict[str, list] | None:
  """{name: [records, hash]} of the files of a finished stage; None if no stage made the folder.

  Raises InputError if the stage has not finished.
  """
  require_finished(folder)
  return finished(folder)['files'] if (folder / 'done.json').exists() else None


def _check_file(path, files: dict[str, list] | None, entry: list | None = None):
  """Raises InputError if a file of a finished stage has changed.

  `files`: what `_written` gives for its folder; `entry`: what `records.describe` gives for the
  file, if it is known.
  """
  if path.suffix not in records.HASHED or files is None:
    return
  name = f'{records.ANSWERS}/{path.name}' if path.parent.name == records.ANSWERS else path.name
  if name not in files:
    raise InputError(f'{path} was added after its stage finished; delete it')
  if not path.exists() or (entry or records.describe(path)) != files[name]:
    raise InputError(f'{path} has changed since its stage finished ({files[name][0]} records '
                     f'then); restore it, or delete {path.parent} and run that stage again')


def _names(entries: dict, workdir) -> dict[str, str]:
  """{path: [records, hash]} -> {name: hash}.

  A file in the workdir is named by its path there, another by its file name alone, so that folders
  may be moved. A name that occurs again gets a number.
  """
  found = {}
  for path, (_, value) in entries.items():
    name = str(_relative(path, workdir))
    found[name if name not in found else f'{name} {len(found)}'] = value
  return found


def _relative(path, workdir):
  path, workdir = storage.absolute(path), storage.absolute(workdir)
  return path.relative_to(workdir) if path.is_relative_to(workdir) else epath.Path(path.name)


def _changes(before: dict, now: dict, where: str = ''):
  """Yields 'KEY (old, now new)' where two manifests differ."""
  for key in sorted(before.keys() | now.keys()):
    a, b = before.get(key), now.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      yield from _changes(a, b, f'{where}{key}.')
    elif a != b:
      yield f'{where}{key} ({a}, now {b})'
