"""Programs compiled for GPUs without a GPU: the reports of `bench/scale_gpu.py`, and a real run."""
import json
import subprocess

import aot
from conftest import ROOT
import gpu
import pytest
import scale_gpu

DECODE = next(p for p in aot.GPU_SAMPLING if p.kind == 'decode')
STEP = aot.GPU_TRAINING[0]
# What ptxas 13.5 prints of a module with two kernels.
REPORT = '''\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
ptxas info    : Compiling entry function 'gpu_decode' for 'sm_90a'
ptxas info    : Function properties for gpu_decode
    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 102 registers, used 1 barriers
ptxas info    : Compile time = 61.407 ms
'''
# Compiles models of two layers; prints what was found as one line of JSON.
PROGRAM = '''
import dataclasses, json
import aot, gpu, scale_gpu
from srlm_jax.models.config import PRESETS
for name in 'llama2-7b', 'llama2-70b':
  PRESETS[name] = dataclasses.replace(PRESETS[name], layers=2)
sampling = [p for p in aot.GPU_SAMPLING if (p.size, p.pod) == ('70b', '8 x h100')]
step = next(p for p in aot.GPU_TRAINING if p.mesh == (1, 8, 2))  # on two hosts
groups = aot.make_mesh(step).devices.reshape(8, 2)
assert all(a.process_index == b.process_index for a, b in groups)
replicated = aot.Training('70b', 'dpo', '8 x h100', (8, 1, 1), 'cached')
out = []
for programs, window in ([*sampling, step, replicated], None), ([*sampling, step], 1000):
  PRESETS['llama2-70b'] = dataclasses.replace(PRESETS['llama2-70b'], window=window)
  for program in programs:
    found, kernel = scale_gpu.measure(program)
    out.append(dict(found, kernel=dataclasses.asdict(kernel) if kernel else None,
                    problems=scale_gpu.problems(program, found, fits=True)))
print(json.dumps(out))
'''


def test_the_report_of_ptxas_is_read():
  assert gpu.parse(REPORT, 'gpu_decode', 14752) == gpu.Kernel(102, 24, 14752)
  assert gpu.parse(REPORT, 'other', 1) == gpu.Kernel(12, 0, 1)
  with pytest.raises(ValueError, match='did not report on absent'):
    gpu.parse(REPORT, 'absent', 1)


def test_a_kernel_without_ptx_is_an_error(tmp_path):
  (tmp_path / 'module.1.ptx').write_text('.visible .entry gpu_decode_other(\n)')
  with pytest.raises(ValueError, match='has the kernel gpu_decode'):
    gpu.assemble(tmp_path, 'gpu_decode')


def test_the_attention_of_a_program_is_counted():
  text = '''
    %a = (bf16[8]{0}, u8[0]{0}) custom-call(%q), custom_call_target="__cudnn$fmhaScaleBiasSoftmax"
    %b = bf16[8]{0} custom-call(%q), custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"
    %c = bf16[8]{0} custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", backend_config={}
    %d = bf16[8]{0} custom-call(%q), custom_call_target="__cublas$gemm"'''
  assert gpu.attention(text) == {'cuDNN': 2, 'Triton': 1}
  assert gpu.attention('%d = f32[] add(%a, %b)') == {}


def test_a_description_has_the_memory_that_programs_are_compared_with():
  for name, (topology, gib) in gpu.PODS.items():
    memory = gpu.CHIPS[topology['topology_name']][0]
    assert f'device_memory_size: {memory} ' in topology['target_config']
    assert gib == pytest.approx(0.95 * memory / 2**30, abs=0.1)
    hosts = int(name.split()[0]) // 8
    assert topology['topology'] == f'1x{hosts}x8' and name.endswith(topology['topology_name'])


# In MiB, as cuDNN 9.28 reported for plans of its backward pass on compute capability 9.0.
@pytest.mark.parametrize('rows, heads, kv_heads, mib', [
    (1, 64, 8, 1248.75), (1, 8, 1, 156.09), (2, 32, 32, 1152.75)])
def test_the_workspace_of_cudnn(rows, heads, kv_heads, mib):
  found = gpu.workspace(rows, 3072, heads, kv_heads, 128)
  assert found / 2**20 == pytest.approx(mib, abs=0.01)


def test_the_workspace_of_cudnn_is_of_the_heads_of_one_gpu():
  one = next(p for p in aot.GPU_TRAINING if (p.size, p.loss, p.mesh) == ('70b', 'dpo', (1, 16, 1)))
  eight = next(p for p in aot.GPU_TRAINING if p.mesh == (1, 1, 8))
  assert scale_gpu.workspace(one) == 8 * scale_gpu.workspace(eight) > 2**30
  assert scale_gpu.workspace(DECODE) == 0


def test_what_docs_scale_md_says_is_checked():
  good = dict(fits=True, total=30.0, attention={'cuDNN': 4}, whole={'a small weight': 0.01})
  assert scale_gpu.problems(STEP, good, fits=True) == []
  assert scale_gpu.problems(DECODE, dict(good, attention={'Triton': 32}), fits=True) == []
  wrong = [
      (STEP, dict(good, fits=False, total=80.0), True, 'needs 80.0 GiB of 75.2, but docs/scale.md'),
      (STEP, good, False, 'says that it does not fit'),
      (STEP, dict(good, attention={}), True, 'attention of cuDNN alone, but none'),
      (DECODE, good, True, 'does not call the attention of Triton'),
      (STEP, dict(good, whole={'all-reduce of [8]': 0.3}), True, 'all-reduce of .8., 30.0% of')]
  for program, found, fits, sentence in wrong:
    with pytest.raises(AssertionError, match=sentence):
      assert scale_gpu.problems(program, found, fits) == []


def test_docs_scale_md_lists_every_program_with_what_it_fits():
  fit, _, too_large = (ROOT / 'docs/scale.md').read_text().partition('Do not fit:')
  for program in aot.GPU_TRAINING + aot.GPU_SAMPLING:
    assert f'| {aot.title(program)} |' in fit
  for program in aot.GPU_TOO_LARGE:
    assert f'| {aot.title(program)} |' in too_large


@pytest.mark.slow
def test_programs_of_two_layers_compile_for_gpus():
  python = ROOT / '.venv-aot-gpu/bin/python'
  if not python.exists():
    pytest.skip('needs the CUDA plugin: make .venv-aot-gpu/.installed')
  ran = subprocess.run([python, '-c', PROGRAM], capture_output=True, text=True,
                       env=dict(PYTHONPATH=f'{ROOT}:{ROOT / "bench"}', PATH='/usr/bin:/bin'))
  assert ran.returncode == 0, ran.stderr
  found = json.loads(ran.stdout.splitlines()[-1])
  replicated = found[3]
  for decode, prefill, step in found[:3], found[4:]:  # without a window, and with one
    # one call per layer, because the sampler unrolls them; a prefill needs no output of the last
    assert decode['attention'] == {'Triton': 2} and decode['kernel']['spilled'] == 0
    assert 0 < decode['kernel']['registers'] < 256 and decode['kernel']['size'] > 1000
    assert prefill['attention'] == {'cuDNN': 1} and prefill['kernel'] is None
    # in the loops over the layers: forward, recomputed forward, backward
    assert step['attention'] == {'cuDNN': 3} and step['kinds']['reduce-scatter'] > 0
    assert [x['problems'] for x in (decode, prefill, step)] == [[], [], []]
  # the gradients of replicated weights are all-reduced whole
  assert len(replicated['problems']) == 4
  assert all('all-reduce of' in sentence for sentence in replicated['problems'])
