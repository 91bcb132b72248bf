import dataclasses
import re

from conftest import forward, init, make_mesh, MESHES
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from srlm_jax import InputError, sharding
from srlm_jax.models import llama
from srlm_jax.models.config import PRESETS
from srlm_jax.sample import engine as engines
from srlm_jax.sample.engine import Request, Sampling
from srlm_jax.train import losses

TINY = PRESETS['tiny-test']
GREEDY, WARM = Sampling(0.0, 1.0, 12), Sampling(1.0, 1.0, 12)
RAGGED = [Request(f'r{i}', list(range(1, 3 + 3 * i))) for i in range(5)]


def make(shape=(1, 1, 1), slots=4, eos=(60,), config=TINY, seed=0):
  mesh = make_mesh(*shape)
  with jax.set_mesh(mesh):
    params = jax.tree.map(lambda x: x * 4, init(TINY))  # far from uniform
    params = jax.tree.map(sharding.put, params, sharding.shardings(params, mesh))
  return engines.Engine(llama.Llama(config), params, mesh, slots, eos, seed, 'test'), params


def run(engine, requests, sampling):
  return [r for results in engine.generate(requests, sampling) for r in results]


def test_greedy_tokens_are_the_argmax_of_the_full_forward_pass_for_ragged_prompts(mesh):
  engine, params = make()
  for request, result in zip(RAGGED, run(engine, RAGGED, GREEDY), strict=True):
    row = list(request.ids)
    for token in result.ids:
      logits, _ = forward(llama.Llama(TINY), params, jnp.asarray([row + [0] * (32 - len(row))]))
      assert token == int(logits[0, len(row) - 1].argmax())
      row.append(token)
    assert result.finish == ('eos' if 60 in result.ids else 'length')
    assert 60 not in result.ids[:-1] and len(result.ids) <= 12


def test_log_probs_at_temperature_1_are_the_trainer_s(mesh):
  engine, params = make()
  for request, result in zip(RAGGED, run(engine, RAGGED, WARM), strict=True):
    row = [*request.ids, *result.ids]
    tokens = jnp.asarray([row + [0] * (32 - len(row))])
    mask = jnp.asarray([[0] * len(request.ids) + [1] * len(result.ids) + [0] * (32 - len(row))])
    logps = jax.jit(losses.token_logps)(forward(llama.Llama(TINY), params, tokens)[0], tokens, mask)
    np.testing.assert_allclose(result.logps, logps[0, len(request.ids):len(row)], atol=1e-4)


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2)])
def test_the_log_probs_of_given_responses_are_those_they_were_sampled_with(shape):
  results = run(make()[0], RAGGED, WARM)
  given = [(list(request.ids), result.ids) for request, result in zip(RAGGED, results, strict=True)]
  engine = make(shape)[0]
  found = [logp for i in range(0, 5, engine.slots) for logp in engine.logps(given[i:i + engine.slots])]
  np.testing.assert_allclose(found, [sum(r.logps) for r in results], atol=1e-4)


@pytest.mark.parametrize('sampling', [GREEDY, Sampling(0.7, 0.9, 12)])
def test_neither_slots_nor_company_nor_order_changes_a_record(sampling):
  wanted = {r.id: r for r in run(make(slots=8)[0], RAGGED, sampling)}
  for slots, requests in ((1, RAGGED), (2, RAGGED[::-1]), (4, RAGGED[2:])):
    for result in run(make(slots=slots)[0], requests, sampling):
      assert (result.ids, result.finish) == (wanted[result.id].ids, wanted[result.id].finish)


def test_other_ids_and_other_seeds_give_other_samples():
  same = [Request(f'x{i}', [1, 2, 3]) for i in range(4)]
  first = run(make()[0], same, WARM)
  assert len({tuple(r.ids) for r in first}) == 4
  assert [r.ids for r in first] != [r.ids for r in run(make(seed=1)[0], same, WARM)]


@pytest.mark.parametrize('shape', MESHES)
def test_the_same_tokens_on_every_mesh(shape):
  for sampling in (WARM,):
    assert [r.ids for r in run(make(shape, slots=8)[0], RAGGED, sampling)] == [
        r.ids for r in run(make(slots=8)[0], RAGGED, sampling)]


def test_a_row_ends_at_any_of_its_eos_ids():
  free = run(make(eos=(63,))[0], RAGGED[:1], GREEDY)[0]
  end = free.ids[3]
  cut = run(make(eos=(63, end))[0], RAGGED[:1], GREEDY)[0]
  assert cut.ids == free.ids[:free.ids.index(end) + 1] and cut.finish == 'eos'


def test_a_prompt_without_room_is_named_and_skipped():
  config = dataclasses.replace(TINY, context=16)
  results = run(make(config=config)[0], [Request('long', list(range(1, 8))), Request('short', [1, 2])], GREEDY)
  found = [(r.id, r.finish == 'too_long', bool(r.ids)) for r in results]
  assert found == [('long', True, False), ('short', False, True)]


def test_bad_requests_are_refused_by_name():
  with pytest.raises(InputError, match='request r has an empty prompt'):
    run(make()[0], [Request('r', [])], GREEDY)
  for bad in ((-0.1, 1.0, 5), (1.0, 0.0, 5), (1.0, 1.1, 5), (1.0, 1.0, 0)):
    with pytest.raises(InputError, match='temperature|top_p|max_tokens'):
      Sampling(*bad)


def numpy_top_p(logits, p):
  order = np.argsort(-logits)
  probs = np.exp(logits[order] - logits.max())
  keep = order[:(np.cumsum(probs / probs.sum()) < p).sum() + 1]
  out = np.zeros(len(logits))
  out[keep] = np.exp(logits[keep] - logits.max())
  return out / out.sum()


@pytest.mark.parametrize('p', [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_the_smallest_set_with_the_mass(p):
  logits = np.random.default_rng(0).normal(size=(20, 200)).astype(np.float32) * 3
  masked = np.asarray(jax.jit(engines.top_p)(logits, p))
  for row, found in zip(logits, masked, strict=True):
    np.testing.assert_array_equal(np.isfinite(found), numpy_top_p(row, p) > 0)


def test_samples_follow_temperature_and_top_p(mesh):
  """Chi-square of 4,000 first tokens against numpy's distribution."""
  engine, params = make(slots=500)
  sampling = Sampling(0.8, 0.9, 1)
  drawn = [r.ids[0] for r in run(engine, [Request(f'd{i}', [5, 6, 7]) for i in range(4000)], sampling)]
  logits = np.asarray(forward(llama.Llama(TINY), params, jnp.asarray([[5, 6, 7]]))[0][0, 2]) / 0.8
  wanted = numpy_top_p(logits, 0.9)
  counts = np.bincount(drawn, minlength=TINY.V)
  assert counts[wanted == 0].sum() == 0
  assert stats.chisquare(counts[wanted > 0], 4000 * wanted[wanted > 0]).pvalue > 1e-3


def test_the_cache_is_updated_in_place(mesh):
  """A cache that rode the layers' scan as input and output would be copied at every token."""
  config = dataclasses.replace(TINY, context=2048, layers=8)
  rows = dict(prompts=(16, 32), lengths=(16,), words=(16,))
  rows = {k: jax.ShapeDtypeStruct(s, jnp.uint32 if k == 'words' else jnp.int32) for k, s in rows.items()}
  compiled = engines.sample.lower(
      llama.Llama(config), llama.abstract_params(config), **rows, key=jax.random.key(0), eos=jnp.asarray([60]),
      temperature=1.0, p=0.9, greedy=False, max_tokens=2016).compile()
  shape = f'f32[8,16,2048,{TINY.K},{TINY.H}]'
  loops = compiled.as_text().partition('\nENTRY ')[0]  # every computation but the outermost
  assert f'{shape}{{4,3,2,1,0}} scatter(' in loops
  assert not re.search(re.escape(shape) + r'\S* copy\(', loops)
