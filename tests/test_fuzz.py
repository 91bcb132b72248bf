"""Readers of a run's files: damaged input gives success or InputError. `make fuzz` runs more."""
import fuzz_run
import fuzzing
import pytest


@pytest.mark.parametrize('target', fuzz_run.TARGETS, ids=lambda target: target.name)
def test_damaged_input_is_read_or_refused(target):
  fuzzing.check(target, 2000)
