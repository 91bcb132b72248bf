import random

import pytest
from rouge_score import rouge_scorer

from configs import base
from srlm_jax.data import templates
from srlm_jax.sample import prompts


def screen(seeds=('Name a nice fruit for me.',), held=('Where is the moon now?',)):
  return prompts.Filter(base.get('m2').prompts, list(seeds), list(held))


@pytest.mark.parametrize('text, finish, reason', [
    (' Tell me about old ships.\n10. More', 'eos', ''),
    ('Tell me about', 'length', 'cut off by length'),
    ('Ships please.', 'eos', 'not 4 to 150 words'), ('', 'eos', 'not 4'),
    ('Tell me a ' + 'very ' * 150 + 'long story', 'eos', 'not 4 to 150 words'),
    ('Draw me a small horse.', 'eos', 'asks for what'), ('What is in this picture?', 'eos', 'asks for what'),
    ('Please go to the shop now.', 'eos', 'asks for what'),
    ('Write a program that sorts numbers.', 'eos', 'a start that'),
    ('"Tell me about old ships."', 'eos', 'a start that'), ('Öl is what you need.', 'eos', 'a start that'),
    ('where is the MOON now', 'eos', 'held out'), ('Name a nice fruit for me!', 'eos', 'seen before'),
    ('Name a nice fruit for us.', 'eos', 'like one seen before'), ('x', 'too_long', 'shots too long')])
def test_each_filter_says_why(text, finish, reason):
  prompt, why = screen()(text, finish)
  assert why.startswith(reason) and bool(why) == bool(reason)
  assert reason or prompt == 'Tell me about old ships.'


def test_words_that_only_hold_a_banned_word_pass():
  assert screen()('Explain photography and mapping briefly.', 'eos')[1] == ''


def test_what_was_accepted_is_known_afterwards():
  s = screen()
  assert s('Tell me about old ships.', 'eos')[1] == ''
  assert s('Tell me about old ships!', 'eos')[1] == 'seen before'
  assert s('Tell me about big ships.', 'eos')[1] == 'like one seen before'
  assert s.dropped == {'seen before': 1, 'like one seen before': 1}


def test_rouge_is_rouge_score_s():
  scorer = rouge_scorer.RougeScorer(['rougeL'], use_stemmer=False)
  rng = random.Random(0)
  for _ in range(500):
    a, b = ([rng.choice('abcde') for _ in range(rng.randint(1, 9))] for _ in range(2))
    wanted = scorer.score(' '.join(a), ' '.join(b))['rougeL'].fmeasure
    assert prompts.rouge_l_above(a, b, wanted - 1e-9) and not prompts.rouge_l_above(a, b, wanted + 1e-9)


@pytest.mark.parametrize('name', ['list', 'sandbox'])
def test_the_author_is_asked_for_the_next_number(name):
  asked = templates.load_author(name).replace('{shots}', prompts.numbered([f'Task {i}.' for i in range(8)]))
  assert asked.endswith('\n8. Task 7.\n9.')


def test_shots_are_six_seeds_and_two_new_ones_by_a_seed():
  config, seeds, new = base.get('m2').prompts, [f's{i}' for i in range(50)], [f'n{i}' for i in range(9)]
  shots = prompts.draw_shots(config, seeds, new, '0/3')
  assert len(set(shots)) == 8 and sum(s.startswith('n') for s in shots) == 2
  assert shots == prompts.draw_shots(config, seeds, new, '0/3') != prompts.draw_shots(config, seeds, new, '0/4')
  assert sum(s.startswith('s') for s in prompts.draw_shots(config, seeds, [], '0/3')) == 8
