"""A short form of tests/torture.py, and whether that program would notice a difference."""
import contextlib
import os
import shutil
import signal

import moments
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torture

CASES = {case.name: case for case in torture.CASES}


def kill(name: str, count: int, base, tmp_path, kills: int, in_bucket: bool = False):
  """Kills a program `kills` times, and asserts that it ends as an undisturbed one."""
  env = dict(os.environ, **torture.environment(tmp_path))
  place, rng = torture.Place(tmp_path, base), np.random.default_rng(1)
  bucket = torture.Bucket(tmp_path, base, rng) if in_bucket else None
  with contextlib.closing(torture.Hosts(count, env)) as hosts:
    row = torture.torture(CASES[name], hosts, place, bucket, kills, rng, False)
  assert row.result == 'equal' and row.kills.total() == kills <= row.starts


def test_a_killed_conversion_ends_as_an_undisturbed_one(tmp_path):
  (tmp_path / 'base').mkdir()
  kill('convert from HF', 1, tmp_path / 'base', tmp_path, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize('name, count, kills, in_bucket', [
    ('m2 DPO, LoRA', 1, 3, False), ('m2 prompts', 1, 3, False), ('m2 judge', 1, 3, False),
    ('m2 pairs', 1, 3, False), ('report', 1, 3, False), ('loop', 1, 6, False),
    ('m2 DPO', 2, 3, False), ('m2 meta_judge', 2, 3, False), ('m2 DPO, LoRA', 2, 2, True),
    ('m2 respond', 1, 3, True)])
def test_killed_programs_end_as_undisturbed_ones(name, count, kills, in_bucket, others, tmp_path):
  kill(name, count, others, tmp_path, kills, in_bucket)


def write(folder):
  """A workdir as a stage leaves it, with a checkpoint."""
  for name, text in (('m2/pairs/pairs.jsonl', '{"id": "a"}\n'), ('m2/pairs/done.json',
                     '{"pairs": 1, "files": {"pairs.jsonl": [1, "x"]}, "seconds": 1.5}'),
                     ('m2/model/metrics.jsonl', '{"step": 0, "loss": 1, "tokens_per_second": 7}\n'),
                     ('report.html', '<p>12.5 s</p><p>0.5</p>')):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
  (folder / 'm2/model/tokenizer.model').write_bytes(b'\0\x80\x01\xff')
  ocp.PyTreeCheckpointer().save(folder / 'm2/model/steps/3/params', dict(a=np.arange(3.0)))
  return folder


@pytest.mark.parametrize('change', [
    'm2/pairs/pairs.jsonl.partial', 'lock.json', 'm2/respond/responses.kept', 'm2/new/',
    'm2/model/steps/2/', 'm2/pairs/pairs.jsonl', 'm2/pairs/done.json',
    'm2/model/metrics.jsonl', 'report.html', 'm2/model/tokenizer.model', 'm2/model/steps/3/params'])
def test_a_difference_of_files_or_arrays_is_found(change, tmp_path):
  a, b = (write(tmp_path / name) for name in 'ab')
  for name, old, new in (('m2/pairs/done.json', '1.5', '2.5'), ('report.html', '12.5', '13.7'),
                         ('m2/model/metrics.jsonl', '7', '8')):  # which may differ
    (b / name).write_text((b / name).read_text().replace(old, new))
  (b / 'm2' / 'pairs' / 'tensorboard').mkdir()
  assert not torture.Tree(a).difference(torture.Tree(b))
  path = b / change
  if change.endswith('3/params'):
    shutil.rmtree(path)
    ocp.PyTreeCheckpointer().save(path, dict(a=np.arange(3.0) + [0, 0, 1e-15]))
  elif change.endswith('/'):
    path.mkdir(parents=True)
  elif path.suffix == '.model':
    path.write_bytes(b'\0\x99\x01\xfe')  # the same text, were its errors replaced
  elif path.exists():
    path.write_text(path.read_text().replace('1', '3').replace('"a"', '"b"').replace('0.5', '0.6'))
  else:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('')
  assert change.rstrip('/') in torture.Tree(a).difference(torture.Tree(b))


KILL, TERM, INT = torture.SIGNALS


@pytest.mark.parametrize('ends, number, victims, is_fine', [
    ([(-9, '')], KILL, [0], True), ([(1, 'error: x')], KILL, [0], False),
    ([(75, 'm2/model: stopped by SIGTERM; the same command continues')], TERM, [0], True),
    ([(-15, '')], TERM, [0], True), ([(75, 'x')], TERM, [0], False),
    ([(130, 'interrupted; the same command continues')], INT, [0], True),
    ([(130, 'm1/judge:  38%|# | 792/2088 [00:30<00:49, 26.34rows/s]\ninterrupted; the same command '
       'continues')], INT, [0], True),
    ([(130, 'Traceback\ninterrupted; the same command continues')], INT, [0], False),
    ([(75, 'error: host 1 was lost; the same command continues from what is saved'), (-9, '')],
     KILL, [1], True),
    ([(1, 'error: host 1 of 2 ended with an error; its output says which'), (-9, '')], KILL, [1],
     False),
    ([(-6, ''), (-9, '')], KILL, [1], False), ([(1, 'error: x')], None, [], False)])
def test_an_end_that_is_not_promised_is_found(ends, number, victims, is_fine):
  moment = torture.Moment(number, victims) if number else None
  found = torture.unexpected([torture.End(code, '', err) for code, err in ends], moment)
  assert (found == '') == is_fine


def test_a_program_that_ignores_all_signals_is_found(tmp_path):
  class Deaf:
    """Hosts whose program ends by itself, whatever it gets."""
    servers = [None]

    def run(self, *args):
      return [torture.End(0, '', '')], 3, 'somewhere' if args[4] else ''
  (tmp_path / 'base').mkdir()
  place = torture.Place(tmp_path, tmp_path / 'base')
  row = torture.torture(CASES['report'], Deaf(), place, None, 3, np.random.default_rng(0), False)
  assert 'ignored 6 signals in a row' in row.result and row.starts == 6 and not row.kills


def test_changes_of_files_are_counted_and_the_chosen_one_sends_the_signal(tmp_path, monkeypatch):
  sent = []
  monkeypatch.setattr(os, 'kill', lambda pid, number: sent.append((pid, number)))
  counter = moments.Counter(str(tmp_path / 'run'), 3, signal.SIGTERM, str(tmp_path / 'report'))
  path = str(tmp_path / 'run' / 'a')
  for event, *args in (
      ('open', path, 'r', os.O_RDONLY), ('open', path, 'w', os.O_WRONLY | os.O_CREAT),
      ('open', path + '/tensorboard/x', 'w', os.O_WRONLY), ('open', '/dev/null', 'w', os.O_WRONLY),
      ('os.mkdir', path, 511, -1), ('open', 3, 'w', os.O_WRONLY)):
    counter.hook(event, tuple(args))
  assert counter.count == 2 and not sent
  counter.hook('os.rename', (path + '.partial', path, -1, -1))
  assert sent == [(os.getpid(), signal.SIGTERM)] and '/a' in (tmp_path / 'report').read_text()
  (tmp_path / 'run').mkdir()
  folder = os.open(tmp_path / 'run', os.O_RDONLY)
  counter.hook('os.remove', ('a', folder))  # as shutil.rmtree
  os.close(folder)
  assert counter.count == 4
