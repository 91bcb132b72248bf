import pytest

from srlm_jax import InputError
from srlm_jax.data import templates, tokenizer as tokenizers


def test_an_author_template_without_its_slot_is_an_error(tmp_path):
  (tmp_path / 'a.txt').write_text('Tasks:')
  with pytest.raises(InputError, match=r'slot \{shots\} 0 times'):
    templates.load_author(str(tmp_path / 'a.txt'))
  known = r'does not exist; name a template of the package \(chat, list, sandbox\)'
  with pytest.raises(InputError, match=known):
    templates.load_author('nothing')


def test_chat_formats():
  assert templates.chat('plain', 'Hi', None) == 'User: Hi\nAssistant:'
  assert templates.chat('llama2', 'Hi', None) == '[INST] Hi [/INST]'
  with pytest.raises(InputError, match='config.chat'):
    templates.chat('alpaca', 'Hi', None)
  with pytest.raises(InputError, match='no chat template'):
    templates.chat('tokenizer', 'Hi', tokenizers.Tokenizer(1, 0, [0]))


@pytest.mark.parametrize('response', [
    'Once upon a time.', ' two  spaces', '1. A list\n2. of things', 'é 漢字 🎉'])
@pytest.mark.parametrize('kind', ['plain', 'llama2'])
def test_the_ids_of_prompt_and_response_are_the_ids_of_the_whole_text(stories, kind, response):
  tokenizer = tokenizers.load(stories)
  before, after = templates.encode_pair(kind, 'Tell me a story.', response, tokenizer)
  whole = templates.chat(kind, 'Tell me a story.', None) + ' ' + response.strip()
  assert before + after == [tokenizer.bos_id, *tokenizer.encode(whole)]
  assert before == templates.encode_prompt(kind, 'Tell me a story.', tokenizer)
  assert tokenizer.decode(after).strip() == response.strip()
