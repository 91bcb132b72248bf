"""The machinery of fuzzing finds a traceback, a hang and a lack of memory."""
import functools
import json
import time

import fuzzing
from hypothesis import strategies as st
import pytest

from srlm_jax import InputError

VALID = [b'{"id": "a", "score": 3}']


def read(defect):
  """A reader of a JSON object that calls defect() if the score is a string."""
  def given(data):
    try:
      found = json.loads(data)
    except (ValueError, RecursionError) as error:
      raise InputError('not JSON') from error
    if not isinstance(found, dict):
      raise InputError('not an object')
    if isinstance(found.get('score'), str):
      defect()
  return given


def target(defect, **fields):
  return fuzzing.Target('made', VALID, read(defect), **fields)


def test_a_reader_without_defects_accepts_and_refuses():
  result = fuzzing.check(target(lambda: None), 300)
  assert result.inputs == result.same + result.accepted + result.refused >= 300
  assert result.accepted > 20 and result.refused > 20 and len(result.places) == 2


def test_a_traceback_is_found_and_shrunk():
  with pytest.raises(AssertionError, match='ZeroDivisionError') as error:
    fuzzing.check(target(lambda: 1 // 0), 300)
  assert 'shrunk input: b\'{"score":""}\'' in str(error.value)


def test_a_hang_is_found():
  result = fuzzing.run(target(lambda: time.sleep(60), seconds=0.05), 100)
  assert len(result.defects) == 1 and 'more than 0.05 s' in result.defects[0]


@pytest.mark.parametrize('megabytes', [60, 4000], ids=['resident', 'addresses'])
def test_a_lack_of_memory_is_found(megabytes):
  result = fuzzing.run(target(lambda: bytearray(megabytes << 20), megabytes=30), 100)
  assert len(result.defects) == 1
  assert ('MemoryError' if megabytes == 4000 else 'allowed 30') in result.defects[0]


def test_the_same_seed_gives_the_same_inputs():
  def inputs(seed):
    found = []
    fuzzing.run(fuzzing.Target('made', st.binary(min_size=3), found.append), 200, seed)
    return found
  assert inputs(1) == inputs(1) != inputs(2)


def test_a_target_that_refuses_everything_is_reported():
  def refuse(data, accepted=()):
    if data not in accepted:
      raise InputError('no')
  for reader, message in (
      (refuse, 'an undamaged input was refused'),
      (functools.partial(refuse, accepted=VALID), 'damaged inputs were accepted')):
    with pytest.raises(AssertionError, match=message):
      fuzzing.check(fuzzing.Target('made', VALID, reader), 50)


def test_names_of_targets_are_found():
  for module in fuzzing._modules():
    assert fuzzing.targets(module)
