"""LoRA: adapters beside their weights, trained and saved alone."""
import dataclasses
import functools
import json
import math
import shutil

from conftest import full_logits, init, main, make_mesh
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_reference import pairs
from test_step import draw_batch, keys

from srlm_jax import config as configs, InputError, model_files, records, sharding, stage
from srlm_jax.checkpoint import convert, hashes, peft, store
from srlm_jax.models import attention, int8, llama, lora
from srlm_jax.models.config import PRESETS
from srlm_jax.train import batch as batches, run as train, state as train_state, step as train_step

TINY = PRESETS['tiny-test']
WIDE = dataclasses.replace(TINY, K=8)  # a key/value head for each of eight devices
RANK, ALPHA = 4, 8.0
LORA = dict(lora_rank=RANK, lora_alpha=ALPHA)
TARGETS = ('q_proj', 'up_proj')
# Einsums of the update of each weight from its A and B, written without models/lora.py.
UPDATES = dict(wq='LDR,LRKGH->LDKGH', wk='LDR,LRKH->LDKH', wv='LDR,LRKH->LDKH',
               wo='LKGHR,LRD->LKGHD', gate='LDR,LRF->LDF', up='LDR,LRF->LDF', down='LFR,LRD->LFD')


def flat(tree):
  found = traverse_util.flatten_dict(tree, sep='.')
  return {name.rpartition('.')[2]: x for name, x in found.items()}


def adapter(config=TINY, rank=RANK, targets=configs.LORA_TARGETS, seed=5):
  """A random adapter whose B is not 0."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, jnp.float32),
                      lora.shapes(config, rank, targets))


def updates(adapter) -> dict:
  """{weight: alpha / rank A B}."""
  arrays = {name.rpartition('_')[0]: x for name, x in flat(adapter).items()}
  return {name: ALPHA / RANK * jnp.einsum(equation, arrays[f'{name}_a'], arrays[f'{name}_b'])
          for name, equation in UPDATES.items() if f'{name}_a' in arrays}


def added(params, *adapters):
  """The parameters with the updates of the adapters in their weights."""
  def one(path, w):
    name = path[-1].key.rpartition('_')[0]
    return w + sum(updates(adapter).get(name, 0) for adapter in adapters)
  return jax.tree_util.tree_map_with_path(one, params)


def tokens(config=TINY):
  return jnp.asarray(np.random.default_rng(1).integers(0, config.V, (2, 24)))


def joined_and_added(targets):
  """Parameters with the adapters of two rounds beside them, and the logits of both added."""
  params, first, second = init(TINY), adapter(targets=targets), adapter(targets=targets, seed=6)
  wanted = full_logits(llama.Llama(TINY), added(params, first, second), tokens())
  assert np.abs(wanted - full_logits(llama.Llama(TINY), params, tokens())).max() > 0.1
  return lora.join(lora.join(params, first, ALPHA / RANK), second, ALPHA / RANK), wanted


def close(model, params, wanted):
  np.testing.assert_allclose(full_logits(model, params, tokens()), wanted, atol=2e-5)


def test_merged_and_unmerged_adapters_of_two_rounds_are_the_same_model(mesh):
  joined, wanted = joined_and_added(configs.LORA_TARGETS)
  close(llama.Llama(TINY), joined, wanted)
  merged = lora.merge(jax.tree.map(jnp.copy, joined))
  assert flat(merged).keys() == flat(init(TINY)).keys()
  close(llama.Llama(TINY), merged, wanted)


@pytest.mark.slow
@pytest.mark.parametrize('targets', [configs.LORA_TARGETS, ('k_proj', 'o_proj')])
def test_adapters_of_joint_and_of_unrolled_weights_are_the_same_model(mesh, targets):
  """With int8 weights too; adapters are not quantized."""
  joined, wanted = joined_and_added(targets)
  close(llama.Llama(TINY, attention.CPU), llama.unroll(joined), wanted)
  fused = dataclasses.replace(attention.XLA, fused=True)
  close(llama.Llama(TINY, fused), llama.fuse(joined), wanted)
  quantized = int8.quantize(joined)
  np.testing.assert_allclose(
      full_logits(llama.Llama(TINY, fused), llama.fuse(quantized), tokens()),
      full_logits(llama.Llama(TINY), quantized, tokens()), atol=2e-5)


@pytest.mark.slow
def test_a_merged_bfloat16_weight_is_rounded_once_and_an_unmerged_one_keeps_small_updates(mesh):
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init(TINY))
  small = jax.tree.map(lambda x: x * 0.02, adapter())
  joined = lora.join(params, small, ALPHA / RANK)
  exact = added(jax.tree.map(lambda x: x.astype(jnp.float32), params), small)
  merged = lora.merge(jax.tree.map(jnp.copy, joined))
  lost = []
  for name, update in updates(small).items():
    before, found, wanted = (next(x for n, x in flat(tree).items() if n.startswith(f'{name}_'))
                             for tree in (params, merged, exact))
    np.testing.assert_array_equal(found, wanted.astype(jnp.bfloat16))
    lost.append(float((found == before).mean()))
    assert np.abs(update).min() > 0
  assert max(lost) > 0.3  # of the values did not change at all
  assert all(x.dtype == jnp.float32 for name, x in flat(joined).items() if '_a_' in name)


def gradients(loss, shape=(1, 1, 1), unrolled=False, **changes):
  """The gradient of a random adapter and the metrics, and the gradient of all merged weights."""
  config, mesh = keys(loss, **LORA, **changes), make_mesh(*shape)
  kernels = attention.CPU if unrolled else attention.XLA
  with jax.set_mesh(mesh):
    params, own = (jax.tree.map(sharding.put, tree, sharding.shardings(tree, mesh))
                   for tree in (init(WIDE), adapter(WIDE)))
    batch = sharding.put_batch(draw_batch(loss), mesh)
    model = llama.Llama(WIDE, kernels)
    found = jax.jit(lambda own, params, batch: train_step.gradient(
        model, config, own, params, batch, jax.random.key(0)))(own, params, batch)
  return jax.tree.map(np.asarray, found)


@functools.cache
def projected(loss):
  """The gradient of a random adapter, from that of all weights, by the chain rule."""
  config = keys(loss)
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params, own = init(WIDE), adapter(WIDE)
    full, metrics = jax.jit(lambda p, r: train_step.gradient(
        llama.Llama(WIDE), config, p, r, draw_batch(loss), jax.random.key(0)))(
            added(params, own), params)
  full = {name.rpartition('_')[0]: x for name, x in flat(full).items()}
  arrays, found = flat(own), {}
  for name, equation in UPDATES.items():
    dims_a, dims_b, dims_w = equation.replace('->', ',').split(',')
    a, b = (next(n for n in arrays if n.startswith(f'{name}_{kind}_')) for kind in 'ab')
    scale = ALPHA / RANK
    found[a] = scale * jnp.einsum(f'{dims_w},{dims_b}->{dims_a}', full[name], arrays[b])
    found[b] = scale * jnp.einsum(f'{dims_a},{dims_w}->{dims_b}', arrays[a], full[name])
  return found, metrics


@pytest.mark.parametrize('loss, shape, unrolled, changes', [
    ('dpo', (1, 1, 1), True, {}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('dpo', (1, 1, 1), False, {}), ('sft', (1, 1, 1), True, {}), ('dpo', (2, 2, 2), False, {}),
        ('dpo', (1, 1, 8), False, dict(accumulate=2))))])
def test_the_gradient_of_an_adapter_is_the_projection_of_the_gradient_of_all_weights(
    loss, shape, unrolled, changes):
  wanted, metrics = projected(loss)
  grad, found = gradients(loss, shape, unrolled, **changes)
  assert flat(grad).keys() == wanted.keys()
  for name, x in flat(grad).items():
    np.testing.assert_allclose(x, wanted[name], atol=1e-5, rtol=1e-4, err_msg=name)
  for name, value in metrics.items():
    np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('dtype, remat', [
    ('float32', 'none'), pytest.param('bfloat16', 'dots', marks=pytest.mark.slow)])
def test_training_begins_at_ln_2_and_changes_only_the_adapter(dtype, remat):
  config = keys('dpo', **LORA, lora_targets=('q_proj', 'down_proj'))
  shape, mesh = dataclasses.replace(TINY, dtype=dtype), make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    frozen = jax.tree.map(lambda x: x.astype(dtype), init(TINY))
    before = jax.tree.map(np.asarray, frozen)
    tx = train_state.optimizer(config, 10)
    abstract = train_state.abstract(shape, config, tx, mesh)
    created = jax.jit(lambda key: train_state.TrainState.create(
        lora.init(abstract.params, key), tx),
        out_shardings=jax.tree.map(lambda x: x.sharding, abstract))
    state = created(jax.random.key(0))
    step = train_step.make(llama.Llama(shape, remat=remat), tx, config, state)
    batch, history = sharding.put_batch(draw_batch('dpo'), mesh), []
    for _ in range(3):
      old = state
      state, metrics = step(state, frozen, batch, jax.random.key(0))
      history.append({k: float(v) for k, v in metrics.items()})
    assert step._cache_size() == 1, 'compiled more than once'
  assert all(x.is_deleted() for x in jax.tree.leaves(old.params)), 'state was not donated'
  assert history[0]['loss'] == pytest.approx(math.log(2), abs=1e-6)
  assert history[0]['margin'] == 0 and history[0]['accuracy'] == 0
  assert history[2]['loss'] < history[0]['loss'] and history[2]['margin'] > 0
  jax.tree.map(np.testing.assert_array_equal, frozen, before)
  trained = {'wq_a_DR', 'wq_b_RKGH', 'down_a_FR', 'down_b_RD'}
  assert flat(state.params).keys() == trained
  of_state = {getattr(path[-1], 'key', '') for path, x in
              jax.tree_util.tree_leaves_with_path(state.opt_state) if x.ndim}
  assert of_state == trained
  sizes = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
  assert sizes == 2 * sum(x.size for x in jax.tree.leaves(state.params))


def test_swapping_chosen_and_rejected_flips_the_margin():
  batch = draw_batch('dpo')
  pairs = batch.response_ids
  swapped = batch.replace(response_ids=np.where(pairs >= 0, pairs ^ 1, -1))
  with jax.set_mesh(make_mesh(1, 1, 1)):
    run = jax.jit(lambda batch: train_step.sums(
        llama.Llama(TINY), keys('dpo', **LORA), adapter(), init(TINY), batch, None)[1])
    one, other = run(batch), run(swapped)
  assert abs(one['margin']) > 0.01
  assert float(one['margin']) == pytest.approx(-float(other['margin']), rel=1e-4)


@pytest.mark.slow
def test_cached_reference_logps_give_the_same_gradient():
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params, own, batch, model = init(TINY), adapter(), draw_batch('dpo'), llama.Llama(TINY)
    logps = jax.jit(lambda p: train_step.pair_logps(
        train_step.token_logps(model, p, batch, None), batch))(params)
    cached = batches.CachedPairBatch(**vars(batch), reference_logps=np.asarray(logps))
    wanted, found = (jax.jit(lambda p, batch=batch: train_step.gradient(
        model, keys('dpo', **LORA), p, params, batch, jax.random.key(0)))(own)
                     for batch in (batch, cached))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), wanted, found)


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
  """A workdir with a model, and adapters of two rounds for it; their parameters."""
  workdir = tmp_path_factory.mktemp('chain')

  def save(name, arrays, targets=(), base=None):
    folder = workdir / name / 'model'
    own = [model_files.adapter(RANK, ALPHA, targets, base, folder)] if base else []
    store.write_model_files(TINY, workdir, folder, *own)
    saver = store.manager(folder, keep=1)
    store.save(saver, 3, arrays)
    saver.close()
    return folder
  with jax.set_mesh(make_mesh(1, 1, 1)):
    root, first, second = init(TINY), adapter(), adapter(seed=6, targets=TARGETS)
    m1 = save('m1', root)
    m2 = save('m2', first, configs.LORA_TARGETS, m1)
    m3 = save('m3', second, TARGETS, m2)
    return m1, m2, m3, added(root, first), added(root, first, second)


def test_a_checkpoint_restores_with_the_adapters_of_all_rounds(chain, tmp_path):
  m1, m2, m3, two, three = chain
  # moved as a whole
  moved = shutil.copytree(m1.parent.parent, tmp_path / 'moved') / 'm3' / 'model'
  assert model_files.base_folder(moved, model_files.read_adapter(moved)) != m2
  mesh = make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    for folder, wanted in ((m2, two), (m3, three), (moved, three)):
      found, name = store.restore_params(folder, mesh, 'float32')
      assert name == model_files.recorded_hash(folder)
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)
    apart, _ = store.restore_params(m3, mesh, 'bfloat16', merge=False)
    assert flat(apart)['wq_a_DR'].shape[-1] == 2 * RANK
    assert flat(apart)['wo_a_KGHR'].shape[-1] == RANK
    assert flat(apart)['embed_VD'].dtype == jnp.bfloat16
  size = sum(p.stat().st_size for p in (m3 / 'steps').rglob('*') if p.is_file())
  whole = sum(p.stat().st_size for p in (m1 / 'steps').rglob('*') if p.is_file())
  assert size < whole / 2


def test_a_merged_bfloat16_model_is_rounded_before_and_after_the_sum(chain, mesh):
  _, m2, *_ = chain
  merged = flat(store.restore_params(m2, mesh, 'bfloat16')[0])['up_DF']
  params = init(TINY)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
  twice, once = (flat(added(tree, adapter()))['up_DF'].astype(jnp.bfloat16)
                 for tree in (rounded, params))
  assert (merged == twice).mean() > 0.99  # float32 sums may differ in the last place
  assert 0.5 < (merged == once).mean() < 0.95
  np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (merged, once)), rtol=0, atol=0.01)


def test_the_hash_covers_the_scale_and_a_changed_base_is_refused(chain, mesh, tmp_path):
  copy = shutil.copytree(chain[0].parent.parent, tmp_path / 'copy')
  m1, m2, m3 = (copy / name / 'model' for name in ('m1', 'm2', 'm3'))
  names = {model_files.recorded_hash(folder) for folder in (m1, m2, m3)}
  one = model_files.read_adapter(m2)
  own = store.read_adapter(m2)
  names |= {hashes.hash_params(own, more=dataclasses.replace(one, **change).identity)
            for change in ({}, dict(alpha=9.0), dict(params='0' * 16))}
  assert len(names) == 5  # of m2 twice
  text = (m2 / 'lora.json').read_text()
  (m2 / 'lora.json').write_text(text.replace('8.0', '9.0'))
  with pytest.raises(InputError, match='lora.json changed after the model was made'):
    store.restore_params(m3, mesh, 'float32')
  for change, message in ((text.replace('q_proj', 'foo'), 'describes no adapter'),
                          (text.replace('"rank": 4', '"rank": 5'), 'changed after the model was ')):
    assert change != text
    (m2 / 'lora.json').write_text(change)
    for write in (convert.to_hf, peft.to_peft):
      with pytest.raises(InputError, match=f'lora.json {message}'):
        write(m2, tmp_path / 'out')
  (m2 / 'lora.json').write_text(text)
  for read in (store.read_adapter, model_files.recorded_hash):
    with pytest.raises(InputError, match='m2/model has the steps 3, not step 9; name one'):
      read(m2, 9)
  saver = store.manager(m1, keep=1)
  shutil.rmtree(m1 / 'steps' / '3')
  with pytest.raises(InputError, match='which does not exist; restore that model'):
    model_files.recorded_hash(m3)
  store.save(saver, 3, init(TINY, seed=9))
  saver.close()
  with pytest.raises(InputError, match='is a LoRA adapter for step 3 of .*m1/model with the '):
    store.restore_params(m3, mesh, 'float32')


def test_an_export_has_the_adapters_in_its_weights(chain, mesh, tmp_path):
  *_, m3, _, three = chain
  convert.to_hf(m3, tmp_path / 'hf')
  assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['dtype'] == 'float32'
  found = convert.load_hf(tmp_path / 'hf', mesh, 'float32')
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, three)


@pytest.fixture
def run(tmp_path, tokenizer_folder):
  """A function that trains one model of a small run with adapters -> its folder."""
  def start(workdir, name, **keys):
    config = configs.get(name, 'tiny').copy_and_resolve_references().unlock()
    config.model = ''
    config.train.update(dict(batch=4, epochs=1, max_length=64, log_every=1, save_every=2, keep=99,
                             **LORA) | keys)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    if not (workdir / 'm1').exists():
      with jax.set_mesh(make_mesh(1, 1, 1)):
        store.write_model_files(TINY, tokenizer_folder, workdir / 'm1' / 'model')
        saver = store.manager(workdir / 'm1' / 'model', 1)
        store.save(saver, 0, init(TINY))
        saver.close()
    records.write(workdir / name / 'pairs' / 'pairs.jsonl', pairs())
    train.run(config, workdir)
    return workdir / name / 'model'
  return start


def first():
  with jax.set_mesh(make_mesh(1, 1, 1)):
    return init(TINY)


def restored(folder):
  mesh = make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    return store.restore_params(folder, mesh, 'float32')[0]


@pytest.mark.slow
def test_a_run_trains_an_adapter_on_an_adapter_and_resumes_byte_identically(run, tmp_path):
  m2 = run(tmp_path, 'm2')
  m3 = run(tmp_path, 'm3', lora_rank=2, lora_targets=TARGETS)
  step = json.loads((m3 / 'metrics.jsonl').read_text().splitlines()[0])
  assert step['loss'] == pytest.approx(math.log(2), abs=1e-6)
  one, two = (json.loads((folder / 'done.json').read_text()) for folder in (m2, m3))
  manifest = json.loads((m3 / 'manifest.json').read_text())
  assert manifest['params'] == one['params'] and 'init/lora.json' in manifest['model_files']
  config = manifest['config']
  assert config['train.lora_rank'] == 2 and config['train.lora_targets'] == [*TARGETS]
  wanted = added(added(first(), store.read_adapter(m2)),
                 jax.tree.map(lambda x: x * 2 ** 0.5, store.read_adapter(m3)))  # alpha 8, rank 2
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), restored(m3), wanted)

  hashes = model_files.read_hashes(m3)
  (m3 / 'done.json').unlink()
  for step in model_files.steps(m3)[1:]:
    shutil.rmtree(m3 / 'steps' / str(step))
  with pytest.raises(InputError, match=r'config.train.lora_alpha \(8.0, now 4.0\)'):
    run(tmp_path, 'm3', lora_rank=2, lora_targets=TARGETS, lora_alpha=4.0)
  run(tmp_path, 'm3', lora_rank=2, lora_targets=TARGETS)
  assert model_files.read_hashes(m3) == hashes
  assert json.loads((m3 / 'done.json').read_text())['params'] == two['params']
  stage.finished_model(tmp_path, 'm3')


@pytest.mark.slow
def test_cached_references_and_full_training_from_an_adapter(run, tmp_path):
  plain, cached = run(tmp_path / 'a', 'm2'), run(tmp_path / 'b', 'm2', reference='cached')
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), restored(plain),
               restored(cached))
  full = run(tmp_path / 'a', 'm3', lora_rank=0)
  assert not (full / 'lora.json').exists()
  step = json.loads((full / 'metrics.jsonl').read_text().splitlines()[0])
  assert step['loss'] == pytest.approx(math.log(2), abs=1e-6)
  assert flat(restored(full)).keys() == flat(first()).keys()


def test_mistakes_are_refused(chain, tmp_path):
  config = configs.get('m2', 'tiny').copy_and_resolve_references().unlock()
  config.train.lora_targets = ('q_proj', 'lm_head')
  with pytest.raises(InputError, match="lora_targets names 'lm_head'; it may name q_proj, k_proj"):
    configs.check(config)
  config = configs.get('m0', 'tiny').copy_and_resolve_references().unlock()
  config.train.lora_rank = 8
  with pytest.raises(InputError, match='lora_rank is 8, and m0 starts from no model'):
    train.run(config, tmp_path)
  with pytest.raises(InputError, match='m1/model has no LoRA adapter; export it as a whole'):
    peft.to_peft(chain[0], tmp_path / 'peft')


@pytest.mark.parametrize('change, message', [
    (dict(use_dora=True), 'use_dora = True is not supported; supported are LoRA adapters'),
    (dict(bias='all'), "bias = 'all' is not"), (dict(modules_to_save=['lm_head']), 'modules_to_sa'),
    (dict(rank_pattern={'q_proj': 2}), 'rank_pattern'), (dict(peft_type='IA3'), 'peft_type = .IA3'),
    (dict(init_lora_weights='pissa'), "init_lora_weights = 'pissa'"), (dict(r=0), 'r = 0 is not'),
    (dict(r=3), r'tensor .*q_proj.lora_A.weight has shape \[4, 32\], and .* requires \[3, 32\]'),
    (dict(use_rslora='false'), "use_rslora = 'false' is not"),
    (dict(exclude_modules=['q_proj']), 'exclude_modules'),
    (dict(target_modules=['model.layers.0.self_attn.q_proj', 'up_proj']),
     'target_modules is .*up_proj.*, and adapter_model.safetensors has tensors of q_proj, k_proj'),
    (dict(a_new_field=1), 'a_new_field = 1 is not supported; supported are .* of q_proj, k_proj')])
def test_what_peft_can_and_we_cannot_is_refused(chain, tmp_path, change, message):
  m1, m2, *_ = chain
  peft.to_peft(m2, tmp_path / 'peft')
  path = tmp_path / 'peft' / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(InputError, match=message) as error:
    peft.from_peft(tmp_path / 'peft', m1, tmp_path / 'out')
  assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()


def test_only_models_of_one_run_name_their_base_relative_to_it(chain, tmp_path):
  m1, m2, m3, *_ = chain
  workdir = m2.parent.parent
  for folder, base in ((m3, 'm2/model'), (workdir / 'm3' / 'other', str(m2)),
                       (workdir / 'adapters' / 'model', str(m2)), (workdir / 'adapter', str(m2)),
                       (tmp_path / 'm3' / 'model', str(m2))):
    assert model_files.adapter(RANK, ALPHA, TARGETS, m2, folder).base == base
  copy = shutil.copytree(m1, workdir / 'copy')
  assert model_files.adapter(RANK, ALPHA, TARGETS, copy, m3).base == str(copy)
  shutil.rmtree(copy)


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused(chain, tmp_path):
  m1, m2, m3, *_ = chain
  peft.to_peft(m2, tmp_path / 'peft')
  with pytest.raises(InputError, match='adapts the parameters .*, and .*m3/model has .*; name the'):
    peft.from_peft(tmp_path / 'peft', m3, tmp_path / 'out')
  printed = main('checkpoint.convert', f'--from_peft={tmp_path}/peft', f'--base={m1}',
                 f'--out={tmp_path}/m4/model')
  assert '4,096 parameters' in printed
  assert model_files.read_adapter(tmp_path / 'm4' / 'model').base == str(m1)
  jax.tree.map(np.testing.assert_array_equal, store.read_adapter(tmp_path / 'm4' / 'model'),
               store.read_adapter(m2))
  assert model_files.recorded_hash(tmp_path / 'm4' / 'model') == model_files.recorded_hash(m2)
  file = tmp_path / 'peft' / peft.TENSORS
  tensors = safetensors.numpy.load_file(file)
  name = 'base_model.model.lm_head.lora_A.weight'
  safetensors.numpy.save_file(tensors | {name: np.zeros((4, 32), np.float32)}, file)
  with pytest.raises(InputError, match=f'tensor {name} is not supported; supported are'):
    peft.from_peft(tmp_path / 'peft', m1, tmp_path / 'out')
