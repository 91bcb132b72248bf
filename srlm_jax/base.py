"""M0: where it lies, its shape, and the config values that are chosen for it."""
from etils import epath
from ml_collections import ConfigDict

from srlm_jax import catalog, closest, config as configs, InputError, model_files, stage
from srlm_jax.models import config as model_config, llama
from srlm_jax.models.config import Config, PRESETS

# What a preset of the shape must agree in.
SAME = ('D', 'F', 'K', 'G', 'H', 'V', 'layers', 'tied', 'biases', 'qk_norm', 'norms', 'window')


def fit(config: ConfigDict, workdir) -> ConfigDict:
  """A config -> the same with values for `train.select` and the keys of `config.FROM_M0`, if open.

  They depend on the config and the files of M0 alone, so a run that is resumed gets the same.
  Raises InputError as `shape_of`.
  """
  config = with_selection(config)
  if not any(configs.is_open(catalog.look_up(config, key)) for key in configs.FROM_M0):
    return config
  folder, shape = find(config, workdir), shape_of(config, workdir)
  has_template = folder is not None and model_files.has_chat_template(folder)
  found = configs.Base(llama.param_count(shape), shape.context, has_template)
  fitted = catalog.replace(config, configs.suited(config, found)).lock()
  configs.check(fitted)
  return fitted


def with_selection(config: ConfigDict) -> ConfigDict:
  """A config -> the same with a value for `train.select`, if it is auto."""
  if config.train.select != 'auto':
    return config
  found = catalog.replace(config, {'train.select': configs.selection(config)}).lock()
  configs.check(found)
  return found


def find(config: ConfigDict, workdir) -> epath.Path | None:
  """The folder of M0: of the run, once it is converted, else the one that the config names."""
  converted = stage.model_folder(workdir, 'm0') if workdir else None
  if converted and model_files.exists(converted):
    return converted
  return epath.Path(config.m0) if config.m0 else None


def shape_of(config: ConfigDict, workdir) -> Config:
  """The shape of M0: that of its folder, else of `config.model`.

  Raises InputError if nothing says what M0 is, or if its folder is not that of a model or has
  another shape than `config.model`.
  """
  folder = find(config, workdir)
  if folder is not None:
    shape = model_config.load(folder)
    check(config, shape, folder)
    return shape
  if not config.model:
    raise InputError(
        f'nothing says what M0 is; give its Hugging Face folder (--m0=FOLDER for the loop and the '
        f'plan, --config.m0=FOLDER for a stage), or a preset as the size: '
        f'{", ".join(configs.SIZES[1:])}')
  return preset(config.model)


def check(config, shape: Config, folder):
  """Raises InputError if the model in `folder` has not the shape that the config names, if any."""
  if not config.model:
    return
  for field in SAME:
    found, wanted = getattr(shape, field), getattr(preset(config.model), field)
    if found != wanted:
      raise InputError(f'{folder} has {field} = {found}, and config.model = {config.model} has '
                       f'{wanted}; name the right one, or none: the loop without --size, or '
                       f'--config.model= for a stage')


def preset(name: str) -> Config:
  """The shape of a name; raises InputError for an unknown one."""
  if name not in PRESETS:
    raise InputError(f'config.model is {configs.show(name)}{closest(name, PRESETS)}; use one of '
                     f'{", ".join(PRESETS)}, or empty for any model')
  return PRESETS[name]


def chosen(every: dict[str, ConfigDict], before: dict[str, ConfigDict]) -> str:
  """What `fit` chose for models, as one line; '' for nothing.

  `every`: {model: its config}; `before`: the same before `fit`.
  """
  parts = []
  for key in configs.FROM_M0:
    values = {}  # {value: the models that it was chosen for}
    for name, config in every.items():
      if configs.is_open(catalog.look_up(before[name], key)):
        values.setdefault(catalog.look_up(config, key), []).append(name)
    for value, models in values.items():
      which = f' ({", ".join(models)})' if len(values) > 1 else ''
      parts.append(f'{key}={value}{which}')
  return f'chosen for M0: {", ".join(parts)}' if parts else ''
