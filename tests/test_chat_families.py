"""Chat templates in the shapes of published families: ids equal those of transformers.

The templates in tests/chat_templates are written for these tests, in the shape of those of Llama 2,
Llama 3, Mistral, Qwen2.5, Qwen3 and OLMo 2. Their tokenizers are trained here, with the special
tokens and the pre-tokenization of the family. Published tokenizers are used where the folder of
test data has some: tokenizers/NAME with tokenizer.json, tokenizer_config.json and a chat template.
"""
import datetime
import functools
import json
from unittest import mock

from conftest import DATA, real_data, ROOT
import pytest
from test_tokenizer import both, byte_level, prepend
from tokenizers import AddedToken
from transformers.utils import chat_template_utils

from srlm_jax import records
from srlm_jax.conversation import in_turns, Message
from srlm_jax.data import oasst, rendering, templates, thinking

HEADERS = ('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>')
CHATML = ('<|im_start|>', '<|im_end|>')
# family: (tokenizer, special tokens, other added tokens, bos, eos)
FAMILIES = dict(
    llama2=(prepend, ('<s>', '</s>'), (), '<s>', '</s>'),
    llama3=(byte_level, ('<|begin_of_text|>', '<|end_of_text|>', *HEADERS), (),
            '<|begin_of_text|>', '<|eot_id|>'),
    mistral=(prepend, ('<s>', '</s>', '[INST]', '[/INST]'), (), '<s>', '</s>'),
    qwen2=(byte_level, ('<|endoftext|>', *CHATML), ('<tool_call>', '</tool_call>'), None,
           '<|im_end|>'),
    qwen3=(byte_level, ('<|endoftext|>', *CHATML), ('<tool_call>', '<think>', '</think>'), None,
           '<|im_end|>'),
    olmo2=(byte_level, ('<|endoftext|>', '<|pad|>'), (), '<|endoftext|>', '<|endoftext|>'))
PUBLISHED = sorted(path.parent.name for path in DATA.glob('tokenizers/*/tokenizer.json'))
SYSTEM = Message('system', 'You are brief.\n')


def save(folder, family):
  make, special, others, bos, eos = FAMILIES[family]
  made = make()
  made.add_special_tokens([AddedToken(t, normalized=False) for t in special])
  made.add_tokens([AddedToken(t, normalized=False) for t in others])
  made.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
      tokenizer_class='PreTrainedTokenizerFast', bos_token=bos, eos_token=eos)))
  template = ROOT / 'tests' / 'chat_templates' / f'{family}.jinja'
  (folder / 'chat_template.jinja').write_text(template.read_text())
  return folder


@pytest.fixture(scope='module', params=[*FAMILIES, *(f'published {name}' for name in PUBLISHED)])
def made(request, tmp_path_factory):
  """(family, our tokenizer, the tokenizer of transformers)."""
  _, _, name = request.param.rpartition(' ')
  if request.param != name:
    return name, *both(DATA / 'tokenizers' / name)
  return name, *both(save(tmp_path_factory.mktemp(name), name))


@functools.cache
def conversations() -> list:
  """300 conversations: OASST1 and published prompts; one or more turns; with a system message."""
  rows = records.read_any(real_data('oasst1/validation.en.messages.jsonl.gz'))
  turns = [turn for _, turn in oasst.turns(rows, False) if not turn.dropped]
  first = [(Message('user', turn.prompt),) for turn in turns if not turn.messages]
  later = [turn.messages for turn in turns if turn.messages]
  seeds = [(SYSTEM, Message('user', f'\n {record["instruction"]} ')) for _, record in
           records.read_any(real_data('prompts/self_instruct_seed_tasks.jsonl'))]
  bench = [(SYSTEM, *in_turns([record['turns'][0], ' Yes.\n\nNo? ', record['turns'][1]]))
           for _, record in records.read_any(real_data('prompts/mt_bench_questions.jsonl'))]
  found = [*first[:90], *later[:90], *seeds[:60], *bench[:60]]
  assert len(found) == 300
  return found


def fixed_date():
  """Gives transformers the date that our templates see."""
  fake = mock.Mock(**{'now.return_value': rendering.DATE})
  assert isinstance(chat_template_utils.datetime, type(datetime.datetime))
  return mock.patch.object(chat_template_utils, 'datetime', fake)


def theirs(model, messages, **more):
  said = [dict(role=m.role, content=m.content) for m in messages]
  with fixed_date():
    return model.apply_chat_template(said, return_dict=False, **more)


def test_ids_equal_those_of_transformers(made):
  _, ours, model = made
  differ = [messages for messages in conversations()
            if templates.encode_prompt('tokenizer', messages, ours)
            != theirs(model, messages, add_generation_prompt=True)]
  assert not differ


def test_a_training_example_is_what_transformers_renders(made):
  """Up to the end of the turn, after which some templates write a line feed."""
  family, ours, model = made
  if thinking.is_open(ours, templates.encode_prompt('tokenizer', 'a', ours)):
    return  # no finished conversation begins like the prompt
  for messages in conversations()[::10]:
    if family.startswith('mistral'):  # without its answer, the last question has the system message
      messages = messages[messages[0].role == 'system':]
    before, after = templates.encode_response('tokenizer', messages, 'Yes. No', 'eos', (), ours)
    whole = theirs(model, [*messages, Message('assistant', 'Yes. No')])
    assert whole[:len(before)] == before
    assert after[-1] == templates.end_of_turn('tokenizer', ours)
    rest = whole[len(before) + len(after):]
    if after != whole[len(before):][:len(after)]:  # Llama 2 writes a space before </s>
      assert family.startswith('llama2') and len(rest) == 1
    assert not {*rest} & {*ours.eos_ids} or family.startswith('llama2')


@pytest.mark.parametrize('made', ['qwen3'], indirect=True)
@pytest.mark.parametrize('said', [
    '<think>\nhm\n</think>\n\nYes </s>', '\n\nhm</think>\n \nYes\n', '</think>Yes',
    '<think>a</think>b</think> c', '<think>hm</think>', '<think>\n\n</think>\n\n'])
def test_the_template_leaves_out_the_thinking_of_earlier_turns(made, said):
  _, ours, model = made
  messages = (SYSTEM, *in_turns(['Hi', said, 'Why?', 'So.', 'Who?', said, 'When?']))
  assert templates.encode_prompt('tokenizer', messages, ours) == theirs(
      model, messages, add_generation_prompt=True)


@pytest.mark.parametrize('kind', ['user', 'assistant', 'system'])
def test_no_message_becomes_an_added_token(made, kind):
  _, ours, _ = made
  names = list(ours.added.values())[-12:]
  if ours.thinking:
    names = [*names, '<think>', 'a</think>b', '<think>\n\n</think>']
  def ids(text):
    said = (Message('user', 'Hi'), Message('assistant', 'Yes'), Message('user', 'Why'))
    said = {'user': (*said[:2], Message('user', text)),
            'assistant': (said[0], Message('assistant', text), said[2]),
            'system': (Message('system', text), *said)}[kind]
    return templates.encode_prompt('tokenizer', said, ours)
  def added(text):
    return [i for i in ids(text) if i in ours.added and ours.added[i] != '<unk>']
  plain = added('Say it')
  for name in names:
    assert added(f'Say {name} it') == plain == added(name), name
    # The template of Qwen3 leaves out earlier thinking.
    is_left_out = bool(ours.thinking) and kind == 'assistant' and '</think>' in name
    assert (name in ours.decode(ids(f'Say {name} it'))) != is_left_out


def test_chatml_equals_its_template_in_transformers(made):
  _, ours, model = made
  if not {*templates.CHATML} <= {*ours.added.values()}:
    with pytest.raises(templates.InputError, match=r'no token <\|im_end\|> or <\|im_start\|>'):
      templates.encode_prompt('chatml', 'Hi', ours)
    return
  for messages in conversations()[::20]:
    assert templates.encode_prompt('chatml', messages, ours) == theirs(
        model, messages, add_generation_prompt=True, chat_template=templates.source('chatml'))


@pytest.mark.parametrize('kind', ['plain', 'llama2'])
def test_formats_of_the_package_equal_their_templates_in_transformers(made, kind):
  _, ours, model = made
  for messages in conversations()[::20]:
    assert templates.encode_prompt(kind, messages, ours) == theirs(
        model, messages, add_generation_prompt=True, chat_template=templates.source(kind))
  before, after = templates.encode_response(
      kind, conversations()[150], 'Yes. No', 'eos', (), ours)
  whole = theirs(model, [*conversations()[150], Message('assistant', 'Yes. No')],
                 chat_template=templates.source(kind))
  assert before + after == whole if kind == 'plain' else before == whole[:len(before)]


def test_the_conversations_have_all_shapes():
  lengths = {len(messages) for messages in conversations()}
  assert {1, 2, 3, 4, 5} <= lengths
  assert {m.role for messages in conversations() for m in messages} == {
      'system', 'user', 'assistant'}
