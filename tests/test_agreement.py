import itertools

import numpy as np
import pytest

from srlm_jax.eval.agreement import agreement


def test_measures_of_two_prompts_by_hand():
  """Replies are (rank, score); rank 0 is best."""
  first = [(0, 5.0), (1, 3.0), (2, 4.0)]   # two concordant pairs, one discordant pair
  second = [(0, 5.0), (1, 2.0)]            # one concordant pair: an exact match
  found = agreement([first, second], 5.0)
  assert found['pairwise_accuracy'] == 3 / 4 and found['ties'] == 0
  assert found['pairs'] == 4 and found['prompts'] == 2
  assert found['exact_match'] == 1 / 2 and found['five_best'] == 1.0
  assert found['spearman'] == pytest.approx((0.5 + 1) / 2)
  assert found['kendall_tau'] == pytest.approx((1 / 3 + 1) / 2)


def test_a_tie_is_an_error_and_not_an_exact_match():
  found = agreement([[(0, 4.0), (1, 4.0)]], 5.0)
  assert (found['pairwise_accuracy'], found['ties'], found['exact_match']) == (0, 1, 0)
  assert (found['spearman'], found['kendall_tau']) == (0, 0)  # undefined


def test_five_best_counts_only_replies_with_the_highest_score():
  found = agreement([[(1, 5.0), (0, 5.0)], [(0, 1.0), (1, 5.0)]], 5.0)
  assert found['five_best'] == 1 / 3
  assert agreement([[(0, 4.0), (1, 3.0)]], 5.0)['five_best'] is None


def test_a_reversed_judge_is_always_wrong_in_any_order_of_replies():
  found = agreement([[(2, 5.0), (0, 1.0), (1, 3.0)]], 5.0)
  assert (found['pairwise_accuracy'], found['exact_match']) == (0, 0)
  assert found['spearman'] == pytest.approx(-1)


def test_prompts_with_fewer_than_two_scored_replies_are_left_out():
  assert agreement([[(0, 4.0)], []], 5.0)['prompts'] == 0
  assert agreement([], 5.0)['pairwise_accuracy'] is None


def test_pairs_with_unscored_replies_are_errors_only_in_pairwise_accuracy_all():
  found = agreement([[(0, 4.0), (1, 2.0), (2, None)], [(0, None), (1, 3.0)]], 5.0)
  assert (found['pairwise_accuracy'], found['pairs'], found['prompts']) == (1, 1, 1)
  assert (found['pairwise_accuracy_all'], found['pairs_all']) == (1 / 4, 4)


def test_intervals_match_a_bootstrap_over_prompts():
  """Reference: resample prompts, pool their pairs, take the percentiles."""
  rng = np.random.default_rng(1)
  prompts = [[(rank, float(rng.integers(0, 6))) for rank in range(rng.integers(2, 5))]
             for _ in range(60)]
  found = agreement(prompts, 5.0)
  accuracies = []
  for _ in range(2000):
    pairs = [a[1] > b[1] for i in rng.integers(0, 60, 60)
             for a, b in itertools.combinations(prompts[i], 2)]
    accuracies.append(np.mean(pairs))
  expected = np.percentile(accuracies, (2.5, 97.5))
  assert found['intervals']['pairwise_accuracy'] == pytest.approx(expected, abs=0.01)
  low, high = found['intervals']['spearman']
  assert low < found['spearman'] < high and found == agreement(prompts, 5.0)


def test_few_pairs_have_a_wide_interval():
  """In the demo, SFT's .633 came from 30 pairs and M1's .697 from 971. The table must show it."""
  few, many = ([[(0, 4.0), (1, 2.0)]] * 2 * n + [[(0, 2.0), (1, 4.0)]] * n for n in (10, 320))
  widths = [np.ptp(agreement(prompts, 5.0)['intervals']['pairwise_accuracy'])
            for prompts in (few, many)]
  assert widths[0] > 0.25 > 0.1 > widths[1]
