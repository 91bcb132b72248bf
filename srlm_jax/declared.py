"""What of the config a stage reads: declared once, and nothing else can be read.

A stage's `run` is decorated with the keys that it reads. It then gets a view of the config with these keys alone, so
that its manifest, which lists them, cannot miss one.

>>> @reads('judge.n', free=('train.log_every',))
... def run(config, workdir):
...   return config.judge.n, config.name, config.judge.template
>>> from configs import base
>>> run(base.get('m2'), 'runs/x')
Traceback (most recent call last):
srlm_jax.declared.Undeclared: config.judge.template is read and not declared; add it to the keys of this stage
"""
from collections.abc import Iterable
import functools

from ml_collections import ConfigDict

FORMAT = 3  # of the manifests that list these keys
ALWAYS = ('name', 'size', 'sampler')  # which config it is; the parameters of the sampler are in the manifest


class Undeclared(Exception):
  """A stage reads a key that it does not declare: a mistake in the program, not of its user."""


def reads(*keys: str, free: Iterable[str] = ()):
  """Declares the keys (`SECTION.KEY`) of `run(config, workdir, ..)`. `keys` change what the stage writes; `free` do
  not, and are not compared when the stage is run again."""
  def wrap(run):
    @functools.wraps(run)
    def declared(config, *args, **more):
      return run(View(whole(config), keys, (*free, *ALWAYS)), *args, **more)
    declared.keys, declared.free = keys, tuple(free)
    return declared
  return wrap


class View:
  """A config, or a section of it, that gives its declared keys alone; `keys`: those that change what is written."""

  def __init__(self, config: ConfigDict, keys: Iterable[str], free: Iterable[str], section: str = ''):
    self._config, self.keys, self._free, self._section = config, tuple(keys), tuple(free), section

  def __getattr__(self, name: str):
    key = self._section + name
    value = look_up(self._config, key)
    if isinstance(value, ConfigDict):
      return View(self._config, self.keys, self._free, key + '.')
    if key not in (*self.keys, *self._free):
      raise Undeclared(f'config.{key} is read and not declared; add it to the keys of this stage')
    return value


def whole(config) -> ConfigDict:
  """The config behind a view, for a stage that runs other stages; a config as it is."""
  return config._config if isinstance(config, View) else config


def look_up(config: ConfigDict, key: str):
  """The value of SECTION.KEY; raises AttributeError if there is none."""
  for part in key.split('.'):
    config = getattr(config, part)
  return config
