import dataclasses
import json

from samples import judgement, pair, response

from srlm_jax import config as configs, records, schema
from srlm_jax.reward import health


def judgements(*scores):
  return [judgement(f'p{i % 4}/{i % 2}', i, s) for i, s in enumerate(scores)]


def responses(*texts, finish='eos'):
  return [response(f'p{i // 2}/{i % 2}', response=text, finish=finish)
          for i, text in enumerate(texts)]


def test_a_healthy_iteration_has_no_warning():
  assert not health.Judgements(judgements(1, 2, 3, 4, 5, 0, 2, 3, 4, 1)).warnings('m2/judge')
  assert not health.Responses(responses('a', 'b', 'c', 'd')).warnings('m2/respond')
  pairs = health.Pairs([pair('p', chosen='x' * 14, rejected='x' * 10)])
  assert not pairs.warnings('m2/pairs', 10)


def test_each_known_failure_gives_a_warning():
  found = health.Judgements(judgements(4, 4, 4, 4, 4, 4, 4, None, None, 1)).warnings('m2/judge')
  assert found[0] == ('m2/judge: 8 of 10 judgements have a score (the others: 2 no score), '
                      'fewer than 90%.')
  assert found[1].startswith('m2/judge: 88% of the scores are 4; the judge hardly distinguishes')
  cut = health.Responses(responses('a', 'b', finish='length')).warnings('m2')
  assert 'are cut at the length limit' in cut[0]
  same_prompt = [dataclasses.replace(r, prompt_id='p') for r in responses('a', 'a ', 'a', ' a')]
  assert '75% of the candidates duplicate' in health.Responses(same_prompt).warnings('m2')[0]
  pairs = health.Pairs([pair('p', chosen='x' * 16, rejected='x' * 10)])
  long = pairs.warnings('m2/pairs', 9)
  assert 'only learn to prefer length' in long[0]
  assert health.Pairs([]).warnings('m2/pairs', 20) == [
      'm2/pairs: 0 pairs from 20 prompts, fewer than 100 per 1,000.']


def write_iteration(folder):
  """The records of an iteration with two prompts and two candidates each."""
  records.write(folder / 'prompts' / 'attempts.jsonl', [
      schema.Attempt(id=str(i), text='x', finish='eos', reason='' if i else 'held out')
      for i in range(5)])
  records.write(folder / 'prompts' / 'prompts.jsonl', [
      schema.Prompt(id='p0', prompt='x\u2028y'), schema.Prompt(id='p1', prompt='z')])
  finished, cut = (responses('a', 'a', 'b', text, finish=finish)
                   for text, finish in (('', 'eos'), ('cc', 'length')))
  records.write(folder / 'respond' / 'responses-00000-of-00001.jsonl', finished[:3] + cut[3:])
  scores = {'p0/0': (3, 3), 'p0/1': (3, 3), 'p1/0': (5, 4), 'p1/1': (1, None)}
  records.write(folder / 'judge' / 'judgements-00000-of-00001.jsonl', [
      judgement(name, j, score)
      for name, judged in scores.items() for j, score in enumerate(judged)])
  records.write(folder / 'pairs' / 'pairs.jsonl', [
      pair('p1', chosen='a\u2028c', rejected='d', chosen_score=4.5, rejected_score=1.0)])


def test_the_statistics_of_an_iteration(tmp_path, capsys):
  folder = tmp_path / 'm2'
  write_iteration(folder)
  health.run(configs.get('m2'), tmp_path)
  found = json.loads((folder / 'health' / 'health.json').read_text())
  assert found['prompts'] == dict(
      attempts=5, accepted=2, dropped={'held out': 1, 'more than wanted': 2})
  assert [found['responses'][name] for name in ('unfinished', 'repeated', 'cut')] == [
      0.25, 0.25, 1]
  judged = found['judgements']
  assert (judged['parse_rate'], judged['unparsed']) == (0.875, {'no score': 1})
  assert judged['score_histogram'] == {'1': 1, '3': 4, '4': 1, '5': 1}
  # One candidate of p1 misses the quorum, which leaves one prompt with two scores.
  assert found['ties'] == dict(prompts=1, all_equal=1.0)
  assert found['pairs'] == dict(count=1, per_1000_prompts=500.0, chosen_characters=3.0,
                                rejected_characters=1.0, length_gap=2.0, margin=3.5)
  printed = capsys.readouterr().out
  assert len(found['warnings']) == 4
  assert all(f'warning: {warning}' in printed for warning in found['warnings'])
  health.run(configs.get('m2'), tmp_path)
  assert 'm2/health: already done' in capsys.readouterr().out


def test_m1_has_only_judgements(tmp_path):
  records.write(tmp_path / 'm1' / 'judge' / 'judgements-00000-of-00001.jsonl',
                judgements(1, 2, 3, 4))
  health.run(configs.get('m1'), tmp_path)
  found = json.loads((tmp_path / 'm1' / 'health' / 'health.json').read_text())
  assert set(found) == {'judgements', 'warnings'} and found['warnings'] == []


def test_no_data_gives_no_warning():
  for empty in (health.Responses(), health.Judgements(), health.Ties()):
    assert empty.warnings('m2') == []
  assert health.Pairs([]).warnings('m2/pairs', 0) == []
