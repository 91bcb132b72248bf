"""Programs compiled ahead of time with the TPU compiler, without hardware: the sampler's of 70B,
and those of a 7B model with a sliding window.

`make aot` runs these tests.
"""
import math
import re

import aot
from conftest import gathered
import pytest

from srlm_jax.models.config import PRESETS

pytestmark = pytest.mark.aot


def programs(kind: str):
  """The programs of one kind, as the parameters of a test."""
  found = [p for p in aot.SAMPLING if p.kind == kind]
  return pytest.mark.parametrize('program', found, ids=[f'{p.name} on {p.pod}' for p in found])


def compiled(program: aot.Sampler):
  """-> the program, and its temporaries as a fraction of the cache, which is updated in place."""
  found = aot.compile(program)
  c, chips = program.model, math.prod(program.mesh)
  memory = found.memory_analysis()
  cache = 2 * c.layers * aot.SLOTS * c.K * aot.SIZE * c.H * 2 / chips  # bytes per chip
  assert memory.alias_size_in_bytes == pytest.approx(cache, rel=0.01)
  print(f'\n{program.name}, {program.pod}: weights and cache '
        f'{memory.argument_size_in_bytes / aot.GIB:.2f} GiB per chip, the cache '
        f'{cache / aot.GIB:.2f}; temporaries {memory.temp_size_in_bytes / aot.GIB:.3f} GiB, '
        f'{memory.temp_size_in_bytes / cache:.2%} of the cache')
  return found, memory.temp_size_in_bytes / cache


@pytest.fixture
def mistral(monkeypatch):
  """The 7B programs are Mistral's, and their rows are longer than its window of 4,096 tokens."""
  monkeypatch.setitem(PRESETS, 'llama2-7b', PRESETS['mistral-7b-v0.1'])
  monkeypatch.setattr(aot, 'SIZE', 8192)


class LongRows(aot.Training):
  """Pairs whose responses both end at position 8,191."""
  width = 3 * 4096

  @property
  def config(self):
    config = super().config
    config.max_length = 8192
    return config


def fits(program, found):
  """Prints the memory of a program, and asserts that a chip has it."""
  used, gib = aot.total_bytes(found) / aot.GIB, aot.PODS[program.pod][1]
  print(f'\n{program.model.family} {program.name}, {program.pod}: {used:.1f} of {gib} GiB per chip')
  return used < gib


@pytest.mark.parametrize('kind, width, kernel', [
    ('decode', 0, 'tpu_decode'), ('prefill', 8192, 'splash')])
def test_the_sampler_of_a_windowed_model_is_in_place(kind, width, kernel, mistral):
  program = aot.Sampler(kind, 'v5p-8', 16, width, '7b', (1, 1, 4))
  found, fraction = compiled(program)
  assert fraction < 0.05 and kernel in found.as_text() and fits(program, found)


def test_dpo_of_a_windowed_model_fits_and_uses_splash_attention(mistral):
  program = LongRows('7b', 'dpo', 'v5p-8', (1, 4, 1), 'step')
  found = aot.compile(program)
  assert fits(program, found)
  # forward, recomputed forward and backward
  assert all(name in found.as_text() for name in (
      'splash_mqa_fwd', 'splash_mqa_dkv', 'splash_mqa_dq'))


@programs('decode')
def test_decode_is_in_place_and_gathers_no_weights(program):
  found, fraction = compiled(program)
  config, text = program.model, found.as_text()
  assert fraction < 0.05
  assert max(gathered(found), default=0) <= aot.SLOTS * config.V  # logits, to sample from
  assert 'tpu_decode' in text and 'tpu_append' in text
  heads = config.K // program.mesh[2]
  layer = rf'bf16\[(1,)?({config.layers},)?{aot.SLOTS},{heads},{aot.SIZE},{config.H}\]'
  prefix = rf'bf16\[(1,)?({config.layers},)?{heads},{aot.PREFIX},{config.H}\]'
  assert not re.search(rf'= ({layer}|{prefix})\S* (copy|dynamic-slice|copy-start)\(', text)


@programs('prefill')
def test_prefill_is_in_place_and_gathers_no_weights(program):
  found, fraction = compiled(program)
  assert fraction < 0.05 and 'splash' in found.as_text()
  assert max(gathered(found), default=0) <= program.rows * program.width * program.model.D


@pytest.mark.parametrize('pod', aot.GROUPS)
def test_a_pod_distributes_a_checkpoint_to_its_groups_in_their_memory(pod):
  found = aot.distribution_bytes(pod)
  name, peak = max(((name, before + needed) for name, before, needed in found),
                   key=lambda pair: pair[1])
  print(f'\n70b bf16 to groups of {aot.group_mesh(pod)} on {pod}: at most '
        f'{peak / aot.GIB:.1f} of {aot.PODS[pod][1]} GiB per chip, for {name}; the parameters take '
        f'{found[-1][1] / aot.GIB:.1f}')
  assert peak < aot.PODS[pod][1] * aot.GIB
