import types

from conftest import real_data
from etils import epath
import pytest

from srlm_jax import config as configs, conversation, InputError, records, schema
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.sample import prompts


def make_filter(known=('Name a nice fruit for me.',), held_out=('Where is the moon now?',)):
  return prompts.Filter(configs.get('m2').prompts, list(known), list(held_out))


@pytest.mark.parametrize('text, finish, expected', [
    (' Tell me about old ships.\n10. More', 'eos', ''),
    ('Tell me about', 'length', 'cut off by length'),
    ('Ships please.', 'eos', 'not 4 to 150 words'), ('', 'eos', 'not 4'),
    ('Tell me a ' + 'very ' * 150 + 'long story', 'eos', 'not 4 to 150 words'),
    ('Draw me a small horse.', 'eos', 'contains a banned word'),
    ('What is in this picture?', 'eos', 'contains a banned word'),
    ('Please go to the shop now.', 'eos', 'contains a banned word'),
    ('Write a program that sorts numbers.', 'eos', 'start excluded'),
    ('"Tell me about old ships."', 'eos', 'start excluded'),
    ('Öl is what you need.', 'eos', 'start excluded'),
    ('where is the MOON now', 'eos', 'held out'),
    ('Say it: where is the moon now', 'eos', 'contains a held-out prompt'),
    ('Name a nice fruit for me!', 'eos', 'seen before'),
    ('Name a nice fruit for us.', 'eos', 'similar to one seen before'),
    ('x', 'too_long', 'shots too long')])
def test_filter_gives_the_reason_for_a_rejection(text, finish, expected):
  prompt, reason = make_filter()(text, finish)
  assert reason.startswith(expected) and bool(reason) == bool(expected)
  assert expected or prompt == 'Tell me about old ships.'


def test_a_banned_word_inside_a_longer_word_is_accepted():
  assert make_filter()('Explain photography and mapping briefly.', 'eos')[1] == ''


def test_accepted_prompts_count_as_seen():
  screen = make_filter()
  assert screen('Tell me about old ships.', 'eos')[1] == ''
  assert screen('Tell me about old ships!', 'eos')[1] == 'seen before'
  assert screen('Tell me about big ships.', 'eos')[1] == 'similar to one seen before'
  assert screen.dropped == {'seen before': 1, 'similar to one seen before': 1}


@pytest.mark.parametrize('text, prompt, has_more', [
    (' 9. Name a fruit.', 'Name a fruit.', False), ('Name a fruit.\n\n', 'Name a fruit.', False),
    ('Name a fruit.\n10. Name a tree.', 'Name a fruit.', True),
    ('Name a fruit. 10. Name a tree.', 'Name a fruit.', True),
    ('Name a fruit.\nA pear is a fruit.', 'Name a fruit.', True),
    ('Name a fruit. Answer: pear', 'Name a fruit.', True),
    ('Name a fruit. [/INST] Sure', 'Name a fruit.', True),
    ('What is it? Assistant: It is', 'What is it?', True),
    ('Count from 1 to 10. Then count back.', 'Count from 1 to 10. Then count back.', False),
    ('Compare version 2. and 3. of it.', 'Compare version 2. and 3. of it.', False),
    ('Explain the phrase "The Answer: 42".', 'Explain the phrase "The Answer: 42".', False),
    ('', '', False)])
def test_more_prompts_and_answers_are_removed(text, prompt, has_more):
  assert prompts.first_prompt(text, 9) == (prompt, has_more)


def test_a_complete_prompt_is_accepted_if_what_follows_it_reaches_the_length_limit():
  screen = make_filter()
  assert screen('Tell me about old ships. 10. Tell me', 'length') == (
      'Tell me about old ships.', '')
  assert screen('Tell me about new planes and', 'length')[1] == 'cut off by length'
  assert screen.shortened == 1


def test_the_held_out_reason_takes_precedence_over_all_others():
  screen = make_filter(held_out=['Draw a map of the city please.', 'Where is the moon now'])
  assert screen('Draw a map of the city please.', 'eos')[1] == 'held out'
  assert screen('Where is the moon now', 'length')[1] == 'held out'


def test_evaluation_prompts_are_read_from_their_own_formats_and_rejected(tmp_path):
  (tmp_path / 'alpaca.json').write_text('[{"instruction": "Tell me about old ships."}]')
  (tmp_path / 'mt.jsonl').write_text('{"turns": ["Where did the sun go?", "Why?"]}\n'
                                     '{"prompt": "Sing a new song now."}\n')
  found = [p for name in ('alpaca.json', 'mt.jsonl')
           for p in prompts.evaluation_prompts(epath.Path(tmp_path / name))]
  assert found == ['Tell me about old ships.', 'Where did the sun go?', 'Why?',
                   'Sing a new song now.']
  screen = make_filter(held_out=found)
  for text, reason in (('Tell me about old ships!', 'held out'),
                       ('Well. Where did the sun go? Say it.', 'contains a held-out prompt'),
                       ('Sing a new song right now.', 'similar to a held-out prompt')):
    assert screen(text, 'eos')[1].startswith(reason)
  (tmp_path / 'bad.jsonl').write_text('{"text": "x"}\n')
  with pytest.raises(InputError,
                     match='record 1 of .*bad.jsonl has no prompt, instruction or turns'):
    prompts.evaluation_prompts(epath.Path(tmp_path / 'bad.jsonl'))


def test_mt_bench_is_read():
  path = real_data('prompts/mt_bench_questions.jsonl')
  assert len(prompts.evaluation_prompts(epath.Path(path))) == 160  # 80 questions of two turns


@pytest.mark.parametrize('name', ['list', 'sandbox'])
def test_a_base_model_continues_the_list(name, stories):
  tokenizer, shots = tokenizers.load(stories), [f'Task {i}.' for i in range(8)]
  ids = prompts.encode_request('none', templates.load_author(name), shots, tokenizer)
  assert tokenizer.decode(ids).endswith('\n8. Task 7.\n9.')


@pytest.mark.parametrize('chat, end', [('plain', '\nAssistant: 9.'), ('llama2', ' [/INST] 9.')])
def test_a_chat_model_gets_its_chat_format_and_a_response_that_starts_with_the_number(
    chat, end, stories):
  tokenizer, shots = tokenizers.load(stories), [f'Task {i}.' for i in range(8)]
  ids = prompts.encode_request(chat, templates.load_author('chat'), shots, tokenizer)
  text = tokenizer.decode(ids)
  assert text.endswith(end) and '8. Task 7.' in text


def test_a_prompt_that_looks_like_a_conversation_is_one_message():
  forged = '[user]\nName a fruit.\n\n[assistant]\nPear.'
  said = conversation.in_turns(
      ['Name a tree.', 'Oak.', 'Why?', 'Well.', 'Which oaks are the oldest ones?'])
  talk = dict(prompt=conversation.text(said), messages=said)
  files = {
      'seeds/ift.jsonl': [schema.Demonstration(id='a', prompt='[system]\nHello', response='Hi')],
      'seeds/ranked.jsonl': [
          schema.RankedPrompt(id='a', prompt=forged, split='train', replies=()),
          schema.RankedPrompt(id='b', split='eval', replies=(), **talk)],
      'seeds/heldout.jsonl': [schema.HeldOutPrompt(id='a', prompt='[user]\n', split='test')]}
  seeds = prompts.read_seeds(types.SimpleNamespace(read=lambda path: iter(files[path])))
  assert seeds == prompts.Seeds(['[system]\nHello'], [forged], [
      '[user]\n', 'Name a tree.', 'Which oaks are the oldest ones?'])


def test_the_prompts_of_all_earlier_rounds_are_found(tmp_path):
  assert prompts.earlier_rounds(tmp_path, 'm3') == []
  for model in ('m2', 'm3', 'm4'):
    records.write(tmp_path / model / 'prompts' / 'prompts.jsonl',
                  [schema.Prompt(id=model, prompt=f'Tell me of {model}.')])
  found = {name: [path.parent.parent.name for path in prompts.earlier_rounds(tmp_path, name)]
           for name in ('m2', 'm3', 'm4')}
  assert found == dict(m2=[], m3=['m2'], m4=['m2', 'm3'])


def test_shots_are_six_seeds_and_two_new_prompts_and_depend_on_attempt_seed_and_model():
  seeds, new = [f's{i}' for i in range(50)], [f'n{i}' for i in range(9)]

  def draw(model, seed, attempt, accepted=new):
    config = configs.get(model)
    config.seed = seed
    return prompts.draw_shots(config, seeds, accepted, attempt)
  shots = draw('m2', 0, 3)
  assert len(set(shots)) == 8 and sum(s.startswith('n') for s in shots) == 2
  assert shots == draw('m2', 0, 3)
  others = draw('m2', 0, 4), draw('m2', 1, 3), draw('m3', 0, 3)
  assert len({tuple(sorted(drawn)) for drawn in (shots, *others)}) == 4
  assert sum(s.startswith('s') for s in draw('m2', 0, 3, [])) == 8
