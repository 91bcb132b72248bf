from srlm_jax.data import scores as scoring
from srlm_jax.sample import pairs


def candidate(n, text='', finish='eos'):
  return dict(id=f'p/{n}', prompt_id='p', prompt='Why?', response=text or f'answer {n}', finish=finish)


def scores(*means):
  return {f'p/{n}': scoring.Score(mean, []) for n, mean in enumerate(means)}


def test_the_highest_mean_against_the_lowest():
  pair = pairs.max_min([candidate(n) for n in range(4)], scores(3.0, 1.0, 4.5, 2.0), False)
  assert (pair['chosen'], pair['chosen_score']) == ('answer 2', 4.5)
  assert (pair['rejected'], pair['rejected_score']) == ('answer 1', 1.0)


def test_among_equals_the_first_is_taken():
  pair = pairs.max_min([candidate(n) for n in range(4)], scores(4.0, 1.0, 4.0, 1.0), False)
  assert (pair['chosen_id'], pair['rejected_id']) == ('p/0', 'p/1')


def test_equal_scores_and_equal_texts_give_no_pair():
  assert pairs.max_min([candidate(n) for n in range(3)], scores(4.0, 4.0, 4.0), False) == 'all scores equal'
  assert pairs.max_min([candidate(n, 'same') for n in range(2)], scores(4.0, 3.0), False) == 'same text'


def test_a_failed_judgement_is_missing_and_not_a_zero():
  three = [candidate(n) for n in range(3)]
  assert pairs.max_min(three, scores(4.0, None, 3.0), False)['rejected_id'] == 'p/2'
  assert pairs.max_min(three, scores(4.0, None, None), False) == 'fewer than two scored candidates'


def test_an_unfinished_response_may_be_rejected_but_not_chosen():
  two = [candidate(0, finish='length'), candidate(1)]
  assert pairs.max_min(two, scores(1.0, 4.0), False)['rejected_id'] == 'p/0'
  assert pairs.max_min(two, scores(4.0, 1.0), False) == 'best candidate unfinished'
  assert pairs.max_min(two, scores(4.0, 1.0), True)['chosen_id'] == 'p/0'
  assert pairs.max_min([candidate(0, finish='length'), candidate(1, finish='length')], scores(4.0, 1.0), False) == (
      'no finished candidate')


def test_an_empty_response_takes_no_part():
  assert pairs.max_min([candidate(0, ' '), candidate(1)], scores(0.0, 4.0), False) == 'fewer than two scored candidates'


def judgement(j, score):
  return dict(response_id='p/0', j=j, score=score, text='')


def test_the_mean_is_of_the_parsed_and_needs_a_quorum():
  three = [judgement(0, 4.0), judgement(1, None), judgement(2, 3.0)]
  assert scoring.by_response(three, 2)['p/0'].mean == 3.5
  assert scoring.by_response(three, 3)['p/0'].mean is None
  assert scoring.by_response(three[1:2], 1)['p/0'].mean is None
