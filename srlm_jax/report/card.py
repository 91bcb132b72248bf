"""The model card of an exported model: the README.md that the Hugging Face Hub shows.

It has only what the files of the run say. What they do not say is left out.
"""
from collections.abc import Iterator
import dataclasses
import json

from etils import epath

from srlm_jax import catalog, config as configs, model_files, stage
from srlm_jax.report import results, summaries

NAME = 'README.md'


@dataclasses.dataclass(frozen=True)
class Export:
  """An exported model, for its card."""
  folder: epath.Path         # of the checkpoint
  step: int
  parameters: int
  dtype: str
  hashes: model_files.ParamHashes
  files: dict[str, str]      # {name: SHA-256} of the exported files
  chat: str                  # '' if unknown
  compared: int              # texts whose ids were compared with those of transformers
  differences: tuple[str, ...]  # those with other ids
  base_model: str = ''       # name on the Hub; '' if unknown
  license: str = ''          # identifier; '' if unknown


@dataclasses.dataclass(frozen=True)
class _Trained:
  """A model of the run: manifest.json and done.json, {} before its end, of its training."""
  name: str
  workdir: epath.Path
  manifest: dict
  done: dict

  @property
  def config(self) -> dict:
    return self.manifest['config']


def text(export: Export) -> str:
  """The text of README.md."""
  lineage = list(_lineage(export.folder))
  parts = [_header(export, lineage), f'# {lineage[0].name if lineage else "Converted model"}',
           _introduction(export, lineage), _use(export), _numbers(export), _training(lineage),
           _config(lineage), _reproduce(export, lineage), _files(export)]
  return '\n\n'.join(filter(None, parts)) + '\n'


def _lineage(folder) -> Iterator[_Trained]:
  """The model in `folder`, if it was trained here, and the models of the run it started from."""
  while (folder / 'manifest.json').exists():
    manifest = stage.read_manifest(folder / 'manifest.json')
    done = stage.finished(folder) if (folder / 'done.json').exists() else {}
    yield _Trained(manifest['stage'].partition('/')[0], folder.parent.parent, manifest, done)
    before = manifest['config'].get('train.init')
    if before not in configs.MODELS:
      return
    folder = folder.parent.parent / before / 'model'


def _header(export: Export, lineage: list[_Trained]) -> str:
  """The YAML that the Hub reads."""
  losses = dict.fromkeys(model.config['train.loss'] for model in lineage)
  fields = dict(library_name='transformers', pipeline_tag='text-generation')
  if export.base_model:
    fields['base_model'] = export.base_model
  if export.license:
    fields['license'] = export.license
  fields['tags'] = ['srlm_jax', *losses]
  return '\n'.join(['---', *(f'{name}: {json.dumps(x)}' for name, x in fields.items()), '---'])


def _introduction(export: Export, lineage: list[_Trained]) -> str:
  size = f'{export.parameters:,} parameters in {export.dtype}'
  if not lineage:
    return f'A model of {size}, converted by srlm_jax and not trained by it.'
  model = lineage[0]
  started = model.config.get('train.init')
  source = f'starts from `{started}`' if started in configs.MODELS else (
      'starts from another model' if started else 'was trained from random weights')
  versions = model.manifest.get('environments', [{}])[-1].get('versions', {})
  by = ' '.join(filter(None, ['srlm_jax', versions.get('srlm_jax')]))
  step = f'step {export.step}' + (f' of {model.done["steps"]}' if model.done else '')
  return (f'`{model.name}` of a run of {by} (self-rewarding language models, Yuan et al. 2024, '
          f'arXiv:2401.10020): {step}, {size}. It {source}.')


def _use(export: Export) -> str:
  if not export.compared:
    return ''
  found = ['## Use']
  if export.chat:
    found.append(f'Prompts have the chat format `{export.chat}`, which is the chat template of the '
                 f'tokenizer.')
    found.append("""```python
tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
inputs = tokenizer.apply_chat_template(
    [{'role': 'user', 'content': PROMPT}], add_generation_prompt=True, return_dict=True,
    return_tensors='pt')
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```""")
  other = len(export.differences)
  found.append(f'Of {export.compared} texts, {other or "none"} have other ids in transformers than '
               f'in srlm_jax{f", such as {export.differences[0]!r}" if other else ""}. Text that '
               f'spells an added token is that token in transformers, and plain text in srlm_jax.')
  return '\n\n'.join(found)


def _numbers(export: Export) -> str:
  """The numbers of this model in the run's report, if they are of these parameters."""
  name, workdir = export.folder.parent.name, export.folder.parent.parent
  params = model_files.recorded_hash(export.folder, export.step)
  for spec in catalog.STAGES:
    path = workdir / name / spec.name / 'manifest.json'
    if spec.runs == ('self',) and path.exists():
      if stage.read_manifest(path)['params'] != params:
        return ''
  rows = [row for row in results.of_models(workdir) if row['model'] == name]
  cells = [cell for table in results.tables(rows) for cell in zip(*table, strict=True)]
  shown = [(heading, value) for heading, value in cells if heading != 'model']
  if not shown:
    return ''
  return ('## Results\n\nFrom the report of the run; 95 % intervals in brackets.\n\n' +
          _table([('measure', 'value'), *shown]))


def _training(lineage: list[_Trained]) -> str:
  """Each model of the lineage with the data that it was trained on."""
  if not lineage:
    return ''
  rows = [('model', 'starts from, parameters', 'loss', 'examples', 'steps', 'file',
           'records', 'hash')]
  for model in lineage:
    started = f'{model.config["train.init"]}, `{model.manifest["params"]}`' if (
        model.manifest['params']) else '-'
    about = (model.name, started, model.config['train.loss'],
             *(f'{model.done[key]:,}' if model.done else '-' for key in ('examples', 'steps')))
    for file, value in model.manifest['inputs'].items():
      rows.append((*about, f'`{file}`', _count(model, file, value), f'`{value}`'))
  return '## Training data\n\n' + _table(rows)


def _count(model: _Trained, file: str, value: str) -> str:
  """The number of records of an input with this hash; '-' if the run's files do not say it."""
  path = model.workdir / file
  if not (path.parent / 'done.json').exists():
    return '-'
  count, found = stage.finished(path.parent)['files'].get(path.name, (None, ''))
  return f'{count:,}' if count is not None and found == value else '-'


def _config(lineage: list[_Trained]) -> str:
  if not lineage:
    return ''
  return ('## Config\n\nThe config keys of the training of '
          f'`{lineage[0].name}`:\n\n```json\n{json.dumps(lineage[0].config, indent=1)}\n```')


def _reproduce(export: Export, lineage: list[_Trained]) -> str:
  """The commands, if the run says which size it has."""
  if not lineage:
    return ''
  name, workdir = lineage[0].name, lineage[0].workdir
  size = summaries.run_results(workdir).size
  if not size or name == 'm0':
    return ''
  command = ['python -m srlm_jax.loop', f'--size={size}', '--workdir=RUN', f'--last={name}']
  if configs.get(name, size).data.source != 'sandbox':
    command += ['--m0=M0', '--data=DATA']
  command += [f"'--set={change}'" for change in changes(workdir, size)]
  then = f'python -m srlm_jax.checkpoint.convert --checkpoint=RUN/{name}/model --to_hf=FOLDER'
  return ('## Reproduce\n\n```sh\n' + ' \\\n  '.join(command) + f'\n{then} --step={export.step}'
          '\n```')


def changes(workdir, size: str) -> list[str]:
  """The --set flags with which the loop made a workdir, from all manifests in it."""
  found: dict[str, list[str]] = {}
  for name in configs.MODELS:
    default, recorded = dict(configs.flat(configs.get(name, size))), {}
    owners = (name, 'data') if name == 'sft' else (name,)
    for path in (path for owner in owners
                 for path in sorted((workdir / owner).glob('*/manifest.json'))):
      recorded |= stage.read_manifest(path)['config']
    for key, value in recorded.items():
      if key in default and _text(value) != _text(default[key]):
        found.setdefault(f'{key}={_text(value)}', []).append(name)
  return [f'{",".join(names)}:{change}' for change, names in found.items()]


def _text(value) -> str:
  """A config value as --set takes it."""
  return ','.join(value) if isinstance(value, list | tuple) else str(value)


def _files(export: Export) -> str:
  hashes = export.hashes
  rows = [('what', 'hash'), *((f'parameters, {name}', f'`{value}`') for name, value in (
      ('as stored', hashes.stored), ('in float32', hashes.float32),
      ('in bfloat16', hashes.bfloat16)))]
  rows += [(f'`{name}`, SHA-256', f'`{value}`') for name, value in sorted(export.files.items())]
  return '## Files\n\n' + _table(rows)


def _table(rows: list[tuple]) -> str:
  """Rows of cells, headings first -> a Markdown table."""
  first, *others = [' | '.join(row) for row in rows]
  return '\n'.join(f'| {row} |' for row in (first, ' | '.join('---' for _ in rows[0]), *others))
