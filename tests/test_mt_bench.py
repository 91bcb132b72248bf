import json
import os

from conftest import real_data, run_main
import pytest

from srlm_jax import InputError, records, schema
from srlm_jax.data import prompt_files
from srlm_jax.eval import mt_bench

QUESTIONS = 'prompts/mt_bench_questions.jsonl'


@pytest.fixture(scope='module')
def questions():
  return mt_bench.read_questions(real_data(QUESTIONS))


def judgment(question, turn, score, model='m2', **fields):
  """One line of FastChat's model_judgment/gpt-4_single.jsonl, with all its fields."""
  return dict(question_id=question, model=model, judge=['gpt-4', 'single-v1'], user_prompt='',
              judgment='', score=score, turn=turn, tstamp=0.0) | fields


def one(question, turns=('a', 'b')):
  return {question: prompt_files.Turns(question_id=question, category='writing', turns=turns)}


def judged(question, turn, score, model='m2'):
  return mt_bench.Judgment(question_id=question, model=model, turn=turn, score=score)


def test_real_questions(questions):
  assert len(questions) == 80 and all(len(q.turns) == 2 for q in questions.values())
  hard = [q for q in questions.values() if q.category in mt_bench.HARD]
  assert len(hard) == 30  # three of eight categories with ten questions each


def test_means_by_hand(questions):
  first = {q.category: i for i, q in reversed(questions.items())}
  writing = first['writing']
  judgments = [
      judged(first['math'], 1, 2), judged(first['math'], 2, 4),
      judged(first['coding'], 1, 3), judged(first['reasoning'], 1, -1),
      judged(writing, 1, 9), judged(writing, 2, 8.5),
      judged(writing, 1, 7, model='m1'), judged(writing, 2, -1, model='m1')]
  result = mt_bench.scores(judgments, questions)
  assert result['m2'] == schema.MtBench(
      overall=26.5 / 5, math_code_reasoning=3.0, other=8.75, turn_1=14 / 3, turn_2=6.25, scored=5,
      no_score=1, absent=154)
  assert result['m1'] == schema.MtBench(
      overall=7.0, math_code_reasoning=None, other=7.0, turn_1=7.0, turn_2=None, scored=1,
      no_score=1, absent=158)


def test_three_eighths_of_the_overall_score_are_hard_as_in_the_paper(questions):
  judgments = [judged(i, turn, 3.83 if q.category in mt_bench.HARD else 8.55)
               for i, q in questions.items() for turn in (1, 2)]
  assert round(mt_bench.scores(judgments, questions)['m2'].overall, 2) == 6.78  # M1


def run(judgments, out, *flags):
  return run_main('eval.mt_bench', f'--questions={real_data(QUESTIONS)}', f'--out={out}',
                  f'--judgments={judgments}', *flags)


def test_command_line(tmp_path, questions):
  path, out = tmp_path / 'j.jsonl', tmp_path / 'o.json'
  records.write(path, [judgment(81, 1, 9), judgment(81, 2, -1), judgment(111, 1, 3)])
  code, printed, err = run(path, out)
  assert code == 0, err
  result = json.loads(out.read_text())['m2']
  names = ('overall', 'math_code_reasoning', 'other', 'no_score')
  assert [result[name] for name in names] == [6, 3, 9, 1]
  assert [line.split()[:4] for line in printed.splitlines()[:2]] == [
      ['model', 'overall', 'math_code_reasoning', 'other'], ['m2', '6.00', '3.00', '9.00']]


def test_bad_input_prints_one_line_and_writes_nothing(tmp_path, questions):
  path, out = tmp_path / 'j.jsonl', tmp_path / 'o.json'
  records.write(path, [judgment(81, 1, 9)])
  for judgments, target, message in [
      (tmp_path / 'no.jsonl', out, 'does not exist'), (tmp_path, out, 'is a folder'),
      (path, tmp_path, 'is a folder'),
      (path, path / 'o.json', 'j.jsonl is a file, not a folder')]:
    code, _, err = run(judgments, target)
    assert code == 1 and err.count('\n') == 1 and message in err
    assert os.listdir(tmp_path) == ['j.jsonl']


ONE = one(81)


@pytest.mark.parametrize('line, message', [
    (judgment(1, 1, 5), 'no question'),
    (judgment([81], 1, 5), 'Expected int . str, got array for "question_id"'),
    (judgment(81, 3, 5), 'has a turn'),
    (judgment(81, 1, None), 'Expected float, got null for "score"'),
    (judgment(81, 1, '5'), 'j.jsonl:1: not a valid record: Expected float, got str for "score"'),
    (judgment(81, 1, 5, model=3), 'Expected str, got int for "model"'),
    (dict(question_id=81), 'j.jsonl:1: not a valid record: Object missing required field model')])
def test_invalid_judgments_are_refused(tmp_path, line, message):
  records.write(tmp_path / 'j.jsonl', [line])
  with pytest.raises(InputError, match=message):
    mt_bench.read_judgments(tmp_path / 'j.jsonl', ONE)


def test_a_duplicate_judgment_is_refused(tmp_path):
  records.write(tmp_path / 'j.jsonl', [judgment(81, 1, 5)] * 2)
  with pytest.raises(InputError, match='twice'):
    mt_bench.read_judgments(tmp_path / 'j.jsonl', ONE)


def test_invalid_questions_are_refused(tmp_path):
  for lines, message in [
      ([dict(question_id=[81], category='x', turns=['a'])], 'q.jsonl:1: .*"question_id"'),
      ([dict(question_id=81, category='x', turns=['a'] * 3)], 'q.jsonl:1: .*it has 3 turns'),
      ([dict(question_id=81, category='x', turns='a')], 'q.jsonl:1: .*"turns"'),
      ([], 'give FastChat')]:
    records.write(tmp_path / 'q.jsonl', lines)
    with pytest.raises(InputError, match=message):
      mt_bench.read_questions(tmp_path / 'q.jsonl')


def test_scores_that_are_no_grade_are_counted_and_kept_out_of_the_means(tmp_path):
  records.write(tmp_path / 'j.jsonl', [judgment(81, 1, 70), judgment(81, 2, 4)])
  found = mt_bench.scores(mt_bench.read_judgments(tmp_path / 'j.jsonl', ONE), ONE)['m2']
  assert (found.overall, found.scored, found.no_score) == (4, 1, 1)


def test_a_question_id_may_be_a_text(tmp_path):
  records.write(tmp_path / 'q.jsonl', [dict(question_id='a1', category='math', turns=['x'])])
  questions = mt_bench.read_questions(tmp_path / 'q.jsonl')
  records.write(tmp_path / 'j.jsonl', [judgment('a1', 1, 4)])
  judgments = mt_bench.read_judgments(tmp_path / 'j.jsonl', questions)
  assert mt_bench.scores(judgments, questions)['m2'].math_code_reasoning == 4
  records.write(tmp_path / 'a.jsonl', [dict(question_id='a1', choices=[dict(turns=['y'])])])
  assert mt_bench.read_answers(tmp_path / 'a.jsonl', questions) == {'a1': ('y',)}
