import json

import pytest

from srlm_jax import config as configs, InputError, records
from srlm_jax.reward import pairs, scores as scoring


def write(workdir, scores, finish='eos', parts=('respond', 'judge'), older=None):
  """One model's responses and judgements: scores[prompt][candidate] is a list of three."""
  folder = workdir / 'm2'
  responses = [dict(id=f'p{i}/{n}', prompt_id=f'p{i}', prompt=f'Why {i}?', response=f'answer {n} ' + 'x' * n,
                    finish=finish) for i, prompt in enumerate(scores) for n in range(len(prompt))]
  judgements = [dict(id=f'p{i}/{n}/{j}', prompt_id=f'p{i}', response_id=f'p{i}/{n}', j=j, score=score, text='t',
                     reason='' if score is not None else 'no score', finish='eos')
                for i, prompt in enumerate(scores) for n, three in enumerate(prompt) for j, score in enumerate(three)]
  for part, stem, rows in (('respond', 'responses', responses), ('judge', 'judgements', judgements)):
    if part in parts:
      records.write(folder / part / f'{stem}-00000-of-00001.jsonl', rows)


def config(**knobs):
  config = configs.get('m2')
  config.pairs.update(knobs)
  return config


def done(workdir):
  return json.loads((workdir / 'm2' / 'pairs' / 'done.json').read_text())


def test_pairs_scores_and_counts_of_a_run(tmp_path, capsys):
  write(tmp_path, [[[5, 5, 4], [1, None, 2]], [[3] * 3, [3] * 3], [[5, None, None], [1] * 3]])
  pairs.run(config(), tmp_path)
  pair, = records.read(tmp_path / 'm2' / 'pairs' / 'pairs.jsonl')
  assert (pair['id'], pair['chosen_id'], pair['rejected_id']) == ('p0', 'p0/0', 'p0/1')
  assert pair['chosen_score'] == pytest.approx(14 / 3) and pair['rejected_score'] == 1.5
  assert pair['rejected_spread'] == 0.5
  kept = {r['id']: r for r in records.read(tmp_path / 'm2' / 'pairs' / 'scores.jsonl')}
  assert kept['p1/0'] == dict(id='p1/0', score=3.0, spread=0.0) and kept['p2/0']['score'] is None
  found = done(tmp_path)
  assert found['dropped'] == {'all scores equal': 1, 'fewer than two scored candidates': 1}
  assert (found['pairs_per_1000_prompts'], found['all_scores_equal'], found['parsed']) == (333.3, 1, 15)
  assert (found['chosen_characters'], found['rejected_characters']) == (9, 10)
  said = capsys.readouterr().out
  assert '1 pairs from 3 prompts by max_min (333.3 per 1,000); 15 of 18 judgements parsed' in said
  assert 'nothing: all scores equal' in said and 'characters of the rejected' in said


def test_pairs_do_not_depend_on_how_many_hosts_sampled(tmp_path):
  write(tmp_path / '1', [[[i % 3, 4, 4], [1, i % 5, 2]] for i in range(7)])
  source, made = tmp_path / '1' / 'm2', []
  for hosts in (1, 2, 3):
    folder = tmp_path / str(hosts) / 'm2'
    for part, stem, of in (('respond', 'responses', 'prompt_id'), ('judge', 'judgements', 'response_id')):
      rows = list(records.read(source / part / f'{stem}-00000-of-00001.jsonl'))
      names = list(dict.fromkeys(r[of] for r in rows))
      for host in range(hosts):
        records.write(folder / part / records.shard_name(stem, host, hosts),
                      [r for r in rows if r[of] in names[host::hosts]])
    pairs.run(config(), tmp_path / str(hosts))
    made.append([(folder / 'pairs' / name).read_bytes() for name in ('pairs.jsonl', 'scores.jsonl')])
  assert made[0] == made[1] == made[2] and len(made[0][0].splitlines()) > 3


def test_consistency_writes_cream_s_rate_into_every_pair(tmp_path):
  write(tmp_path, [[[5] * 3, [1] * 3], [[5] * 3, [1] * 3]])
  again = [dict(id=f'{i}', response_id=name, score=score) for i, (name, score) in enumerate(
      [('p0/0', 4), ('p0/1', 2), ('p1/0', 2), ('p1/1', 4)] * 2)]
  records.write(tmp_path / 'm2' / 'judge_again' / 'judgements-00000-of-00001.jsonl', again)
  pairs.run(config(strategy='consistency'), tmp_path)
  made = list(records.read(tmp_path / 'm2' / 'pairs' / 'pairs.jsonl'))
  assert [p['tau'] for p in made] == pytest.approx([1, -1]) and [p['confidence'] for p in made] == [0.5, 0.5]


def test_agreement_reads_implicit_rewards_and_temporal_an_older_model(tmp_path):
  write(tmp_path, [[[5] * 3, [1] * 3], [[5] * 3, [1] * 3]])
  rewards = [dict(id='p0/0', reward=1.0), dict(id='p0/1', reward=-1.0), dict(id='p1/0', reward=-1.0),
             dict(id='p1/1', reward=0.5)]
  records.write(tmp_path / 'm2' / 'implicit' / 'rewards-00000-of-00001.jsonl', rewards)
  pairs.run(config(strategy='agreement'), tmp_path)
  assert [p['id'] for p in records.read(tmp_path / 'm2' / 'pairs' / 'pairs.jsonl')] == ['p0']
  assert done(tmp_path)['dropped'] == {'implicit reward disagrees': 1}

  other = tmp_path / 'other'
  write(other, [[[4] * 3, [2] * 3]])
  records.write(other / 'm2' / 'respond_older' / 'responses-00000-of-00001.jsonl', [
      dict(id=f'p0/older{n}', prompt_id='p0', prompt='Why 0?', response=f'old {n}', finish='eos') for n in range(2)])
  records.write(other / 'm2' / 'judge_older' / 'judgements-00000-of-00001.jsonl', [
      dict(response_id=f'p0/older{n}', score=s) for n, s in enumerate((3, 1)) for _ in range(2)])
  pairs.run(config(strategy='temporal'), other)
  pair, = records.read(other / 'm2' / 'pairs' / 'pairs.jsonl')
  assert (pair['chosen_id'], pair['rejected_id'], pair['rejected']) == ('p0/0', 'p0/older1', 'old 1')


def test_positives_are_records_of_sft(tmp_path):
  write(tmp_path, [[[5] * 3, [5, 5, 5]], [[4] * 3, [5, 5, 4]]])
  pairs.run(config(strategy='positives_only'), tmp_path)
  made = list(records.read(tmp_path / 'm2' / 'pairs' / 'positives.jsonl', 'id', 'prompt', 'response'))
  assert [(p['id'], p['prompt'], p['score']) for p in made] == [('p0/0', 'Why 0?', 5), ('p0/1', 'Why 0?', 5)]
  assert (done(tmp_path)['positives'], done(tmp_path)['dropped']) == (2, {'no candidate scored high enough': 1})


@pytest.mark.parametrize('strategy, message', [
    ('maxmin', r"'maxmin' \(did you mean \"max_min\"\?\); it is one of max_min, margin"),
    ('consistency', 'judge_again.* does not exist; run the stage that writes it'),
    ('agreement', 'implicit.* does not exist'), ('temporal', 'respond_older.* does not exist')])
def test_an_unknown_strategy_and_a_missing_stage_are_said(tmp_path, strategy, message):
  write(tmp_path, [[[5] * 3, [1] * 3]])
  with pytest.raises(InputError, match=message):
    pairs.run(config(strategy=strategy), tmp_path)
  assert not (tmp_path / 'm2' / 'pairs').exists()


def judgement(j, score):
  return dict(response_id='p/0', j=j, score=score, text='')


def test_the_mean_is_of_the_parsed_and_needs_a_quorum():
  three = [judgement(0, 4.0), judgement(1, None), judgement(2, 3.0)]
  assert scoring.by_response(three, 2)['p/0'].mean == 3.5
  assert scoring.by_response(three, 3)['p/0'].mean is None
  assert scoring.by_response(three[1:2], 1)['p/0'].mean is None


def test_the_spread_is_of_the_parsed():
  assert scoring.by_response([judgement(0, 4.0), judgement(1, None), judgement(2, 2.0)], 2)['p/0'].spread == 1.0
  assert scoring.by_response([judgement(0, 4.0), judgement(1, None)], 2)['p/0'].spread is None
