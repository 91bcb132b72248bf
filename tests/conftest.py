"""Eight fake devices, before JAX wakes up; where the real data is; small models and tokenizers."""
import functools
import io
import os
import pathlib
import subprocess
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from srlm_jax import sharding
from srlm_jax.models import llama

hypothesis.settings.register_profile('same', deadline=None, derandomize=True)  # a loaded machine is no failure
hypothesis.settings.load_profile('same')

ROOT = pathlib.Path(__file__).parent.parent
DATA = pathlib.Path(os.environ.get('SRLM_TEST_DATA', ROOT.parent / 'shared' / 'data'))
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]


def make_mesh(data, fsdp, tensor):
  return sharding.make_mesh(data, fsdp, tensor, jax.devices()[:data * fsdp * tensor])


def init(config, seed=0):
  """Random parameters, by numpy: to compile an initialiser takes seconds."""
  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.ones(x.shape) if path[-1].key.startswith('scale') else
      jnp.asarray(rng.normal(size=x.shape) * 0.06, jnp.float32), llama.abstract_params(config))


@functools.partial(jax.jit, static_argnames='model')
def forward(model, params, tokens, positions=None, cache=None, at=None):
  """Logits and cache."""
  return model.apply({'params': params}, tokens, positions, cache, at)


@pytest.fixture
def mesh():
  """One device, set."""
  mesh = make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture(scope='session')
def stories():
  """A real trained Llama of 260K parameters, as a Hugging Face folder."""
  folder = DATA / 'tinyllamas-260k'
  if not folder.exists():
    pytest.skip(f'{folder} is absent; set SRLM_TEST_DATA to the folder of test data')
  return folder


def run_main(module, *flags):
  """`python -m srlm_jax.MODULE FLAGS` in a process of its own -> (exit code, stdout, stderr)."""
  command = [sys.executable, '-m', f'srlm_jax.{module}', *flags]
  done = subprocess.run(command, capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


@functools.cache
def tokenizer_bytes() -> bytes:
  """A SentencePiece model of 64 pieces, as `tiny-test` has."""
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['User: Name a fruit. Assistant: pear fig plum', 'Score: 0 1 2 3 4 5'] * 50),
      model_writer=out, vocab_size=64, model_type='bpe', character_coverage=1.0, hard_vocab_limit=False,
      user_defined_symbols=['\n'], normalization_rule_name='identity', minloglevel=2)
  return out.getvalue()


@pytest.fixture(scope='session')
def tokenizer_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizer')
  (folder / 'tokenizer.model').write_bytes(tokenizer_bytes())
  return folder
