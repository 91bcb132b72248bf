"""Estimates the time of a compiled TPU program from its text; nothing is executed.

Three estimates, in seconds:
  cycles  the TPU compiler's own estimate of every instruction
  floor   every instruction at the peak of its chip, by FLOPs or by bytes
  middle  the compiler's estimate of what computes; what moves memory is corrected by the stream of
          the calibration, and runs at 85 % of the bandwidth at most

In all three, collectives take what the compiler's scheduler expects of them (where it has no
figure: bytes over links). The compiler has no estimate of Pallas calls: splash attention takes its
FLOPs at SHARE of the peak, and the kernels of a decode the bytes that they must read and write, at
85 % of the bandwidth. Asynchronous collectives and copies cost only the time for which the program
waits for them.
"""
import collections
from collections.abc import Mapping
import dataclasses
import math
import re

import hlo
from hlo import Array, Computation, Instruction, Program

from srlm_jax.models.costs import BANDWIDTH, LATENCY, PRODUCTS, SHARE
from srlm_jax.pods import Chip

WAYS = ('cycles', 'floor', 'middle')
KINDS = ('matmul', 'collectives', 'elementwise', 'dropout', 'attention', 'copies', 'optimizer')
FREE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'partition-id',
        'replica-id', 'after-all', 'iota', 'opt-barrier', 'send-done', 'recv', 'recv-done'}
# A fusion with more of these draws random bits; the compiler's estimate is of its arithmetic.
XORS = 20


@dataclasses.dataclass(frozen=True)
class Sampled:
  """What the text of a sampling program does not say."""
  length: int  # tokens that each slot holds
  prefix: int  # tokens of the prefix that all rows share
  runs: tuple[int, ...]  # of the loops without a constant number of runs, the outermost first


@dataclasses.dataclass
class Row:
  """An instruction's, or a kind's, part of the estimated time."""
  kind: str
  source: str = ''
  seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(WAYS, 0.0))
  flops: float = 0
  bytes: float = 0
  times: float = 0


@dataclasses.dataclass
class Estimate:
  """The estimated time of a program on one chip."""
  rows: dict[str, Row]      # by instruction
  seconds: dict[str, float]
  guessed: int              # collectives without a figure of the scheduler
  sent: float = 0           # bytes to other slices, whose time is not in the estimate

  def kinds(self) -> dict[str, Row]:
    """-> the sums by kind, the most expensive first."""
    found = {}
    for row in self.rows.values():
      total = found.setdefault(row.kind, Row(row.kind))
      total.flops += row.flops
      total.bytes += row.bytes
      for way in WAYS:
        total.seconds[way] += row.seconds[way]
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds['middle']))

  def per(self, steps: int) -> 'Estimate':
    """-> the estimate of one of the equal steps of a program."""
    def part(seconds):
      return {way: seconds[way] / steps for way in WAYS}
    rows = {name: Row(r.kind, r.source, part(r.seconds), r.flops / steps, r.bytes / steps,
                      r.times / steps) for name, r in self.rows.items()}
    return Estimate(rows, part(self.seconds), self.guessed, self.sent / steps)

  def top(self, count: int) -> list[tuple[str, Row]]:
    """-> the most expensive instructions."""
    return sorted(self.rows.items(), key=lambda item: -item[1].seconds['middle'])[:count]


@dataclasses.dataclass(frozen=True)
class Cost:
  """One execution of an instruction."""
  kind: str
  flops: float
  bytes: float
  seconds: Mapping[str, float]


def estimate(program: Program, chip: Chip, stream: float, collective_cycles: Mapping[str, float],
             sampled: Sampled | None = None) -> Estimate:
  """-> the estimated time of a program.

  `stream`: the share of the bandwidth that the compiler expects of a float32 stream.
  `collective_cycles`: see `hlo.collective_cycles`. ValueError for a loop whose number of runs is
  unknown, and for an unknown Pallas call.
  """
  walk = _Walk(program, chip, stream, collective_cycles, sampled)
  runs = sampled.runs if sampled else ()
  seconds = {way: walk.run(program.entry, way, 1, runs) for way in WAYS}
  return Estimate(walk.rows, seconds, len(walk.guessed), walk.sent)


class _Walk:
  """Runs through a program in the order of its schedule, once per way."""

  def __init__(self, program, chip, stream, collective_cycles, sampled):
    self.program, self.chip, self.stream = program, chip, stream
    self.collective_cycles, self.sampled = collective_cycles, sampled
    self.rows: dict[str, Row] = {}
    self.guessed: set[str] = set()
    self.sent = 0.0
    self.costs: dict[tuple[str, str], Cost] = {}

  def run(self, name: str, way: str, times: int, runs: tuple[int, ...]) -> float:
    """-> the seconds of one run of a computation that runs `times` times; `runs`: see Sampled."""
    computation = self.program.computations[name]
    clock = _Clock()
    for instruction in computation.instructions:
      if instruction.opcode == 'while':
        count, inner = self._trips(instruction, runs)
        clock.now += count * self.run(instruction.attribute('body'), way, times * count, inner)
      elif instruction.opcode == 'call':
        clock.now += self.run(instruction.attribute('to_apply'), way, times, runs)
      elif instruction.opcode == 'conditional':
        clock.now += max(self.run(branch, way, times, runs) for branch in _branches(instruction))
      elif instruction.opcode == 'send':
        self.sent += instruction.arrays[0].bytes * times if way == 'cycles' else 0
      elif instruction.opcode not in FREE:
        self._one(clock, computation, instruction, way, times)
    return clock.now

  def _trips(self, loop: Instruction, runs: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """-> how often the body of a loop runs, and the numbers that are left for loops inside it."""
    try:
      return hlo.trips(self.program, loop), runs
    except ValueError:
      if not runs:
        raise
      return runs[0], runs[1:]

  def _one(self, clock, computation, instruction, way, times):
    opcode = instruction.opcode
    inner = _collective(self.program, instruction)
    if opcode.endswith('-done'):
      kind = 'collectives' if opcode.startswith(hlo.COLLECTIVES) else 'copies'
      self._wait(clock, instruction, kind, instruction.operands[0], way, times)
    elif opcode.endswith('-start') and not inner:
      clock.begin(instruction.name, 'copies', self._copy(instruction))
    elif inner and inner.chain:
      if instruction.name.startswith('async-collective-done'):
        self._wait(clock, instruction, 'collectives', inner.chain, way, times)
        return
      clock.begin(inner.chain, self._links(inner), self._collective(inner))
      if instruction.cycles:
        self._compute(clock, computation, instruction, way, times)
    elif inner:
      name = instruction.name
      scattered = instruction.attribute('calls').startswith('all-reduce-scatter')
      clock.begin(name, self._links(inner), self._collective(inner, scattered))
      if not opcode.endswith('-start'):
        self._wait(clock, instruction, 'collectives', name, way, times)
    elif opcode != 'custom-call' or 'tpu_custom_call' in instruction.attributes:
      self._compute(clock, computation, instruction, way, times)

  def _compute(self, clock, computation, instruction, way, times):
    key = computation.name, instruction.name
    if key not in self.costs:
      self.costs[key] = self._cost(computation, instruction)
    cost = self.costs[key]
    clock.now += cost.seconds[way]
    row = self._add(instruction, cost.kind, cost.seconds[way], way, times)
    if way == 'cycles':
      row.flops += cost.flops * times
      row.bytes += cost.bytes * times

  def _wait(self, clock, instruction, kind, started, way, times):
    """Advances the clock to the end of what was started."""
    seconds = max(0.0, clock.ends.get(started, 0) - clock.now)
    clock.now += seconds
    self._add(instruction, kind, seconds, way, times)

  def _add(self, instruction, kind, seconds, way, times) -> Row:
    row = self.rows.setdefault(instruction.name, Row(kind, instruction.source))
    row.seconds[way] += seconds * times
    row.times += times if way == 'cycles' else 0
    return row

  def _cost(self, computation: Computation, instruction: Instruction) -> Cost:
    if instruction.opcode == 'custom-call':
      return self._pallas(computation, instruction)
    flops = hlo.flops(self.program, computation, instruction)
    moved = hlo.moved(self.program, computation, instruction)
    by_flops, by_bytes = flops / self.chip.flops, moved / self.chip.bandwidth
    floor, cycles = max(by_flops, by_bytes), instruction.cycles / self.chip.hertz
    kind = self._kind(instruction, flops)
    computes = kind == 'dropout' or by_flops > by_bytes
    middle = cycles if computes else max(by_bytes / BANDWIDTH, cycles * self.stream)
    return Cost(kind, flops, moved, dict(cycles=cycles, floor=floor, middle=middle))

  def _kind(self, instruction: Instruction, flops: float) -> str:
    if flops > 1e6:
      return 'matmul'
    if '/update/' in instruction.source:
      return 'optimizer'
    if sum(i.opcode == 'xor' for _, i in self.program.inside(instruction)) > XORS or (
        'ropout' in instruction.source):
      return 'dropout'
    copies = instruction.opcode in ('copy', 'transpose', 'reshape')
    return 'copies' if copies or instruction.name.startswith('copy') else 'elementwise'

  def _pallas(self, computation: Computation, call: Instruction) -> Cost:
    """The cost of a Pallas call; ValueError for an unknown one."""
    name = call.name.partition('.')[0]
    if splash := re.match(r'splash_m[qh]a_(fwd|dkv|dq)', name):
      return self._splash(computation, call, splash[1])
    if name not in ('tpu_decode', 'tpu_append') or not self.sampled:
      raise ValueError(f'the time of the Pallas call {call.name} is unknown')
    read = _read_by_decode if name == 'tpu_decode' else _moved_by_append
    moved = read(computation, call, self.sampled.length)
    floor = moved / self.chip.bandwidth
    seconds = floor / BANDWIDTH
    kind = 'attention' if name == 'tpu_decode' else 'copies'
    return Cost(kind, 0, moved, dict(cycles=seconds, floor=floor, middle=seconds))

  def _splash(self, computation: Computation, call: Instruction, part: str) -> Cost:
    """Splash attention over packed rows, or over the prefix and the prompts of a prefill."""
    heads, T, H, S = _attention_shape(computation, call)
    if self.sampled:
      visited = _visited_behind(self.sampled.prefix, T)
    else:
      block = min(512, T)
      visited = (S // T) * (T // block) * (T // block + 1) // 2 * block**2  # causal in each copy
    flops = 2 * PRODUCTS[part] * heads * visited * H
    floor = flops / self.chip.flops
    seconds = floor / SHARE[part]
    return Cost('attention', flops, 0, dict(cycles=seconds, floor=floor, middle=seconds))

  def _copy(self, instruction: Instruction) -> float:
    """-> the seconds of an asynchronous copy, between HBM and VMEM or inside HBM."""
    arrays = instruction.arrays[:2]
    if not any(a.hbm for a in arrays):
      return 0.0
    return min(a.bytes for a in arrays) / self.chip.bandwidth

  def _collective(self, collective: Instruction, scattered: bool = False) -> float:
    """-> the seconds of a collective; `scattered`: of an all-reduce that keeps only one part."""
    known = self.collective_cycles.get(collective.name, 0) / self.chip.hertz
    if known > 1e-7 and not scattered:
      return known
    self.guessed.add(collective.name)
    sent = _sent(collective) / (2 if scattered else 1)
    links = 1 if collective.opcode.startswith('collective-permute') else 2
    return sent / (links * self.chip.link) + LATENCY

  def _links(self, collective: Instruction) -> str:
    """What a collective occupies: those over the same groups, or pairs, run one by one."""
    pairs = re.search(r'source_target_pairs=(\S+)', collective.attributes)
    return pairs[1] if pairs else str(hlo.group(collective))


class _Clock:
  """The time in a computation, and the ends of what runs beside it."""

  def __init__(self):
    self.now = 0.0
    self.ends: dict[str, float] = {}
    self.free = collections.defaultdict(float)  # when a resource has done what was started on it

  def begin(self, name: str, resource: str, seconds: float):
    """Starts something once its resource is free; a second start of it does nothing."""
    if name not in self.ends:
      self.free[resource] = self.ends[name] = max(self.free[resource], self.now) + seconds


def _collective(program: Program, instruction: Instruction) -> Instruction | None:
  """-> the collective that an instruction is, or that it holds if it is a fusion."""
  if instruction.opcode.startswith(hlo.COLLECTIVES):
    return instruction
  return next((i for _, i in program.inside(instruction) if i.opcode.startswith(hlo.COLLECTIVES)),
              None)


def _sent(collective: Instruction) -> float:
  """-> bytes that a chip sends."""
  kind = next(k for k in hlo.COLLECTIVES if collective.opcode.startswith(k))
  sizes = [a.bytes for a in collective.arrays]
  if kind == 'collective-permute':
    return sizes[0]
  result = max(sizes) if collective.opcode.endswith('-start') else sum(sizes)
  n = hlo.group(collective)
  return result * (n - 1) / n * {'all-reduce': 2, 'reduce-scatter': n}.get(kind, 1)


def _branches(conditional: Instruction) -> list[str]:
  listed = re.search(r'branch_computations=\{([^}]*)\}', conditional.attributes)
  return re.findall(hlo.NAME, listed[1] if listed else ' '.join(
      re.findall(r'(?:true|false)_computation=%?([\w.<>-]+)', conditional.attributes)))


def _attention_shape(computation: Computation, call: Instruction) -> tuple[int, int, int, int]:
  """-> heads of all rows, queries, head width and keys of a call of splash attention."""
  dims = [a.dims for name in call.operands for a in computation.by_name[name].arrays
          if a.dtype == 'bf16']
  *heads, T, H = next(d for d in dims if len(d) >= 3)
  S = max(d[-2] for d in dims if len(d) >= 2 and d[-1] == H)
  return math.prod(heads), T, H, S


def _visited_behind(prefix: int, T: int) -> int:
  """-> pairs of a query and a key in the blocks that T queries behind a prefix visit.

  >>> _visited_behind(512, 128) == 128 * 1024, _visited_behind(512, 1024) == 512**2 * (2 + 3)
  (True, True)
  """
  queries, keys = min(512, T), min(512, prefix + T)
  return sum(queries * -(-(prefix + end) // keys) * keys for end in range(queries, T + 1, queries))


def _read_by_decode(computation: Computation, call: Instruction, length: int) -> float:
  """-> bytes that attention of one layer reads and writes.

  Of the caches [L, B, K, S, H] it must read one layer and `length` tokens per slot, of prefixes
  [L, K, W, H] one layer. That its last block of a slot is read whole is not counted.
  """
  operands = _operands(computation, call)
  layers = _cache(operands).dims[0]
  total = sum(a.bytes for a in call.arrays)
  for array in operands:
    if len(array.dims) == 5:
      total += array.bytes / layers * min(1, length / array.dims[3])
    else:
      total += array.bytes / (layers if array.dims[:1] == (layers,) else 1)
  return total


def _moved_by_append(computation: Computation, call: Instruction, length: int) -> float:
  """-> bytes that an append moves: per slot and head it reads and writes a tile of 8 sublanes."""
  del length
  cache = _cache(_operands(computation, call))
  _, B, K, _, H = cache.dims
  tile = 8 * 4 * H  # sublanes of 32 bits
  return 2 * 2 * B * K * tile  # keys and values, in and out


def _operands(computation: Computation, call: Instruction) -> list[Array]:
  return [a for name in call.operands for a in computation.by_name[name].arrays]


def _cache(operands: list[Array]) -> Array:
  return next(a for a in operands if len(a.dims) == 5)
