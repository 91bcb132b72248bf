import json

import pytest
from samples import judgement, response

from srlm_jax import config as configs, InputError, records, schema
from srlm_jax.reward import pairs, scores as scoring


def write(workdir, scores, finish='eos'):
  """Writes records of m2; scores[prompt][candidate] has one score per judgement."""
  folder = workdir / 'm2'
  candidates = [(i, n, judged) for i, prompt in enumerate(scores)
                for n, judged in enumerate(prompt)]
  records.write(folder / 'respond' / 'responses-00000-of-00001.jsonl', [
      response(f'p{i}/{n}', prompt=f'Why {i}?', response=f'answer {n} ' + 'x' * n, finish=finish)
      for i, n, _ in candidates])
  records.write(folder / 'judge' / 'judgements-00000-of-00001.jsonl', [
      judgement(f'p{i}/{n}', j, score)
      for i, n, judged in candidates for j, score in enumerate(judged)])


def config(**changes):
  config = configs.get('m2')
  config.pairs.update(changes)
  return config


def read(workdir, name='pairs.jsonl', kind=schema.Pair):
  return list(records.read(workdir / 'm2' / 'pairs' / name, kind))


def done(workdir):
  return json.loads((workdir / 'm2' / 'pairs' / 'done.json').read_text())


def test_pairs_scores_and_counts_of_a_run(tmp_path, capsys):
  write(tmp_path, [[[5, 5, 4], [1, None, 2]], [[3] * 3, [3] * 3], [[5, None, None], [1] * 3]])
  pairs.run(config(), tmp_path)
  pair, = read(tmp_path)
  assert (pair.id, pair.chosen_id, pair.rejected_id) == ('p0', 'p0/0', 'p0/1')
  assert pair.chosen_score == pytest.approx(14 / 3) and pair.rejected_score == 1.5
  assert pair.rejected_spread == 0.5
  scores = {r.id: r for r in read(tmp_path, 'scores.jsonl', schema.CandidateScore)}
  assert scores['p1/0'] == schema.CandidateScore(id='p1/0', score=3.0, spread=0.0)
  assert scores['p2/0'].score is None
  found = done(tmp_path)
  assert found['dropped'] == {'all scores equal': 1, 'fewer than two scored candidates': 1}
  assert found['pairs_per_1000_prompts'] == 333.3
  assert (found['all_scores_equal'], found['parsed']) == (1, 15)
  assert (found['chosen_characters'], found['rejected_characters']) == (9, 10)
  printed = capsys.readouterr().out
  assert ('1 pairs from 3 prompts by max_min (333.3 per 1,000); '
          '15 of 18 judgements parsed') in printed
  assert 'dropped, all scores equal' in printed and 'characters per rejected response' in printed


def test_pairs_do_not_depend_on_the_number_of_hosts_that_sampled(tmp_path):
  write(tmp_path / '1', [[[i % 3, 4, 4], [1, i % 5, 2]] for i in range(7)])
  source, made = tmp_path / '1' / 'm2', []
  for hosts in (1, 2, 3):
    folder = tmp_path / str(hosts) / 'm2'
    for part, stem, kind, field in (
        ('respond', 'responses', schema.Response, 'prompt_id'),
        ('judge', 'judgements', schema.Judgement, 'response_id')):
      rows = list(records.read(source / part / f'{stem}-00000-of-00001.jsonl', kind))
      names = list(dict.fromkeys(getattr(r, field) for r in rows))
      for host in range(hosts):
        records.write(folder / part / records.shard_name(stem, host, hosts),
                      [r for r in rows if getattr(r, field) in names[host::hosts]])
    pairs.run(config(), tmp_path / str(hosts))
    made.append([(folder / 'pairs' / f'{name}.jsonl').read_bytes() for name in ('pairs', 'scores')])
  assert made[0] == made[1] == made[2] and len(made[0][0].splitlines()) > 3


def test_consistency_writes_the_cream_rate_into_every_pair(tmp_path):
  write(tmp_path, [[[5] * 3, [1] * 3], [[5] * 3, [1] * 3]])
  scores = {'p0/0': 4, 'p0/1': 2, 'p1/0': 2, 'p1/1': 4}
  again = [judgement(name, j, score) for name, score in scores.items() for j in range(2)]
  records.write(tmp_path / 'm2' / 'judge_again' / 'judgements-00000-of-00001.jsonl', again)
  pairs.run(config(strategy='consistency'), tmp_path)
  made = read(tmp_path)
  assert [p.tau for p in made] == pytest.approx([1, -1])
  assert [p.soft_label for p in made] == [0.5, 0.5]


def test_implicit_reward_reads_implicit_rewards(tmp_path):
  write(tmp_path, [[[5] * 3, [1] * 3], [[5] * 3, [1] * 3]])
  rewards = {'p0/0': 1.0, 'p0/1': -1.0, 'p1/0': -1.0, 'p1/1': 0.5}
  records.write(tmp_path / 'm2' / 'implicit' / 'rewards-00000-of-00001.jsonl', [
      schema.ImplicitReward(id=name, reward=reward, logp=reward, older_logp=0.0)
      for name, reward in rewards.items()])
  pairs.run(config(strategy='implicit_reward'), tmp_path)
  assert [p.id for p in read(tmp_path)] == ['p0']
  assert done(tmp_path)['dropped'] == {'implicit reward disagrees': 1}


def test_temporal_reads_the_responses_of_the_older_model(tmp_path):
  write(tmp_path, [[[4] * 3, [2] * 3]])
  folder = tmp_path / 'm2'
  records.write(folder / 'respond_older' / 'responses-00000-of-00001.jsonl', [
      response(f'p0/older{n}', prompt='Why 0?', response=f'old {n}')
      for n in range(2)])
  records.write(folder / 'judge_older' / 'judgements-00000-of-00001.jsonl', [
      judgement(f'p0/older{n}', j, s) for n, s in enumerate((3, 1)) for j in range(2)])
  pairs.run(config(strategy='temporal'), tmp_path)
  pair, = read(tmp_path)
  assert (pair.chosen_id, pair.rejected_id) == ('p0/0', 'p0/older1')
  assert pair.rejected == 'old 1'


def test_positives_are_sft_records(tmp_path):
  write(tmp_path, [[[5] * 3, [5, 5, 5]], [[4] * 3, [5, 5, 4]]])
  pairs.run(config(strategy='positives_only'), tmp_path)
  made = read(tmp_path, 'positives.jsonl', schema.Positive)
  assert [(p.id, p.prompt, p.score) for p in made] == [
      ('p0/0', 'Why 0?', 5), ('p0/1', 'Why 0?', 5)]
  assert done(tmp_path)['positives'] == 2
  assert done(tmp_path)['dropped'] == {'no candidate scored high enough': 1}


@pytest.mark.parametrize('strategy, message', [
    ('maxmin', r"'maxmin' \(did you mean \"max_min\"\?\); choose one of max_min, margin"),
    ('consistency', 'judge_again.* does not exist; run the stage that writes it'),
    ('implicit_reward', 'implicit.* does not exist'),
    ('temporal', 'respond_older.* does not exist')])
def test_an_unknown_strategy_and_a_missing_stage_raise_an_input_error(tmp_path, strategy, message):
  write(tmp_path, [[[5] * 3, [1] * 3]])
  with pytest.raises(InputError, match=message):
    pairs.run(config(strategy=strategy), tmp_path)
  assert not (tmp_path / 'm2' / 'pairs').exists()


def test_the_mean_is_over_parsed_judgements_and_needs_a_quorum():
  three = [judgement('p/0', j, score) for j, score in enumerate((4.0, None, 3.0))]
  assert scoring.by_response(three, 2)['p/0'].mean == 3.5
  assert scoring.by_response(three, 3)['p/0'].mean is None
  assert scoring.by_response(three[1:2], 1)['p/0'].mean is None


def test_the_spread_is_over_parsed_judgements():
  three = [judgement('p/0', j, score) for j, score in enumerate((4.0, None, 2.0))]
  assert scoring.by_response(three, 2)['p/0'].spread == 1.0
  assert scoring.by_response(three[:2], 2)['p/0'].spread is None
