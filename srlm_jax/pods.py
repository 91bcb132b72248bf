"""TPU slices and GPU nodes by their names, and the published peaks of their chips."""
import dataclasses
import re

from srlm_jax import closest, config as configs, InputError


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of one chip; `link`: of one link in one direction.

  A TPU's collective uses two links at once. Of a GPU, two links are its NVLink in one direction.
  """
  hertz: float
  flops: float      # bf16, per second
  bandwidth: float  # bytes per second of HBM
  link: float       # bytes per second
  gib: float = 0    # of memory that a program may have; libtpu gives it 30.75 of v4's 32


CHIPS = {'v4': Chip(1.05e9, 275e12, 1228e9, 45e9, 30.75),
         'v5e': Chip(1.5e9, 197e12, 819e9, 45e9),
         'v5p': Chip(1.75e9, 459e12, 2765e9, 90e9, 95),
         'v6e': Chip(1.75e9, 918e12, 1640e9, 90e9, 31),
         'h100': Chip(1.98e9, 989e12, 3350e9, 225e9, 75.2),
         'h200': Chip(1.98e9, 989e12, 4800e9, 225e9, 133.9)}
NODE = 8           # GPUs of a node; JAX has 95 % of their memory, see docs/scale.md
NETWORK = 50e9     # bytes per second per GPU between nodes: one port of 400 Gbit/s
CUBE = 64          # chips: slices of v4 and v5p are smaller, or a multiple of it
HOST = 4           # chips of a TPU host, but for the small slices of v6e
# Chips of a slice.
SIZES = {'v4': (4, 8, 16, 32, *range(CUBE, 4096 + 1, CUBE)),
         'v5p': (4, 8, 16, 32, *range(CUBE, 6144 + 1, CUBE)),
         'v6e': (1, 4, 8, 16, 32, 64, 128, 256)}
KINDS = (*SIZES, 'h100', 'h200')  # those that a pod may have
CORES = {'v4': 2, 'v5p': 2, 'v6e': 1}  # what the name of a slice counts, per chip
FORMS = ('v4-N and v5p-N for N cores, v6e-N for N chips, 8xh100 and 8xh200 for a node, and several '
         'of them as 2xv5p-128 or 4x8xh100')


@dataclasses.dataclass(frozen=True)
class Pod:
  """Slices of TPUs, or nodes of GPUs."""
  kind: str   # a key of CHIPS
  count: int  # slices or nodes
  size: int   # chips of one slice or node

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def platform(self) -> str:
    return 'tpu' if self.kind in SIZES else 'gpu'

  @property
  def chips(self) -> int:
    """Chips of all slices."""
    return self.count * self.size

  @property
  def hosts(self) -> int:
    """Hosts of all slices. The chips of v6e-1, v6e-4 and v6e-8 are on one host each."""
    single = self.platform == 'gpu' or (self.kind == 'v6e' and self.size <= 8)
    return self.count * (1 if single else self.size // HOST)

  @property
  def name(self) -> str:
    """
    >>> find('2xV5p-128').name, find('8xh200').name
    ('2xv5p-128', '8xh200')
    """
    one = f'{self.size}x{self.kind}' if self.platform == 'gpu' else (
        f'{self.kind}-{self.size * CORES[self.kind]}')
    return one if self.count == 1 else f'{self.count}x{one}'


def find(text: str) -> Pod:
  """The pod of a name, see FORMS. Raises InputError, with the closest names, for an unknown one.

  >>> find('v5p-256'), find('2x8xh100')
  (Pod(kind='v5p', count=1, size=128), Pod(kind='h100', count=2, size=8))
  """
  name = ''.join(text.lower().split())
  one = r'(v4|v5p|v6e)-(\d{1,6})|([1-9]\d{0,4})x(h100|h200)'
  found = re.fullmatch(rf'(?:([1-9]\d{{0,3}})x)?(?:{one})', name)
  if not found:
    raise InputError(f'--pod={configs.short(text)}{closest(name, _names())}: pods are {FORMS}')
  count, kind, number, gpus, gpu = found.groups()
  count = int(count or 1)
  if gpu:
    if int(gpus) % NODE:
      raise InputError(f'--pod={configs.short(text)}: a node has {NODE} GPUs; write {NODE}x{gpu}, '
                       f'or a multiple of {NODE}')
    return Pod(gpu, count * int(gpus) // NODE, NODE)
  sizes, cores = SIZES[kind], CORES[kind]
  if int(number) / cores not in sizes:
    near = sorted(sizes, key=lambda size: abs(size * cores - int(number)))[:2]
    names = ' and '.join(Pod(kind, count, size).name for size in sorted(near))
    raise InputError(f'--pod={configs.short(text)}: there is no slice {kind}-{number}; the closest '
                     f'are {names}')
  return Pod(kind, count, int(number) // cores)


def of_kind(kind: str) -> list[Pod]:
  """One slice of each size that is a power of two, or nodes, the smallest first."""
  if kind in SIZES:
    return [Pod(kind, 1, size) for size in SIZES[kind] if size.bit_count() == 1]
  return [Pod(kind, 2**i, NODE) for i in range(8)]


def _names() -> list[str]:
  several = [Pod('v5p', 2, 64), Pod('v6e', 2, 256), Pod('h100', 2, NODE), Pod('h200', 2, NODE)]
  return [pod.name for pod in (*several, *(pod for kind in KINDS
                                           for pod in of_kind(kind)))]
