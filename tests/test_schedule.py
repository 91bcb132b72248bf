import hypothesis
from hypothesis import strategies as st
import pytest

from srlm_jax import InputError
from srlm_jax.sample.schedule import Request, Schedule

HOW = dict(room=100, done=0, held=1000, together=True, refill=True)


def requests(*counts, length=3):
  return [Request(f'r{i}', [1] * length, n) for i, n in enumerate(counts)]


def finish(schedule, slot):
  schedule.add(slot, [7], [-1.0], 'eos')


def test_slots_go_to_whole_requests_in_order_as_they_become_free():
  schedule = Schedule(requests(2, 2, 1), 3, **HOW)
  first, = schedule.admit()
  assert (first.request.id, list(first.numbers), first.slots) == ('r0', [0, 1], [0, 1])
  finish(schedule, 1)
  second, = schedule.admit()
  assert second.request.id == 'r1' and sorted(second.slots) == [1, 2]
  assert schedule.admit() == [] and list(schedule.leave()) == []
  finish(schedule, 1)  # r1 is half done; r2 may begin
  third, = schedule.admit()
  assert third.request.id == 'r2' and third.slots == [1]


def test_results_leave_in_order_and_whole():
  schedule = Schedule(requests(1, 2), 3, **HOW)
  schedule.admit()
  finish(schedule, 1)
  schedule.add(2, [5, 6], [-1.0, -2.0], '')
  finish(schedule, 2)
  assert list(schedule.leave()) == []  # the first is not done
  finish(schedule, 0)
  left = {request.id: [r.ids for r in results] for request, results in schedule.leave()}
  assert left == {'r0': [[7]], 'r1': [[7], [5, 6, 7]]} and schedule.done()


def test_static_batches_wait_for_all_and_samples_apart_enter_one_by_one():
  schedule = Schedule(requests(2, 1), 2, **HOW | dict(refill=False, together=False))
  assert [(p.request.id, list(p.numbers)) for p in schedule.admit()] == [('r0', [0]), ('r0', [1])]
  finish(schedule, 0)
  assert schedule.admit() == []
  finish(schedule, 1)
  assert [p.request.id for p in schedule.admit()] == ['r1']


def test_more_samples_than_slots_enter_in_parts():
  schedule = Schedule(requests(5), 2, **HOW)
  seen = []
  while not schedule.done():
    seen += [list(p.numbers) for p in schedule.admit()]
    for slot in list(schedule.running):
      finish(schedule, slot)
    left = list(schedule.leave())
  assert seen == [[0, 1], [2, 3], [4]] and len(left[0][1]) == 5


def test_what_is_too_long_or_known_takes_no_slot():
  asked = [Request('known', [1], 2), Request('long', [1] * 101, 2), Request('half', [1], 2)]
  schedule = Schedule(asked, 4, **HOW | dict(done=3))  # the first two, and one that was too long
  part, = schedule.admit()
  assert part.request.id == 'half' and list(part.numbers) == [0, 1]
  for slot in list(schedule.running):
    finish(schedule, slot)
  assert [(r.id, [x.finish for x in results]) for r, results in schedule.leave()] == [
      ('known', []), ('long', ['too_long'] * 2), ('half', ['eos'] * 2)]


@hypothesis.given(counts=st.lists(st.integers(1, 5), max_size=30), slots=st.integers(1, 7), held=st.integers(1, 9),
                  order=st.randoms(use_true_random=False), together=st.booleans(), refill=st.booleans())
def test_every_request_leaves_once_in_order_and_few_are_here(counts, slots, held, order, together, refill):
  """Whatever ends first; and no more of the stream is read than is held."""
  read = 0

  def stream():
    nonlocal read
    for request in requests(*counts):
      read += 1
      yield request
  schedule = Schedule(stream(), slots, 100, 0, held, together, refill)
  left = []
  while not schedule.done():
    schedule.admit()
    assert len(schedule.running) <= slots and read - len(left) <= held
    finish(schedule, order.choice(sorted(schedule.running)))
    left += schedule.leave()
  assert [(r.id, len(results)) for r, results in left] == [(f'r{i}', n) for i, n in enumerate(counts)]
  assert all(x.finish == 'eos' and x.ids == [7] for _, results in left for x in results)


def test_a_request_that_makes_no_sense_is_refused_by_name():
  for bad in (dict(ids=[]), dict(n=0), dict(n=-1), dict(lengths=[1, 2]), dict(lengths=[0])):
    with pytest.raises(InputError, match='request r '):
      Request(**dict(id='r', ids=[1]) | bad)
