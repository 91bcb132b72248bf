from hypothesis import given, strategies as st
import pytest

from srlm_jax import config as configs
from srlm_jax.reward import strategies
from srlm_jax.reward.strategies import Candidate


def pairs_config(**changes):
  config = configs.get('m2').pairs
  config.update(changes)
  return config


def candidates(*scores, **fields):
  """One candidate per score; `fields` lists the values of other fields."""
  return [Candidate(f'p/{i}', **(dict(response=f'answer {i}', finish='eos', score=score) | {
      name: values[i] for name, values in fields.items()})) for i, score in enumerate(scores)]


def ids(choice):
  return choice if isinstance(choice, str) else tuple(int(c.id[2:]) for c in choice)


def choose(strategy, *scores, rho=None, margin=None, **fields):
  """The strategy's choice as candidate indices, or its reason."""
  changes = {k: v for k, v in dict(rho=rho, margin=margin).items() if v is not None}
  return ids(strategy(candidates(*scores, **fields), pairs_config(**changes)))


def test_max_min_takes_the_highest_and_lowest_score_and_the_first_of_ties():
  assert choose(strategies.max_min, 3.0, 1.0, 4.5, 2.0) == (2, 1)
  assert choose(strategies.max_min, 4.0, 1.0, 4.0, 1.0) == (0, 1)


def test_equal_scores_equal_texts_and_too_few_candidates_give_no_pair():
  max_min = strategies.max_min
  assert choose(max_min, 4.0, 4.0, 4.0) == 'all scores equal'
  assert choose(max_min, 4.0, 3.0, response=['same', 'same']) == 'same text'
  assert choose(max_min, 4.0, None, None) == 'fewer than two scored candidates'
  assert choose(max_min, 0.0, 4.0, response=[' ', 'x']) == 'fewer than two scored candidates'


def test_a_failed_judgement_is_missing_and_not_zero():
  assert choose(strategies.max_min, 4.0, None, 3.0) == (0, 2)


def test_an_unfinished_response_may_be_rejected_but_not_chosen():
  max_min = strategies.max_min
  first_cut, both_cut = dict(finish=['length', 'eos']), dict(finish=['length', 'length'])
  assert choose(max_min, 1.0, 4.0, **first_cut) == (1, 0)
  assert choose(max_min, 4.0, 1.0, **first_cut) == 'best candidate is unfinished'
  allowed = pairs_config(unfinished_chosen=True)
  assert ids(max_min(candidates(4.0, 1.0, **first_cut), allowed)) == (0, 1)
  assert choose(max_min, 4.0, 1.0, **both_cut) == 'no finished candidate'


def test_margin_drops_pairs_with_close_scores():
  assert choose(strategies.margin, 4.0, 3.0, margin=1.0) == (0, 1)
  assert choose(strategies.margin, 4.0, 3.5, margin=1.0) == 'score gap below the margin'


def test_length_control_takes_the_shortest_of_the_top_and_the_longest_of_the_bottom_band():
  """With rho 0.25 and scores from 1 to 5, the bands are 4 and above, and 2 and below."""
  controlled = strategies.length_controlled
  scores = 5.0, 4.0, 3.0, 1.0, 2.0, 3.9
  texts = ['a' * 30, 'b' * 10, 'c' * 20, 'd' * 5, 'e' * 40, 'f']
  assert choose(controlled, *scores, response=texts, rho=0.25) == (1, 4)
  same = choose(strategies.max_min, *scores, response=texts)
  assert choose(controlled, *scores, response=texts, rho=0.0) == (0, 3) == same
  texts = ['long one', 'short', 'bad', 'very bad']
  assert choose(controlled, 5.0, 5.0, 1.0, 1.0, response=texts, rho=0.0) == (1, 3)
  cut = dict(response=['a' * 9, 'b', 'c'], finish=['eos', 'length', 'eos'])
  assert choose(controlled, 5.0, 4.9, 1.0, **cut, rho=0.25) == (0, 2)  # a cut one is never chosen
  assert choose(controlled, 3.0, 3.0, rho=0.25) == 'all scores equal'
  texts = ['a' * 9, 'b', 'c' * 3]
  assert choose(controlled, 5.0, 3.0, 1.0, response=texts, rho=0.5) == (1, 2)


def test_consistency_needs_the_older_ranking_and_computes_the_cream_rate():
  assert choose(strategies.consistency, 4.0, 1.0) == 'not ranked by the older model'
  assert choose(strategies.consistency, 4.0, 1.0, again=[1.0, 4.0]) == (0, 1)
  three = candidates(1.0, 2.0, 3.0, again=[1.0, 3.0, 2.0])  # two of three pairs agree
  assert strategies.kendall_tau(three) == pytest.approx(1 / 3)
  assert strategies.kendall_tau(candidates(1.0, 2.0, again=[3.0, 3.0])) == 0
  assert strategies.consistency_rate([1.0, -1.0, 0.5]) == pytest.approx((1 + 0 + 0.75) / 3)


def test_implicit_reward_needs_an_implicit_reward_with_the_same_preference():
  implicit_reward = strategies.implicit_reward
  assert choose(implicit_reward, 4.0, 1.0, implicit=[0.1, -3.0]) == (0, 1)
  assert choose(implicit_reward, 4.0, 1.0, implicit=[-3.0, 0.1]) == 'implicit reward disagrees'
  assert choose(implicit_reward, 4.0, 1.0, implicit=[0.1, None]) == 'no implicit reward'


def test_temporal_rejects_the_worst_response_of_the_older_model():
  temporal = strategies.temporal
  assert choose(temporal, 4.0, 0.0, 1.0, 3.0, older=[False, False, True, True]) == (0, 2)
  better = choose(temporal, 2.0, 3.0, 4.0, older=[False, True, True])
  assert better == 'not better than the older model'
  alone = choose(temporal, 2.0, 3.0, older=[False, False])
  assert alone == 'fewer than two scored candidates'


def test_positives_are_finished_distinct_and_above_the_threshold():
  scored = candidates(5.0, 5.0, 4.9, 5.0, response=['a', 'a', 'b', 'c'],
                      finish=['eos', 'eos', 'eos', 'length'])
  assert [c.id for c in strategies.positives_only(scored, pairs_config())] == ['p/0']
  low = strategies.positives_only(candidates(4.0), pairs_config())
  assert low == 'no candidate scored high enough'


FIELDS = st.fixed_dictionaries(dict(
    response=st.sampled_from(['', 'a', 'bb', 'ccc']),
    finish=st.sampled_from(['eos', 'length', 'too_long']),
    score=st.none() | st.sampled_from([0.0, 1.0, 2.5, 5.0]), again=st.none() | st.floats(0, 5),
    implicit=st.none() | st.floats(-9, 9), older=st.booleans()))


@given(st.lists(FIELDS, max_size=6), st.sampled_from(sorted(strategies.PAIRS)),
       st.sampled_from([0.0, 0.2, 0.5]))
def test_the_chosen_response_always_scores_higher_is_finished_and_differs(fields, name, rho):
  found = [Candidate(f'p/{i}', **f) for i, f in enumerate(fields)]
  choice = strategies.PAIRS[name](found, pairs_config(rho=rho))
  if isinstance(choice, str):
    assert choice
  else:
    chosen, rejected = choice
    assert chosen.score > rejected.score and chosen.finish == 'eos'
    assert chosen.response != rejected.response
    assert chosen.response and rejected.response
