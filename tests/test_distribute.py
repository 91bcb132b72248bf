"""A checkpoint that several hosts read once: the exchange of its layers."""
import dataclasses
import json
import os
import subprocess
import sys

from conftest import init, make_mesh, MESHES, ROOT
from flax import traverse_util
import jax
import numpy as np
import pytest

from srlm_jax.checkpoint import arrays, distribute, store
from srlm_jax.models.config import PRESETS

SHAPE = dataclasses.replace(PRESETS['tiny-test'], layers=5, D=128, V=512)


@pytest.fixture
def saved(tmp_path, tokenizer_folder, mesh):
  params = init(SHAPE)
  store.write_model_files(SHAPE, tokenizer_folder, tmp_path)
  with store.manager(tmp_path, keep=1) as saver:
    store.save(saver, 0, params)
  return tmp_path, params


def test_every_device_gets_its_part_of_every_array(saved):
  (folder, params), dtype = saved, 'bfloat16'
  for sizes in MESHES:
    mesh = make_mesh(*sizes)
    if mesh.size != jax.device_count():
      continue
    with jax.set_mesh(mesh):
      abstract = traverse_util.flatten_dict(store.abstract_on(mesh, params, dtype), sep='.')
    stored = arrays.open_all(folder / 'steps' / '0' / 'params',
                             {name: x.shape for name, x in abstract.items()})
    found = distribute.restore(stored, abstract, mesh)
    for name, x in traverse_util.flatten_dict(params, sep='.').items():
      assert found[name].sharding == abstract[name].sharding
      np.testing.assert_array_equal(found[name], x.astype(dtype))


HOST = """
import json, sys
import jax, numpy as np
from srlm_jax import hosts, sharding
from srlm_jax.checkpoint import distribute, store
hosts.join(60, print)
folder, found = sys.argv[1], []
expected = dict(np.load(folder + '/expected.npz'))
for size, mesh in ((1, (1, 2, 1)), (2, (2, 1, 2)), (4, (1, 4, 2))):
  mesh = sharding.make_mesh(*mesh, hosts.Group(size).devices)
  if size > 1 and hosts.Group(size).index == 1:  # an order in which the devices of hosts alternate
    order = mesh.devices.ravel()[[0, 2, 1, 3]].reshape(mesh.devices.shape)
    mesh = jax.sharding.Mesh(order, mesh.axis_names, axis_types=mesh.axis_types)
  with jax.set_mesh(mesh):
    before = distribute.bytes_read()
    params, _ = store.restore_params(folder, mesh, 'float32', once=True)
    found.append(sum(hosts.gather(distribute.bytes_read() - before)))
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    whole = expected[jax.tree_util.keystr(path, simple=True, separator='.')]
    assert len(x.sharding.device_set) == 2 * size
    for shard in x.addressable_shards:
      np.testing.assert_array_equal(shard.data, whole[shard.index])
if hosts.is_first_host():
  print(json.dumps(found))
"""


@pytest.mark.slow
def test_four_hosts_read_one_copy_for_groups_of_one_two_and_four(saved):
  folder, params = saved
  flat = traverse_util.flatten_dict(params, sep='.')
  np.savez(folder / 'expected.npz', **{name: np.asarray(x) for name, x in flat.items()})
  mesh = make_mesh(1, 1, 1)
  before = distribute.bytes_read()
  store.restore_params(folder, mesh, 'float32')
  copy = distribute.bytes_read() - before
  done = subprocess.run(
      [ROOT / 'launch' / 'local.sh', '4', sys.executable, '-c', HOST, folder], cwd=ROOT,
      capture_output=True, text=True,
      env=os.environ | dict(JAX_PLATFORMS='cpu',
                            XLA_FLAGS='--xla_force_host_platform_device_count=2'))
  assert done.returncode == 0, done.stderr
  found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('[')
                          and line.endswith(']') and 'Gloo' not in line))
  print(f'{copy} bytes on one host; on 4 hosts in groups of 1, 2 and 4: {found}')
  # Every host reads the index of the checkpoint, a few KB.
  assert all(copy * 0.98 < read < copy * 1.05 for read in found), (copy, found)
