"""The planner: names of pods, memory and choices against the real ones, time, and refusals."""
import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import aot
from conftest import make_mesh, ROOT
import jax
import numpy as np
import pytest
import scale_rows

from srlm_jax import base, catalog, config as configs, InputError, plan, pods
from srlm_jax.checkpoint import store
from srlm_jax.data.examples import Example, Examples
from srlm_jax.data.packing import Packing
from srlm_jax.models import cache as caches, config as model_config, costs, int8, llama, sizing
from srlm_jax.models.config import PRESETS
from srlm_jax.models.sizing import Mesh
from srlm_jax.sample import engine as engines
from srlm_jax.train import run as train, state as train_state

GIB = 2**30


def make(name, pod, size='70b', **changes):
  return plan.make(catalog.replace(configs.get(name, size), changes), pods.find(pod), plan.LENGTHS)


@pytest.mark.parametrize('name, chips, hosts, platform', [
    ('v4-8', 4, 1, 'tpu'), ('v4-256', 128, 32, 'tpu'), ('v5p-8', 4, 1, 'tpu'),
    ('v5p-16', 8, 2, 'tpu'), ('v5p-384', 192, 48, 'tpu'), ('2 x V5p-128', 128, 32, 'tpu'),
    ('v6e-1', 1, 1, 'tpu'), ('v6e-8', 8, 1, 'tpu'), ('v6e-16', 16, 4, 'tpu'),
    ('4xv6e-256', 1024, 256, 'tpu'), ('8xh100', 8, 1, 'gpu'), ('3x8xH200', 24, 3, 'gpu'),
    ('16 x h100', 16, 2, 'gpu')])
def test_names_of_pods(name, chips, hosts, platform):
  pod = pods.find(name)
  assert (pod.chips, pod.hosts, pod.platform) == (chips, hosts, platform)
  assert pods.find(pod.name) == pod


@pytest.mark.parametrize('name, message', [
    ('v5p-100', 'there is no slice v5p-100; the closest are v5p-64 and v5p-128'),
    ('v5p-257', 'there is no slice v5p-257; the closest are v5p-256 and v5p-384'),
    ('2xv6e-7', 'there is no slice v6e-7; the closest are 2xv6e-4 and 2xv6e-8'),
    ('v5-256', r'\(did you mean "v5p-256"\?\): pods are v4-N and v5p-N for N cores'),
    ('h100', r'\(did you mean "8xh100"\?\): pods are'), ('', '--pod=: pods are'),
    ('0x8xh100', 'pods are'),
    ('4xh100', 'a node has 8 GPUs; write 8xh100, or a multiple'),
    ('x' * 1000, r'1000 characters\): pods are')])
def test_an_unknown_pod_is_one_sentence(name, message):
  with pytest.raises(InputError, match=message) as error:
    pods.find(name)
  assert len(str(error.value)) < 350


def test_the_pods_of_the_compiled_programs_have_the_same_chips():
  for name, (_, gib) in aot.PODS.items():
    pod = pods.find(name)
    assert pod.chip.gib == gib
    sizes = {np.prod(p.mesh) for p in (*aot.TRAINING, *aot.RECIPES, *aot.MESHES, *aot.GPU_TRAINING)
             if p.pod == name}
    assert sizes <= {pod.chips}


@pytest.mark.parametrize('row', [row for row in scale_rows.rows() if row.middle],
                         ids=lambda row: row.title)
def test_the_estimates_are_close_to_those_of_the_compiled_programs(row):
  p, mesh, pod = row.program, Mesh(*row.program.mesh), pods.find(row.program.pod)
  if isinstance(p, aot.Training):
    half, rows, responses = p.config.max_length // 2, p.rows * mesh.parts, 1 + (p.loss == 'dpo')
    one = costs.example(half, half, responses)
    examples = costs.Tokens(rows * one.total, rows * one.seen, rows * one.targets)
    found = costs.training_step(p.model, pod, mesh, rows, half * (1 + responses), examples,
                                p.loss == 'dpo', p.reference == 'step', 1, p.config.remat,
                                p.moments)
  elif p.kind == 'decode':
    found = costs.decode_step(p.model, pod, mesh, p.bits == 8, p.rows, 2048, aot.PREFIX)
  else:
    found = costs.prefill(p.model, pod, mesh, p.bits == 8, p.rows, p.width, aot.PREFIX)
  most = 0.1 if isinstance(p, aot.Training) else 0.17
  assert found.estimate * 1e3 == pytest.approx(row.middle, rel=most)
  assert found.floor < found.estimate


def on_first(tree):
  """-> the bytes of arrays on the first device."""
  return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards
             if shard.device == jax.devices()[0])


def zeros(abstract):
  """Shapes with shardings -> arrays on the devices."""
  return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract)


@pytest.mark.parametrize('sizes, moments', [
    ((1, 4, 2), 'float32'), ((2, 2, 2), 'bfloat16'), ((1, 8, 1), 'float32')])
def test_bytes_of_the_state_are_those_of_real_arrays(sizes, moments):
  shape, mesh = dataclasses.replace(PRESETS['sandbox'], dtype='bfloat16'), make_mesh(*sizes)
  config = catalog.replace(configs.get('m2', 'tiny'), {'train.moments': moments})
  with jax.set_mesh(mesh):
    abstract = train_state.abstract(shape, config.train,
                                    train_state.optimizer(config.train, 10), mesh)
  state = zeros(abstract)
  reference = jax.tree.map(lambda x: x.astype(shape.dtype), state.params)
  parts = sizing.training_parts(shape, Mesh(*sizes), 256, True, 1, 'dots', moments, 'tpu')
  assert parts['parameters'] == pytest.approx(on_first(state.params), rel=0.01)
  assert parts['optimizer'] == pytest.approx(on_first(state.opt_state), rel=0.01)
  assert parts['reference'] == pytest.approx(on_first(reference), rel=0.01)


@pytest.mark.parametrize('is_int8', [False, True])
def test_bytes_of_the_sampler_are_those_of_real_arrays(is_int8):
  shape, mesh = dataclasses.replace(PRESETS['llama2-7b'], D=256, F=512, K=2, V=1024, layers=2,
                                    dtype='bfloat16'), make_mesh(4, 1, 2)
  c = configs.get('m2').sample
  c.size, c.int8 = 512, is_int8
  with jax.set_mesh(mesh):
    params = zeros(store.abstract_on(mesh, llama.abstract_params(shape), shape.dtype))
    params = int8.quantize(params) if is_int8 else params
    cache = caches.empty(shape, 8, 512, False)
  parts = sizing.sampler_parts(c, shape, Mesh(4, 1, 2), 8, 0, 'tpu')
  assert parts['weights'] == pytest.approx(on_first(params), rel=0.02)
  assert parts['cache'] == on_first(cache) * 3 / 2  # and the prefix: 2 slots per shard, and 1


def drawn(count, prompt, response, longest):
  """-> pairs with these mean lengths; one has `longest` tokens, and another one is shorter."""
  more = (longest - prompt - 2 * response) // 2
  lengths = [response] * (count - 2) + [response + more, response - more]
  return [Example(f'e{i}', [1] * prompt, ([1] * n, [1] * n)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize('pod, reference', [
    ('v5p-256', 'step'), ('v5p-256', 'cached'), ('v4-128', 'step'), ('2xv5p-128', 'step'),
    ('v6e-64', 'cached'), ('4x8xh200', 'step'), ('v5p-2048', 'step')])
def test_training_makes_the_planned_choices(pod, reference, monkeypatch, tmp_path):
  lengths = dict(prompt=100, response=1000, judgement=150)
  config = catalog.replace(configs.get('m2'), {'train.reference': reference})
  found = plan.make(config, pods.find(pod), lengths)
  step = next(s for s in found.stages if s.name == 'model').programs[0]
  monkeypatch.setattr(sizing, 'devices', lambda: plan.devices(pods.find(pod)))
  shape = dataclasses.replace(PRESETS['llama2-70b'], dtype='bfloat16', dropout=0.1)
  examples = drawn(200, 100, 1000, 3072)
  s = types.SimpleNamespace(config=catalog.find('train').view(config), folder=tmp_path)
  chosen = train._choose(s, shape, Examples(examples, {}), None)
  m, c = chosen.mesh, chosen.train
  assert (m.data, m.fsdp, m.tensor) == dataclasses.astuple(step.mesh)
  assert (c.accumulate, c.remat) == (step.accumulate, step.remat)
  packed = Packing(examples, c.batch, 2, 0, c.max_length, step.mesh.parts * c.accumulate, 128)
  assert (packed.shape.rows, packed.shape.width) == (step.rows, step.width)


@pytest.mark.parametrize('rows', [4, 8, 16])
def test_a_given_number_of_rows_is_planned_and_divides_over_the_mesh(rows):
  for pod in ('v5p-8', 'v5p-64', 'v6e-64', '8xh200'):
    found = make('m2', pod, '7b', **{'train.rows': rows})
    step = next(s for s in found.stages if s.name == 'model').programs[0]
    assert step.rows == rows and rows % (step.mesh.parts * step.accumulate) == 0
    assert step.width == 2048 + found.config.respond.max_tokens
  message = f'every step has {rows} rows .* must be a multiple of 32, config.train.accumulate times'
  with pytest.raises(InputError, match=message):
    make('m2', 'v5p-64', '7b', **{'train.rows': rows, 'mesh.fsdp': 32, 'mesh.tensor': 1})


@pytest.mark.parametrize('pod, size', [
    ('v5p-8', '7b'), ('8xh200', '7b'), ('v5p-256', '70b'), ('v6e-256', '70b'), ('v4-64', '70b')])
def test_sampling_makes_the_planned_choices(pod, size, monkeypatch, tmp_path):
  pod = pods.find(pod)
  program = make('m2', pod.name, size).stages[1].programs[-1]
  monkeypatch.setattr(sizing, 'devices', lambda local=False: plan.host(pod))
  monkeypatch.setattr(jax, 'process_count', lambda: pod.hosts)
  monkeypatch.setattr(engines.model_config, 'load', lambda folder: PRESETS[f'llama2-{size}'])
  chosen = engines.choose(configs.get('m2', size), [tmp_path])
  m = chosen.sample_mesh
  assert (m.data, m.fsdp, m.tensor) == dataclasses.astuple(program.mesh)
  assert chosen.sample.slots == program.slots


def test_the_slots_chosen_with_int8_weights_are_not_refused(monkeypatch, tmp_path):
  """The copy in bf16 is gone when the cache is made: together they would not fit."""
  pod = pods.find('v6e-8')
  memory = pod.chips * 31 * GIB
  monkeypatch.setattr(sizing, 'devices', lambda local=False: plan.host(pod))
  monkeypatch.setattr(engines.model_config, 'load', lambda folder: PRESETS['llama2-70b'])
  monkeypatch.setattr(engines.hosts, 'memory', lambda: memory)
  config = catalog.replace(configs.get('m2', '70b'), {'sample.int8': True})
  chosen = engines.choose(config, [tmp_path])
  params, row = 68_976_648_192, 2 * 2 * 80 * 8 * 128 * 4096  # bytes of a slot in bf16
  assert 3 * params < memory < 3 * params + chosen.sample.slots * row
  engines.refuse_too_large(chosen, tmp_path)
  memory = 3 * params - 1
  with pytest.raises(InputError, match='lower config.sample.slots'):
    engines.refuse_too_large(chosen, tmp_path)


def test_the_plan_has_every_stage_that_runs_a_model():
  def names(name, **changes):
    return [s.name for s in make(name, 'v5p-256', **changes).stages]
  assert names('sft') == ['model', 'judge_eval', 'answers']
  assert names('m1') == ['judge', 'model', 'judge_eval', 'answers']
  assert names('m2') == ['prompts', 'respond', 'judge', 'model', 'judge_eval', 'answers']
  changes = {'train.reference': 'cached', 'train.select': 'agreement',
             'train.data': ('pairs', 'judge_pairs'), 'pairs.strategy': 'implicit_reward'}
  assert names('m3', **changes) == [
      'prompts', 'respond', 'judge', 'implicit', 'meta_judge', 'reference', 'model', 'selection',
      'judge_eval', 'answers']
  assert 'judge_older' in names('m3', **{'pairs.strategy': 'temporal'})


@pytest.mark.parametrize('pod, size, group', [
    ('v5p-256', '70b', 1), ('v4-256', '70b', 2), ('v6e-256', '70b', 2), ('v6e-256', '7b', 1),
    ('2x8xh200', '70b', 1)])
def test_a_group_has_the_fewest_hosts_that_hold_weights_and_cache(pod, size, group):
  found = make('m2', pod, size)
  assert found.group == group
  assert f'{found.pod.hosts // group} groups of {group} host' in plan.text(found)


def test_what_is_read_and_stored():
  found = make('m2', 'v5p-256')
  params = 68_976_648_192
  assert found.reads == [('m0 to sample', 2 * params), *((what, 4 * params) for what in (
      'm1 to sample', 'm1 to train', 'm1 as the reference', 'm2 to sample'))]
  assert (found.checkpoints, found.checkpoint_bytes) == (2, 12 * params)
  often = {'train.save_every': 50}  # of 250 steps
  assert make('m2', 'v5p-256', **often).checkpoints == 2
  assert make('m2', 'v5p-256', **often, **{'train.select': 'agreement'}).checkpoints == 5
  cached = make('m2', 'v5p-256', **{'train.reference': 'cached'})
  assert [what for what, _ in cached.reads][2:4] == ['m1 as the reference', 'm1 to train']


def test_early_stopping_samples_at_every_checkpoint_and_reads_it_again():
  found = make('m2', 'v5p-256', **{'endpoint.url': 'http://judge/v1'})
  params, stages = 68_976_648_192, {s.name: s for s in found.stages}
  assert [*stages][3:5] == ['model', 'stopping']
  assert stages['model'].work == 'at most 750 steps'  # 3 epochs of 250: 200, 400, 600 and 750
  assert stages['stopping'].work == '1,265 prompts'   # (4 + 1) x 253
  reads = dict(found.reads)
  assert reads['m1 and 4 checkpoints to compare'] == 5 * 4 * params
  assert reads['3 checkpoints to train on'] == 3 * (12 + 4) * params  # with the reference
  assert found.checkpoints == 2
  adapters = make('m2', 'v5p-256', **{'endpoint.url': 'http://judge/v1', 'train.lora_rank': 16})
  assert 12 * params < dict(adapters.reads)['3 checkpoints to train on'] < 12.2 * params


def test_the_size_of_the_data_and_of_the_steps():
  steps = next(s for s in make('m2', 'v5p-256').stages if s.name == 'model')
  assert steps.work == '250 steps'  # 5,000 prompts, of which 80 % give a pair, in batches of 16
  assert next(s for s in make('sft', 'v5p-256').stages if s.name == 'model').work == '200 steps'
  judged = next(s for s in make('m2', 'v5p-256').stages if s.name == 'judge')
  assert judged.work == '20,000 prompts x 3'


def test_loading_int8_weights_takes_a_copy_in_bf16():
  stage = make('m2', 'v5p-256', **{'sample.int8': True}).stages[1]
  loading, prefill, decode = stage.programs
  params = 68_976_648_192
  assert loading.bytes == 3 * params / 4  # on 4 chips
  assert prefill.bytes > decode.bytes
  assert decode.parts['weights'] == pytest.approx(params / 4, rel=0.01)


def test_more_chips_take_less_time_and_floors_are_below_estimates():
  found = [make('m2', pod) for pod in ('v5p-64', 'v5p-128', 'v5p-256')]
  estimates = [p.seconds.estimate for p in found]
  assert estimates == sorted(estimates, reverse=True)
  for stage_ in (s for p in found for s in p.stages):
    assert 0 < stage_.seconds.floor < stage_.seconds.estimate, stage_.name


@pytest.mark.parametrize('pod, size, changes, message', [
    ('8xh200', '70b', {}, 'step of the stage model needs 163.2 GiB per chip by formula, which is '
     "up to 15% above the compiler's figure, and a chip has 133.9; what fits .tight: more than 85% "
     'of the memory.: --config.train.moments=bfloat16 .tight. or --pod=2x8xh200$'),
    ('v6e-8', '70b', {}, 'what fits: --pod=v6e-..$'),
    ('v6e-16', '70b', {'sample.slots': 512}, 'what fits: .*--pod='),
    ('v6e-64', '70b', {'sample.slots': 4096}, 'what fits: --config.sample.slots=-1 or --pod='),
    ('v5p-8', '7b', {'train.remat': 'none', 'train.accumulate': 1, 'train.batch': 64,
                     'train.pack': False}, 'what fits: .*--config.train.remat=auto'),
    ('v5p-8', '7b', {'mesh.data': 4}, 'fits: --config.mesh.data=-1 --config.mesh.fsdp=-1')])
def test_what_does_not_fit_is_refused_with_what_fits(pod, size, changes, message):
  found = make('m2', pod, size, **changes)
  with pytest.raises(InputError, match=message):
    plan.refuse_too_large(found, plan.LENGTHS)


def test_changes_of_the_loop_are_made_by_set():
  with pytest.raises(InputError, match=': --set=train.moments=bfloat16 .tight. or --pod='):
    [*plan.report([configs.get('m2')], pods.find('8xh200'), plan.LENGTHS, is_loop=True)]


# The formula is above the compiler's figure: 79.4 for 74.9 GiB, and 142.1 for 129.3.
@pytest.mark.parametrize('name, pod, changes, message', [
    ('sft', '2x8xh100', {}, 'May not fit: model with 79.4 GiB by formula, which is up to 15%'),
    ('m2', '8xh200', {'train.batch': 1, 'train.reference': 'cached'},
     'May not fit: model with 142.1 GiB by .* For m2, what fits.*: --config.train.moments=bfl')])
def test_a_program_that_the_formula_does_not_rule_out_is_not_refused(name, pod, changes, message):
  config = catalog.replace(configs.get(name), {'train.pack': False, **changes})
  text = ' '.join(' '.join(plan.report([config], pods.find(pod), plan.LENGTHS)).split())
  assert re.search(message, text) and f'{pod} (may not fit) ' in text


def planned(row):
  """-> the programs of a row's kind in a plan with its mesh, rows and recomputation; the plan."""
  p = row.program
  values = dict(zip(('data', 'fsdp', 'tensor'), p.mesh, strict=True))
  if isinstance(p, aot.Training):
    values = {f'mesh.{axis}': size for axis, size in values.items()}
    values |= {'train.pack': False, 'train.batch': p.rows * p.mesh[0] * p.mesh[1],
               'train.moments': p.moments, 'train.remat': p.config.remat, 'train.accumulate': 1,
               'train.reference': p.reference or 'step', 'train.lora_rank': p.lora}
  else:
    values = {f'sample_mesh.{axis}': size for axis, size in values.items()}
    values['sample.slots'] = aot.SLOTS
  found = make('sft' if getattr(p, 'loss', '') == 'sft' else 'm2', p.pod, p.size, **values)
  stage = 'model' if isinstance(p, aot.Training) else 'judge'
  name = 'step' if isinstance(p, aot.Training) else p.kind
  return found, [x for s in found.stages if s.name == stage for x in s.programs if x.name == name]


@pytest.mark.parametrize('row', scale_rows.on_gpus(True), ids=lambda row: row.title)
def test_what_fits_by_the_compiler_is_not_refused(row):
  found, (program,) = planned(row)
  assert dataclasses.astuple(program.mesh) == row.program.mesh
  assert row.gib <= program.bytes / GIB and program not in found.too_large


@pytest.mark.parametrize('row', scale_rows.on_gpus(False), ids=lambda row: row.title)
def test_what_does_not_fit_by_the_compiler_is_refused_or_named(row):
  found, (program,) = planned(row)
  assert program in found.may_not_fit and 'May not fit: ' in plan.text(found)
  if row.gib > sizing.MOST_ABOVE * found.pod.chip.gib:
    with pytest.raises(InputError, match='does not fit'):
      plan.refuse_too_large(found, plan.LENGTHS)


def test_far_too_large_programs_are_among_the_rows():
  assert sum(row.gib > sizing.MOST_ABOVE * aot.PODS[row.program.pod][1]
             for row in scale_rows.on_gpus(False)) >= 2


def test_what_is_said_to_fit_fits():
  found = make('m2', 'v6e-64', **{'sample.slots': 4096})
  with pytest.raises(InputError) as error:
    plan.refuse_too_large(found, plan.LENGTHS)
  pod = str(error.value).rpartition('--pod=')[2]
  assert make('m2', 'v6e-64').tight == []
  assert make('m2', pod, **{'sample.slots': 4096}).tight == []
  plan.refuse_too_large(make('m2', 'v5p-256'), plan.LENGTHS)


def test_cheaper_pods_are_smaller_and_hold_everything():
  found = [*plan.cheaper([make('m2', 'v5p-256')], plan.LENGTHS)]
  assert [p.pod.name for p, in found] == ['v5p-64', 'v5p-128']
  assert not any(p.may_not_fit for p, in found)


def test_a_program_without_a_margin_is_named():
  changes = {'train.moments': 'bfloat16', 'train.reference': 'cached'}
  found = make('m2', '8xh200', **changes)  # docs/scale.md: it fits
  assert not found.may_not_fit
  assert 'More than 85% of the memory, which may fail: model.' in plan.text(found)
  assert '\n8xh200 (tight) ' in plan.show_cheaper([found], plan.LENGTHS)


@pytest.mark.parametrize('name, changes, message', [
    ('m0', {}, 'M0 is pretrained'), ('m2', {'model': ''}, 'nothing says what M0 is; give its'),
    ('m2', {'model': 'llama2-70'}, 'did you mean "llama2-70b"'),
    ('sft', {'train.data': ('corpus',)}, 'config.train.data names corpus'),
    ('m2', {'mesh.tensor': 3}, 'tensor=3, whose product does not divide')])
def test_a_config_that_cannot_be_planned_is_refused(name, changes, message):
  with pytest.raises(InputError, match=message):
    make(name, 'v5p-256', **changes)


def test_the_folder_of_m0_gives_the_plan_of_its_preset(tmp_path):
  shape = PRESETS['qwen3-8b']
  (tmp_path / 'config.json').write_text(json.dumps(model_config.to_hf(shape)))
  pod = pods.find('v5p-8')
  by_name, by_folder = (
      plan.text(plan.make(base.fit(plan.of_m0('m2', 'auto', m0, []), ''), pod, plan.LENGTHS))
      for m0 in ('qwen3-8b', str(tmp_path)))
  assert 'm2 from qwen3-8b (8,190,735,360 parameters) on v5p-8: 4 chips' in by_name
  assert by_folder == by_name.replace('qwen3-8b', str(tmp_path))


def test_an_unknown_m0_is_one_sentence(tmp_path):
  with pytest.raises(InputError, match=r'--m0=qwen3-9b \(did you mean "qwen3-8b"\?\): it is the '
                     'Hugging Face folder of M0, or one of llama2-7b, '):
    plan.of_m0('m2', 'auto', 'qwen3-9b', [])
  with pytest.raises(InputError, match='holds no config.json'):
    base.fit(plan.of_m0('m2', 'auto', str(tmp_path), []), '')


def test_the_docs_show_what_is_printed():
  parts = plan.report([configs.get('m2')], pods.find('v5p-256'), plan.LENGTHS)
  docs = (ROOT / 'docs/scale.md').read_text()
  block = docs.partition('--pod=v5p-256\n')[2].partition('\n```')[0]
  assert '\n'.join(parts) == block.strip('\n')


def test_the_command_plans_the_loop_without_a_device():
  command = [sys.executable, '-m', 'srlm_jax.plan', '--pod=4x8xh200', '--last=m1', '--size=7b',
             '--set=m1:eft.targets=ranks', '--response=300']
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                        env={**os.environ, 'JAX_PLATFORMS': 'none'})  # JAX would find no device
  assert done.returncode == 0, done.stderr
  printed = ' '.join(done.stdout.split())
  assert 'sft of size 7b' in printed and 'm1 of size 7b' in printed
  assert 'nothing calibrates' in printed and '300 per response' in printed
  # In bf16, and 1 + 2 checkpoints of parameters and moments in float32; records take little.
  assert f'whole loop: {(2 + 3 * 12) * 6.738415616:.0f} GB, M0 with 13 GB included' in printed


def test_flags_of_the_loop_are_refused_with_a_config():
  command = [sys.executable, '-m', 'srlm_jax.plan', '--pod=v5p-256', '--config=iter2', '--size=7b',
             '--set=train.batch=8']
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode and not done.stdout
  assert '--size and --set cannot be combined with --config: name the size' in done.stderr
  assert 'Traceback' not in done.stderr


def test_a_plan_with_lora_has_the_model_once_and_saves_the_adapter_alone():
  found = make('m2', '8xh100', '70b', **{'train.lora_rank': 16})
  (step,) = next(stage for stage in found.stages if stage.name == 'model').programs
  count = llama.param_count(PRESETS['llama2-70b'])
  assert step.parts['reference'] == 0 and not found.tight
  assert step.parts['parameters'] == pytest.approx(2 * count / 8, rel=0.05)
  assert found.checkpoint_bytes < 0.02 * 2 * count
  assert sum(name.startswith('m1 ') for name, _ in found.reads) == 2  # to sample and to train
  total = plan.report([found.config], found.pod, plan.LENGTHS, is_loop=True)
  assert 'Storage of the whole loop' in ' '.join(total)
