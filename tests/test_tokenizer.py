import json
import shutil

import pytest

from srlm_jax import InputError
from srlm_jax.data import templates, tokenizer as tokenizers


def test_both_libraries_give_the_same_ids(stories, tmp_path):
  """The same vocabulary through sentencepiece, and through transformers from a tokenizer.json."""
  transformers = pytest.importorskip('transformers')
  plain = tokenizers.load(stories, 512)
  transformers.LlamaTokenizer.from_pretrained(str(stories), local_files_only=True).save_pretrained(str(tmp_path))
  if not (tmp_path / 'tokenizer.json').exists():
    pytest.fail('transformers wrote no tokenizer.json')
  fast = tokenizers.load(tmp_path, 512)
  assert (fast.bos_id, fast.eos_ids[0], fast.size) == (plain.bos_id, plain.eos_ids[0], plain.size) == (1, 2, 512)
  for text in ('Once upon a time, Lily said "hi".', 'User: Name a fruit.\nAssistant:'):
    assert fast.encode(text) == plain.encode(text)
    assert fast.decode(fast.encode(text)) == text


def test_names_of_special_tokens_in_text_are_text(stories, tmp_path):
  transformers = pytest.importorskip('transformers')
  transformers.LlamaTokenizer.from_pretrained(str(stories), local_files_only=True).save_pretrained(str(tmp_path))
  for folder in (stories, tmp_path):
    tokenizer = tokenizers.load(folder)
    ids = tokenizer.encode('a </s> b')
    assert tokenizer.eos_ids[0] not in ids and 's' in tokenizer.decode(ids)


def test_a_tokenizer_s_own_chat_template(stories, tmp_path):
  transformers = pytest.importorskip('transformers')
  made = transformers.LlamaTokenizer.from_pretrained(str(stories), local_files_only=True)
  made.chat_template = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}\n{% endfor %}<|a|>"
  made.save_pretrained(str(tmp_path))
  tokenizer = tokenizers.load(tmp_path)
  assert templates.chat('tokenizer', 'Hi', tokenizer) == '<|user|> Hi\n<|a|>'
  assert templates.encode_prompt('tokenizer', 'Hi', tokenizer).count(tokenizer.bos_id) == 1
  assert '< /s>' in templates.chat('tokenizer', 'Hi </s>', tokenizer)
  before, after = templates.encode_pair('tokenizer', 'Hi </s>', 'No</s>', tokenizer)
  assert tokenizer.eos_ids[0] not in before + after  # no text ends a row


def test_several_ids_may_end_a_row(stories, tmp_path):
  for name in ('tokenizer.model', 'tokenizer_config.json'):
    shutil.copy(stories / name, tmp_path)
  (tmp_path / 'generation_config.json').write_text(json.dumps(dict(eos_token_id=[7, 2])))
  assert tokenizers.load(tmp_path).eos_ids == (2, 7)


def test_a_tokenizer_that_does_not_match_the_model_is_refused(stories, tmp_path):
  with pytest.raises(InputError, match='has 512 ids and the model only 500'):
    tokenizers.load(stories, 500)
  with pytest.raises(InputError, match='holds no tokenizer'):
    tokenizers.load(tmp_path)


def test_ids_beyond_the_tokenizer_are_shown_not_hidden(stories):
  tokenizer = tokenizers.load(stories, 600)
  ids = tokenizer.encode('Once upon')
  assert tokenizer.decode([*ids, 555]) == 'Once upon\ufffd'
