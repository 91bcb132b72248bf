from collections import Counter
import dataclasses

import pytest
from samples import judgement, ranked

from srlm_jax import InputError, records, schema
from srlm_jax.data import ranked as ranking
from srlm_jax.reward import eft, judges, scores as scoring

JUDGE = judges.load('additive')


def scores(*lists):
  """One list per reply of the scores of its judgements -> the score of each reply."""
  return [scoring.of([judgement(f'p/{i}', j, score, text=f'{i}.{j}')
                      for j, score in enumerate(judged)], 1) for i, judged in enumerate(lists)]


def test_scores_in_the_order_of_the_ranks_keep_the_judgement_nearest_to_the_mean():
  judged = scores([5, 4, 4], [3, 3, 3], [1, None, 2])
  examples, dropped = eft.from_baseline(ranked('p', range(3)), judged, JUDGE)
  assert not dropped
  assert [(e.response, e.score) for e in examples] == [('0.1', 4), ('1.0', 3), ('2.0', 1)]
  assert examples[0].prompt == JUDGE.render(prompt='Why?', response='t0')
  assert examples[0].id == 'p/0'


@pytest.mark.parametrize('lists, reason', [
    (([3, 3, 3], [4, 4, 4], [1, 1, 1]), 'scores contradict the human ranks'),
    (([3] * 3, [3] * 3, [3] * 3), 'no pair agrees with the human ranks'),
    (([5] * 3, [None] * 3, [1] * 3), 'a reply of the prompt has no score')])
def test_other_prompts_are_dropped_with_a_reason(lists, reason):
  dropped = {f'p/{i}': reason for i in range(3)}
  assert eft.from_baseline(ranked('p', range(3)), scores(*lists), JUDGE) == ([], dropped)


def test_targets_must_not_contradict_the_ranks():
  """Means of 3.5 and 3.33 are in order. The judgements nearest to them, 3 and 4, are not."""
  examples, dropped = eft.from_baseline(ranked('p', range(2)), scores([3, 4], [4, 4, 2]), JUDGE)
  assert not examples and set(dropped.values()) == {'targets contradict the human ranks'}
  # 4 is the first of the two judgements that are equally near to 3.5.
  examples, dropped = eft.from_baseline(ranked('p', range(2)), scores([4, 3], [4, 4, 2]), JUDGE)
  assert [e.score for e in examples] == [4, 4] and not dropped


def test_ties_are_allowed_if_another_pair_agrees():
  judged = scores([4] * 3, [4] * 3, [1] * 3)
  assert len(eft.from_baseline(ranked('p', range(3)), judged, JUDGE)[0]) == 3


def test_scores_from_ranks_span_the_scale_and_parse():
  (examples, dropped), (two, _) = (eft.from_ranks(ranked('p', range(n)), JUDGE) for n in (3, 2))
  assert not dropped
  assert [[e.score for e in some] for some in (examples, two)] == [[5, 3, 0], [5, 0]]
  assert all(JUDGE.parse(e.response) == (e.score, '') for e in examples)


def balanced(examples):
  balance = eft.Balance()
  for example in examples:
    balance.add(example)
  kept = [e for e in examples if balance.keeps(e)]
  assert balance.after == Counter(e.score for e in kept)
  return kept


def test_balance_downsamples_the_most_frequent_score_to_the_runner_up():
  examples = [schema.EftExample(id=f'{s}{i}', prompt='', response='', score=float(s))
              for s, n in ((4, 9), (3, 4), (1, 2)) for i in range(n)]
  kept = balanced(examples)
  assert scoring.histogram(e.score for e in kept) == {'1': 2, '3': 4, '4': 4}
  assert kept == balanced(examples)
  assert balanced(examples[:9]) == examples[:9]  # there is no other score
  # The smallest hashes of those with the most frequent score.
  removed = sorted((e.id for e in examples[:9]), key=records.digest)[4:]
  assert kept == [e for e in examples if e.id not in removed]


def test_replies_with_equal_ranks_have_no_order():
  tied = ranked('p', (0, 1, 1))
  ranking.check([tied], 'f')
  assert len(eft.from_baseline(tied, scores([5] * 3, [2] * 3, [4] * 3), JUDGE)[0]) == 3
  reason = 'all replies have the same human rank'
  assert eft.from_ranks(ranked('p', (0, 0)), JUDGE) == ([], {'p/0': reason, 'p/1': reason})


@pytest.mark.parametrize('ranks', [(0, 2), (1, 2), (0,), (0, 0, 1), (0, 1, 3)])
def test_invalid_ranks_are_refused(ranks):
  with pytest.raises(InputError, match='r.jsonl: the ranks .* of p are not a ranking'):
    ranking.check([ranked('p', ranks)], 'r.jsonl')


def test_a_reply_without_text_is_refused():
  replies = tuple(schema.Reply(id=str(i), text=text, rank=i) for i, text in enumerate('t '))
  with pytest.raises(InputError, match='a reply of p has no text'):
    ranking.check([ranked('p', (), replies=replies)], 'r.jsonl')


def test_a_cut_judgement_is_not_a_target():
  judged = scores([5, 4, 4], [3, 3, 3])
  cut = [dataclasses.replace(j, finish='length') for j in judged[1].judgements]
  judged[1] = dataclasses.replace(judged[1], judgements=cut)
  examples, dropped = eft.from_baseline(ranked('p', range(2)), judged, JUDGE)
  assert [e.id for e in examples] == ['p/0'] and dropped == {'p/1': 'no finished judgement'}


def test_ranks_are_stated_in_the_format_of_the_template():
  judge = judges.load('multiple_choice')
  examples, _ = eft.from_ranks(ranked('p', range(3)), judge)
  last_lines = [e.response.splitlines()[-1] for e in examples]
  assert last_lines == ['Answer: E', 'Answer: C', 'Answer: A']
  parsed = [judge.parse(e.response)[0] for e in examples]
  assert parsed == [e.score for e in examples] == [5, 3, 1]


def test_the_table_shows_the_yield_the_reasons_and_the_scores_before_and_after():
  shown = eft.table(schema.EftSummary(
      examples=3, replies=8, prompts=3, judgements=24, parsed=20,
      scores_judged={'0': 2, '4': 18}, scores_before={'4': 5}, scores={'4': 3},
      dropped={'scores contradict the human ranks': 3}))
  assert '3 examples from 8 ranked replies of 3 prompts' in shown
  assert 'scores contradict the human ranks' in shown
  rows = [line.split() for line in shown.splitlines()[-2:]]
  assert rows == [['0', '2', '0', '0'], ['4', '18', '5', '3']]
