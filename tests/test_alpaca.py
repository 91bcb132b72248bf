import doctest
import functools
import json
import math

from conftest import run_main
import pytest
import samples

from srlm_jax import InputError, records
from srlm_jax.eval import alpaca


def annotation(preference, output='four', **fields):
  """One record of AlpacaEval's annotations.json, with all its fields."""
  return dict(
      instruction='i', output_1='o', generator_1='gpt4_1106_preview', dataset='helpful_base',
      output_2=output, generator_2='m2', annotator='weighted_alpaca_eval_gpt4_turbo',
      preference=preference, raw_completion=None) | fields


def judged(preference, output='four'):
  return alpaca.Annotation(preference=preference, generator_2='m2', output_2=output)


run = functools.partial(run_main, 'eval.alpaca')


def test_docstrings():
  assert doctest.testmod(alpaca).failed == 0


def test_win_rate_by_hand():
  given = [judged(p) for p in (1.0, 2.0, 1.5, 1.9, None, math.nan, 0)]
  given.append(judged(1.2, 'x' * 12))
  result = alpaca.win_rate(given)
  wins = (0, 1, .5, .9, .5, .2)
  assert result['win_rate'] == pytest.approx(100 * sum(wins) / 6)
  deviation = math.sqrt(sum((x - 3.1 / 6) ** 2 for x in wins) / 5)  # sample standard deviation
  assert result['standard_error'] == pytest.approx(100 * deviation / math.sqrt(6))
  counts = [result[k] for k in ('wins', 'draws', 'losses', 'count', 'missing')]
  assert counts == [2, 2, 2, 6, 2]
  assert result['characters'] == (7 * 4 + 12) / 8
  assert alpaca.win_rate([judged(None)])['win_rate'] is None


def test_outputs_from_the_command_line(tmp_path):
  rows = [samples.response(f'{i}/0', prompt=f'Prompt {i}?', response=f'Ré {i}')
          for i in range(3)]
  records.write(tmp_path / 'answers' / 'responses-00000-of-00001.jsonl', rows)
  out = tmp_path / 'outputs.json'
  code, _, err = run(f'--answers={tmp_path / "answers"}', '--generator=m2', f'--out={out}')
  assert code == 0, err
  assert json.loads(out.read_text()) == [
      dict(instruction=r.prompt, output=r.response, generator='m2', dataset='heldout')
      for r in rows]
  assert not list(tmp_path.glob('**/*.partial'))


def test_win_rate_from_the_command_line(tmp_path):
  given = [annotation(2.0), annotation(1.0), annotation(None), annotation(math.nan)]
  (tmp_path / 'annotations.json').write_text(json.dumps(given))
  out = tmp_path / 'new' / 'rate.json'
  code, printed, err = run(f'--annotations={tmp_path / "annotations.json"}', f'--out={out}')
  assert code == 0 and 'win_rate 50' in printed, err
  result = json.loads(out.read_text())
  assert (result['generator'], result['win_rate'], result['missing']) == ('m2', 50.0, 2)
  assert not list(tmp_path.glob('**/*.partial'))


def test_bad_input_prints_one_line_and_writes_nothing(tmp_path):
  (tmp_path / 'bad.json').write_text('[{"preference": 1.0')
  for flags, message in [(['--answers=x'], '--generator'),
                         ([f'--answers={tmp_path}', '--generator=m'], 'holds no')]:
    code, _, err = run(*flags, f'--out={tmp_path / "out.json"}')
    assert code == 1 and message in err and err.startswith('error: ') and err.count('\n') == 1
  assert not (tmp_path / 'out.json').exists()
  (tmp_path / 'latin.json').write_bytes(b'["\xe9"]')
  for name, message in [
      ('no.json', 'cannot be read'), ('bad.json', 'not JSON'), ('latin.json', 'not JSON'),
      ('', 'is a folder; give the annotations.json')]:
    with pytest.raises(InputError, match=message):
      alpaca.read_annotations(tmp_path / name)


@pytest.mark.parametrize('content, message', [
    ({}, 'not a list of annotations .Expected array, got object'), ([], 'no annotations'),
    ([3], r'Expected object, got int for "\[0\]"'),
    ([dict(preference=1.0)], 'missing required field generator_2'),
    ([annotation(1.0), annotation(2.5)], 'annotation 1 has the preference 2.5'),
    ([annotation('2')], r'got str for "\[0\].preference"'),
    ([annotation(True)], r'got bool for "\[0\].preference"'),
    ([annotation(1.0, output=None)], r'Expected str, got null for "\[0\].output_2"'),
    ([annotation(1.0), annotation(1.0, generator_2='m3')], 'both m2 and m3')])
def test_invalid_annotations_are_refused(tmp_path, content, message):
  (tmp_path / 'a.json').write_text(json.dumps(content))
  with pytest.raises(InputError, match=message):
    alpaca.read_annotations(tmp_path / 'a.json')


@pytest.mark.parametrize('out, message', [
    ('.', 'is a folder'),
    ('annotations.json/rate.json', 'annotations.json is a file, not a folder')])
def test_an_output_path_that_cannot_be_written_is_refused(tmp_path, out, message):
  annotations = tmp_path / 'annotations.json'
  annotations.write_text(json.dumps([annotation(2.0)]))
  code, _, err = run(f'--annotations={annotations}', f'--out={tmp_path / out}')
  assert code == 1 and message in err and err.startswith('error: ') and err.count('\n') == 1
  assert [p.name for p in tmp_path.iterdir()] == ['annotations.json']
