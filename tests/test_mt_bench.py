import json
import os
import pathlib
import subprocess
import sys

import pytest

from srlm_jax import InputError, records
from srlm_jax.eval import mt_bench

DATA = pathlib.Path(os.environ.get('SRLM_TEST_DATA') or pathlib.Path(__file__).parents[2] / 'shared' / 'data')
QUESTIONS = DATA / 'prompts' / 'mt_bench_questions.jsonl'


@pytest.fixture(scope='module')
def questions():
  if not QUESTIONS.exists():
    pytest.skip(f'{QUESTIONS} is absent; set SRLM_TEST_DATA to the folder of test data')
  return mt_bench.read_questions(QUESTIONS)


def judgment(question, turn, score, model='m2', **fields):
  """One line of FastChat's model_judgment/gpt-4_single.jsonl, with the fields that it has."""
  return dict(question_id=question, model=model, judge=['gpt-4', 'single-v1'], user_prompt='', judgment='',
              score=score, turn=turn, tstamp=0.0) | fields


def test_real_questions(questions):
  assert len(questions) == 80 and all(len(q['turns']) == 2 for q in questions.values())
  hard = [q for q in questions.values() if q['category'] in mt_bench.HARD]
  assert len(hard) == 30  # three of eight categories, ten questions each


def test_means_by_hand(questions):
  first = {q['category']: i for i, q in reversed(questions.items())}
  judgments = [
      judgment(first['math'], 1, 2), judgment(first['math'], 2, 4), judgment(first['coding'], 1, 3),
      judgment(first['reasoning'], 1, -1), judgment(first['writing'], 1, 9),
      judgment(first['writing'], 2, 8.5),
      judgment(first['writing'], 1, 7, model='m1'), judgment(first['writing'], 2, -1, model='m1')]
  result = mt_bench.scores(judgments, questions)
  assert result['m2'] == dict(
      overall=26.5 / 5, math_code_reasoning=3.0, other=8.75, turn_1=14 / 3, turn_2=6.25, scored=5, no_score=1,
      absent=154)
  assert result['m1'] == dict(
      overall=7.0, math_code_reasoning=None, other=7.0, turn_1=7.0, turn_2=None, scored=1, no_score=1,
      absent=158)


def test_overall_is_three_eighths_hard_as_in_the_papers_table(questions):
  judgments = [judgment(i, t, 3.83 if q['category'] in mt_bench.HARD else 8.55)
               for i, q in questions.items() for t in (1, 2)]
  assert round(mt_bench.scores(judgments, questions)['m2']['overall'], 2) == 6.78  # M1


def test_command_line(tmp_path, questions):
  records.write(tmp_path / 'j.jsonl', [judgment(81, 1, 9), judgment(81, 2, -1), judgment(111, 1, 3)])
  out = tmp_path / 'o.json'
  command = [sys.executable, '-m', 'srlm_jax.eval.mt_bench', f'--questions={QUESTIONS}', f'--out={out}']
  done = subprocess.run([*command, f'--judgments={tmp_path / "j.jsonl"}'], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  result = json.loads(out.read_text())['m2']
  assert [result[k] for k in ('overall', 'math_code_reasoning', 'other', 'no_score')] == [6, 3, 9, 1]
  assert [line.split()[:4] for line in done.stdout.splitlines()[:2]] == [
      ['model', 'overall', 'math_code_reasoning', 'other'], ['m2', '6.00', '3.00', '9.00']]
  out.unlink()
  done = subprocess.run([*command, f'--judgments={tmp_path / "no.jsonl"}'], capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'does not exist' in done.stderr
  assert not out.exists()
  for flag, place, word in [
      ('judgments', tmp_path, 'is a folder'), ('out', tmp_path, 'is a folder'),
      ('out', tmp_path / 'j.jsonl' / 'o.json', 'j.jsonl is a file, not a folder')]:
    given = [f'--judgments={tmp_path / "j.jsonl"}', f'--{flag}={place}']
    done = subprocess.run([*command, *given], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and word in done.stderr
    assert os.listdir(tmp_path) == ['j.jsonl']


ONE = {81: dict(question_id=81, category='writing', turns=['a', 'b'])}


@pytest.mark.parametrize('line, word', [
    (judgment(1, 1, 5), 'no question'), (judgment([81], 1, 5), 'no question'), (judgment(81, 3, 5), 'turn'),
    (judgment(81, 1, 11), 'score 11'), (judgment(81, 1, None), 'score None'),
    (judgment(81, 1, '5'), 'j.jsonl:1: "score" is "5", which is no number'),
    (judgment(81, 1, 5, model=3), 'model'), (dict(question_id=81), 'j.jsonl:1: no field "model"')])
def test_judgments_of_the_wrong_kind_are_refused(tmp_path, line, word):
  records.write(tmp_path / 'j.jsonl', [line])
  with pytest.raises(InputError, match=word):
    mt_bench.read_judgments(tmp_path / 'j.jsonl', ONE)


def test_a_judgment_given_twice_is_refused(tmp_path):
  records.write(tmp_path / 'j.jsonl', [judgment(81, 1, 5)] * 2)
  with pytest.raises(InputError, match='twice'):
    mt_bench.read_judgments(tmp_path / 'j.jsonl', ONE)


def test_questions_of_the_wrong_kind_are_refused(tmp_path):
  for line in [dict(question_id='81', category='x', turns=['a']),
               dict(question_id=81, category='x', turns='a')]:
    records.write(tmp_path / 'q.jsonl', [line])
    with pytest.raises(InputError, match='FastChat'):
      mt_bench.read_questions(tmp_path / 'q.jsonl')
