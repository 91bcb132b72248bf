"""Eight fake CPU devices, the folder of test data, small models and tokenizers."""
import atexit
import functools
import io
import math
import os
import pathlib
import re
import shutil
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
# Most of the time of the tests is compilation. XLA does the same as in a program; only LLVM, which
# then makes machine code, optimizes less.
os.environ['XLA_FLAGS'] = ' '.join([
    '--xla_backend_optimization_level=0', os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8'])

import buckets
from etils import epath
import forks
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from srlm_jax import catalog, config as configs, sharding
from srlm_jax.models import llama

# Without a deadline, because the machine may be loaded.
hypothesis.settings.register_profile('same', deadline=None, derandomize=True)
hypothesis.settings.load_profile('same')

ROOT = pathlib.Path(__file__).parent.parent
DATA = pathlib.Path(os.environ.get('SRLM_TEST_DATA', ROOT.parent / 'shared' / 'data'))
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]
LONGEST = [f'test_{name}' for name in ('loop', 'engine', 'step', 'reference', 'compile', 'convert')]


def pytest_collection_modifyitems(items):
  """The longest files start first, so that no process is left with one of them at the end."""
  items.sort(key=lambda item: item.path.stem not in LONGEST)  # stable


def make_mesh(data, fsdp, tensor):
  return sharding.make_mesh(data, fsdp, tensor, jax.devices()[:data * fsdp * tensor])


def init(config, seed=0):
  """Random parameters, from numpy, because compiling an initializer takes seconds."""
  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.ones(x.shape) if path[-1].key.startswith('scale') else
      jnp.asarray(rng.normal(size=x.shape) * 0.06, jnp.float32), llama.abstract_params(config))


@functools.partial(jax.jit, static_argnames='model')
def full_logits(model, params, tokens):
  """tokens [B, T] -> logits [B, T, V] of the full forward pass."""
  return model.apply({'params': params}, tokens)


def gathered(compiled) -> set[int]:
  """The number of elements of each all-gather in a program."""
  found = re.findall(r'= \(?\w+\[([\d,]*)\]\S* all-gather', compiled.as_text())
  return {math.prod(map(int, dims.split(','))) for dims in found}


@pytest.fixture
def mesh():
  """Sets a mesh of one device."""
  mesh = make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    yield mesh


def real_data(name):
  """The path of a file or folder of the test data; skips the test where it is absent."""
  path = DATA / name
  if not path.exists():
    pytest.skip(f'{path} is absent; set SRLM_TEST_DATA to the folder of test data')
  return path


@pytest.fixture(scope='session')
def stories():
  """A trained Llama of 260K parameters, as a Hugging Face folder."""
  return real_data('tinyllamas-260k')


@functools.cache
def tokenizer_bytes() -> bytes:
  """A SentencePiece model of 64 pieces, the vocabulary size of `tiny-test`."""
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(
          ['User: Name a fruit. Assistant: pear fig plum', 'Score: 0 1 2 3 4 5'] * 50),
      model_writer=out, vocab_size=64, model_type='bpe', character_coverage=1.0,
      hard_vocab_limit=False, user_defined_symbols=['\n'], normalization_rule_name='identity',
      minloglevel=2)
  return out.getvalue()


@pytest.fixture(scope='session')
def tokenizer_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizer')
  (folder / 'tokenizer.model').write_bytes(tokenizer_bytes())
  return folder


# Makes the sandbox small enough for a test.
CHANGES = ('data.ift=160', 'data.ranked_train=120', 'data.ranked_eval=24', 'data.ranked_tune=12',
           'data.test_prompts=24', 'data.valid_prompts=24', 'prompts.count=48', 'sample.slots=64',
           'm1:train.epochs=2', 'm2:train.save_every=2', 'train.batch=8')


# All processes of a run compile the same programs, in ever new closures: they share a cache.
if 'SRLM_COMPILED' not in os.environ:  # not a worker of pytest-xdist
  os.environ['SRLM_COMPILED'] = tempfile.mkdtemp(prefix='srlm-compiled-')
  atexit.register(shutil.rmtree, os.environ['SRLM_COMPILED'], ignore_errors=True)
CACHE = os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ['SRLM_COMPILED']
jax.config.update('jax_compilation_cache_dir', CACHE)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


@functools.cache
def bucket_server() -> buckets.Server:
  """The server of gs://runs, which this process and the programs of the tests use."""
  found = buckets.Server()
  os.environ.update(found.env)
  return found


@functools.cache
def server() -> forks.Server:
  environment = dict(
      os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='',
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.3', **bucket_server().env)
  return forks.Server(environment, ROOT)


def run_main(module, *flags, before='') -> tuple[int, str, str]:
  """Runs the program srlm_jax.MODULE, after some statements -> exit code, stdout, stderr."""
  return server().run(module, flags, before)


def main(module, *flags, code=0, before=''):
  """The output of the program srlm_jax.MODULE, which must exit with `code` and no traceback."""
  ended, out, err = run_main(module, *flags, before=before)
  assert ended == code and 'Traceback' not in err, out + err
  return out + err if code else out


def config_flags(name):
  """CHANGES as flags of one model's config."""
  for change in CHANGES:
    models, _, rest = change.rpartition(':')
    if not models or name in models.split(','):
      yield f'--config.{rest}'


@pytest.fixture
def bucket(request):
  """A new folder in a bucket, and the server of that bucket."""
  name = re.sub(r'\W+', '-', request.node.name)
  path, found = epath.Path(f'gs://{buckets.BUCKET}/{name}'), bucket_server()
  if path.exists():
    path.rmtree()
  yield path, found
  assert not found.faults


@pytest.fixture(scope='session')
def demo(tmp_path_factory):
  """The folder of a finished loop of the sandbox, and its output."""
  workdir = tmp_path_factory.mktemp('demo')
  changes = (f'--set={change}' for change in CHANGES)
  return workdir, main('loop', '--size=tiny', f'--workdir={workdir}', *changes)


# Stages that only some strategies and pairs of judgements need; the meta-judge is one of them.
OTHERS = {spec.name: spec for spec in catalog.STAGES
          if spec.program.startswith(('sample.', 'reward.swap', 'reward.judge_pairs'))
          and not catalog.needs(spec.name, configs.get('m2', 'tiny'))}


def on(spec) -> list[str]:
  """The flag --on of a stage, if its program has it."""
  return [f'--on={spec.on}'] if spec.on else []


@pytest.fixture(scope='session')
def others(demo, tmp_path_factory):
  """The demo with the stages of OTHERS for m2."""
  workdir = tmp_path_factory.mktemp('others') / 'run'
  shutil.copytree(demo[0], workdir)
  for spec in OTHERS.values():
    main(spec.program, '--config=iter2:tiny', f'--workdir={workdir}', *on(spec),
         *config_flags('m2'))
  return workdir
