"""How programs are compiled for H100 and H200 GPUs without a GPU.

The CUDA plugin of JAX compiles for a description of a GPU instead of a device. Nothing is allocated
or executed. XLA's compiler calls ptxas on each kernel, Triton's included. cuDNN's attention is a
call of its library: XLA asks cuDNN for a plan and its workspace only where there is a GPU
(`workspace`).
"""
import dataclasses
import importlib.metadata
import pathlib
import re
import subprocess
import tempfile

from jax._src import xla_bridge
from jax.experimental import topologies

from srlm_jax import pods

# What the CUDA driver reports of the SXM modules, as in the files h100_sxm.txtpb and h200.txtpb of
# XLA: bytes of memory, bytes per second.
CHIPS = {'h100': (84_942_979_072, 3_352_320_000_000), 'h200': (151_397_597_184, 4_800_000_000_000)}
DESCRIPTION = '''
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{chip}"'''
PER_HOST = 8
OPTIONS = dict(xla_gpu_autotune_level=0)  # autotuning would run programs on a GPU
ATTENTION = {'cuDNN': r'"__cudnn\$fmha', 'Triton': r'"__gpu\$xla\.gpu\.triton"'}


def _pod(chip: str, hosts: int) -> tuple[dict, float]:
  memory, bandwidth = CHIPS[chip]
  text = DESCRIPTION.format(chip=chip, memory=memory, bandwidth=bandwidth)
  topology = dict(topology_name=chip, target_config=text, topology=f'1x{hosts}x{PER_HOST}')
  return topology, pods.CHIPS[chip].gib


# {name: (topology, GiB per GPU)}: 95 % of its memory; the rest is left to CUDA, NCCL and cuDNN.
PODS = {f'{hosts * PER_HOST} x {chip}': _pod(chip, hosts) for chip in CHIPS for hosts in (1, 2)}


def devices(pod: str) -> list:
  """-> the GPUs of a name of `PODS`, which need not exist."""
  # JAX knows the name gpu only where there is one (jax-ml/jax#23971).
  xla_bridge.canonicalize_platform = _canonicalize
  return topologies.get_topology_desc(platform='cuda', **PODS[pod][0]).devices


def _canonicalize(platform: str, known=xla_bridge.canonicalize_platform) -> str:
  return 'cuda' if platform == 'gpu' else known(platform)


def attention(text: str) -> dict[str, int]:
  """The text of a compiled program -> {cuDNN or Triton: its calls}; XLA's own attention is none."""
  counts = {name: len(re.findall(pattern, text)) for name, pattern in ATTENTION.items()}
  return {name: count for name, count in counts.items() if count}


def workspace(rows: int, width: int, heads: int, kv_heads: int, head_width: int) -> int:
  """-> bytes of cuDNN's workspace for the backward pass of attention with a mask.

  In bf16 the gradient of the mask for each head, and those of keys and values for each query head
  if several share them; in float32 a number per query. cuDNN 9.28 reports the same for its plans
  (tests/test_aot_gpu.py), and nothing for its forward pass.
  """
  shared = 2 * 2 * width * head_width if heads > kv_heads else 0
  return rows * heads * (2 * width**2 + shared + 4 * width)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What ptxas reports of a kernel."""
  registers: int    # per thread
  spilled: int      # bytes of registers stored to memory, per thread
  size: int         # bytes of machine code


def assemble(folder: pathlib.Path, name: str) -> Kernel:
  """-> the report of ptxas on the kernel `name` in the PTX files that xla_dump_to wrote."""
  found = [p for p in sorted(folder.glob('*.ptx')) if f'.entry {name}(' in p.read_text()]
  if not found:
    raise ValueError(f'no PTX file in {folder} has the kernel {name}')
  with tempfile.TemporaryDirectory() as made:
    cubin = pathlib.Path(made) / 'kernel.cubin'
    ran = subprocess.run([ptxas(), '-v', '-arch=sm_90a', str(found[0]), '-o', str(cubin)],
                         check=True, capture_output=True, text=True)
    return parse(ran.stderr, name, cubin.stat().st_size)


def parse(report: str, name: str, size: int) -> Kernel:
  """The lines that `ptxas -v` prints -> those of the kernel `name`."""
  own = re.search(rf"Compiling entry function '{name}'.*?(\d+) bytes spill stores.*?"
                  r'Used (\d+) registers', report, re.DOTALL)
  if not own:
    raise ValueError(f'ptxas did not report on {name}: {report}')
  return Kernel(int(own[2]), int(own[1]), size)


def ptxas() -> str:
  """-> the path of the assembler that belongs to the plugin."""
  files = importlib.metadata.files('nvidia-cuda-nvcc')
  return str(next(f for f in files if f.name == 'ptxas').locate())


def versions() -> str:
  """-> the versions of JAX, the plugin, cuDNN and ptxas."""
  names = 'jax', 'jax-cuda13-plugin', 'nvidia-cudnn-cu13'
  found = [f'{name} {importlib.metadata.version(name)}' for name in names]
  shown = subprocess.run([ptxas(), '--version'], check=True, capture_output=True, text=True).stdout
  return ', '.join([*found, 'ptxas ' + re.search(r'V([\d.]+)', shown)[1]])
