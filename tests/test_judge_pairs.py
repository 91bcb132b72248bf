"""Preference pairs of judgements: by majority, and of swapped responses."""
import dataclasses

import pytest
import samples

from srlm_jax import config as configs
from srlm_jax.reward import judge_pairs

JUDGE = configs.get('m2', 'tiny').judge


def judged(scores, name='p/0'):
  return [samples.judgement(name, j, score) for j, score in enumerate(scores)]


@pytest.mark.parametrize('scores, expected', [
    ([4, 4, 2], (0, 2, 1)), ([1, 4, 5, 5, 4, 5], (2, 0, 2)), ([5, 5, 5, 4, 2, 2], (0, 4, 1)),
    ([3, 3, 3], None), ([3, 3, 4, 4, 1], None), ([2], None), ([], None)])
def test_the_score_of_most_votes_is_chosen_and_the_farthest_rejected(scores, expected):
  found = judge_pairs.vote(judged(scores))
  assert (found and (found[0].index, found[1].index, found[2])) == expected


@pytest.mark.parametrize('scores, level, above, expected', [
    ([1, 5, 4], 3.5, False, (0, 1)), ([1, 5, 4], 3.5, True, (1, 0)),
    ([3, 4], 3.0, False, None),   # none says that the response is worse
    ([3, 2], 3.0, False, (1, 0)), ([1, 2], 3.0, False, None), ([], 3.0, True, None)])
def test_one_judgement_on_each_side_of_the_level(scores, level, above, expected):
  found = judge_pairs.contradicting(judged(scores), level, above)
  assert (found and tuple(j.index for j in found)) == expected


def test_a_prompt_gets_a_response_to_the_nearest_prompt_that_has_no_response_in_common():
  prompts = dict(a='Name two nice fruits.', b='List two nice fruits.', c='Name two nice tools.',
                 d='What is iron?')
  said = dict(a=['pear', 'fig'], b=['fig', 'plum'], c=['saw', 'axe'], d=['ore', 'ore'])
  responses = [samples.response(f'{p}/{i}', prompt=prompts[p], response=text)
               for p, texts in said.items() for i, text in enumerate(texts)]
  responses[4] = dataclasses.replace(responses[4], finish='length')
  found = {item.prompt_id: item for item in judge_pairs.swapped(lambda: iter(responses), JUDGE)}
  assert {p: item.response for p, item in found.items()} == dict(
      a='axe', b='axe', c='pear')  # d has no word in common with another prompt
  assert found['a'].prompt == prompts['a'] and found['a'].id not in {r.id for r in responses}
