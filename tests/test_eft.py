import pytest

from srlm_jax.data import eft, scores as scoring, templates

JUDGE = templates.load_judge('additive', 0, 5)


def ranked(n=3):
  return dict(id='p', prompt='Why?', split='train', replies=[dict(id=str(i), text=f't{i}', rank=i) for i in range(n)])


def scores(*lists):
  """Scores of three judgements a reply."""
  made = [dict(response_id=f'p/{i}', j=j, score=score, text=f'{i}.{j}') for i, three in enumerate(lists)
          for j, score in enumerate(three)]
  return scoring.by_response(made, 1)


def test_agreement_with_people_keeps_the_judgement_nearest_to_the_mean():
  examples, dropped = eft.from_baseline([ranked()], scores([5, 4, 4], [3, 3, 3], [1, None, 2]), JUDGE)
  assert not dropped and [(e['response'], e['score']) for e in examples] == [('0.1', 4), ('1.0', 3), ('2.0', 1)]
  assert examples[0]['prompt'] == JUDGE.render('Why?', 't0') and examples[0]['id'] == 'p/0'


@pytest.mark.parametrize('lists, reason', [
    (([3, 3, 3], [4, 4, 4], [1, 1, 1]), 'against the order of people'),
    (([3] * 3, [3] * 3, [3] * 3), 'all scores equal'),
    (([5] * 3, [None] * 3, [1] * 3), 'a reply without a parsed score')])
def test_the_rest_is_dropped_with_a_reason(lists, reason):
  assert eft.from_baseline([ranked()], scores(*lists), JUDGE) == ([], {reason: 1})


def test_ties_are_allowed_where_something_is_in_order():
  assert len(eft.from_baseline([ranked()], scores([4] * 3, [4] * 3, [1] * 3), JUDGE)[0]) == 3


def test_ranks_as_scores_run_from_highest_to_lowest_and_parse():
  examples = eft.from_ranks([ranked(3), dict(ranked(2), id='q')], JUDGE)
  assert [e['score'] for e in examples] == [5, 2, 0, 5, 0]
  assert all(JUDGE.parse(e['response']) == (e['score'], '') for e in examples)


def test_balance_cuts_the_commonest_score_to_the_next():
  examples = [dict(id=f'{s}{i}', score=float(s)) for s, n in ((4, 9), (3, 4), (1, 2)) for i in range(n)]
  kept = eft.balance(examples)
  assert scoring.histogram(e['score'] for e in kept) == {'1': 2, '3': 4, '4': 4}
  assert kept == [e for e in examples if e in kept] and kept == eft.balance(examples)
