import pytest

from srlm_jax import InputError
from srlm_jax.reward import eft, judges, scores as scoring

JUDGE = judges.load('additive')


def ranked(n=3):
  return dict(id='p', prompt='Why?', split='train', replies=[dict(id=str(i), text=f't{i}', rank=i) for i in range(n)])


def scores(*lists):
  """Scores of three judgements a reply."""
  made = [dict(response_id=f'p/{i}', j=j, score=score, text=f'{i}.{j}', finish='eos') for i, three in enumerate(lists)
          for j, score in enumerate(three)]
  return scoring.by_response(made, 1)


def test_agreement_with_people_keeps_the_judgement_nearest_to_the_mean():
  examples, dropped = eft.from_baseline([ranked()], scores([5, 4, 4], [3, 3, 3], [1, None, 2]), JUDGE)
  assert not dropped and [(e['response'], e['score']) for e in examples] == [('0.1', 4), ('1.0', 3), ('2.0', 1)]
  assert examples[0]['prompt'] == JUDGE.render(prompt='Why?', response='t0') and examples[0]['id'] == 'p/0'


@pytest.mark.parametrize('lists, reason', [
    (([3, 3, 3], [4, 4, 4], [1, 1, 1]), 'against the order of people'),
    (([3] * 3, [3] * 3, [3] * 3), 'no two scored in the order of people'),
    (([5] * 3, [None] * 3, [1] * 3), 'a reply of the prompt without a score')])
def test_the_rest_is_dropped_with_a_reason(lists, reason):
  assert eft.from_baseline([ranked()], scores(*lists), JUDGE) == ([], {f'p/{i}': reason for i in range(3)})


def test_targets_too_keep_the_order_of_people():
  """Means of 3.5 and 3.33 are in order; the judgements nearest to them, 3 and 4, are not."""
  examples, dropped = eft.from_baseline([ranked(2)], scores([3, 4], [4, 4, 2]), JUDGE)
  assert not examples and set(dropped.values()) == {'targets against the order of people'}
  examples, dropped = eft.from_baseline([ranked(2)], scores([4, 3], [4, 4, 2]), JUDGE)  # the first of equals is 4
  assert [e['score'] for e in examples] == [4, 4] and not dropped


def test_ties_are_allowed_where_something_is_in_order():
  assert len(eft.from_baseline([ranked()], scores([4] * 3, [4] * 3, [1] * 3), JUDGE)[0]) == 3


def test_ranks_as_scores_run_from_highest_to_lowest_and_parse():
  examples, dropped = eft.from_ranks([ranked(3), dict(ranked(2), id='q')], JUDGE)
  assert not dropped
  assert [e['score'] for e in examples] == [5, 3, 0, 5, 0]
  assert all(JUDGE.parse(e['response']) == (e['score'], '') for e in examples)


def test_balance_cuts_the_commonest_score_to_the_next():
  examples = [dict(id=f'{s}{i}', score=float(s)) for s, n in ((4, 9), (3, 4), (1, 2)) for i in range(n)]
  kept = eft.balance(examples)
  assert scoring.histogram(e['score'] for e in kept) == {'1': 2, '3': 4, '4': 4}
  assert kept == [e for e in examples if e in kept] and kept == eft.balance(examples)


def test_ties_of_people_carry_no_order():
  tied = dict(ranked(3), replies=[dict(id=str(i), text=f't{i}', rank=rank) for i, rank in enumerate((0, 1, 1))])
  eft.check([tied], 'f')
  assert len(eft.from_baseline([tied], scores([5] * 3, [2] * 3, [4] * 3), JUDGE)[0]) == 3
  equal = dict(ranked(2), replies=[dict(id=str(i), text=f't{i}', rank=0) for i in range(2)])
  assert eft.from_ranks([equal], JUDGE) == ([], {'p/0': 'people rank all equal', 'p/1': 'people rank all equal'})


@pytest.mark.parametrize('ranks', [(0, 2), (1, 2), (0,), (0, 0, 1), (0, 1, 3)])
def test_ranks_that_are_no_ranking_are_refused(ranks):
  record = dict(ranked(), replies=[dict(id=str(i), text='t', rank=rank) for i, rank in enumerate(ranks)])
  with pytest.raises(InputError, match='r.jsonl: the ranks .* of p are not a ranking'):
    eft.check([record], 'r.jsonl')


def test_a_reply_without_text_is_refused():
  record = dict(ranked(2), replies=[dict(id='0', text='t', rank=0), dict(id='1', text=' ', rank=1)])
  with pytest.raises(InputError, match='a reply of p has no text'):
    eft.check([record], 'r.jsonl')


def test_a_cut_judgement_is_no_target():
  made = scores([5, 4, 4], [3, 3, 3])
  for judgement in made['p/1'].judgements:
    judgement['finish'] = 'length'
  examples, dropped = eft.from_baseline([ranked(2)], made, JUDGE)
  assert [e['id'] for e in examples] == ['p/0'] and dropped == {'p/1': 'no finished judgement'}


def test_other_templates_state_the_ranks_in_their_own_form():
  judge = judges.load('multiple_choice')
  examples, _ = eft.from_ranks([ranked(3)], judge)
  assert [e['response'].splitlines()[-1] for e in examples] == ['Answer: E', 'Answer: C', 'Answer: A']
  assert [judge.parse(e['response'])[0] for e in examples] == [e['score'] for e in examples] == [5, 3, 1]


def test_the_table_says_the_yield_the_reasons_and_the_scores_before_and_after():
  said = eft.table(dict(examples=3, replies=8, prompts=3, judgements=24, parsed=20, scores_judged={'0': 2, '4': 18},
                        scores_before={'4': 5}, scores={'4': 3}, dropped={'against the order of people': 3}))
  assert '3 examples from 8 ranked replies of 3 prompts' in said and 'against the order of people' in said
  assert [line.split() for line in said.splitlines()[-2:]] == [['0', '2', '0', '0'], ['4', '18', '5', '3']]


@pytest.mark.parametrize('replies', [
    None, ['a', 'b'], [dict(id='0', text='a'), dict(id='1', text='b')],
    [dict(id='0', text='a', rank=None), dict(id='1', text='b', rank=1)],
    [dict(id='0', text='a', rank=0.0), dict(id='1', text='b', rank=True)],
    [dict(id='0', text=3, rank=0), dict(id='1', text='b', rank=1)], [dict(text='a', rank=0), dict(text='b', rank=1)]])
def test_records_of_another_form_are_one_sentence(replies):
  with pytest.raises(InputError, match='r.jsonl: .* of p'):
    eft.check([dict(ranked(), replies=replies)], 'r.jsonl')
