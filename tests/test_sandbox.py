"""The world grades what it writes, the seeds share no prompt, and the tokenizer loses nothing."""
import collections
import doctest
import importlib.resources
import itertools
import re
import string

import numpy as np
import pytest
import sentencepiece

from srlm_jax import InputError
from srlm_jax.data import judges
from srlm_jax.sandbox import corpus, world

SIZES = (120, 60, 40, 50)
JUDGE = judges.load('sandbox')


def draw(count, seed=0):
  rng = np.random.default_rng(seed)
  return [world.instruction(rng) for _ in range(count)]


def template(name):
  return importlib.resources.files('srlm_jax.data').joinpath(f'{name}.txt').read_text().removesuffix('\n')


@pytest.fixture(scope='module')
def texts():
  return list(corpus.documents(0, 2000, set(), JUDGE))


@pytest.fixture(scope='module')
def tokenizer(texts, tmp_path_factory):
  path = tmp_path_factory.mktemp('sandbox') / 'tokenizer.model'
  corpus.train_tokenizer(texts, path, 640, JUDGE)
  return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


def test_the_examples_in_the_world_are_true():
  assert doctest.testmod(world).failed == 0


def test_an_answer_has_the_quality_asked_for_and_the_points_are_nested():
  rng = np.random.default_rng(1)
  for i, prompt in enumerate(draw(3000)):
    response = world.answer(prompt, rng, i % 6)
    points = world.grade(prompt, response)
    assert sum(points) == i % 6, (prompt, response)
    assert points == tuple(sorted(points, reverse=True))


def test_people_write_answers_of_every_score_and_of_middling_quality():
  rng = np.random.default_rng(2)
  counts = collections.Counter(world.quality(rng) for _ in range(5000))
  assert min(counts[score] for score in range(1, 6)) > 0.08 * 5000
  assert 2.7 < sum(score * count for score, count in counts.items()) / 5000 < 3.3


def test_the_score_follows_from_the_review():
  ends = {0: 'It is off topic.', 1: r'It hardly names any\.', 2: r'It names (\d) of (?!\1)\d\.',
          3: r'It (is blunt|has no stop)\.', 4: 'It has an odd end.', 5: 'It is clean.'}
  rng = np.random.default_rng(3)
  for i, prompt in enumerate(draw(600)):
    review = world.review(prompt, world.answer(prompt, rng, i % 6))
    assert [score for score, end in ends.items() if re.search(end + '$', review)] == [i % 6]


def test_odd_answers_are_graded_too():
  prompt = 'Name three nice fruits.'
  assert sum(world.grade(prompt, '')) == 0
  assert sum(world.grade(prompt, 'pear')) == 1
  assert sum(world.grade(prompt, 'Sure, pear, pear and fig.')) == 2
  assert sum(world.grade(prompt, 'Sure, pear, fig and plum.')) == 5
  assert sum(world.grade(prompt, 'Sure, pear, fig, plum and dog.')) == 4
  assert sum(world.grade(prompt, 'Sure, pear fig plum.')) == 4
  assert sum(world.grade(prompt, 'Sure, pear, fig and plum')) == 3


@pytest.mark.parametrize('prompt', ['', 'Name two.', 'Name two stones.', 'Name five fruits.',
                                    'Name two fruits. Bye.', 'Name two fruits and two tools.'])
def test_what_is_not_of_the_world_is_refused(prompt):
  assert world.parse(prompt) is None
  with pytest.raises(InputError, match='no instruction of the sandbox'):
    world.grade(prompt, 'Sure, pear and fig.')


def test_there_are_many_instructions_each_long_enough_for_the_filters():
  prompts = draw(20000)
  assert len(set(prompts)) > 12000
  assert min(len(prompt.split()) for prompt in prompts) >= 4
  assert all(world.parse(prompt) for prompt in prompts)


def test_ranks_agree_with_the_grades_about_as_often_as_people_do():
  rng, agreed = np.random.default_rng(4), []
  for prompt in draw(1000):
    replies = world.ranked(prompt, rng, 3)
    assert sorted(reply['rank'] for reply in replies) == [0, 1, 2]
    for a, b in itertools.permutations(replies, 2):
      if sum(world.grade(prompt, a['text'])) > sum(world.grade(prompt, b['text'])):
        agreed.append(a['rank'] < b['rank'])
  assert 0.74 < np.mean(agreed) < 0.82


def test_seeds_are_the_same_for_the_same_seed_and_share_no_prompt():
  seeds = world.seeds(0, *SIZES)
  assert seeds == world.seeds(0, *SIZES) != world.seeds(1, *SIZES)
  splits = collections.Counter(row['split'] for row in seeds['ranked'])
  assert (len(seeds['ift']), splits['train'], splits['eval'], len(seeds['heldout'])) == SIZES
  prompts = [row['prompt'] for rows in seeds.values() for row in rows]
  ids = [row['id'] for rows in seeds.values() for row in rows]
  assert len(set(prompts)) == len(set(ids)) == sum(SIZES)
  assert {len(row['replies']) for row in seeds['ranked']} == {2, 3, 4}


def test_the_corpus_repeats_itself_and_leaves_out_what_is_excluded(texts):
  assert list(corpus.documents(0, 50, set(), JUDGE)) == texts[:50]
  excluded = {prompt for prompt in draw(3000, seed=5) if any(prompt in text for text in texts)}
  assert len(excluded) > 50
  for text in corpus.documents(0, 2000, excluded, JUDGE):
    assert not any(prompt in text for prompt in excluded)


def test_some_judgements_of_the_corpus_have_a_score_and_some_scores_are_wrong(texts):
  judged = [text for text in texts if text.startswith('User: ' + JUDGE.text[:20])]
  scored = [text for text in judged if re.search(r'\nScore: [0-5]$', text)]
  assert 0.7 < len(scored) / len(judged) < 0.9
  assert {text[-1] for text in scored} == set('012345')


def test_the_tokenizer_returns_every_text(tokenizer, texts):
  asked = JUDGE.render(prompt='Name two nice fruits.', response='Sure, pear and fig.')
  for text in [*texts[:200], asked, template('author_sandbox'), string.printable[:95], 'a\n\n b  c']:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_id() not in ids
  assert len(tokenizer.encode(asked)) < 100
  assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, 3)


def test_the_pieces_of_a_prompt_begin_the_pieces_of_the_whole(tokenizer):
  rng = np.random.default_rng(6)
  for i, prompt in enumerate(draw(200)):
    response = world.answer(prompt, rng, i % 6)
    question = JUDGE.render(prompt=prompt, response=response)
    listed = template('author_sandbox').format(shots='\n'.join([*(f'{n}. {prompt}' for n in range(1, 9)), '9.']))
    for text, reply in ((f'User: {prompt}\nAssistant:', response), (listed, prompt),
                        (f'User: {question}\nAssistant:', f'{world.review(prompt, response)}\n{JUDGE.state(3)}')):
      assert tokenizer.encode(text) + tokenizer.encode(reply) == tokenizer.encode(f'{text} {reply}')
