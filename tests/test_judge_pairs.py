"""Preference pairs of judgements: by majority, and of swapped responses."""
import dataclasses

import pytest
import samples

from srlm_jax import config as configs, InputError
from srlm_jax.reward import judge_pairs, swap


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


@pytest.mark.parametrize('scores, level, expected', [
    ([1, 5, 4], 4.0, (0, 1, 4)), ([3, 2], 3.0, (1, 0, 1)), ([2, 4, 5], 4.5, (0, 2, 3)),
    ([1, 5, 4], 3.0, 'not below the own responses'),  # its mean is 3.3
    ([1, 2], 3.0, 'all judgements agree'), ([], 3.0, 'not below the own responses')])
def test_of_a_swapped_response_the_lowest_score_is_chosen_if_the_mean_agrees(
    scores, level, expected):
  found = judge_pairs.below(judged(scores), level)
  assert (found if isinstance(found, str) else (
      found[0].index, found[1].index, found[2])) == expected


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


def test_equal_gaps_are_not_taken_from_the_first_prompts_only():
  made = [judge_pairs.Rating(f'{i:03}/0', float(i % 2), 1.0) for i in range(200)]
  kept = judge_pairs.limit(made, 200, 0.2, 1.0)
  assert len(kept) == 50 and kept == judge_pairs.limit(made[::-1], 200, 0.2, 1.0)
  assert 60 < sum(int(rating.id[:3]) for rating in kept) / 50 < 140


@pytest.mark.parametrize('changes, message', [
    ({'judge.by': 'oracle'}, 'config.judge.by is oracle'), ({'judge.n': 1}, 'judge.n is 1')])
def test_what_cannot_give_a_pair_is_refused(changes, message, tmp_path):
  config = configs.get('m2', 'tiny').unlock()
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError, match=message):
    judge_pairs.run(config, tmp_path)
