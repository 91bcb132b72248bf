"""Reads the text of a compiled TPU program (`compiled.as_text()`), and of its schedule.

Only what `bench/estimate.py` needs: instructions in the order of their schedule, the shapes and the
memory of arrays, trip counts of loops, FLOPs of matrix products, bytes that a fusion moves.
"""
from collections.abc import Iterator
import dataclasses
import functools
import math
import re

import numpy as np

BITS = dict(pred=8, s4=4, u4=4, s8=8, u8=8, s16=16, u16=16, bf16=16, f16=16, s32=32, u32=32, f32=32,
            s64=64, u64=64, f64=64)
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
NAME = r'%?([\w.<>-]+)'
SHAPE = re.compile(r'(\w+)\[([\d,]*)\](\{[^}]*\})?')  # dtype[dims]{layout}


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of an instruction's result."""
  dtype: str
  dims: tuple[int, ...]
  hbm: bool  # False: in a memory inside the core, such as VMEM

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    return self.size * BITS[self.dtype] / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""
  name: str
  opcode: str
  result: str                # its type: one array, or a tuple of arrays
  operands: tuple[str, ...]  # names
  literal: str               # the text in the parentheses: a constant, the number of a parameter
  attributes: str            # the text after them
  root: bool

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """The arrays of the result; tokens and other types without elements are left out."""
    return tuple(Array(dtype, tuple(int(n) for n in dims.split(',') if n), 'S(' not in layout)
                 for dtype, dims, layout in SHAPE.findall(self.result)
                 if dtype in BITS)

  @property
  def hbm_bytes(self) -> float:
    return sum(a.bytes for a in self.arrays if a.hbm)

  @property
  def cycles(self) -> int:
    """The compiler's estimate, 0 where it has none: collectives, async copies, Pallas calls."""
    return int(self._match(r'"estimated_cycles":"(\d+)"') or 0)

  @property
  def source(self) -> str:
    """The JAX operation that it comes from."""
    return self._match(r'op_name="([^"]*)"')

  @property
  def chain(self) -> str:
    """The number that the parts of an asynchronous, fused collective share."""
    return self._match(r'chain_id="(\d+)"')

  def attribute(self, name: str) -> str:
    """The name of a computation or a number, '' if the attribute is absent."""
    return self._match(rf'\b{name}=' + NAME)

  def _match(self, pattern: str) -> str:
    found = re.search(pattern, self.attributes)
    return found[1] if found else ''


@dataclasses.dataclass
class Computation:
  """Instructions in the order in which they run."""
  name: str
  instructions: list[Instruction] = dataclasses.field(default_factory=list)

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    return {i.name: i for i in self.instructions}

  @functools.cached_property
  def root(self) -> Instruction:
    return next(i for i in self.instructions if i.root)

  def parameter(self, number: int) -> str:
    """-> the name of a parameter."""
    return next(i.name for i in self.instructions
                if i.opcode == 'parameter' and i.literal == str(number))

  def behind(self, name: str) -> Instruction | None:
    """-> the instruction that makes the values of `name`: looks through bitcasts and copies."""
    found = self.by_name.get(name)
    while found and found.opcode in ('bitcast', 'copy', 'copy-start', 'copy-done'):
      found = self.by_name.get(found.operands[0])
    return found


@dataclasses.dataclass
class Program:
  """A compiled program."""
  computations: dict[str, Computation]
  entry: str

  def called(self, instruction: Instruction) -> Computation | None:
    """-> the computation that a fusion calls."""
    return self.computations.get(instruction.attribute('calls'))

  def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """Yields the instructions of a fusion and of the fusions in it, each with its computation."""
    called = self.called(instruction)
    for inner in called.instructions if called else ():
      yield called, inner
      yield from self.inside(inner)


def parse(text: str) -> Program:
  """The text of a compiled, scheduled program -> its computations."""
  computations, current, entry, lines = {}, None, None, []
  for line in text.split('\n'):
    begun = re.match(rf'(ENTRY )?{NAME} \(.*\{{$', line)
    if begun:
      current = computations[begun[2]] = Computation(begun[2])
      entry = current.name if begun[1] else entry
    elif current and line == '}':
      current.instructions += map(_instruction, lines)
      current, lines = None, []
    elif current and re.match(r'  (ROOT )?%', line):
      lines.append(line)
    elif current and lines:  # a line break in a quoted attribute
      lines[-1] += ' ' + line
  if entry is None:
    raise ValueError('the text has no ENTRY computation')
  return Program(computations, entry)


def _instruction(line: str) -> Instruction:
  """`%name = type opcode(operands), attributes` -> an instruction."""
  head = re.match(rf'  (ROOT )?{NAME} = ', line)
  result, rest = _until_closed(line[head.end():])
  opcode = re.match(r'\s*([\w-]+)(?=\()', rest)
  inner, attributes = _until_closed(rest[opcode.end():])
  return Instruction(head[2], opcode[1], result, tuple(re.findall(r'%([\w.<>-]+)', inner)),
                     inner[1:-1], attributes, bool(head[1]))


def _until_closed(text: str) -> tuple[str, str]:
  """Splits a text after its first parenthesis is closed; without one at its start, at a space.

  >>> _until_closed('(f32[2], (s32[])) tuple(%a)'), _until_closed('f32[2]{0} add(%a)')
  (('(f32[2], (s32[]))', ' tuple(%a)'), ('f32[2]{0}', ' add(%a)'))
  """
  if not text.startswith('('):
    first, _, rest = text.partition(' ')
    return first, ' ' + rest
  depth = 0
  for i, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if not depth:
      return text[:i + 1], text[i + 1:]
  raise ValueError(f'a parenthesis is not closed: {text[:80]}')


def trips(program: Program, loop: Instruction) -> int:
  """-> how often the body of a while loop runs.

  ValueError unless the loop counts up by a constant while a counter is less than a constant. The
  counter is taken to start at 0, as in all loops of `lax.scan` and of windowed products.
  """
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  condition = program.computations[loop.attribute('condition')]
  compare = condition.root
  if compare.opcode != 'compare' or 'direction=LT' not in compare.attributes:
    raise ValueError(f'{loop.name}: its condition is not counter < limit')
  counter, limit = (condition.behind(name) for name in compare.operands)
  if counter.opcode != 'get-tuple-element' or limit.opcode != 'constant':
    raise ValueError(f'{loop.name}: its limit is not a constant')
  body = program.computations[loop.attribute('body')]
  index = int(counter.attribute('index'))
  step, value = 0, body.behind(body.root.operands[index])
  while value.opcode == 'add':
    added = [body.behind(name) for name in value.operands]
    constants = [int(i.literal) for i in added if i.opcode == 'constant']
    others = [i for i in added if i.opcode != 'constant']
    if len(constants) != 1:
      raise ValueError(f'{loop.name}: its counter does not grow by a constant')
    step, value = step + constants[0], others[0]
  if value.opcode != 'get-tuple-element' or int(value.attribute('index')) != index or step < 1:
    raise ValueError(f'{loop.name}: its counter does not grow by a constant')
  return -(-int(limit.literal) // step)


def flops(program: Program, computation: Computation, instruction: Instruction) -> int:
  """-> FLOPs of the matrix products of an instruction; for a fusion, of those in it."""
  if instruction.opcode == 'fusion':
    return sum(_product_flops(c, i) for c, i in program.inside(instruction))
  return _product_flops(computation, instruction)


def _product_flops(computation: Computation, product: Instruction) -> int:
  if product.opcode not in ('dot', 'convolution'):
    return 0
  left, right = (computation.by_name[name].arrays[0].dims for name in product.operands[:2])
  out = product.arrays[0]
  if product.opcode == 'dot':
    dims = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', product.attributes)[1]
    return 2 * out.size * math.prod(left[int(n)] for n in dims.split(',') if n)
  return _convolution_flops(left, right, out.dims, product.attributes)


def _convolution_flops(left, right, out, attributes: str) -> int:
  """The TPU compiler writes matrix products as convolutions; batches are dilated windows."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes).groups()
  window = re.search(r'window=\{([^}]*)\}', attributes)
  fields = dict(re.findall(r'(\w+)=(\S+)', window[1])) if window else {}
  spatial = sorted(c for c in labels[0] if c.isdigit())
  total = 2 * out[labels[2].index('b')] * out[labels[2].index('f')] * right[labels[1].index('i')]
  for n, label in enumerate(spatial):
    def field(name, default, n=n):
      return fields[name].split('x')[n] if name in fields else default
    total *= _taps(left[labels[0].index(label)], right[labels[1].index(label)],
                   out[labels[2].index(label)], int(field('stride', '1')),
                   int(field('pad', '0_0').split('_')[0]), int(field('lhs_dilate', '1')),
                   int(field('rhs_dilate', '1')))
  return total


@functools.cache
def _taps(left: int, right: int, out: int, stride: int, pad: int, left_dilation: int,
          right_dilation: int) -> int:
  """-> along one dimension, the pairs of an output and a weight that meet an element of the input.

  >>> _taps(8, 1, 8, 1, 0, 1, 1), _taps(4, 4, 4, 3, 0, 4, 1)  # plain; a batch of 4
  (8, 4)
  """
  at = (np.arange(out)[:, None] * stride + np.arange(right) * right_dilation - pad)
  inside = (at >= 0) & (at <= (left - 1) * left_dilation) & (at % left_dilation == 0)
  return int(inside.sum())


def moved(program: Program, computation: Computation, instruction: Instruction) -> float:
  """-> bytes of HBM that an instruction reads and writes.

  Of an array that is read through slices alone, the slices; of one that is updated in place, the
  update; of one that a fusion only passes on, nothing.
  """
  inner = program.called(instruction) or _alone(computation, instruction)
  total = 0
  for number, name in enumerate(instruction.operands):
    operand = computation.by_name[name]
    if operand.hbm_bytes:
      total += min(operand.hbm_bytes, _read(program, inner, inner.parameter(number)))
  made = inner.root
  parts = made.operands if made.opcode == 'tuple' else (made.name,)
  if len(parts) != len(instruction.arrays):  # an operation with several results
    return total + instruction.hbm_bytes
  for array, name in zip(instruction.arrays, parts, strict=True):
    total += min(array.bytes, _written(program, inner, name)) if array.hbm else 0
  return total


def _alone(computation: Computation, instruction: Instruction) -> Computation:
  """-> a computation of one instruction, whose operands are its parameters."""
  parameters = [
      dataclasses.replace(computation.by_name[name], opcode='parameter', literal=str(number),
                          operands=(), root=False)
      for number, name in enumerate(instruction.operands)]
  return Computation('', [*parameters, dataclasses.replace(instruction, root=True)])


def _read(program: Program, computation: Computation, name: str) -> float:
  """-> bytes that a computation reads of an array, infinity for all of it."""
  total = 0
  for user in computation.instructions:
    if name not in user.operands or user.opcode == 'tuple' or _collective(user):
      continue
    if user.opcode == 'bitcast' or not user.root and _renames(program, user):
      total += _read(program, computation, user.name)
    elif user.opcode in ('dynamic-slice', 'slice', 'gather') and name == user.operands[0]:
      total += user.arrays[0].bytes
    elif user.opcode == 'dynamic-update-slice' and name == user.operands[0]:
      pass
    elif user.opcode == 'fusion':
      inner = program.called(user)
      total += sum(_read(program, inner, inner.parameter(number))
                   for number, operand in enumerate(user.operands) if operand == name)
    else:
      return math.inf
  return total


def _renames(program: Program, instruction: Instruction) -> bool:
  """-> whether an instruction in a fusion only changes the layout of its operand."""
  if instruction.opcode != 'fusion':
    return instruction.opcode == 'copy'
  inner = program.called(instruction)
  return len(instruction.operands) == 1 and all(
      i.opcode in ('parameter', 'bitcast', 'copy') for i in inner.instructions)


def _written(program: Program, computation: Computation, name: str) -> float:
  """-> bytes that a computation writes of an array that it makes, infinity for all of it."""
  made = computation.by_name[name]
  while made.opcode == 'bitcast':
    made = computation.by_name[made.operands[0]]
  if made.opcode == 'parameter' or _collective(made):
    return 0
  if made.opcode == 'dynamic-update-slice':
    return computation.by_name[made.operands[1]].arrays[0].bytes
  if made.opcode == 'fusion' and len(made.arrays) == 1:
    inner = program.called(made)
    return _written(program, inner, inner.root.name)
  return math.inf


def _collective(instruction: Instruction) -> bool:
  return instruction.opcode.startswith(COLLECTIVES)


def group(instruction: Instruction) -> int:
  """-> the number of chips that take part in one group of a collective.

  Three notations: {{0,1},{2,3}}, [groups,size]<=..., mesh['a'=4,'b'=2] {'a'}.
  """
  text = instruction.attributes
  if found := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
    return len(found[1].split(','))
  if found := re.search(r'replica_groups=\[(\d+),(\d+)\]', text):
    return int(found[2])
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
  return 1


def collective_cycles(schedule: str) -> dict[str, float]:
  """-> {name of a collective: cycles}, from the dump of the latency-hiding scheduler.

  `schedule`: the text that the option xla_dump_latency_hiding_schedule writes. Its times of other
  instructions are not usable.
  """
  names, found = {}, {}
  for block, fields in _blocks(schedule):
    if block == 'instructions' and 'opcode' in fields:
      if fields['opcode'].strip('"').startswith(COLLECTIVES):
        names[fields['id']] = fields['name'].strip('"')
    elif block == 'instructions' and fields.get('id') in names:
      start = float(fields.get('start_timestamp_cycles', 0))
      found[names[fields['id']]] = float(fields.get('end_timestamp_cycles', 0)) - start
  return found


def _blocks(text: str) -> Iterator[tuple[str, dict[str, str]]]:
  """Yields (name, its own fields) of each block `name { field: value ... }`, at any depth."""
  stack = []
  for line in text.split('\n'):
    line = line.strip()
    if line.endswith('{'):
      stack.append((line[:-1].strip(), {}))
    elif line == '}':
      yield stack.pop()
    elif stack and ': ' in line:
      field, _, value = line.partition(': ')
      stack[-1][1].setdefault(field, value)
