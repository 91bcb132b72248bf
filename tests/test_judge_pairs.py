"""Preference pairs of judgements: by majority, and of swapped responses."""
import dataclasses
import json

from hypothesis import given, strategies as st
import pytest
import samples
import tiny_run

from srlm_jax import config as configs, InputError, loop, records, schema
from srlm_jax.reward import judge_pairs, judges, swap
from srlm_jax.sandbox import audit, world


def judged(scores, name='p/0'):
  return [samples.judgement(name, j, score) for j, score in enumerate(scores)]


@pytest.mark.parametrize('scores, expected', [
    ([4, 4, 2], (0, 2, 1)), ([1, 4, 5, 5, 4, 5], (2, 0, 2)), ([5, 5, 5, 4, 2, 2], (0, 4, 1)),
    ([3, 3, 3], 'fewer than two scores'), ([3, 3, 4, 4, 1], 'no score has most votes'),
    ([2], 'fewer than two scores'), ([], 'fewer than two scores')])
def test_the_score_of_most_votes_is_chosen_and_the_farthest_rejected(scores, expected):
  found = judge_pairs.vote(judged(scores))
  assert (found if isinstance(found, str) else (
      found[0].index, found[1].index, found[2])) == expected


@pytest.mark.parametrize('scores, level, is_better, expected', [
    ([1, 5, 4], 4.0, False, (0, 1, 4)), ([3, 2], 3.0, False, (1, 0, 1)),
    ([2, 4, 1, 5], 4.5, False, (1, 3, 1)), ([1, 5, 4], 3.0, True, (2, 0, 3)),
    ([1, 5, 4], 3.0, False, 'the mean score is on the wrong side'),  # it is 3.3
    ([5, 1], 3.0, True, 'the mean score is on the wrong side'),  # it is 3
    ([5, 4], 3.0, True, 'all judgements agree'), ([], 3.0, True, 'no usable judgement')])
def test_a_judgement_on_the_right_side_is_chosen_if_the_mean_agrees(
    scores, level, is_better, expected):
  found = judge_pairs.apart(judged(scores), level, is_better)
  assert (found if isinstance(found, str) else (
      found[0].index, found[1].index, found[2])) == expected


@given(st.lists(st.lists(st.sampled_from([1.0, 2.0, 3.0]), max_size=9), min_size=1, max_size=3),
       st.integers(0, 30), st.sampled_from([0.3, 0.5, 1.0]))
def test_each_kind_has_as_many_pairs_of_any_scores(scores, maximum, share):
  kinds = [[judge_pairs.Rating(f'{kind}/{i}', score, 1.0) for i, score in enumerate(found)]
           for kind, found in enumerate(scores)]
  kept = judge_pairs.even(kinds, maximum, share)
  sizes = [sum(p.id.startswith(f'{kind}/') for p in kept) for kind in range(len(kinds))]
  assert len({*sizes}) == 1 and sum(sizes) == len(kept) <= maximum


def test_each_kind_has_as_many_pairs():
  kinds = [[judge_pairs.Rating(f'{kind}{i}', float(i % 5), i) for i in range(n)]
           for kind, n in (('a', 30), ('b', 7), ('c', 50))]
  assert [p.id[0] for p in judge_pairs.even(kinds, 40, 1.0)] == ['a'] * 7 + ['b'] * 7 + ['c'] * 7
  assert len(judge_pairs.even(kinds, 9, 1.0)) == 9
  assert judge_pairs.even([*kinds, []], 40, 1.0) == []


def test_a_prompt_gets_a_response_to_the_nearest_prompt_that_has_no_response_in_common():
  prompts = dict(a='Name two nice fruits.', b='List two nice fruits.', c='Name two nice tools.',
                 d='What is iron?')
  said = dict(a=['pear', 'fig'], b=['fig', 'plum'], c=['saw', 'axe'], d=['ore', 'ore'])
  responses = [samples.response(f'{p}/{i}', prompt=prompts[p], response=text)
               for p, texts in said.items() for i, text in enumerate(texts)]
  responses[4] = dataclasses.replace(responses[4], finish='length')
  found = {r.prompt_id: r for r in swap.swapped(lambda: iter(responses))}
  assert {p: r.response for p, r in found.items()} == dict(
      a='axe', b='axe', c='pear')  # d has no word in common with another prompt
  assert (found['a'].prompt, found['a'].id) == (prompts['a'], 'a/c')


def test_only_the_responses_to_the_first_prompts_are_given_to_others(monkeypatch):
  monkeypatch.setattr(swap, 'POOL', 2)
  responses = [samples.response(f'{i}/0', prompt=f'Name {i}.', response=f'{i}') for i in range(5)]
  assert [r.response for r in swap.swapped(lambda: iter(responses))] == ['1', '0', '0', '0', '0']


def test_equal_gaps_are_not_taken_from_the_first_prompts_only():
  made = [judge_pairs.Rating(f'{i:03}/0', float(i % 2), 1.0) for i in range(200)]
  kept = judge_pairs.limit(made, 50, 1.0)
  assert len(kept) == 50 and kept == judge_pairs.limit(made[::-1], 50, 1.0)
  assert 60 < sum(int(rating.id[:3]) for rating in kept) / 50 < 140


@pytest.mark.parametrize('name, changes, message', [
    ('majority_pairs', {'judge.by': 'oracle'}, 'config.judge.by is oracle, and majority_pairs'),
    ('judge_pairs', {'judge.by': 'random'}, 'config.judge.by is random, and judge_pairs'),
    ('majority_pairs', {'judge.n': 2}, 'judge.n is 2, and majority_pairs need 3'),
    ('swapped_pairs', {'judge.n': 1}, 'judge.n is 1, and swapped_pairs need 2')])
def test_what_cannot_give_a_pair_is_refused(name, changes, message, tmp_path):
  config = configs.get('m2', 'tiny').unlock()
  config.update_from_flattened_dict({**changes, 'judge.quorum': 1})
  if name != 'judge_pairs':
    with pytest.raises(InputError, match=message):
      judge_pairs.run(config, tmp_path, name.removesuffix('_pairs'))
  config.train.data = 'pairs', name
  with pytest.raises(InputError, match=message):
    loop.refuse_mistakes(config)


def test_prompts_without_a_word_in_common_are_refused(run):
  workdir, config = run
  tiny_run.write(workdir, config, 'respond', {tiny_run.shard('responses'): [
      samples.response(f'{p}/0', prompt=p, response=p) for p in ('Name it.', 'Why?')]},
                 params='hash-m1')
  with pytest.raises(InputError, match='m2/swap: no two prompts have a word in common'):
    swap.run(config, workdir)
  assert not (workdir / 'm2' / 'swap' / 'swapped.jsonl').exists()


PROMPTS = dict(p0='Name two nice fruits.', p1='Name two nice tools.', p2='Name two nice animals.',
               p3='Name two nice sports.')
SAID = dict(p0=('Sure, pear and fig.', 'pear.'), p1=('Sure, saw and axe.', 'saw.'),
            p2=('Sure, cat and dog.', 'cat.'), p3=('Sure, saw and cow.', 'no.'))
SCORES = dict(p0=((5, 5, 5, 2), (4, 4, 4, 2)), p1=((5, 5, 4, 4), (2, 2, 2, 2)),
              p2=((5, 5, 5, 2), (2, 2, None, 4)), p3=((3, 3, 3, 3), (3, None, None, None)))
SWAPPED = ((1, 2, 1, 5), (1, 1, 1, 1), (5, 5, 5, 5), (1, 1, 4, 4))


def write_judgements(workdir, config, name, found):
  """found: {response id: scores}."""
  made = [j for response_id, scores in found.items() for j in judged(scores, response_id)]
  tiny_run.write(workdir, config, name, {tiny_run.shard('judgements'): made}, schema.JudgeSummary(
      judgements=len(made), parsed=len(made), lowest=0.0, highest=5.0, unparsed={}), 'hash-m1')


@pytest.fixture
def run(tmp_path):
  """A workdir in which m2 has candidates, judgements and eight pairs, and the config of m2."""
  config = configs.get('m2', 'tiny')
  config.judge.n, config.judge.quorum = 4, 2
  config.judge_pairs.share, config.judge_pairs.score_share = 0.5, 1.0
  config.train.data = 'pairs', 'majority_pairs', 'swapped_pairs'
  for name in ('m0', 'm1'):
    tiny_run.model(tmp_path, name)
  tiny_run.write(tmp_path, config, 'respond', {tiny_run.shard('responses'): [
      samples.response(f'{p}/{i}', prompt=PROMPTS[p], response=text)
      for p, texts in SAID.items() for i, text in enumerate(texts)]}, params='hash-m1')
  write_judgements(tmp_path, config, 'judge', {
      f'{p}/{i}': scores for p, found in SCORES.items() for i, scores in enumerate(found)})
  tiny_run.write(tmp_path, config, 'pairs', {'pairs.jsonl': [
      samples.pair(p, chosen_id=f'{p}/0', rejected_id=f'{p}/1') for p in PROMPTS]})
  return tmp_path, config


def made_by(workdir, name):
  """The pairs of a stage by response, and its done.json."""
  found = records.read(workdir / 'm2' / name / f'{name}_pairs.jsonl', schema.JudgePair)
  done = json.loads((workdir / 'm2' / name / 'done.json').read_text())
  return {pair.id.removesuffix(f'/{name}'): pair for pair in found}, done


def test_votes_of_judgements_become_pairs_that_ask_the_judge_as_before(run):
  workdir, config = run
  judge_pairs.run(config, workdir, 'majority')
  pairs, done = made_by(workdir, 'majority')
  assert {name: (pair.chosen_score, pair.rejected_score) for name, pair in pairs.items()} == {
      'p0/0': (5, 2), 'p0/1': (4, 2), 'p2/0': (5, 2), 'p2/1': (2, 4)}
  assert pairs['p2/1'].rejected_id == 'p2/1/3' and pairs['p2/1'].rejected == 'p2/1 3'
  judge = judges.load('sandbox')
  assert pairs['p0/1'].prompt == judge.render(prompt=PROMPTS['p0'], response='pear.')
  assert done['dropped'] == {'fewer than two scores': 2, 'no score has most votes': 1,
                             'no score': 1, 'over the limits': 0}


def test_a_share_limits_the_pairs_of_judgements(run):
  workdir, config = run
  config.judge_pairs.share = 0.4  # 2 of 6
  judge_pairs.run(config, workdir, 'majority')
  pairs, done = made_by(workdir, 'majority')
  assert done['pairs'] == len(pairs) == 2 and done['dropped']['over the limits'] == 2
  assert pairs.keys() <= {'p0/0', 'p0/1', 'p2/0'}  # two votes ahead; p2/1 is one ahead


@pytest.fixture
def swapped(run):
  """The swapped responses of `run`, which are judged."""
  workdir, config = run
  swap.run(config, workdir)
  found = [*records.read(workdir / 'm2' / 'swap' / 'swapped.jsonl', schema.Response)]
  write_judgements(workdir, config, 'judge_swapped', dict(
      zip((r.id for r in found), SWAPPED, strict=True)))
  return found


@pytest.mark.parametrize('of, names', [('own', {'p0/0', 'p0/1'}), ('swapped', {'p0/p1', 'p3/p0'})])
def test_pairs_may_be_of_own_or_of_swapped_responses_only(run, swapped, of, names):
  workdir, config = run
  config.judge_pairs.of = of
  judge_pairs.run(config, workdir, 'swapped')
  pairs, done = made_by(workdir, 'swapped')
  assert pairs.keys() == names and done['dropped'] == {
      'own': {'all judgements agree': 3, 'the mean score is on the wrong side': 2, 'no score': 1,
              'over the limits': 0},
      'swapped': {'all judgements agree': 1, 'the mean score is on the wrong side': 1,
                  'over the limits': 0}}[of]


def test_judgements_of_swapped_responses_become_pairs_and_the_oracle_audits_all(run, swapped):
  workdir, config = run
  found = swapped
  assert [r.prompt for r in found] == [*PROMPTS.values()]
  assert all(r.response not in SAID[r.prompt_id] for r in found)
  judge_pairs.run(config, workdir, 'swapped')
  pairs, done = made_by(workdir, 'swapped')
  # The mean scores of the own responses are 3.9, 3.3, 3.5 and 3, of the swapped 2.3, 1, 5 and 2.5.
  kept = {found[0].id: (2, 5), found[3].id: (1, 4), 'p0/0': (5, 2), 'p0/1': (4, 2)}
  assert {name: (p.chosen_score, p.rejected_score) for name, p in pairs.items()} == kept
  assert PROMPTS['p0'] in pairs[found[0].id].prompt and found[0].response in (
      pairs[found[0].id].prompt)
  assert done['dropped'] == {'all judgements agree': 4, 'over the limits': 0, 'no score': 1,
                             'the mean score is on the wrong side': 3}
  judge_pairs.run(config, workdir, 'majority')
  audit.run(config, workdir, 'judge_pairs')
  numbers = json.loads((
      workdir / 'm2' / 'audit_judge_pairs' / 'audit_judge_pairs.json').read_text())
  assert numbers['judge_pairs'] == 8
  assert [sum(world.grade(r.prompt, r.response)) for r in (found[0], found[3])] == [0, 0]
  # The oracle gives p0/0 and p2/0 5 points and p0/1 and p2/1 2.
  assert (numbers['nearer'], numbers['as_near'], numbers['farther']) == (0.75, 0.0, 0.25)
