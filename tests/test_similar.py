import random

from hypothesis import given, strategies as st
import pytest
from rouge_score import rouge_scorer

from srlm_jax.data import similar

WORDS = st.lists(st.sampled_from(['a', 'b', 'c', 'the', 'Cat', 'dog.', 'of']),
                 max_size=8).map(' '.join)
SCORER = rouge_scorer.RougeScorer(['rougeL'], use_stemmer=False)


def by_brute_force(known, text, limit):
  return any(SCORER.score(k, text)['rougeL'].fmeasure > limit for k in known)


@given(st.lists(WORDS, max_size=8), WORDS, st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.8, 0.99]))
def test_the_index_agrees_with_brute_force(known, text, limit):
  found = similar.Index(known).find(text, limit)
  assert (found is not None) == by_brute_force(known, text, limit)
  assert found is None or SCORER.score(found, text)['rougeL'].fmeasure > limit


@pytest.mark.parametrize('limit', [0.3, 0.5, 0.7, 0.9])
def test_the_index_agrees_with_brute_force_on_texts_derived_from_each_other(limit):
  rng = random.Random(0)
  words = [f'w{i}' for i in range(60)]
  known, index, hits = [], similar.Index(), 0
  for _ in range(300):
    if known and rng.random() < 0.7:
      text = rng.choice(known).split()
    else:
      text = rng.choices(words, k=rng.randint(4, 20))
    text = ' '.join(rng.choice(words) if rng.random() < 0.25 else word for word in text)
    found = index.find(text, limit) is not None
    assert found == by_brute_force(known, text, limit)
    hits += found
    if not found:
      known.append(text)
      index.add(text)
  assert 5 < hits < 295
  assert index.compared < 0.5 * len(known) * 300  # the bound ruled out most texts


@given(st.lists(WORDS, max_size=8), WORDS)
def test_the_nearest_text_is_that_of_brute_force(known, text):
  scores = [SCORER.score(k, text)['rougeL'].fmeasure for k in known]
  found = similar.Index(known).nearest(text)
  if found is None:
    assert max(scores, default=0) == 0
  else:
    assert found == (max(scores), scores.index(max(scores)))


def test_a_text_without_words_is_not_similar_to_any():
  assert similar.Index(['', '漢字']).find('漢字', 0.0) is None
  assert similar.Index([]).find('a b', 0.0) is None


HELD = ('Where is the moon now?', 'Name two nice fruits for a party.', 'Hello there')


@pytest.mark.parametrize('text, why', [
    ('where is THE moon, now', 'held out'), ('Hello, there!', 'held out'),
    ('It is late. Where is the moon now? Answer briefly.', 'contains a held-out prompt'),
    ('Name two nice fruits.', 'part of a held-out prompt'),
    ('two nice fruits for a party', 'part of a held-out prompt'),
    ('Where is the moon right now?', 'similar to a held-out prompt'),
    ('Name two nice tools for my work.', ''), ('Why?', ''), ('the moon', ''), ('', '')])
def test_a_held_out_prompt_is_found_in_other_forms(text, why):
  assert similar.HeldOut(HELD).why(text, 0.7) == why


@pytest.mark.parametrize('held, text, why', [
    ('Name two jobs.', 'We have a bet. Name two jobs.', 'contains a held-out prompt'),
    ('Name two jobs.', 'My teacher said: "Name two jobs!" Please help.',
     'contains a held-out prompt'),
    ('Name two jobs.', 'name two jobs\nThank you.', 'contains a held-out prompt'),
    ('Name two jobs.', 'Well… Name two jobs.', 'contains a held-out prompt'),
    ('Name two jobs.', 'We bet (name two jobs).', 'contains a held-out prompt'),
    ('Name two jobs.', 'A bet — name two jobs.', 'contains a held-out prompt'),
    ('Name two jobs.', '1. Name two jobs 2. Sing it', 'contains a held-out prompt'),
    ('Hi. Why not?', 'I ask you. Hi! Why not? Tell me.', 'contains a held-out prompt'),
    ('Name two jobs.', 'Please name two jobs for a baker.', ''),
    ('Name two jobs.', 'Name two jobs and a fruit.', ''),
    ('Name two.', 'Name two. Jobs are hard.', 'contains a held-out prompt'),
    ('We have a bet. Name two jobs.', 'Name two jobs.', 'part of a held-out prompt'),
    ('...', 'We have a bet. Name two jobs.', '')])
def test_a_short_held_out_prompt_is_found_as_whole_sentences(held, text, why):
  assert similar.HeldOut([held]).why(text, .99) == why


@given(st.lists(st.sampled_from('abcdef'), min_size=4, max_size=9),
       st.lists(st.sampled_from('abcdef'), max_size=5),
       st.lists(st.sampled_from('abcdef'), max_size=5))
def test_words_before_and_after_do_not_hide_a_held_out_prompt(held, before, after):
  assert similar.HeldOut([' '.join(held)]).why(' '.join(before + held + after), 1.0)
