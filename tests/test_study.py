"""Means over seeds, and what a change of later models takes from the loop."""
import json

from conftest import CHANGES, main
import pytest

from srlm_jax import study
from srlm_jax.data import records


def graded(workdir, **scores):
  for model, values in scores.items():
    records.write(workdir / model / 'oracle' / 'graded.jsonl',
                  (dict(prompt_id=f'p{i}', score=x) for i, x in enumerate(values)))
    (workdir / model / 'oracle' / 'done.json').write_text('{}')


def test_a_gain_is_paired_by_prompt_and_its_error_is_over_prompts(tmp_path):
  graded(tmp_path / 'a', sft=[1, 2, 3], m1=[2, 2, 5])
  graded(tmp_path / 'b', sft=[1, 1, 1], m1=[4, 1, 1])
  gained = study.gains([tmp_path / 'a', tmp_path / 'b'], ['m0', 'sft', 'm1', 'm2'])
  assert gained == dict(m1=dict(p0=[1, 3], p1=[0, 0], p2=[2, 0]))
  empty = {heading: None for heading, _ in study.COLUMNS.values()}
  results = [[dict(empty, model='sft'), dict(empty, model='m1', pairs=n)] for n in (10, 20)]
  _, row = study.table(results, gained)
  assert row['gain'] == 1 and row['gain_error'] == pytest.approx(1 / 3 ** 0.5) and row['pairs'] == 15
  assert (row['gain_least'], row['gain_most']) == (1, 1)
  assert '+1.000' in study.text([row]) and '+1.00 to +1.00' in study.text([row])


def test_what_does_not_depend_on_a_change_is_taken_once(tmp_path):
  (tmp_path / 'loop-0' / 'm1' / 'model').mkdir(parents=True)
  (tmp_path / 'blind-0' / 'm0').mkdir(parents=True)
  (tmp_path / 'loop-0' / 'm0').mkdir()
  (tmp_path / 'loop-0' / 'm0' / 'config.json').write_text('{}')
  study.take(tmp_path / 'loop-0', tmp_path / 'blind-0')
  assert (tmp_path / 'blind-0' / 'm1' / 'model').exists() and not any((tmp_path / 'blind-0' / 'm0').iterdir())


@pytest.mark.slow
def test_a_study_runs_the_loop_of_every_seed(tmp_path):
  flags = [f'--workdir={tmp_path}', '--seeds=1', *(f'--set={c}' for c in CHANGES)]
  assert 'call them something else' in main('study', *flags, code=1)
  said = main('study', *flags, '--name=blind', '--last=m2', '--set=m2:judge.by=random')
  made = json.loads((tmp_path / 'blind.json').read_text())
  assert 'blind, 1 seeds' in said and [row['model'] for row in made['models']] == ['m0', 'sft', 'm1', 'm2']
