"""A stage: a folder `WORKDIR/MODEL/STAGE` with a manifest, records, and a done file.

It writes manifest.json before anything else and done.json after everything else; run again with the
same config and inputs, it does nothing.
"""
import hashlib
import json
import time

from etils import epath

from srlm_jax import catalog, config as configs, environment, hosts, InputError, model_files, records

FORMAT = 3  # of manifest.json


class Stage:
  """One stage's folder.

  `s = Stage(..)`; return if `s.done`; check the input; `s.begin()`; work; `s.finish()`.
  """

  def __init__(self, spec: catalog.Spec, config, workdir, template: str = '', more_inputs=()):
    """`template`: the text of its template; `more_inputs`: files that it reads beside `spec.reads`.

    Raises InputError if the folder was made with others, if a stage that it reads from has not
    finished, or if files of a finished stage do not hold the records that it wrote.
    """
    self.folder = spec.folder(workdir, config)
    self.title = f'{self.folder.parent.name}/{spec.name}'
    self.started = time.time()
    self.models = [finished_model(workdir, name) for name in spec.models(config)]
    self.inputs = [*spec.inputs(workdir, config), *more_inputs]
    hashes = {epath.Path(path): records.hash_file(path) for path in self.inputs}
    models = {folder: model_files.read_hashes(folder) for folder in self.models}
    self._manifest = json.loads(json.dumps(dict(
        format=FORMAT, stage=self.title,
        params='-'.join(found['stored'] for found in models.values()),
        model_files={f'{_relative(folder, workdir)}/{file}': name
                     for folder, found in models.items() for file, name in found['files'].items()},
        inputs=_names(hashes, workdir),
        template=hashlib.sha256(template.encode()).hexdigest()[:16],
        config=spec.recorded(config))))
    path = self.folder / 'manifest.json'
    self.done = (self.folder / 'done.json').exists()
    if self.done and not path.exists():
      require_finished(self.folder)
    if path.exists():
      for change in _changes(self._before(path, config), self._manifest):
        raise InputError(f'{self.folder} was made with another {change}; delete that folder or use another --workdir')
    for source, found in hashes.items():
      require_finished(source.parent)
      _check_file(source, found)
    if self.done:
      _check_files(self.folder)
      hosts.say(f'{self.title}: done before')

  def _before(self, path, config) -> dict:
    """The manifest that is there, with the keys of today: one that it lacks had its default, and one that the stage no
    longer reads is left out."""
    before = read_manifest(path)
    before.pop('environments', None)
    if missing := self._manifest['config'].keys() - before['config'].keys():
      default = configs.get(config.name, config.size)
      before['config'] |= json.loads(json.dumps({key: catalog.look_up(default, key) for key in missing}))
    before['config'] = {key: before['config'][key] for key in self._manifest['config']}
    return before

  def begin(self, mesh=None):
    """Writes the manifest, before anything else of the stage; a stage that resumes in another environment, or on
    another `mesh`, adds that one."""
    hosts.sync(f'{self.title} was looked up')  # no host finds a manifest that is half written
    now = environment.record() | (dict(mesh=dict(mesh.shape)) if mesh else {})
    if hosts.is_first_host():
      path = self.folder / 'manifest.json'
      before = read_manifest(path).get('environments', []) if path.exists() else []
      self.folder.mkdir(parents=True, exist_ok=True)
      write_json(path, dict(self._manifest, environments=[*(e for e in before if e != now), now]))
    params = self._manifest['params']
    hosts.say(f'{self.title}: starts' + f', parameters {params}' * bool(params))
    hosts.sync(f'{self.title} begins')

  def finish(self, **summary):
    """Marks the stage done; `summary` is kept in done.json and printed."""
    hosts.sync(f'{self.title} ends')
    seconds = round(time.time() - self.started, 1)
    if hosts.is_first_host():
      write_json(self.folder / 'done.json', dict(summary, files=records.contents(self.folder), seconds=seconds))
    hosts.sync(f'{self.title} is done')  # every host may read done.json
    hosts.say(f'{self.title}: done in {seconds} s' + ''.join(f', {k} {v}' for k, v in summary.items()
                                                       if not isinstance(v, dict | list | None)))


def model_folder(workdir, name: str):
  """The checkpoint folder of a model of the run; of any model, where `name` is a path."""
  if not name:
    raise InputError('this config names no model for this stage (config.sampler is empty); it is for m1, m2 and m3')
  return epath.Path(name) if '/' in name else epath.Path(workdir) / name / 'model'


def finished_model(workdir, name: str):
  """The checkpoint folder of a model that another stage runs; refused while its training has not finished, or no
  checkpoint of it was selected that should be."""
  folder = model_folder(workdir, name)
  require_finished(folder)
  if selects_by(folder) and not (folder / model_files.SELECTED).exists():
    raise InputError(f'{folder} was trained with train.select, and nothing is selected; run python -m '
                     f'srlm_jax.selection with the config of {name}')
  return folder


def selects_by(folder) -> str:
  """The train.select that the model in `folder` was trained with; '' too for one that was not trained here."""
  path = folder / 'manifest.json'
  return read_manifest(path)['config'].get('train.select', '') if path.exists() else ''


def read_manifest(path) -> dict:
  """The manifest of a stage, checked for its format."""
  advice = 'delete that folder or use another --workdir'
  found = records.read_json(path, advice)
  if not isinstance(found, dict) or found.get('format') != FORMAT or not isinstance(found.get('config'), dict):
    raise InputError(f'{path} is damaged, or was written by another version of srlm_jax (this one writes format '
                     f'{FORMAT}); {advice}')
  return found


def require_finished(folder, name: str = ''):
  """Raises InputError if a stage began in this folder and did not finish, or if its file `name` is not as it was then.
  A folder without manifest.json and done.json was not made by a stage, and is not checked."""
  folder = epath.Path(folder)
  manifest, done = ((folder / file).exists() for file in ('manifest.json', 'done.json'))
  if manifest and not done:
    raise InputError(f'{folder} is not finished; run that stage again, it does what is missing')
  if done and not manifest:
    raise InputError(f'{folder} has a done.json and no manifest.json; restore it, or delete {folder} and run that '
                     f'stage again')
  if done:
    finished(folder)
  if name:
    _check_file(folder / name)


def _check_file(path, found: str = ''):
  """Raises InputError if a file of a finished stage is not as its stage left it; `found`: its hash, if it is known."""
  if path.suffix not in ('.json', '.jsonl') or not (path.parent / 'done.json').exists():
    return
  files = finished(path.parent)['files']
  if path.name not in files:
    raise InputError(f'{path} was not there when its stage finished; delete it')
  if not path.exists() or (found or records.hash_file(path)) != files[path.name][1]:
    raise InputError(f'{path} is not as its stage left it ({files[path.name][0]} records); restore it, or delete '
                     f'{path.parent} and run that stage again')


def _check_files(folder):
  """`_check_file` for every file that a finished stage wrote, and for records that were added to its folder."""
  for path in sorted({*folder.glob('*.jsonl'), *(folder / name for name in finished(folder)['files'])}):
    _check_file(path)


def finished(folder) -> dict:
  """What a finished stage wrote of itself into done.json, checked for what every stage writes."""
  path = epath.Path(folder) / 'done.json'
  advice = 'delete it, and run that stage again'
  found = records.read_json(path, advice)
  if not isinstance(found, dict) or not isinstance(found.get('files'), dict) or 'seconds' not in found:
    raise InputError(f'{path} lacks "files" or "seconds": it is damaged, or of an older version; {advice}')
  return found


def write_json(path, value):
  """Writes a whole file, or nothing."""
  path = epath.Path(path)
  partial = path.parent / f'{path.name}.partial'
  partial.write_text(json.dumps(value, indent=1) + '\n')
  partial.replace(path)


def seeds(workdir):
  """The folder of the run's seed data: ift.jsonl, ranked.jsonl, heldout.jsonl."""
  return epath.Path(workdir) / 'data' / 'seeds'


def _names(hashes: dict, workdir) -> dict[str, str]:
  """{path: hash} -> {name: hash}: files of the workdir by their path in it, others by their name, so that both may be
  moved; of several with one name each gets a number."""
  found = {}
  for path, value in hashes.items():
    name = str(_relative(path, workdir))
    found[name if name not in found else f'{name} {len(found)}'] = value
  return found


def _relative(path, workdir):
  path, workdir = epath.Path(path).resolve(), epath.Path(workdir).resolve()
  return path.relative_to(workdir) if path.is_relative_to(workdir) else epath.Path(path.name)


def _changes(before, now, where=''):
  """Yields 'key (old, now new)' where two manifests differ."""
  for key in sorted(set(before) | set(now)):
    a, b = before.get(key), now.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      yield from _changes(a, b, f'{where}{key}.')
    elif a != b:
      yield f'{where}{key} ({a}, now {b})'
