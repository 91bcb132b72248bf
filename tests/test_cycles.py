"""The estimate of time of `bench/cycles.py`, on small programs written by hand."""
import doctest
import textwrap

import aot
import cycles as bench
import estimate
import hlo
import pytest

from srlm_jax import pods
from srlm_jax.models import llama


@pytest.mark.parametrize('module', [bench, estimate, hlo])
def test_the_examples_in_docstrings(module):
  found = doctest.testmod(module)
  assert found.attempted and not found.failed


def program(entry, *computations):
  """A program of an entry computation, given by its lines, and others, given as text."""
  lines = '\n'.join(f'  {line}' for line in textwrap.dedent(entry).strip().split('\n'))
  text = '\n\n'.join(textwrap.dedent(c).strip() for c in computations)
  main = f'ENTRY %main (x: f32[]) -> f32[] {{\n{lines}\n}}'
  return hlo.parse(f'HloModule jit_step\n\n{text}\n\n{main}\n')


def estimated(found, collective_cycles=None, stream=0.5, sampled=None):
  """The estimate on a chip of 1 GHz, 1 TFLOP/s, 1 GB/s of memory and 0.5 GB/s per link."""
  chip = pods.Chip(1e9, 1e12, 1e9, 0.5e9)
  return estimate.estimate(found, chip, stream, collective_cycles or {}, sampled)


def cycles(count):
  return f'backend_config={{"window_config":{{}},"estimated_cycles":"{count}"}}'


ADD = '''
    %add (a: f32[1000], b: f32[1000]) -> f32[1000] {
      %a = f32[1000]{0} parameter(0)
      %b = f32[1000]{0} parameter(1)
      ROOT %c = f32[1000]{0} add(%a, %b)
    }'''
MEGABYTE = 'bf16[500,1000]{1,0:T(8,128)(2,1)}'


def test_an_instruction_is_read_with_its_type_operands_and_attributes():
  found = program('''
      %x = f32[2,3]{1,0:T(8,128)} parameter(0)
      %c = s32[] constant(7)
      %f = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, (f32[4]{0}, pred[])) fusion(%x, %c), kind=kLoop,
          calls=%add.1, metadata={op_name="jit(step)/update/mul"},
          backend_config={"estimated_cycles":"12", "xprof":"(}"}
      ROOT %g = f32[4]{0} get-tuple-element(%f), index=1''')
  main = found.computations['main']
  assert found.entry == 'main' and list(main.by_name) == ['x', 'c', 'f', 'g']
  fusion = main.by_name['f']
  assert (fusion.opcode, fusion.operands, fusion.attribute('calls')) == (
      'fusion', ('x', 'c'), 'add.1')
  assert [(a.dtype, a.dims, a.hbm, a.bytes) for a in fusion.arrays] == [
      ('bf16', (2, 3), False, 12), ('f32', (4,), True, 16), ('pred', (), True, 1)]
  assert fusion.hbm_bytes == 17 and fusion.cycles == 12 and fusion.source == 'jit(step)/update/mul'
  assert main.by_name['c'].literal == '7' and main.root.name == 'g' and not fusion.root


LOOP = '''
    %body (p: (s32[], f32[1000])) -> (s32[], f32[1000]) {{
      %p = (s32[], f32[1000]{{0}}) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      %x = f32[1000]{{0}} get-tuple-element(%p), index=1
      %one = s32[] constant({step})
      %next = s32[] add(%i, %one)
      %copied = s32[] copy(%next)
      %y = f32[1000]{{0}} fusion(%x, %x), kind=kLoop, calls=%add, {cycles}
      ROOT %out = (s32[], f32[1000]{{0}}) tuple({counter}, %y)
    }}

    %condition (p: (s32[], f32[1000])) -> pred[] {{
      %p = (s32[], f32[1000]{{0}}) parameter(0)
      %limit = s32[] constant(10)
      %i = s32[] get-tuple-element(%p), index=0
      ROOT %less = pred[] compare(%i, %limit), direction={direction}
    }}'''
WHILE = '''
    %x = (s32[], f32[1000]{0}) parameter(0)
    ROOT %loop = (s32[], f32[1000]{0}) while(%x), condition=%condition, body=%body'''


def loop(step=1, counter='%copied', direction='LT'):
  body = LOOP.format(step=step, counter=counter, direction=direction, cycles=cycles(8000))
  return program(WHILE, ADD, body)


@pytest.mark.parametrize('step, count', [(1, 10), (2, 5), (3, 4)])
def test_a_loop_counts_as_often_as_it_runs(step, count):
  found = loop(step)
  assert hlo.trips(found, found.computations['main'].root) == count
  done = estimated(found)
  # 8,000 cycles at 1 GHz; 12 KB at 1 GB/s, less at 85 % of it; the stream halves the cycles
  wanted = dict(cycles=8e-6 * count, floor=12e-6 * count, middle=12e-6 / 0.85 * count)
  assert done.seconds == pytest.approx(wanted, rel=0.01)  # the counter moves some bytes too
  row = done.rows['y']
  assert (row.kind, row.times, row.bytes) == ('elementwise', count, 12_000 * count)


@pytest.mark.parametrize('change', [
    dict(direction='GT'), dict(step=0), dict(counter='%i'), dict(counter='%one')])
def test_a_loop_without_a_constant_number_of_runs_is_refused(change):
  with pytest.raises(ValueError, match='^loop: its'):
    estimated(loop(**change))


def test_loops_that_end_when_the_data_says_so_take_the_given_numbers_from_the_outside_in():
  def sums(number, body, limit):
    """A loop to `limit`, around an addition of 8,000 cycles and the lines of `body`."""
    return f'''
        %body.{number} (p: (s32[], s32[])) -> (s32[], s32[]) {{
          %p.{number} = (s32[], s32[]) parameter(0)
          %x.{number} = f32[1000]{{0:S(1)}} constant(0)
          %y.{number} = f32[1000]{{0:S(1)}} add(%x.{number}, %x.{number}), {cycles(8000)}
          {body}
          %i.{number} = s32[] get-tuple-element(%p.{number}), index=0
          %one.{number} = s32[] constant(1)
          %next.{number} = s32[] add(%i.{number}, %one.{number})
          %n.{number} = s32[] get-tuple-element(%p.{number}), index=1
          ROOT %out.{number} = (s32[], s32[]) tuple(%next.{number}, %n.{number})
        }}

        %condition.{number} (p: (s32[], s32[])) -> pred[] {{
          %q.{number} = (s32[], s32[]) parameter(0)
          %j.{number} = s32[] get-tuple-element(%q.{number}), index=0
          %limit.{number} = s32[] {limit}
          ROOT %less.{number} = pred[] compare(%j.{number}, %limit.{number}), direction=LT
        }}'''

  def run(number, state):
    return (f'%loop.{number} = (s32[], s32[]) while({state}), condition=%condition.{number}, '
            f'body=%body.{number}')
  given = 'get-tuple-element(%q.{}), index=1'.format
  found = program(
      f"%x = (s32[], s32[]) parameter(0)\nROOT {run(1, '%x')}",
      sums(3, '', given(3)), sums(2, run(3, '%p.2'), 'constant(5)'),
      sums(1, run(2, '%p.1'), given(1)))
  with pytest.raises(ValueError, match='its limit is not a constant'):
    estimated(found)
  done = estimated(found, sampled=estimate.Sampled(0, 0, (8, 3)))
  assert [done.rows[f'y.{n}'].times for n in (1, 2, 3)] == [8, 8 * 5, 8 * 5 * 3]
  assert done.seconds['cycles'] == pytest.approx(8e-6 * 8 * (1 + 5 + 15), rel=0.01)
  step = done.per(8)
  assert step.rows['y.3'].times == 15
  assert step.seconds == pytest.approx({way: s / 8 for way, s in done.seconds.items()})
  assert step.kinds()['elementwise'].seconds == pytest.approx(step.seconds)


def test_flops_of_products():
  found = program('''
      %x = bf16[64,128]{1,0} parameter(0)
      %w = bf16[128,32]{1,0} parameter(1)
      %dot = bf16[64,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      %conv = bf16[64,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
      %a = bf16[8,64,128]{2,1,0} parameter(2)
      %b = bf16[8,32,128]{2,1,0} parameter(3)
      %heads = bf16[64,32]{1,0} convolution(%a, %b), window={size=8}, dim_labels=0bf_0oi->0bf
      %batch = bf16[8,64,32]{2,1,0} convolution(%a, %b),
          window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf
      %c = bf16[2,32,128]{2,1,0} parameter(4)
      ROOT %padded = bf16[9,64,32]{2,1,0} convolution(%a, %c), window={size=2 pad=1_1},
          dim_labels=0bf_0oi->0bf''')
  main = found.computations['main']
  # `heads` has one output position; its type is written without this dimension of size 1.
  heads = hlo._convolution_flops((8, 64, 128), (8, 32, 128), (1, 64, 32),
                                 main.by_name['heads'].attributes)
  assert heads == 2 * 64 * 32 * 128 * 8
  assert {name: hlo.flops(found, main, main.by_name[name])
          for name in ('x', 'dot', 'conv', 'batch', 'padded')} == dict(
      x=0, dot=2 * 64 * 32 * 128, conv=2 * 64 * 32 * 128, batch=8 * 2 * 64 * 32 * 128,
      padded=16 * 2 * 64 * 32 * 128)


def moved(entry, *computations):
  """Bytes of HBM that the last instruction moves."""
  found = program(entry, *computations)
  main = found.computations['main']
  return hlo.moved(found, main, main.root)


STACK = 'f32[80,1000]{1,0}'


def test_bytes_of_a_plain_operation_and_of_arrays_in_vmem():
  assert moved('''
      %x = f32[1000]{0} parameter(0)
      %y = f32[1000]{0:T(1024)S(1)} parameter(1)
      ROOT %z = f32[1000]{0} add(%x, %y)''') == 8000


def test_bytes_of_slices():
  assert moved(f'''
      %x = {STACK} parameter(0)
      %i = s32[] parameter(1)
      ROOT %z = f32[1,1000]{{1,0}} dynamic-slice(%x, %i, %i),
          dynamic_slice_sizes={{1,1000}}''') == 2 * 4000 + 2 * 4
  nested = '''
      %inner (s: f32[80,1000], j: s32[]) -> f32[1,1000] {
        %s = f32[80,1000]{1,0} parameter(0)
        %j = s32[] parameter(1)
        ROOT %d = f32[1,1000]{1,0} dynamic-slice(%s, %j, %j), dynamic_slice_sizes={1,1000}
      }

      %sliced (p: f32[80,1000], i: s32[]) -> f32[1000] {
        %p = f32[80,1000]{1,0} parameter(0)
        %i = s32[] parameter(1)
        %b = f32[80,1,1000]{2,1,0} bitcast(%p)
        %t = f32[80,1000]{1,0} bitcast(%b)
        %f = f32[1,1000]{1,0} fusion(%t, %i), kind=kLoop, calls=%inner
        ROOT %r = f32[1000]{0} bitcast(%f)
      }'''
  assert moved(f'''
      %x = {STACK} parameter(0)
      %k = s32[] parameter(1)
      ROOT %z = f32[1000]{{0}} fusion(%x, %k), kind=kLoop, calls=%sliced''', nested) == 2 * 4000 + 4


def test_bytes_of_a_slice_of_an_array_whose_layout_a_fusion_changes():
  relayout = '''
      %relayout (s: s8[80,1000]) -> s8[80,1000] {
        %s = s8[80,1000]{1,0:T(32,128)(4,1)} parameter(0)
        ROOT %c = s8[80,1000]{1,0:T(8,128)(4,1)} copy(%s)
      }'''
  sliced = '''
      %sliced (p: s8[80,1000], i: s32[]) -> f32[1000] {
        %p = s8[80,1000]{1,0:T(32,128)(4,1)} parameter(0)
        %i = s32[] parameter(1)
        %f = s8[80,1000]{1,0:T(8,128)(4,1)} fusion(%p), kind=kLoop, calls=%relayout
        %d = s8[1,1000]{1,0} dynamic-slice(%f, %i, %i), dynamic_slice_sizes={1,1000}
        ROOT %r = f32[1000]{0} convert(%d)
      }'''
  given = '''
      %x = s8[80,1000]{1,0} parameter(0)
      %k = s32[] parameter(1)
      '''
  assert moved(
      f'{given}ROOT %z = f32[1000]{{0}} fusion(%x, %k), kind=kLoop, calls=%sliced', relayout,
      sliced) == 1000 + 4 + 4000
  assert moved(f'{given}ROOT %z = s8[80,1000]{{1,0}} fusion(%x), kind=kLoop, calls=%relayout',
               relayout) == 2 * 80_000
  assert moved(f'{given}ROOT %z = s8[80,1000]{{1,0}} copy(%x)') == 2 * 80_000


def test_bytes_of_an_update_in_place_and_of_what_is_passed_on():
  update = '''
      %update (p: f32[80,1000], u: f32[1,1000], i: s32[]) -> (f32[80,1000], f32[80,1000]) {
        %p = f32[80,1000]{1,0} parameter(0)
        %u = f32[1,1000]{1,0} parameter(1)
        %i = s32[] parameter(2)
        %d = f32[80,1000]{1,0} dynamic-update-slice(%p, %u, %i, %i)
        %b = f32[80,1000]{1,0} bitcast(%d)
        %other = f32[80,1000]{1,0} parameter(3)
        ROOT %t = (f32[80,1000]{1,0}, f32[80,1000]{1,0}) tuple(%b, %other)
      }'''
  assert moved(f'''
      %x = {STACK} parameter(0)
      %row = f32[1,1000]{{1,0}} parameter(1)
      %k = s32[] parameter(2)
      %passed = {STACK} parameter(3)
      ROOT %z = ({STACK}, {STACK}) fusion(%x, %row, %k, %passed), kind=kLoop, calls=%update''',
               update) == 4000 + 4 + 4000


def test_a_collective_costs_what_the_program_waits_for_it():
  def seconds(between, known):
    found = program(f'''
        %x = f32[1000]{{0}} parameter(0)
        %s = (f32[1000]{{0}}, f32[4000]{{0}}) all-gather-start(%x), replica_groups=[2,4]<=[8]
        %y = f32[1000]{{0}} fusion(%x, %x), kind=kLoop, calls=%add, {cycles(between)}
        ROOT %d = f32[4000]{{0}} all-gather-done(%s)''', ADD)
    return estimated(found, known)
  known = {'s': 5000}  # cycles, so 5 us
  done = seconds(2000, known)
  assert done.seconds['cycles'] == pytest.approx(5e-6) and done.guessed == 0
  assert done.rows['d'].seconds['cycles'] == pytest.approx(3e-6)
  assert done.kinds()['collectives'].seconds['cycles'] == pytest.approx(3e-6)
  assert seconds(9000, known).seconds['cycles'] == pytest.approx(9e-6)
  # 16 KB on 4 chips: 12 KB per chip over two links of 0.5 GB/s, and 2 us
  guessed = seconds(1000, {})
  assert guessed.seconds['cycles'] == pytest.approx(12e-6 + 2e-6) and guessed.guessed == 1


def test_collectives_over_the_same_links_run_one_by_one_and_over_others_at_once():
  def seconds(groups):
    return estimated(program(f'''
        %x = f32[1000]{{0}} parameter(0)
        %s = (f32[1000]{{0}}, f32[4000]{{0}}) all-gather-start(%x), replica_groups=[2,4]<=[8]
        %t = (f32[1000]{{0}}, f32[4000]{{0}}) all-gather-start(%x), replica_groups={groups}
        %d = f32[4000]{{0}} all-gather-done(%s)
        ROOT %e = f32[4000]{{0}} all-gather-done(%t)'''), dict(s=5000, t=4000)).seconds['floor']
  assert seconds('[2,4]<=[8]') == pytest.approx(9e-6)
  assert seconds("mesh['a'=2,'b'=4] {'a'}") == pytest.approx(5e-6)


def test_an_all_reduce_sends_twice_and_one_that_keeps_its_part_once():
  scatter = f'''
      %all-reduce-scatter.1 (x: bf16[500,1000]) -> bf16[125,1000] {{
        %x = {MEGABYTE} parameter(0)
        %r = {MEGABYTE} all-reduce(%x), replica_groups={{{{0,1,2,3}}}}, to_apply=%sum
        ROOT %d = bf16[125,1000]{{1,0}} slice(%r), slice={{[0:125], [0:1000]}}
      }}'''
  def seconds(line):
    return estimated(program(f'%x = {MEGABYTE} parameter(0)\nROOT {line}', scatter),
                     ).seconds['cycles'] - 2e-6
  whole = seconds(f'%r = {MEGABYTE} all-reduce(%x), replica_groups={{{{0,1,2,3}}}}, to_apply=%sum')
  part = seconds('%f = bf16[125,1000]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1')
  assert whole == pytest.approx(2 * 0.75e6 / 1e9) and part == pytest.approx(0.75e6 / 1e9)


def test_a_fused_collective_runs_beside_the_fusions_of_its_chain():
  part = '''
      %part (x: f32[1000]) -> f32[4000] {{
        %x = f32[1000]{{0}} parameter(0)
        ROOT %g = f32[4000]{{0}} all-gather(%x), replica_groups={{{{0,1,2,3}}}},
            frontend_attributes={{chain_id="{}"}}
      }}'''.format
  def seconds(between):
    return estimated(program(f'''
        %x = f32[1000]{{0}} parameter(0)
        %async-collective-start.1 = f32[4000]{{0}} fusion(%x), kind=kCustom, calls=%part
        %fusion.1 = f32[4000]{{0}} fusion(%x), kind=kOutput, calls=%part, {cycles(between)}
        ROOT %async-collective-done.1 = f32[4000]{{0}} fusion(%x), kind=kCustom, calls=%part''',
        part(3))).seconds['cycles']
  assert seconds(4000) == pytest.approx(14e-6)  # as above: the collective is longer
  assert seconds(20_000) == pytest.approx(20e-6)


def test_asynchronous_copies_share_the_bandwidth_and_copies_inside_vmem_are_free():
  def seconds(memory):
    return estimated(program(f'''
        %x = f32[1000]{{0{memory}}} parameter(0)
        %s = (f32[1000]{{0:S(1)}}, f32[1000]{{0{memory}}}, u32[]{{:S(2)}}) copy-start(%x)
        %t = (f32[1000]{{0:S(1)}}, f32[1000]{{0{memory}}}, u32[]{{:S(2)}}) copy-start(%x)
        %y = f32[1000]{{0:S(1)}} fusion(), kind=kLoop, calls=%zero, {cycles(1000)}
        %d = f32[1000]{{0:S(1)}} copy-done(%s)
        ROOT %e = f32[1000]{{0:S(1)}} copy-done(%t)''', '''
        %zero () -> f32[1000] {
          %z = f32[] constant(0)
          ROOT %b = f32[1000]{0} broadcast(%z), dimensions={}
        }''')).seconds['cycles']
  assert seconds('') == pytest.approx(8e-6)
  assert seconds(':S(1)') == pytest.approx(1e-6)


def test_what_goes_to_other_slices_is_counted_and_takes_no_time():
  done = estimated(program('''
      %x = f32[1000]{0} parameter(0)
      %t = token[] after-all()
      %s = (f32[1000]{0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true
      %r = (f32[1000]{0}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true
      %sd = token[] send-done(%s), channel_id=1, is_host_transfer=true
      ROOT %rd = (f32[1000]{0}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true'''))
  assert done.sent == 4000 and done.seconds['cycles'] == 0
  assert '0.0 GB per chip' in bench.details(done)


def test_kinds_of_instructions():
  threefry = '\n'.join(f'        %x{i} = u32[1000]{{0}} xor(%p, %p)' for i in range(30))
  bits = f'''
      %bits (p: u32[1000]) -> u32[1000] {{
        %p = u32[1000]{{0}} parameter(0)
{threefry}
        ROOT %r = u32[1000]{{0}} add(%x0, %x29)
      }}'''
  product = '''
      %product (x: bf16[500,1000], w: bf16[1000,500]) -> bf16[500,500] {
        %x = bf16[500,1000]{1,0} parameter(0)
        %w = bf16[1000,500]{1,0} parameter(1)
        ROOT %c = bf16[500,500]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
      }'''
  done = estimated(program(f'''
      %x = {MEGABYTE} parameter(0)
      %w = bf16[1000,500]{{1,0}} parameter(1)
      %p = u32[1000]{{0}} parameter(2)
      %f = f32[1000]{{0}} parameter(3)
      %matmul = bf16[500,500]{{1,0}} fusion(%x, %w), kind=kOutput, calls=%product, {cycles(900_000)}
      %dropout = u32[1000]{{0}} fusion(%p), kind=kLoop, calls=%bits, {cycles(70_000)}
      %copy.1 = {MEGABYTE} copy(%x), {cycles(100)}
      %adam = f32[1000]{{0}} fusion(%f, %f), kind=kLoop, calls=%add,
          metadata={{op_name="jit(step)/update/add"}}, {cycles(100)}
      ROOT %other = f32[1000]{{0}} fusion(%f, %f), kind=kLoop, calls=%add, {cycles(100)}''',
      bits, product, ADD))
  assert {name: row.kind for name, row in done.rows.items()} == {
      'matmul': 'matmul', 'dropout': 'dropout', 'copy.1': 'copies', 'adam': 'optimizer',
      'other': 'elementwise'}
  assert {*done.kinds()} < {*estimate.KINDS}
  matmul = done.rows['matmul']
  assert matmul.flops == 2 * 500 * 500 * 1000
  # 0.5 ms by FLOPs, 2.5 ms by bytes: bound by memory
  assert matmul.seconds == pytest.approx(dict(cycles=9e-4, floor=2.5e-3, middle=2.5e-3 / 0.85))
  assert done.rows['dropout'].seconds['middle'] == pytest.approx(7e-5)  # as the compiler expects
  assert [name for name, _ in done.top(2)] == ['matmul', 'copy.1']


def test_attention_counts_the_blocks_that_the_causal_mask_leaves():
  def call(name, keys, rows=''):
    return estimated(program(f'''
        %q = bf16[{rows}8,1024,128]{{2,1,0}} parameter(0)
        %k = bf16[{rows}{keys},128]{{1,0}} parameter(1)
        ROOT %{name} = (f32[8,1024,128]{{2,1,0}}) custom-call(%q, %k, %k),
            custom_call_target="tpu_custom_call"'''))
  blocks = 3 * 512 * 512  # of 1,024 queries and keys
  one = call('splash_mqa_fwd_segmented.1', 1024).rows['splash_mqa_fwd_segmented.1']
  assert one.kind == 'attention' and one.flops == 2 * 2 * 8 * blocks * 128
  assert one.seconds['cycles'] == pytest.approx(one.seconds['floor'] / 0.64)
  two = call('splash_mqa_dkv_segmented.1', 2048).rows['splash_mqa_dkv_segmented.1']
  assert two.flops == 2 * 2 * one.flops
  rows = call('splash_mqa_fwd_segmented.1', 1024, '3,2,').rows['splash_mqa_fwd_segmented.1']
  assert rows.flops == 3 * 2 * one.flops  # rows and key/value heads of a chip
  with pytest.raises(ValueError, match='Pallas call tpu_other is unknown'):
    call('tpu_other', 1024)


def test_attention_of_a_prefill_sees_the_prefix_and_the_tokens_before_it():
  done = estimated(program("""
      %q = bf16[8,1024,128]{2,1,0} parameter(0)
      %k = bf16[1536,128]{1,0} parameter(1)
      ROOT %splash_mqa_fwd_segmented.1 = bf16[8,1024,128]{2,1,0} custom-call(%q, %k, %k),
          custom_call_target="tpu_custom_call\""""), sampled=estimate.Sampled(0, 512, ()))
  blocks = (2 + 3) * 512 * 512
  assert done.rows['splash_mqa_fwd_segmented.1'].flops == 2 * 2 * 8 * blocks * 128


def test_the_kernels_of_a_decode_cost_the_bytes_that_they_move():
  found = program("""
      %layer = s32[1]{0:S(6)} parameter(0)
      %q = bf16[4,1,8,128]{3,2,1,0} parameter(1)
      %k = bf16[80,4,1,4096,128]{4,3,2,1,0} parameter(2)
      %v = bf16[80,4,1,4096,128]{4,3,2,1,0} parameter(3)
      %prefix = bf16[80,1,512,128]{3,2,1,0} parameter(4)
      %new = bf16[4,1,1,128]{3,2,1,0} parameter(5)
      %tpu_append.1 = (bf16[80,4,1,4096,128]{4,3,2,1,0}, bf16[80,4,1,4096,128]{4,3,2,1,0})
          custom-call(%layer, %new, %new, %k, %v), custom_call_target="tpu_custom_call"
      ROOT %tpu_decode.1 = f32[4,1,8,128]{3,2,1,0}
          custom-call(%layer, %q, %k, %v, %prefix, %prefix),
          custom_call_target="tpu_custom_call\"""")
  done = estimated(found, sampled=estimate.Sampled(length=100, prefix=512, runs=()))
  # keys and values of 4 slots, the prefix once, then the index, the queries and the result
  read = 2 * 2 * 128 * (4 * 100 + 512) + 4 + 4 * 8 * 128 * (2 + 4)
  decode, append = done.rows['tpu_decode.1'], done.rows['tpu_append.1']
  assert (decode.kind, decode.bytes) == ('attention', read)
  assert decode.seconds == pytest.approx(
      dict(cycles=read * 1e-9 / 0.85, floor=read * 1e-9, middle=read * 1e-9 / 0.85))
  # 16 positions of 4 slots, keys and values, read and written
  assert (append.kind, append.bytes) == ('copies', 2 * 2 * 4 * 16 * 128 * 2)
  with pytest.raises(ValueError, match='Pallas call tpu_append.1 is unknown'):
    estimated(found)


def test_cycles_of_collectives_come_from_the_dump_of_the_schedule():
  assert hlo.collective_cycles('''
hlo_module {
  name: "jit_step"
  computations {
    name: "main"
    instructions {
      name: "all-reduce.1"
      opcode: "all-reduce"
      shape {
        element_type: BF16
      }
      id: 17
    }
    instructions {
      name: "fusion.1"
      opcode: "fusion"
      id: 18
    }
  }
}
computation_schedules {
  computation_id: 3
  instructions {
    id: 18
    end_timestamp_cycles: 40
  }
  instructions {
    id: 17
    start_timestamp_cycles: 40
    end_timestamp_cycles: 140.5
  }
}
''') == {'all-reduce.1': 100.5}


@pytest.mark.parametrize('loss, reference, tokens, factor', [
    ('sft', '', 2048, 6), ('dpo', 'cached', 3072, 6), ('dpo', 'step', 3072, 8)])
def test_the_flops_that_a_step_needs(loss, reference, tokens, factor):
  """About 6 per parameter and token to train, 2 for a reference; prompts are not in the head."""
  one, two = (aot.Training('70b', loss, 'v5p-256', (1, 16, 8), reference, rows=n) for n in (1, 2))
  c, flops = one.model, bench.needed_flops(one)
  count = llama.param_count(c)
  assert bench.needed_flops(two) == 2 * flops
  assert flops == pytest.approx(factor * count * tokens * 16, rel=0.03)
  assert flops > factor * (count - 2 * c.V * c.D) * tokens * 16
  assert bench.least_seconds(one) == pytest.approx(flops / 128 / 459e12)


@pytest.mark.parametrize('bits', [16, 8])
def test_the_bytes_that_a_step_of_decode_needs(bits):
  program = aot.Sampler('decode', 'v5p-16', bits)
  c = program.model
  weights = (llama.param_count(c) - c.V * c.D) * bits / 8
  token = 2 * 80 * 8 * 128 * 2  # keys and values of 80 layers and 8 heads in bf16
  needed = weights + token * (64 * 2048 + 512)
  assert bench.needed_bytes(program) == pytest.approx(needed)
  assert bench.least_seconds(program) == pytest.approx(needed / 8 / 2765e9)


def test_the_lines_of_the_tables():
  program = aot.Sampler('decode', 'v5p-16')
  least = bench.least_seconds(program)  # 8 ms
  rows = {kind: estimate.Row(kind, seconds=dict(cycles=0.02, middle=0.001 * n, floor=0))
          for n, kind in enumerate(estimate.KINDS[:4], 1)}
  done = estimate.Estimate(rows, dict(cycles=4 * least, middle=2 * least, floor=least), 0)
  cells = bench.line(program, 'yes', (done, 26.12, 30.4)).split(' | ')
  assert cells[:4] == ['| 70b decode, bf16', 'v5p-16', '1, 1, 8', '64']
  assert cells[6:] == ['26.1', *(f'{n * least * 1e3:.1f}' for n in (4, 2, 1)),
                       '25.0 / 50.0 / 100.0', 'bandwidth', '30 |']
  assert bench.parts(program, done).split(' | ')[4:] == [
      '1.0', '2.0', '3.0', '4.0', '0.0', '0.0', '0.0 |']
  assert bench.line(program, 'yes', None).count('|') == bench.HEADER.splitlines()[1].count('|')
  training = aot.Training('70b', 'sft', 'v6e-256', (1, 32, 8), remat='full', rows=4)
  assert bench.line(training, 'no', (done, 1, 1)).startswith(
      '| 70b sft | v6e-256 | 1, 32, 8 | 4 | full | no | 1.0 | ')


@pytest.mark.parametrize('width, rows', [(128, 2), (2048, 1)])
def test_the_flops_that_a_prefill_needs(width, rows):
  program = aot.Sampler('prefill', 'v6e-8', width=width)
  c = program.model
  products = 2 * (llama.param_count(c) - 2 * c.V * c.D) * width * rows
  scores = 4 * 80 * 64 * 128 * rows * (width * 512 + width**2 / 2)  # 64 heads of 128
  assert bench.needed_flops(program) == pytest.approx(products + scores, rel=1e-4)
  assert bench.least_seconds(program) == pytest.approx((products + scores) / 8 / 918e12, rel=1e-4)
