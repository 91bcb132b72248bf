from conftest import DATA
from etils import epath
import pytest

from srlm_jax import config as configs, InputError, records
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.sample import prompts


def screen(seeds=('Name a nice fruit for me.',), held=('Where is the moon now?',)):
  return prompts.Filter(configs.get('m2').prompts, list(seeds), list(held))


@pytest.mark.parametrize('text, finish, reason', [
    (' Tell me about old ships.\n10. More', 'eos', ''),
    ('Tell me about', 'length', 'cut off by length'),
    ('Ships please.', 'eos', 'not 4 to 150 words'), ('', 'eos', 'not 4'),
    ('Tell me a ' + 'very ' * 150 + 'long story', 'eos', 'not 4 to 150 words'),
    ('Draw me a small horse.', 'eos', 'asks for what'), ('What is in this picture?', 'eos', 'asks for what'),
    ('Please go to the shop now.', 'eos', 'asks for what'),
    ('Write a program that sorts numbers.', 'eos', 'a start that'),
    ('"Tell me about old ships."', 'eos', 'a start that'), ('Öl is what you need.', 'eos', 'a start that'),
    ('where is the MOON now', 'eos', 'held out'),
    ('Say it: where is the moon now', 'eos', 'holds a held-out prompt'),
    ('Name a nice fruit for me!', 'eos', 'seen before'),
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


@pytest.mark.parametrize('text, prompt, more', [
    (' 9. Name a fruit.', 'Name a fruit.', False), ('Name a fruit.\n\n', 'Name a fruit.', False),
    ('Name a fruit.\n10. Name a tree.', 'Name a fruit.', True),
    ('Name a fruit. 10. Name a tree.', 'Name a fruit.', True),
    ('Name a fruit.\nA pear is a fruit.', 'Name a fruit.', True), ('Name a fruit. Answer: pear', 'Name a fruit.', True),
    ('Name a fruit. [/INST] Sure', 'Name a fruit.', True), ('What is it? Assistant: It is', 'What is it?', True),
    ('Count from 1 to 10. Then count back.', 'Count from 1 to 10. Then count back.', False),
    ('Compare version 2. and 3. of it.', 'Compare version 2. and 3. of it.', False),
    ('Explain the phrase "The Answer: 42".', 'Explain the phrase "The Answer: 42".', False), ('', '', False)])
def test_several_prompts_and_a_started_answer_are_cut_off(text, prompt, more):
  assert prompts.cut(text, 9) == (prompt, more)


def test_a_prompt_that_was_cut_by_us_may_have_ended_by_length():
  s = screen()
  assert s('Tell me about old ships. 10. Tell me', 'length') == ('Tell me about old ships.', '')
  assert s('Tell me about new planes and', 'length')[1] == 'cut off by length'
  assert s.shortened == 1


def test_a_held_out_prompt_is_counted_as_one_whatever_else_is_wrong_with_it():
  s = screen(held=['Draw a map of the city please.', 'Where is the moon now'])
  assert s('Draw a map of the city please.', 'eos')[1] == s('Where is the moon now', 'length')[1] == 'held out'


def test_evaluation_prompts_never_enter_and_are_read_from_their_own_files(tmp_path):
  (tmp_path / 'alpaca.json').write_text('[{"instruction": "Tell me about old ships."}]')
  (tmp_path / 'mt.jsonl').write_text('{"turns": ["Where did the sun go?", "Why?"]}\n'
                                     '{"prompt": "Sing a new song now."}\n')
  found = [p for name in ('alpaca.json', 'mt.jsonl') for p in prompts.evaluation_prompts(epath.Path(tmp_path / name))]
  assert found == ['Tell me about old ships.', 'Where did the sun go?', 'Why?', 'Sing a new song now.']
  s = screen(held=found)
  for text, why in (('Tell me about old ships!', 'held out'), ('Well. Where did the sun go? Say it.', 'holds a held'),
                    ('Sing a new song right now.', 'like a held')):
    assert s(text, 'eos')[1].startswith(why)
  (tmp_path / 'bad.jsonl').write_text('{"text": "x"}\n')
  with pytest.raises(InputError, match='record 1 of .*bad.jsonl has no prompt, instruction or turns'):
    prompts.evaluation_prompts(epath.Path(tmp_path / 'bad.jsonl'))


def test_mt_bench_itself_is_read():
  path = DATA / 'prompts' / 'mt_bench_questions.jsonl'
  if not path.exists():
    pytest.skip(f'{path} is absent; set SRLM_TEST_DATA')
  assert len(prompts.evaluation_prompts(epath.Path(path))) == 160  # of two turns


@pytest.mark.parametrize('name', ['list', 'sandbox'])
def test_a_base_model_goes_on_with_the_list(name, stories):
  tokenizer, shots = tokenizers.load(stories), [f'Task {i}.' for i in range(8)]
  asked = tokenizer.decode(prompts.ask('none', templates.load_author(name), shots, tokenizer))
  assert asked.endswith('\n8. Task 7.\n9.')


@pytest.mark.parametrize('chat', ['plain', 'llama2'])
def test_a_chat_model_is_asked_in_its_form_and_its_answer_begins_with_the_number(chat, stories):
  tokenizer, shots = tokenizers.load(stories), [f'Task {i}.' for i in range(8)]
  asked = tokenizer.decode(prompts.ask(chat, templates.load_author('chat'), shots, tokenizer))
  assert asked.endswith({'plain': '\nAssistant: 9.', 'llama2': ' [/INST] 9.'}[chat]) and '8. Task 7.' in asked


def test_a_prompt_of_an_earlier_round_is_not_written_again(tmp_path):
  assert prompts.earlier_rounds(tmp_path, 'm3') == []
  for model in ('m2', 'm3', 'm4'):
    records.write(tmp_path / model / 'prompts' / 'prompts.jsonl', [dict(id=model, prompt=f'Tell me of {model}.')])
  found = {name: [path.parent.parent.name for path in prompts.earlier_rounds(tmp_path, name)]
           for name in ('m2', 'm3', 'm4')}
  assert found == dict(m2=[], m3=['m2'], m4=['m2', 'm3'])


def test_shots_are_six_seeds_and_two_new_ones_and_differ_between_attempts_seeds_and_rounds():
  seeds, new = [f's{i}' for i in range(50)], [f'n{i}' for i in range(9)]
  def draw(model, seed, attempt, new=new):
    config = configs.get(model)
    config.seed = seed
    return prompts.draw_shots(config, seeds, new, attempt)
  shots = draw('m2', 0, 3)
  assert len(set(shots)) == 8 and sum(s.startswith('n') for s in shots) == 2 and shots == draw('m2', 0, 3)
  assert len({tuple(sorted(x)) for x in (shots, draw('m2', 0, 4), draw('m2', 1, 3), draw('m3', 0, 3))}) == 4
  assert sum(s.startswith('s') for s in draw('m2', 0, 3, [])) == 8
