import pytest

from srlm_jax.eval.agreement import agreement


def test_by_hand_on_two_prompts():
  """Replies as (rank, score), rank 0 best."""
  first = [(0, 5.0), (1, 3.0), (2, 4.0)]   # pairs: right, right, wrong
  second = [(0, 5.0), (1, 2.0)]            # right, and the whole order
  found = agreement([first, second], 5.0)
  assert found['pairwise_accuracy'] == 3 / 4 and found['ties'] == 0 and found['pairs'] == 4 and found['prompts'] == 2
  assert found['exact_match'] == 1 / 2 and found['five_best'] == 1.0
  assert found['spearman'] == pytest.approx((0.5 + 1) / 2)
  assert found['kendall_tau'] == pytest.approx((1 / 3 + 1) / 2)


def test_a_tie_is_not_right_and_not_an_exact_match():
  found = agreement([[(0, 4.0), (1, 4.0)]], 5.0)
  assert (found['pairwise_accuracy'], found['ties'], found['exact_match']) == (0, 1, 0)
  assert (found['spearman'], found['kendall_tau']) == (0, 0)  # undefined: no information


def test_five_best_is_of_the_replies_scored_five():
  assert agreement([[(1, 5.0), (0, 5.0)], [(0, 1.0), (1, 5.0)]], 5.0)['five_best'] == 1 / 3
  assert agreement([[(0, 4.0), (1, 3.0)]], 5.0)['five_best'] is None


def test_a_reversed_judge_is_all_wrong_and_the_order_of_the_lines_does_not_matter():
  found = agreement([[(2, 5.0), (0, 1.0), (1, 3.0)]], 5.0)
  assert (found['pairwise_accuracy'], found['exact_match'], found['spearman']) == (0, 0, pytest.approx(-1))


def test_prompts_with_fewer_than_two_scored_replies_are_left_out():
  assert agreement([[(0, 4.0)], []], 5.0)['prompts'] == 0
  assert agreement([], 5.0)['pairwise_accuracy'] is None
