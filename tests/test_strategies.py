from hypothesis import given, strategies as st
import pytest

from srlm_jax import config as configs
from srlm_jax.reward import strategies
from srlm_jax.reward.strategies import Candidate


def knobs(**changes):
  config = configs.get('m2').pairs
  config.update(changes)
  return config


def candidates(*scores, **others):
  """One candidate a score; `others`: lists of other fields."""
  return [Candidate(f'p/{i}', **(dict(response=f'answer {i}', finish='eos', score=score) | {
      name: values[i] for name, values in others.items()})) for i, score in enumerate(scores)]


def ids(choice):
  return choice if isinstance(choice, str) else tuple(int(c.id[2:]) for c in choice)


def test_max_min_is_the_highest_against_the_lowest_and_the_first_of_equals():
  assert ids(strategies.max_min(candidates(3.0, 1.0, 4.5, 2.0), knobs())) == (2, 1)
  assert ids(strategies.max_min(candidates(4.0, 1.0, 4.0, 1.0), knobs())) == (0, 1)


def test_equal_scores_equal_texts_and_too_few_give_no_pair():
  assert strategies.max_min(candidates(4.0, 4.0, 4.0), knobs()) == 'all scores equal'
  assert strategies.max_min(candidates(4.0, 3.0, response=['same', 'same']), knobs()) == 'same text'
  assert strategies.max_min(candidates(4.0, None, None), knobs()) == 'fewer than two scored candidates'
  assert strategies.max_min(candidates(0.0, 4.0, response=[' ', 'x']), knobs()) == 'fewer than two scored candidates'


def test_a_failed_judgement_is_missing_and_not_a_zero():
  assert ids(strategies.max_min(candidates(4.0, None, 3.0), knobs())) == (0, 2)


def test_an_unfinished_response_may_be_rejected_but_not_chosen():
  first_cut, both_cut = dict(finish=['length', 'eos']), dict(finish=['length', 'length'])
  assert ids(strategies.max_min(candidates(1.0, 4.0, **first_cut), knobs())) == (1, 0)
  assert strategies.max_min(candidates(4.0, 1.0, **first_cut), knobs()) == 'best candidate unfinished'
  assert ids(strategies.max_min(candidates(4.0, 1.0, **first_cut), knobs(unfinished_chosen=True))) == (0, 1)
  assert strategies.max_min(candidates(4.0, 1.0, **both_cut), knobs()) == 'no finished candidate'


def test_margin_drops_pairs_that_are_too_near():
  assert ids(strategies.margin(candidates(4.0, 3.0), knobs(margin=1.0))) == (0, 1)
  assert strategies.margin(candidates(4.0, 3.5), knobs(margin=1.0)) == 'scores nearer than the margin'


def test_length_control_takes_the_shortest_of_the_top_and_the_longest_of_the_bottom():
  """Bands of rho 0.25 on scores 1 to 5: from 4 up, and to 2."""
  texts = ['a' * 30, 'b' * 10, 'c' * 20, 'd' * 5, 'e' * 40, 'f']
  scored = candidates(5.0, 4.0, 3.0, 1.0, 2.0, 3.9, response=texts)
  assert ids(strategies.length_controlled(scored, knobs(rho=0.25))) == (1, 4)
  assert ids(strategies.length_controlled(scored, knobs(rho=0.0))) == (0, 3) == ids(strategies.max_min(scored, knobs()))
  ties = candidates(5.0, 5.0, 1.0, 1.0, response=['long one', 'short', 'bad', 'very bad'])
  assert ids(strategies.length_controlled(ties, knobs(rho=0.0))) == (1, 3)
  cut = candidates(5.0, 4.9, 1.0, response=['a' * 9, 'b', 'c'], finish=['eos', 'length', 'eos'])
  assert ids(strategies.length_controlled(cut, knobs(rho=0.25))) == (0, 2)  # what was cut is never chosen
  assert strategies.length_controlled(candidates(3.0, 3.0), knobs(rho=0.25)) == 'all scores equal'
  met = candidates(5.0, 3.0, 1.0, response=['a' * 9, 'b', 'c' * 3])
  assert ids(strategies.length_controlled(met, knobs(rho=0.5))) == (1, 2)


def test_consistency_needs_the_older_ranking_and_the_rate_is_cream_s():
  assert strategies.consistency(candidates(4.0, 1.0), knobs()) == 'not ranked by the older model'
  assert ids(strategies.consistency(candidates(4.0, 1.0, again=[1.0, 4.0]), knobs())) == (0, 1)
  three = candidates(1.0, 2.0, 3.0, again=[1.0, 3.0, 2.0])  # of three pairs two agree
  assert strategies.kendall_tau(three) == pytest.approx(1 / 3)
  assert strategies.kendall_tau(candidates(1.0, 2.0, again=[3.0, 3.0])) == 0
  assert strategies.consistency_rate([1.0, -1.0, 0.5]) == pytest.approx((1 + 0 + 0.75) / 3)


def test_agreement_needs_the_implicit_reward_on_its_side():
  assert ids(strategies.agreement(candidates(4.0, 1.0, implicit=[0.1, -3.0]), knobs())) == (0, 1)
  assert strategies.agreement(candidates(4.0, 1.0, implicit=[-3.0, 0.1]), knobs()) == 'implicit reward disagrees'
  assert strategies.agreement(candidates(4.0, 1.0, implicit=[0.1, None]), knobs()) == 'without an implicit reward'


def test_temporal_rejects_the_older_model_s_worst():
  scored = candidates(4.0, 0.0, 1.0, 3.0, older=[False, False, True, True])
  assert ids(strategies.temporal(scored, knobs())) == (0, 2)
  better = candidates(2.0, 3.0, 4.0, older=[False, True, True])
  assert strategies.temporal(better, knobs()) == 'not better than the older model'
  assert strategies.temporal(candidates(2.0, 3.0, older=[False, False]), knobs()) == 'fewer than two scored candidates'


def test_positives_are_finished_different_and_high_enough():
  scored = candidates(5.0, 5.0, 4.9, 5.0, response=['a', 'a', 'b', 'c'], finish=['eos', 'eos', 'eos', 'length'])
  assert [c.id for c in strategies.positives_only(scored, knobs())] == ['p/0']
  assert strategies.positives_only(candidates(4.0), knobs()) == 'no candidate scored high enough'


FIELDS = st.fixed_dictionaries(dict(
    response=st.sampled_from(['', 'a', 'bb', 'ccc']), finish=st.sampled_from(['eos', 'length', 'too_long']),
    score=st.none() | st.sampled_from([0.0, 1.0, 2.5, 5.0]), again=st.none() | st.floats(0, 5),
    implicit=st.none() | st.floats(-9, 9), older=st.booleans()))


@given(st.lists(FIELDS, max_size=6), st.sampled_from(sorted(strategies.PAIRS)), st.sampled_from([0.0, 0.2, 0.5]))
def test_whatever_the_candidates_chosen_is_better_finished_and_another_text(fields, name, rho):
  choice = strategies.PAIRS[name]([Candidate(f'p/{i}', **f) for i, f in enumerate(fields)], knobs(rho=rho))
  if isinstance(choice, str):
    assert choice
  else:
    chosen, rejected = choice
    assert chosen.score > rejected.score and chosen.finish == 'eos' and chosen.response != rejected.response
    assert chosen.response and rejected.response
