import types

from conftest import make_mesh
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from srlm_jax import InputError, sharding
from srlm_jax.models import llama
from srlm_jax.models.config import PRESETS


def test_a_mesh_axis_is_used_once_and_the_first_dimension_wins():
  assert sharding.spec('DKGH') == P('fsdp', 'tensor', None, None)
  assert sharding.spec('BTD') == P(('data', 'fsdp'), None, None)
  assert sharding.spec('VD') == P('tensor', 'fsdp')


def test_parameters_must_be_named_after_their_dimensions():
  mesh = make_mesh(1, 1, 1)
  with pytest.raises(ValueError, match='not named after its dimensions'):
    sharding.shardings({'kernel': jnp.zeros((4, 4))}, mesh)
  with pytest.raises(ValueError, match='not named after its dimensions'):
    sharding.shardings({'w_DX': jnp.zeros((4, 4))}, mesh)


def test_a_dimension_that_the_mesh_does_not_divide_is_refused_by_name():
  mesh = make_mesh(1, 1, 8)
  message = 'dimension K = 2 does not divide over tensor = 8'
  with jax.set_mesh(mesh), pytest.raises(InputError, match=message):
    sharding.shardings(llama.abstract_params(PRESETS['tiny-test']), mesh)
  with pytest.raises(InputError, match='batch tokens: dimension B = 6'):
    sharding.put_batch(dict(tokens=jnp.zeros((6, 4))), make_mesh(2, 2, 1))


def test_layers_are_stacked_and_every_weight_is_sharded(mesh):
  mesh = make_mesh(1, 4, 2)
  with jax.set_mesh(mesh):
    places = sharding.shardings(llama.abstract_params(PRESETS['llama2-70b']), mesh)
  assert places['layers']['attention']['wq_DKGH'].spec == P(None, 'fsdp', 'tensor', None, None)
  for path, place in jax.tree_util.tree_leaves_with_path(places):
    if 'scale' not in jax.tree_util.keystr(path):
      assert {'fsdp', 'tensor'} <= set(place.spec), path


@pytest.mark.parametrize('shape', [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (16, -1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape):
  with pytest.raises(InputError, match='config.mesh'):
    sharding.make_mesh(*shape)


def test_a_size_of_minus_1_takes_the_remaining_devices():
  assert dict(sharding.make_mesh(2, -1, 2).shape) == dict(data=2, fsdp=2, tensor=2)


def test_data_must_divide_over_the_slices():
  devices = [types.SimpleNamespace(slice_index=i // 3, platform='tpu') for i in range(6)]
  with pytest.raises(InputError, match='config.mesh.data = 3 does not divide over the 2 slices'):
    sharding.make_mesh(3, 2, 1, devices)


def test_fsdp_may_span_several_gpu_hosts():
  class Device(types.SimpleNamespace):
    __hash__ = object.__hash__
  devices = [Device(slice_index=i // 8, platform='gpu', device_kind='H100', process_index=i // 8,
                    id=i) for i in range(32)]
  mesh = sharding.make_mesh(1, -1, 8, devices)
  assert mesh.devices.shape == (1, 4, 8) and [d.id for d in mesh.devices.flat] == list(range(32))
