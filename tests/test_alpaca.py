import doctest
import functools
import json
import math
import sys
import types

from conftest import run_main
import msgspec
import pytest

from srlm_jax import InputError, records, schema
from srlm_jax.eval import alpaca


def annotation(preference, output='four', **fields):
  """One record of AlpacaEval's annotations.json, with all its fields."""
  return dict(
      instruction='i', output_1='o', generator_1='gpt4_1106_preview', dataset='helpful_base',
      output_2=output, generator_2='m2', annotator='weighted_alpaca_eval_gpt4_turbo',
      preference=preference, raw_completion=None) | fields


def judged(preference, output='four', instruction='i'):
  return alpaca.Annotation(instruction=instruction, preference=preference, generator_2='m2',
                           output_2=output)


run = functools.partial(run_main, 'eval.alpaca')


def test_docstrings():
  assert doctest.testmod(alpaca).failed == 0


def test_win_rate_by_hand():
  given = [judged(p) for p in (1.0, 2.0, 1.5, 1.9, None, math.nan, 0)]
  given.append(judged(1.2, 'x' * 12))
  result = alpaca.win_rate(given)
  wins = (0, 1, .5, .9, .5, .2)
  assert result.win_rate == pytest.approx(100 * sum(wins) / 6)
  deviation = math.sqrt(sum((x - 3.1 / 6) ** 2 for x in wins) / 5)  # sample standard deviation
  assert result.standard_error == pytest.approx(100 * deviation / math.sqrt(6))
  assert (result.wins, result.draws, result.losses, result.count, result.missing) == (2, 2, 2, 6, 2)
  assert result.discrete_win_rate == 100 * (2 + 2 / 2) / 6
  assert result.characters == (7 * 4 + 12) / 8 and result.generator == 'm2'
  nothing = alpaca.win_rate([judged(None)])
  assert nothing.win_rate is nothing.discrete_win_rate is nothing.standard_error is None


# Of a model on AlpacaEval's leaderboard: wins, losses and draws of 805, and its discrete win rate.
@pytest.mark.parametrize('wins, losses, draws, rate', [
    (676, 129, 0, 83.97515527950311), (575, 225, 5, 71.73913043478261),
    (75, 727, 3, 9.503105590062113)])
def test_the_discrete_win_rate_is_that_of_the_leaderboard(wins, losses, draws, rate):
  given = [judged(1.7)] * wins + [judged(1.2)] * losses + [judged(1.5)] * draws
  found = alpaca.win_rate(given)
  assert found.discrete_win_rate == pytest.approx(rate, abs=1e-12)
  assert (found.wins, found.losses, found.draws) == (wins, losses, draws)


def test_win_rate_from_the_command_line(tmp_path):
  given = [annotation(2.0), annotation(1.0), annotation(None), annotation(math.nan)]
  (tmp_path / 'annotations.json').write_text(json.dumps(given))
  out = tmp_path / 'new' / 'rate.json'
  code, printed, err = run(f'--annotations={tmp_path / "annotations.json"}', f'--out={out}')
  assert code == 0 and 'win_rate 50' in printed, err
  result = msgspec.json.decode(out.read_bytes(), type=schema.AlpacaEval)
  assert (result.generator, result.win_rate, result.missing) == ('m2', 50.0, 2)
  assert result.length_controlled is None
  assert not list(tmp_path.glob('**/*.partial'))


def test_bad_input_prints_one_line_and_writes_nothing(tmp_path):
  (tmp_path / 'bad.json').write_text('[{"preference": 1.0')
  (tmp_path / 'few.json').write_text(json.dumps([annotation(1.0)]))
  for flags, message in [(['--annotations=x'], 'x cannot be read'),
                         (['--length_controlled'], '--annotations is missing'),
                         ([f'--annotations={tmp_path / "few.json"}', '--length_controlled'],
                          '805 instructions in their order, and these 1 annotations')]:
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
    ([dict(preference=1.0)], 'missing required field instruction'),
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


@pytest.fixture
def instructions(monkeypatch):
  """805 instructions in place of AlpacaEval's, as the program knows them by a hash."""
  found = [f'Name {i} fruits.' for i in range(alpaca.COUNT)]
  monkeypatch.setattr(alpaca, 'DIGEST', records.digest(*found))
  return found


def test_the_length_controlled_win_rate_is_refused_for_other_instructions(instructions):
  given = [judged(1.0, instruction=text) for text in instructions]
  for other in (given[:-1], given[1:] + given[:1], given + given[:1]):
    with pytest.raises(InputError, match='is defined for AlpacaEval.s 805 instructions in their '
                                         f'order, and these {len(other)} annotations are of other'):
      alpaca.length_controlled(other)
  with pytest.raises(InputError, match='no annotation has a preference'):
    alpaca.length_controlled([judged(None, instruction=text) for text in instructions])


def test_one_sentence_says_what_the_length_controlled_win_rate_needs(instructions, monkeypatch):
  given = [judged(1.0, instruction=text) for text in instructions]
  monkeypatch.setitem(sys.modules, 'alpaca_eval', None)  # as if it were not installed
  with pytest.raises(InputError, match=r"needs alpaca_eval .*: pip install -e '.\[eval\]'"):
    alpaca.length_controlled(given)

  def fail(*_, **__):
    raise FileNotFoundError('no such file in the cache\nand more')
  fake = types.SimpleNamespace(metrics=types.SimpleNamespace(get_length_controlled_winrate=fail))
  monkeypatch.setitem(sys.modules, 'alpaca_eval', fake)
  with pytest.raises(InputError, match=r'read df_gamed.csv .* \(no such file in the cache\); '):
    alpaca.length_controlled(given)
