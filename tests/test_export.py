"""The small files of an export: what is kept, what a run changes, and that ids stay the same."""
import io
import json

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
import tokenizers as library
from tokenizers import models, pre_tokenizers, processors

from srlm_jax import InputError, stage
from srlm_jax.checkpoint import export
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.models import config as model_config
from srlm_jax.sandbox.data import M0

PROMPTS = ('Name two nice fruits.', 'Ein Satz.\n\n1. Eins\n2.  Zwei', '漢字 é 😀 x', 'a < b')
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def write(folder, files: dict):
  """Writes files, {name: text, bytes or JSON object}."""
  for name, data in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, dict):
      data = json.dumps(data, indent=3)  # not the indent of an export
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return folder


def config(vocab: int, **changes) -> dict:
  return model_config.to_hf(model_config.PRESETS['tiny-test']) | dict(vocab_size=vocab) | changes


def manifest(chat: str) -> dict:
  """manifest.json of a model that a run with this chat format trained."""
  return dict(format=stage.FORMAT, stage='m1/model', config=dict(chat=chat))


def sentences(**options) -> bytes:
  """A SentencePiece model of a few sentences."""
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(**(dict(
      sentence_iterator=iter(['User: Name a fruit. Assistant: pear fig plum', 'a  b é'] * 50),
      model_writer=out, vocab_size=60, model_type='bpe', hard_vocab_limit=False, minloglevel=2)
      | options))
  return out.getvalue()


def byte_level(folder, **settings):
  """A model with the files of a byte-level tokenizer, as those of Llama 3 or Qwen."""
  marks = ['<s>', '</s>', '<|end|>', '<|user|>', '<|assistant|>', '<|im_start|>', '<|im_end|>']
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = library.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.post_processor = processors.ByteLevel()
  made.add_special_tokens(marks)
  names = dict(bos_token='<s>', eos_token='<|end|>') | settings
  return write(folder, {
      'config.json': config(263), 'tokenizer.json': made.to_str(),
      'tokenizer_config.json': dict(tokenizer_class='PreTrainedTokenizerFast') | names,
      'chat_template.jinja': TEMPLATE, 'additional_chat_templates/tool.jinja': 'x',
      'special_tokens_map.json': {name: x for name, x in names.items() if x},
      'generation_config.json': dict(bos_token_id=256, eos_token_id=257, temperature=0.6)})


def same_ids(folder, made: export.Export, out, chat: str):
  """Writes the export, which our loader also reads, and compares ids and texts of prompts."""
  ours, theirs = tokenizers.load(folder), tokenizers.load(write(out, made.files))
  for prompt in PROMPTS:
    assert theirs.encode(prompt) == ours.encode(prompt)
    ids = templates.encode_prompt(chat, prompt, ours)
    assert templates.encode_prompt('tokenizer', prompt, theirs) == ids
    # sentencepiece writes ' ⁇ ' for the unknown id, transformers nothing.
    assert theirs.decode(ids) == ours.decode(ids).replace(' ⁇ ', '')
  assert {*theirs.eos_ids} == {*ours.eos_ids, templates.end_of_turn(chat, ours)}
  assert theirs.bos_id == ours.bos_id


@pytest.mark.parametrize('chat', ['plain', 'llama2'])
def test_a_run_with_a_sentencepiece_model_gets_all_that_others_need(tmp_path, chat):
  folder = write(tmp_path / 'ours', {
      'config.json': config(1024), 'tokenizer.model': (M0 / 'tokenizer.model').read_bytes(),
      'manifest.json': manifest(chat)})
  found = export.plan(folder, 1024, 'float32')
  assert (found.chat, found.differences) == (chat, ()) and found.compared > 500
  assert next(iter(found.files)) == 'config.json' and found.files.keys() == {
      'config.json', 'generation_config.json', 'tokenizer.model', 'tokenizer.json',
      'tokenizer_config.json', 'chat_template.jinja'}
  assert json.loads(found.files['config.json']) == config(1024, bos_token_id=1, eos_token_id=2)
  assert json.loads(found.files['generation_config.json']) == dict(bos_token_id=1, eos_token_id=2)
  settings = json.loads(found.files['tokenizer_config.json'])
  assert settings['chat_template'].encode() == found.files['chat_template.jinja']
  assert settings['chat_template'] == templates.source(chat)
  assert settings.items() > dict(bos_token='<s>', eos_token='</s>', add_bos_token=True,
                                 tokenizer_class='PreTrainedTokenizerFast').items()
  same_ids(folder, found, tmp_path / 'theirs', chat)


def test_a_conversion_without_training_keeps_the_files_of_its_source(tmp_path):
  folder = byte_level(tmp_path / 'ours')
  fields = config(263, bos_token_id=256, eos_token_id=[257, 258])
  del fields['dtype']  # older versions of transformers write only torch_dtype
  write(folder, {'config.json': fields})
  found = export.plan(folder, 263, 'float32')
  assert found.files == {str(path.relative_to(folder)): path.read_bytes()
                         for path in folder.rglob('*.*') if path.is_file()}
  assert (found.chat, found.differences) == ('', ()) and found.compared > 400


def test_the_run_changes_the_template_the_eos_ids_and_the_bos_token(tmp_path):
  """The source ends at </s> alone and adds no bos token; the run ends responses with <|end|>."""
  folder = byte_level(tmp_path / 'ours')
  write(folder, {'manifest.json': manifest('plain'), 'config.json': config(263, eos_token_id=257)})
  kept = export.plan(folder, 263, 'float32', 'tokenizer')
  for name in ('chat_template.jinja', 'tokenizer.json', 'additional_chat_templates/tool.jinja'):
    assert kept.files[name] == (folder / name).read_bytes()
  found = export.plan(folder, 263, 'bfloat16')
  assert 'additional_chat_templates/tool.jinja' not in found.files
  assert found.files['chat_template.jinja'].decode() == templates.source('plain')
  for made in (kept, found):
    for name in ('config.json', 'generation_config.json'):
      assert json.loads(made.files[name])['eos_token_id'] == [257, 258]
    assert json.loads(made.files['generation_config.json'])['temperature'] == 0.6
    assert json.loads(made.files['tokenizer_config.json'])['add_bos_token'] is True
  assert json.loads(found.files['config.json'])['dtype'] == 'bfloat16'
  same_ids(folder, kept, tmp_path / 'kept', 'tokenizer')
  same_ids(folder, found, tmp_path / 'found', 'plain')


def test_a_tokenizer_without_bos_and_a_format_with_its_own_end_of_turn(tmp_path):
  """As Qwen's base models: no sequence begins with bos, and the tokenizer's eos ends no turn."""
  folder = byte_level(tmp_path / 'ours', bos_token=None, eos_token='</s>')
  (folder / 'generation_config.json').write_text('{"eos_token_id": 257}')
  found = export.plan(folder, 263, 'float32', 'chatml')
  assert json.loads(found.files['generation_config.json']) == dict(eos_token_id=[257, 262])
  assert not json.loads(found.files['tokenizer_config.json']).get('add_bos_token')
  same_ids(folder, found, tmp_path / 'theirs', 'chatml')


def test_a_source_whose_ids_differ_is_kept_and_counted_unless_the_run_needs_its_own(tmp_path):
  """LlamaTokenizer adds no space before a text that begins with one; sentencepiece does."""
  settings = dict(tokenizer_class='LlamaTokenizer', bos_token='<s>', eos_token='</s>',
                  model_max_length=512)
  folder = write(tmp_path / 'ours', {
      'config.json': config(1024, bos_token_id=1, eos_token_id=2),
      'tokenizer.model': (M0 / 'tokenizer.model').read_bytes(), 'tokenizer_config.json': settings})
  found = export.plan(folder, 1024, 'float32')
  assert ' a' in found.differences and 'User: a'[:1] not in found.differences
  assert found.files['tokenizer_config.json'] == (folder / 'tokenizer_config.json').read_bytes()
  assert 'tokenizer.json' not in found.files
  found = export.plan(folder, 1024, 'float32', 'plain')
  assert found.differences == ()
  assert json.loads(found.files['tokenizer_config.json'])['model_max_length'] == 512


@pytest.mark.parametrize('options', [
    dict(), dict(add_dummy_prefix=False), dict(byte_fallback=True, vocab_size=340),
    dict(user_defined_symbols=['\n', 'ab', ' fig'], split_by_whitespace=False),
    dict(model_type='unigram', vocab_size=40)], ids=str)
def test_kinds_of_sentencepiece_models_keep_their_ids(tmp_path, options):
  """As Llama's, they change no character of a text."""
  model = sentences(normalization_rule_name='identity', remove_extra_whitespaces=False, **options)
  folder = write(tmp_path, {'config.json': config(400), 'tokenizer.model': model})
  found = export.plan(folder, 400, 'float32', 'plain')
  assert found.compared > 350 and not found.differences
  same_ids(folder, found, tmp_path / 'theirs', 'plain')


def test_differences_of_a_model_that_changes_characters_are_stated(tmp_path):
  """sentencepiece also removes a ▁ at the end of a text, as if it were a space."""
  model = sentences(normalization_rule_name='nfkc')
  folder = write(tmp_path, {'config.json': config(64), 'tokenizer.model': model})
  found = export.plan(folder, 64, 'float32', 'plain')
  assert '▁' in found.differences and len(found.differences) < 10
  same_ids(folder, found, tmp_path / 'theirs', 'plain')


def test_missing_and_unusable_pieces_are_errors_of_one_sentence(tmp_path):
  folder = write(tmp_path / 'ours', {
      'config.json': config(400), 'manifest.json': manifest('plain')})
  with pytest.raises(InputError, match='contains neither tokenizer.json nor tokenizer.model'):
    export.plan(folder, 400, 'float32')
  (folder / 'manifest.json').unlink()
  assert export.plan(folder, 400, 'float32').files.keys() == {'config.json'}  # as it was converted
  proto = sentencepiece_model_pb2.ModelProto.FromString(sentences())
  proto.trainer_spec.treat_whitespace_as_suffix = True
  write(folder, {'tokenizer.model': proto.SerializeToString()})
  with pytest.raises(InputError, match="in the chat format plain, 'a' has other ids"):
    export.plan(folder, 400, 'float32', 'plain')
  write(folder, {'tokenizer.model': sentences()})
  with pytest.raises(InputError, match='--chat=plane .*: it is one of plain, llama2') as error:
    export.plan(folder, 400, 'float32', 'plane')
  assert '\n' not in str(error.value)
  with pytest.raises(InputError, match='no chat template'):
    export.plan(folder, 400, 'float32', 'tokenizer')
  write(folder, {'generation_config.json': '[1]'})
  with pytest.raises(InputError, match='generation_config.json'):
    export.plan(folder, 400, 'float32')


def test_a_tokenizer_that_gives_prompts_other_ids_is_refused(tmp_path):
  """sentencepiece keeps a user-defined piece as it is; transformers first makes a space of it."""
  model = sentences(user_defined_symbols=['\n'])
  folder = write(tmp_path, {'config.json': config(400), 'tokenizer.model': model})
  with pytest.raises(InputError, match="in the chat format plain, 'a' has other ids"):
    export.plan(folder, 400, 'float32', 'plain')
