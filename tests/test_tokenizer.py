import io
import json
import shutil

from hypothesis import given, strategies as st
import pytest
import sentencepiece
import tokenizers as library
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
import transformers

from srlm_jax import InputError
from srlm_jax.data import templates, tokenizer as tokenizers

# Added tokens that text must never become: special and other ones.
SPECIAL = ('<|begin|>', '<|end|>', '<|role|>')
OTHERS = ('<think>', '[TOOL_CALLS]', '<｜User｜>')
MARKS = SPECIAL + OTHERS
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|role|>"
            "{{ m['role'] }}<｜User｜>\n\n{{ m['content'] | trim }}<|end|>"
            "{% endfor %}{% if add_generation_prompt %}<|role|>assistant<think>\n\n{% endif %}")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
          r'[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')  # pre-tokenization of Llama 3
WORDS = ['User: Name a fruit. Assistant: pear fig plum', 'system user assistant\n\n',
         '[INST] Tell me a story. [/INST]',
         'think <thinking> is a <b> of TOOL_CALLS, User',
         'é 漢字 def f(x):\n    return x  # two  spaces',
         ] * 20
ORDINARY = ['Hi', ' Name a  fruit.\n', '1. A list\n2. of <b> things', 'é 漢字 🎉', '\n\n  x\n', '',
            'a < b | c > [d]', '< think>', 'def f(x):\n    return x']


def byte_level():
  """Byte-level BPE, as in Llama 3 and Qwen."""
  made = library.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(library.Regex(LLAMA3), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(WORDS, trainers.BpeTrainer(
      vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
  return made


def byte_fallback():
  """BPE of characters with ▁ for a space, as in Llama 2, without ▁ before the text."""
  made = library.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
  made.pre_tokenizer = pre_tokenizers.Metaspace()
  made.decoder = decoders.Sequence([
      decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(' ', 1, 0)])
  made.train_from_iterator(WORDS, trainers.BpeTrainer(
      vocab_size=500, special_tokens=['<unk>', *(f'<0x{i:02X}>' for i in range(256))],
      show_progress=False))
  made = json.loads(made.to_str())
  # In Llama 2 the bytes are pieces, not added tokens.
  made['added_tokens'] = [t for t in made['added_tokens'] if t['content'] == '<unk>']
  return library.Tokenizer.from_str(json.dumps(made))


def metaspace():
  """Llama 2 as current transformers converts it: ▁ before the text."""
  made = byte_fallback()
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
  return made


def prepend():
  """Llama 2 as in its published files: ▁ before every part between added tokens."""
  made = byte_fallback()
  made.pre_tokenizer = None
  made.normalizer = normalizers.Sequence(
      [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  return made


KINDS = dict(byte_level=byte_level, metaspace=metaspace, prepend=prepend)


def save(folder, made, added=(), template=TEMPLATE, **config):
  """Writes tokenizer.json and tokenizer_config.json of `made` with added tokens."""
  made.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
  made.add_tokens(list(added) or [AddedToken(t, normalized=False) for t in OTHERS])
  made.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
      tokenizer_class='PreTrainedTokenizerFast', bos_token='<|begin|>', eos_token='<|end|>',
      chat_template=template, **config)))
  return folder


@pytest.fixture(scope='module', params=KINDS)
def made(request, tmp_path_factory):
  """(our tokenizer, the tokenizer of transformers) for each kind."""
  return both(save(tmp_path_factory.mktemp(request.param), KINDS[request.param]()))


def both(folder):
  """(our tokenizer, the tokenizer of transformers) of one folder."""
  model = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True,
                                                     trust_remote_code=False)
  return tokenizers.load(folder), model


def theirs(model, prompt):
  """Ids of the prompt in its chat format in transformers."""
  return model.apply_chat_template([dict(role='user', content=prompt)], return_dict=False,
                                   add_generation_prompt=True)


def added(model, ids):
  """The added tokens among the ids."""
  names = {i: str(t) for i, t in model.added_tokens_decoder.items()}
  return [names[i] for i in ids if i in names]


@pytest.mark.parametrize('mark', MARKS)
@pytest.mark.parametrize('chat', ['plain', 'llama2', 'tokenizer'])
def test_text_never_becomes_an_added_token(made, chat, mark):
  ours, model = made
  before, after = templates.encode_pair(chat, 'Say it now.', 'Yes, I do.', ours)
  own = added(model, before)
  assert own[0] == '<|begin|>' and len(own) == (6 if chat == 'tokenizer' else 1)
  assert not added(model, after)
  for text in (mark, f'Say {mark}now', f'{mark}{mark} x', f'a\n{mark}\n'):
    assert added(model, templates.encode_prompt(chat, text, ours)) == own
    before, after = templates.encode_pair(chat, text, f'No{text}', ours)
    assert added(model, before) == own and not added(model, after)
    assert ours.decode(after).strip() == f'No{text}'.strip()
    assert mark in ours.decode(before[1:])
  assert not added(model, ours.encode(f'a {mark} b'))


@pytest.mark.parametrize('text', ORDINARY)
def test_ordinary_text_has_the_same_ids_as_in_transformers(made, text):
  ours, model = made
  assert templates.encode_prompt('tokenizer', text, ours) == theirs(model, text)
  assert ours.encode(text) == model.encode(text, add_special_tokens=False)


@given(st.text(st.sampled_from('ab <>|[]_\n\t é漢think/')))
def test_any_text_has_the_same_ids_as_in_transformers_or_no_added_token(made, text):
  ours, model = made
  ids = templates.encode_prompt('tokenizer', text, ours)
  if any(mark in text for mark in MARKS):
    assert added(model, ids) == added(model, theirs(model, ''))
  else:
    assert ids == theirs(model, text)


@pytest.mark.parametrize('text', ORDINARY)
def test_the_ids_of_prompt_and_response_are_the_ids_of_the_whole_text(made, text):
  ours, model = made
  response = f'Yes {text}'.strip()
  before, after = templates.encode_pair('tokenizer', text, response, ours)
  whole = model.apply_chat_template([dict(role='user', content=text)], tokenize=False,
                                    add_generation_prompt=True)
  assert before == theirs(model, text)
  assert before + after == model.encode(whole + response, add_special_tokens=False)


@pytest.mark.parametrize('normalized', [False, True])
@pytest.mark.parametrize('flags', [dict(lstrip=True), dict(rstrip=True),
                                   dict(lstrip=True, rstrip=True), dict(single_word=True)], ids=str)
@pytest.mark.parametrize('kind', KINDS)
def test_added_tokens_of_the_template_match_as_in_transformers(tmp_path, kind, flags, normalized):
  marks = [AddedToken(t, normalized=normalized, **flags) for t in OTHERS]
  template = TEMPLATE.replace(' | trim', '').replace("\n\n{{ m['content']", "{{ m['content']")
  ours, model = both(save(tmp_path, KINDS[kind](), marks, template))
  for text in (*ORDINARY, 'x  ', '  x', '. x', 'é'):
    assert templates.encode_prompt('tokenizer', text, ours) == theirs(model, text)
  for mark in OTHERS:
    own = added(model, templates.encode_prompt('tokenizer', 'a. b', ours))
    assert added(model, templates.encode_prompt('tokenizer', f'a {mark} b', ours)) == own


def test_an_added_token_that_merges_could_produce_is_broken_apart(tmp_path):
  fields = json.loads(byte_level().to_str())
  vocab, merges = fields['model']['vocab'], fields['model']['merges']
  for left, right in (('<', 't'), ('h', 'i'), ('hi', 'n'), ('hin', 'k'), ('<t', 'hink'),
                      ('<think', '>')):
    vocab.setdefault(left + right, len(vocab))
    merges.insert(0, [left, right])  # before the learned merges
  merges.sort(key=lambda pair: ''.join(pair) not in '<think>')
  fields['pre_tokenizer'] = fields['pre_tokenizer']['pretokenizers'][1]  # no word boundaries
  made = library.Tokenizer.from_str(json.dumps(fields))
  assert made.encode('<think>').tokens == ['<think>']
  ours, model = both(save(tmp_path, made))
  assert model.convert_tokens_to_ids('<think>') == vocab['<think>']
  for chat in ('plain', 'llama2', 'tokenizer'):
    before, after = templates.encode_pair(chat, 'a<think>b', 'No<think><think>', ours)
    assert added(model, before) == added(model, templates.encode_prompt(chat, 'a', ours))
    assert not added(model, after)
    assert ours.decode(after).strip() == 'No<think><think>'


def test_unigram_pieces_that_are_added_tokens_are_broken_apart(tmp_path):
  pieces = [('<unk>', 0.0), ('<|begin|>', 0.0), ('<|end|>', 0.0), ('<think>', 0.0), *(
      (c, -3.0) for c in '▁abcdefghijklmnopqrstuvwxyz<|>.'), ('▁a', -1.0)]
  made = library.Tokenizer(models.Unigram(pieces, unk_id=0))
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first')
  made.decoder = decoders.Metaspace()
  made.add_special_tokens(['<unk>'])
  ours, model = both(save(tmp_path, made, unk_token='<unk>'))
  for mark in ('<|end|>', '<think>', '<unk>'):
    assert not added(model, ours.encode(f'a {mark} b'))
    assert ours.decode(ours.encode(f'a {mark} b')) == f'a {mark} b'
    ids = templates.encode_prompt('tokenizer', f'☃ {mark} b', ours)
    assert added(model, ids).count('<unk>') == added(model, theirs(model, '☃ b')).count('<unk>')
    assert f'{mark} b' in ours.decode(ids)
  assert added(model, ours.encode('a ☃')) == ['<unk>']  # a character that is not in the vocabulary
  assert templates.encode_prompt('tokenizer', 'a ☃', ours) == theirs(model, 'a ☃')


def test_a_single_character_that_is_only_an_added_token_is_an_error(tmp_path):
  made = byte_level()
  made.add_tokens(['x'])
  with pytest.raises(InputError, match="'x'.*added token.*tokenizer.json"):
    tokenizers.load(save(tmp_path, made)).encode('x')


def test_a_vocabulary_with_gaps_is_an_error(tmp_path):
  """Its renamed added tokens would get the ids of pieces."""
  fields = json.loads(byte_level().to_str())
  vocab = {piece: i + 20 for piece, i in fields['model']['vocab'].items()}
  fields['model']['vocab'] = dict(zip(MARKS, range(20), strict=False)) | vocab
  made = library.Tokenizer.from_str(json.dumps(fields))
  with pytest.raises(InputError, match='tokenizer.json has a vocabulary with gaps'):
    tokenizers.load(save(tmp_path, made))


@pytest.mark.parametrize('kind', KINDS)
def test_added_tokens_of_spaces_are_text(tmp_path, kind):
  """GPT-NeoX and Gemma have such tokens."""
  runs = [AddedToken('    ', normalized=False), '\n\n']
  ours, model = both(save(tmp_path, KINDS[kind](), [*OTHERS, *runs]))
  text = 'def f(x):\n\n    return x'
  assert added(model, ours.encode(text)) == ['\n\n', '    ']
  assert ours.encode(text) == model.encode(text, add_special_tokens=False)
  assert templates.encode_prompt('tokenizer', text, ours) == theirs(model, text)


@pytest.mark.parametrize('template', [
    "{{ m[0]['content'] | replace('<think>', '') }}",
    "{% if '<think>' in m[0]['content'] %}<|role|>{% endif %}{{ m[0]['content'] }}",
    "{{ m[0]['content'].split('<think>')[0] }}", "{{ m[0]['content'] | tojson }}"])
def test_a_template_that_interprets_a_prompt_is_an_error(tmp_path, template):
  ours = tokenizers.load(save(tmp_path, byte_level(), template=template.replace('m[', 'messages[')))
  with pytest.raises(InputError, match='chat template.*changes or interprets.*config.chat'):
    templates.encode_prompt('tokenizer', 'a "<think> b', ours)


@pytest.mark.parametrize('template, found', [
    ([dict(name='default', template='{{ 1 }}'), dict(name='b', template='{{ 2 }}')], '{{ 1 }}'),
    ([dict(name='b', template='{{ 2 }}')], None), ([dict(name='default', template=5)], None),
    (5, None), ('', None), (None, None)])
def test_a_tokenizer_without_a_default_template_needs_another_chat_format(
    tmp_path, template, found):
  ours = tokenizers.load(save(tmp_path, byte_level(), template=template))
  assert (ours.template and ours.template.source) == found
  assert templates.encode_prompt('plain', 'Hi', ours)
  if not found:
    with pytest.raises(InputError, match='no chat template .a text, or .*set config.chat to'):
      templates.encode_prompt('tokenizer', 'Hi', ours)


def test_code_in_a_tokenizer_folder_never_runs(tmp_path, monkeypatch):
  folder = save(tmp_path, byte_level(), auto_map=dict(AutoTokenizer=['mine.Mine', None]))
  (folder / 'mine.py').write_text('raise SystemExit("code of the folder ran")')
  original, asked = transformers.AutoTokenizer.from_pretrained, []
  monkeypatch.setattr(transformers.AutoTokenizer, 'from_pretrained',
                      lambda *a, **k: asked.append(k) or original(*a, **k))
  try:
    tokenizers.load(folder)
  except InputError as error:
    assert str(folder) in str(error)
  assert [k['trust_remote_code'] for k in asked] == [False]


def test_an_invalid_tokenizer_file_is_an_error(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{')
  with pytest.raises(InputError, match='tokenizer.json'):
    tokenizers.load(tmp_path)


def test_both_libraries_give_the_same_ids(stories, tmp_path):
  """Loads the same vocabulary with sentencepiece and, as tokenizer.json, with transformers."""
  plain = tokenizers.load(stories, 512)
  made = transformers.LlamaTokenizer.from_pretrained(str(stories), local_files_only=True,
                                                     trust_remote_code=False)
  made.save_pretrained(str(tmp_path))
  if not (tmp_path / 'tokenizer.json').exists():
    pytest.fail('transformers wrote no tokenizer.json')
  fast = tokenizers.load(tmp_path, 512)
  assert (plain.bos_id, plain.eos_ids[0], plain.size) == (1, 2, 512)
  assert (fast.bos_id, fast.eos_ids[0], fast.size) == (1, 2, 512)
  for text in ('Once upon a time, Lily said "hi".', 'User: Name a fruit.\nAssistant:'):
    assert fast.encode(text) == plain.encode(text)
    assert fast.decode(fast.encode(text)) == text


def test_names_of_special_tokens_in_text_are_text(stories, tmp_path):
  made = transformers.LlamaTokenizer.from_pretrained(str(stories), local_files_only=True,
                                                     trust_remote_code=False)
  made.save_pretrained(str(tmp_path))
  for folder in (stories, tmp_path):
    tokenizer = tokenizers.load(folder)
    ids = tokenizer.encode('a </s> b')
    assert tokenizer.eos_ids[0] not in ids and 's' in tokenizer.decode(ids)


def test_the_chat_template_of_a_tokenizer_is_used(stories, tmp_path):
  made = transformers.LlamaTokenizer.from_pretrained(str(stories), local_files_only=True,
                                                     trust_remote_code=False)
  made.chat_template = ("{{ bos_token }}{% for m in messages %}"
                        "<|{{ m['role'] }}|> {{ m['content'] }}\n{% endfor %}<|a|>")
  made.save_pretrained(str(tmp_path))
  tokenizer, made = both(tmp_path)
  ids = templates.encode_prompt('tokenizer', 'Hi', tokenizer)
  assert ids == theirs(made, 'Hi') and ids.count(tokenizer.bos_id) == 1
  assert tokenizer.decode(ids).strip() == '<|user|> Hi\n<|a|>'
  before, after = templates.encode_pair('tokenizer', 'Hi </s>', 'No</s>', tokenizer)
  assert tokenizer.eos_ids[0] not in before + after  # text never ends a sequence
  both_texts = tokenizer.decode(before + after).strip()
  assert both_texts == '<|user|> Hi </s>\n<|a|>No</s>'  # and is unchanged


def test_several_ids_may_end_a_sequence(stories, tmp_path):
  for name in ('tokenizer.model', 'tokenizer_config.json'):
    shutil.copy(stories / name, tmp_path)
  (tmp_path / 'generation_config.json').write_text(json.dumps(dict(eos_token_id=[7, 2])))
  assert tokenizers.load(tmp_path).eos_ids == (2, 7)


@pytest.mark.parametrize('kind', ['sentencepiece', 'transformers'])
@pytest.mark.parametrize('eos', [None, 7, [], [7, 2], [7, 7], 'missing'], ids=str)
def test_the_eos_ids_of_generation_config_are_read(tokenizer_folder, tmp_path, kind, eos):
  tokenizer_of(kind, tokenizer_folder, tmp_path)
  own = tokenizers.load(tmp_path).eos_ids[0]
  fields = dict(do_sample=True) if eos == 'missing' else dict(eos_token_id=eos)
  (tmp_path / 'generation_config.json').write_text(json.dumps(fields))
  wanted = {None: [], 7: [7], 'missing': []}.get(eos, eos) if not isinstance(eos, list) else eos
  assert tokenizers.load(tmp_path).eos_ids == (own, *(i for i in dict.fromkeys(wanted) if i != own))


@pytest.mark.parametrize('kind', ['sentencepiece', 'transformers'])
@pytest.mark.parametrize('eos', [
    True, '2', '', 1.5, 2.0, -1, [2, -1], [2, '3'], [None], [True], [[2]], {}, dict(a=1), 10**9,
    [2, 10**9], 10**400, float('nan'), 'size', 'x' * 5000], ids=lambda x: str(x)[:20])
def test_an_invalid_eos_id_of_generation_config_is_an_error(tokenizer_folder, tmp_path, kind, eos):
  tokenizer_of(kind, tokenizer_folder, tmp_path)
  size = tokenizers.load(tmp_path).size
  path = tmp_path / 'generation_config.json'
  path.write_text(json.dumps(dict(eos_token_id=size if eos == 'size' else eos)))
  with pytest.raises(InputError) as error:
    tokenizers.load(tmp_path)
  said = str(error.value)
  assert said.startswith(f'{path}: eos_token_id is ') and f'ids from 0 to {size - 1}' in said
  assert len(said) < len(str(path)) + 300 and '\n' not in said


@pytest.mark.parametrize('text', [
    b'', b'{', b'[]', b'[{}]', b'3', b'null', b'"eos_token_id"', b'\xff\xfe', b'[' * 10**5,
    b'{"eos_token_id": ' + b'9' * 5000 + b'}', None],
    ids=['empty', 'half', 'list', 'of one', 'number', 'null', 'text', 'bytes', 'nested', 'digits',
         'folder'])
def test_a_generation_config_that_is_not_an_object_is_an_error(tokenizer_folder, tmp_path, text):
  tokenizer_of('sentencepiece', tokenizer_folder, tmp_path)
  path = tmp_path / 'generation_config.json'
  path.mkdir() if text is None else path.write_bytes(text)
  with pytest.raises(InputError) as error:
    tokenizers.load(tmp_path)
  said = str(error.value)
  assert said.startswith(f'{path} ') and '\n' not in said and len(said) < 2 * len(str(path)) + 300


def tokenizer_of(kind, source, folder):
  """Writes a tokenizer of one kind into the folder."""
  if kind == 'sentencepiece':
    shutil.copy(source / 'tokenizer.model', folder)
  else:
    save(folder, byte_level())


def test_a_tokenizer_that_does_not_match_the_model_is_an_error(stories, tmp_path):
  with pytest.raises(InputError, match='has 512 ids but the model has only 500'):
    tokenizers.load(stories, 500)
  with pytest.raises(InputError, match='contains neither tokenizer.json nor tokenizer.model'):
    tokenizers.load(tmp_path)


def test_ids_outside_the_vocabulary_are_shown_as_replacement_characters(stories):
  tokenizer = tokenizers.load(stories, 600)
  ids = tokenizer.encode('Once upon')
  assert tokenizer.decode([*ids, 555]) == 'Once upon\ufffd'


def test_a_sentencepiece_model_that_encodes_text_as_control_pieces_is_an_error(tmp_path):
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['Name a fruit: pear fig plum'] * 50), model_writer=out,
      vocab_size=40, model_type='bpe', user_defined_symbols=['\n', '<start_of_turn>'],
      hard_vocab_limit=False, minloglevel=2)
  (tmp_path / 'tokenizer.model').write_bytes(out.getvalue())
  with pytest.raises(InputError, match='<start_of_turn> in any text as one control piece'):
    tokenizers.load(tmp_path)
