"""The workloads of the sampling benchmarks: a model, and requests with the lengths of samples."""
from collections.abc import Sequence
import dataclasses
import json
import pathlib

from flax import traverse_util
import numpy as np
from safetensors import numpy as safetensors

from srlm_jax.checkpoint import hf
from srlm_jax.models.config import Config, to_hf
from srlm_jax.sample.engine import Engine, Request, Sampling

SIGMA = 0.8  # standard deviation of the log of a length


@dataclasses.dataclass(frozen=True)
class Kind:
  """A workload: its size, and its lengths in tokens."""
  count: int   # prompts
  rubric: int  # length of the rubric
  prompt: int  # median length of a prompt
  median: int  # median length of a sample
  cap: int     # largest length of a sample


# Of a CPU: 58M parameters in float32; lengths are a quarter of a real run's.
CPU = Config(D=512, F=1376, K=8, G=1, H=64, V=32000, layers=8, context=2048)
CPU_RESPOND, CPU_JUDGE = Kind(16, 0, 100, 50, 256), Kind(4, 350, 250, 40, 128)
TEMPERATURE, TOP_P = 0.7, 0.9


def lengths(rng, kind: Kind, n: int) -> list[int]:
  """-> n lengths of samples, log-normal."""
  return np.clip(rng.lognormal(np.log(kind.median), SIGMA, n), 1, kind.cap).astype(int).tolist()


def respond(kind: Kind, V: int, n: int = 4) -> list[Request]:
  """-> requests with prompts of log-normal lengths."""
  rng = np.random.default_rng(0)
  sizes = rng.lognormal(np.log(kind.prompt), 0.5, kind.count)
  sizes = np.clip(sizes, 4, 4 * kind.prompt).astype(int)
  return [Request(f'respond{i}', rng.integers(1, V, size).tolist(), n,
                  lengths=lengths(rng, kind, n)) for i, size in enumerate(sizes)]


def judge(kind: Kind, V: int) -> list[Request]:
  """-> requests of a rubric, a prompt and one of its 4 candidates, with 3 samples each.

  Prompt and candidate have about `kind.prompt` tokens together.
  """
  rng = np.random.default_rng(1)
  rubric, made = rng.integers(1, V, kind.rubric).tolist(), []
  for i in range(kind.count):
    medians = [kind.prompt * 2 // 5] + 4 * [kind.prompt * 3 // 5]
    sizes = [rng.integers(size // 2, size * 3 // 2) for size in medians]
    prompt, *candidates = (rng.integers(1, V, size).tolist() for size in sizes)
    made += [Request(f'judge{i}/{j}', rubric + prompt + candidate, 3,
                     lengths=lengths(rng, kind, 3)) for j, candidate in enumerate(candidates)]
  return made


def run(engine: Engine, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
  """-> the ids of every sample."""
  return [result.ids for _, results in engine.generate(requests, sampling) for result in results]


def export(config: Config, params, folder):
  """Writes the parameters as a Hugging Face folder, in float32."""
  ours, tensors = traverse_util.flatten_dict(params, sep='.'), {}
  for leaf in hf.leaves(config):
    array = np.asarray(ours[leaf.name])
    for layer, name in enumerate(leaf.tensors):
      tensors[name] = np.empty(leaf.hf_shape, np.float32)
      leaf.ours(tensors[name])[...] = array[layer] if leaf.stacked else array
  safetensors.save_file(tensors, pathlib.Path(folder, hf.SINGLE), dict(format='pt'))
  fields = to_hf(config) | dict(bos_token_id=1, eos_token_id=2)
  pathlib.Path(folder, 'config.json').write_text(json.dumps(fields))
