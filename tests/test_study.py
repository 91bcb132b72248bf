"""Tests of the means over seeds and of the data that a study copies from the loop."""
import doctest
import json

from conftest import CHANGES, main
import pytest
from scipy import stats

from srlm_jax import records, schema, stage, study
from srlm_jax.reward import scores

SHARED = study.unchanged_parts(['m2:judge.n=1'])


def graded(workdir, **models):
  for model, values in models.items():
    (workdir / model / 'model').mkdir(parents=True)
    stage.write_json(workdir / model / 'model' / 'done.json', {})
    records.write(workdir / model / 'oracle' / 'graded.jsonl', (
        schema.GradedResponse(id=f'p{i}/0', prompt_id=f'p{i}', index=0, prompt='', response='',
                              finish='eos', n_tokens=0, logp=0.0, score=x)
        for i, x in enumerate(values)))


def difference(mean, over_prompts, *by_run):
  """The expected result of `study.paired`, computed with scipy."""
  several = len(by_run) > 1
  interval = stats.ttest_1samp(by_run, 0).confidence_interval(0.95) if several else None
  return dict(mean=pytest.approx(mean), over_prompts=pytest.approx(over_prompts),
              over_seeds=pytest.approx(stats.sem(by_run)) if several else None,
              interval=pytest.approx([interval.low, interval.high]) if several else None,
              least=pytest.approx(min(by_run)), most=pytest.approx(max(by_run)))


def test_the_doctests_of_studies_pass():
  assert doctest.testmod(study).failed == 0


def test_a_gain_is_paired_by_prompt_with_errors_over_prompts_and_over_seeds(tmp_path):
  runs, loops = [tmp_path / 'a', tmp_path / 'b'], [tmp_path / 'c', tmp_path / 'd']
  graded(runs[0], sft=[1, 2, 3], m1=[2, 2, 5])
  graded(runs[1], sft=[1, 1, 1], m1=[5, 1, 1], m2=[1, 1, 3])
  graded(loops[0], sft=[1, 2, 3], m1=[2, 2, 4])
  sft, m1, m2 = study.table(runs, loops)
  error = scores.standard_error
  assert m1['gain'] == difference(7 / 6, error([2.5, 0, 1]), 1, 4 / 3)
  assert sft['gain'] is None and sft['against'] == difference(0, 0, 0)
  assert m1['against'] == difference(1 / 3, 1 / 3, 1 / 3)  # d has no M1
  assert (m1['runs'], m2['runs']) == (2, 1) and m2['against'] is None
  assert m2['gain'] == difference(-2 / 3, error([-4, 0, 2]), -2 / 3)
  assert (m1['wins'], m1['losses']) == (pytest.approx(1 / 2), 0)  # mean of 2 / 3 and 1 / 3
  assert study.over_seeds([1.0, 2.0, 4.0]) == {k: difference(7 / 3, 0, 1, 2, 4)[k] for k in (
      'mean', 'over_seeds', 'interval')} and study.over_seeds([]) is None
  assert '+1.167' in study.text([sft, m1]) and '+1.00 to +1.33' in study.text([m1])
  assert study.table(loops, loops)[1]['against'] is None


def test_the_overview_has_a_line_per_study(tmp_path):
  row = dict.fromkeys(study.COLUMNS) | dict(gain=None, errors={}, judge={}, against=dict(
      mean=-0.5, over_prompts=0.1, over_seeds=0.3, interval=[-1.1, 0.1], least=-1, most=0))
  stage.write_json(tmp_path / 'blind.json', dict(
      name='blind', seeds=3, changes=[], models=[dict(row, model='m2', wins=0.25)]))
  stage.write_json(tmp_path / 'loop.json', dict(
      name='loop', seeds=5, changes=[],
      models=[dict(row, model=m, against=None) for m in ('m1', 'm2')]))
  _, first, second = study.overview(tmp_path).splitlines()
  assert first.split()[:2] == ['loop', '5'] and second.split()[:2] == ['blind', '3']
  assert '-0.500       0.100     0.300    0.316  -1.100 to +0.100  -1.00 to +0.00  0.25' in second


def test_shared_parts_are_copied_unless_they_exist(tmp_path):
  (tmp_path / 'loop-0' / 'm1' / 'model').mkdir(parents=True)
  (tmp_path / 'loop-0' / 'm2').mkdir()
  (tmp_path / 'blind-0' / 'm0').mkdir(parents=True)
  (tmp_path / 'loop-0' / 'm0').mkdir()
  (tmp_path / 'loop-0' / 'm0' / 'config.json').write_text('{}')
  study.take(tmp_path / 'loop-0', tmp_path / 'blind-0', SHARED)
  assert (tmp_path / 'blind-0' / 'm1' / 'model').exists()
  assert not any((tmp_path / 'blind-0' / 'm0').iterdir())
  assert not (tmp_path / 'blind-0' / 'm2').exists()


def test_a_copy_that_a_kill_cut_off_begins_again(tmp_path):
  for name in ('a', 'b'):
    records.write(tmp_path / 'loop-0' / 'm1' / 'eft' / f'{name}.jsonl', [dict(id=name)])
  (tmp_path / 'blind-0' / 'm1.partial' / 'eft').mkdir(parents=True)
  (tmp_path / 'blind-0' / 'm1.partial' / 'eft' / 'a.jsonl').write_text('{"i')
  study.take(tmp_path / 'loop-0', tmp_path / 'blind-0', SHARED)
  assert [p.name for p in (tmp_path / 'blind-0').iterdir()] == ['m1']
  found = {p.name: p.read_text() for p in tmp_path.glob('blind-0/m1/eft/*')}
  assert found == {'a.jsonl': '{"id": "a"}\n', 'b.jsonl': '{"id": "b"}\n'}
  (tmp_path / 'blind-0' / 'm1.partial').mkdir()  # beside a complete copy
  study.take(tmp_path / 'loop-0', tmp_path / 'blind-0', SHARED)
  assert {p.name: p.read_text() for p in tmp_path.glob('blind-0/m1/eft/*')} == found


@pytest.mark.slow
def test_a_study_runs_the_loop_of_every_seed(tmp_path):
  flags = [f'--workdir={tmp_path}', '--seeds=1', *(f'--set={c}' for c in CHANGES)]
  assert 'give them another name' in main('study', *flags, code=1)
  said = main('study', *flags, '--name=blind', '--last=m2', '--set=m2:judge.by=random')
  made = json.loads((tmp_path / 'blind.json').read_text())
  assert 'blind, 1 seeds' in said
  assert [row['model'] for row in made['models']] == ['m0', 'sft', 'm1', 'm2']
