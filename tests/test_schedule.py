import hypothesis
from hypothesis import strategies as st
import pytest

from srlm_jax import InputError
from srlm_jax.sample.schedule import Request, Schedule

OPTIONS = dict(prompt_limit=100, known=0, kept={}, max_held=1000, together=True, refill=True)


def make_requests(*counts):
  return [Request(f'r{i}', [1, 1, 1], n) for i, n in enumerate(counts)]


def finish(schedule, slot):
  schedule.add(slot, [7], [-1.0], 'eos')


def test_free_slots_go_to_whole_requests_in_order():
  schedule = Schedule(make_requests(2, 2, 1), 3, **OPTIONS)
  first, = schedule.admit()
  assert (first.request.id, list(first.numbers), first.slots) == ('r0', [0, 1], [0, 1])
  finish(schedule, 1)
  second, = schedule.admit()
  assert second.request.id == 'r1' and sorted(second.slots) == [1, 2]
  assert schedule.admit() == [] and list(schedule.leave()) == []
  finish(schedule, 1)  # one of the two samples of r1; r2 gets its slot
  third, = schedule.admit()
  assert third.request.id == 'r2' and third.slots == [1]


def test_whole_results_are_returned_in_request_order():
  schedule = Schedule(make_requests(1, 2), 3, **OPTIONS)
  schedule.admit()
  finish(schedule, 1)
  schedule.add(2, [5, 6], [-1.0, -2.0], '')
  finish(schedule, 2)
  assert list(schedule.leave()) == []  # r0 has not finished
  finish(schedule, 0)
  returned = {request.id: [r.ids for r in results] for request, results in schedule.leave()}
  assert returned == {'r0': [[7]], 'r1': [[7], [5, 6, 7]]} and schedule.done()


def test_without_refill_a_batch_finishes_first_and_without_together_samples_start_alone():
  schedule = Schedule(make_requests(2, 1), 2, **OPTIONS | dict(refill=False, together=False))
  started = [(p.request.id, list(p.numbers)) for p in schedule.admit()]
  assert started == [('r0', [0]), ('r0', [1])]
  finish(schedule, 0)
  assert schedule.admit() == []
  finish(schedule, 1)
  assert [p.request.id for p in schedule.admit()] == ['r1']


def test_a_request_with_more_samples_than_slots_starts_in_parts():
  schedule = Schedule(make_requests(5), 2, **OPTIONS)
  started = []
  while not schedule.done():
    started += [list(p.numbers) for p in schedule.admit()]
    for slot in list(schedule.running):
      finish(schedule, slot)
    returned = list(schedule.leave())
  assert started == [[0, 1], [2, 3], [4]] and len(returned[0][1]) == 5


def test_known_and_too_long_requests_get_no_slot():
  requests = [Request('known', [1], 2), Request('long', [1] * 101, 2), Request('half', [1], 2)]
  # The caller knows both samples of the first request and one of the second.
  schedule = Schedule(requests, 4, **OPTIONS | dict(known=3))
  part, = schedule.admit()
  assert part.request.id == 'half' and list(part.numbers) == [0, 1]
  for slot in list(schedule.running):
    finish(schedule, slot)
  returned = [(r.id, [x.finish for x in results]) for r, results in schedule.leave()]
  assert returned == [('known', []), ('long', ['too_long'] * 2), ('half', ['eos'] * 2)]


@hypothesis.given(
    counts=st.lists(st.integers(1, 5), max_size=30), slots=st.integers(1, 7),
    max_held=st.integers(1, 9), order=st.randoms(use_true_random=False),
    together=st.booleans(), refill=st.booleans())
def test_every_request_is_returned_once_in_order_and_at_most_max_held_are_held(
    counts, slots, max_held, order, together, refill):
  """Samples finish in random order."""
  read = 0

  def stream():
    nonlocal read
    for request in make_requests(*counts):
      read += 1
      yield request
  schedule = Schedule(stream(), slots, 100, 0, {}, max_held, together, refill)
  returned = []
  while not schedule.done():
    schedule.admit()
    assert len(schedule.running) <= slots and read - len(returned) <= max_held
    finish(schedule, order.choice(sorted(schedule.running)))
    returned += schedule.leave()
  expected = [(f'r{i}', n) for i, n in enumerate(counts)]
  assert [(r.id, len(results)) for r, results in returned] == expected
  assert all(x.finish == 'eos' and x.ids == [7] for _, results in returned for x in results)


def test_requests_that_are_added_can_be_stopped_and_removed_at_any_time():
  schedule = Schedule((), 3, **OPTIONS)
  assert schedule.admit() == []
  first, second, third = (schedule.put(request) for request in make_requests(2, 1, 2))
  assert [part.request.id for part in schedule.admit()] == ['r0', 'r1']
  schedule.stop(first[1])
  assert (first[1].finish, first[0].finish, len(schedule.running)) == ('stopped', '', 2)
  assert schedule.admit() == []  # both samples of r2 wait for slots
  schedule.remove(second)
  assert second[0].finish == ''
  third_part, = schedule.admit()
  finish(schedule, third_part.slots[0])
  schedule.remove(third)  # one of its samples has finished
  finish(schedule, first_slot := next(iter(schedule.running)))
  assert first[0].ids == [7] and first_slot == 0
  schedule.remove(first)
  waiting = schedule.put(make_requests(1)[0])
  schedule.remove(waiting)
  assert schedule.done() and schedule.admit() == [] and len(schedule._free) == 3


def test_an_invalid_request_is_rejected_by_its_id():
  for bad in (dict(ids=[]), dict(n=0), dict(n=-1), dict(lengths=[1, 2]), dict(lengths=[0])):
    with pytest.raises(InputError, match='request r '):
      Request(**dict(id='r', ids=[1]) | bad)
