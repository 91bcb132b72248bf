"""The small files of an exported model, which make other programs read it as it is read here.

What a model's folder has is copied bit for bit, and what it lacks is added: the ids of bos and eos
in config.json and generation_config.json, and a tokenizer that transformers loads. The export of a
run changes more: the chat format of the run replaces the chat template, every id that ends a
response here ends one there, and the tokenizer has the same ids in transformers.
"""
from collections.abc import Sequence
import dataclasses
import json
import pathlib
import random
import tempfile

from etils import epath

from srlm_jax import closest, InputError, model_files, stage
from srlm_jax.config import CHATS
from srlm_jax.data import templates, tokenizer as tokenizers

CONFIG, GENERATION = 'config.json', 'generation_config.json'
SETTINGS, BACKEND, TEMPLATE = 'tokenizer_config.json', 'tokenizer.json', 'chat_template.jinja'
NAMED_TEMPLATES = 'additional_chat_templates/'
# The class that takes tokenizer.json as it is, in every version of transformers.
CLASS = 'PreTrainedTokenizerFast'
# Fields of a tokenizer_config.json that stay beside a new tokenizer.json; the others configure
# another class.
KEPT = ('pad_token', 'padding_side', 'model_max_length', 'chat_template')
RANDOM_TEXTS = 500
TEXTS = (
    '', ' ', '  ', '\n', '\t', 'a', ' a', 'a ', '  a  b  ', '\na', 'a\n\n b\n', ' \n a',
    'a\tb\r\nc', 'User: Name a fruit.\nAssistant: A fig, 12 pears (0.5 kg) & "plums"!',
    '[INST] Hi [/INST] Ho.', ''.join(map(chr, range(32, 127))), '1234567890 3.14159 1e-5',
    'aaaaaaaaaaaaaaaa', '========', 'def f(x):\n  return x ** 2  # square\n', '▁', '▁▁a ▁b',
    'é e\u0301 ü ß ﬁ ½ ①', 'Ω ∑ → ≤ “ ” – … €', 'Привет, мир', '漢字かな交じり文', 'हिन्दी', 'שלום',
    'مرحبا', '\U0001f600 \U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea',
    'a\u00a0b\u200bc\ufeff', 'x\x00y\x7f', '\ufffd')
PROMPTS = ('a', 'Name two nice fruits.', 'Was ist größer: 漢字 oder 2?', 'One.\n\nTwo:  3')


@dataclasses.dataclass(frozen=True)
class Export:
  """The small files of an export, and how the ids of its tokenizer compare with ours."""
  files: dict[str, bytes]       # without the model card
  chat: str                     # chat format; '' for a conversion without training
  compared: int = 0             # texts whose ids were compared
  differences: tuple[str, ...] = ()  # those with other ids in transformers


def plan(folder, vocab: int, dtype: str, chat: str = '') -> Export:
  """The small files for the export of the model in `folder`, compared with our tokenizer.

  `vocab`: the model's number of ids; `dtype`: of its tensors; `chat`: the chat format, by default
  that of the run which trained the model. Raises InputError if the model of a run has no tokenizer,
  if there is no such chat format, or if transformers would give other ids to the prompts of a run.
  """
  folder = epath.Path(folder)
  chat = _chat(folder, chat)
  files = {name: (folder / name).read_bytes() for name in model_files.names(folder)}
  config = _parse(folder, files, CONFIG)
  if {config.get('dtype'), config.get('torch_dtype')} - {None} != {dtype}:  # trained in float32
    _change(files, CONFIG, config | dict(dtype=dtype, torch_dtype=dtype))
  if not chat and not files.keys() & {BACKEND, 'tokenizer.model'}:
    return Export(files, chat)
  ours = tokenizers.load(folder, vocab)
  ends = {*templates.end_ids(chat or 'none', ours)}
  for name in (CONFIG, GENERATION):
    before = _parse(folder, files, name)
    _change(files, name, before | _ids(before, ours.start, ends, bool(chat)))
  files, theirs = _tokenizer(folder, files, ours, chat)
  for prompt in PROMPTS if chat else ():
    _check_prompt(folder, chat, prompt, ours, theirs)
  texts = _texts(theirs)
  return Export(files, chat, len(texts), tuple(
      text for text in texts if theirs.encode(text, add_special_tokens=False) != ours.encode(text)))


def _tokenizer(folder, files: dict[str, bytes], ours: tokenizers.Tokenizer, chat: str):
  """-> the files with the tokenizer and chat template of the export, and the tokenizer."""
  before = settings = _parse(folder, files, SETTINGS)
  if BACKEND not in files and (chat or not settings):
    files[BACKEND], settings = _from_sentencepiece(files['tokenizer.model'], ours, settings)
  if chat and chat != 'tokenizer':
    settings = settings | dict(chat_template=templates.source(chat))
    files = {name: data for name, data in files.items() if not name.startswith(NAMED_TEMPLATES)}
    files[TEMPLATE] = settings['chat_template'].encode()
  if settings != before:
    _change(files, SETTINGS, settings)
  theirs = _load(files)
  if chat and theirs('')['input_ids'] != ours.start:
    _change(files, SETTINGS, settings | dict(add_bos_token=bool(ours.start)))
    theirs = _load(files)
  return files, theirs


def _chat(folder, chat: str) -> str:
  """The chat format of an export: as given, or that of the run, or '' for a conversion."""
  chat = chat or stage.trained_with(folder, 'chat')
  if chat and chat not in CHATS:
    raise InputError(f'--chat={chat}{closest(chat, CHATS)}: it is one of {", ".join(CHATS)}')
  return chat


def _parse(folder, files: dict[str, bytes], name: str) -> dict:
  """The object of a JSON file, {} if there is no file. Raises InputError if it is damaged."""
  try:
    found = json.loads(files.get(name, b'{}'))
  except (ValueError, RecursionError) as error:
    raise InputError(f'{folder / name}: not JSON ({error}); download it again') from error
  if not isinstance(found, dict):
    raise InputError(f'{folder / name} contains no JSON object; download it again')
  return found


def _change(files: dict[str, bytes], name: str, fields: dict):
  """Replaces a JSON file, if its fields change."""
  if name not in files or json.loads(files[name]) != fields:
    files[name] = (json.dumps(fields, indent=2, ensure_ascii=False) + '\n').encode()


def _ids(fields: dict, start: list[int], ends: set[int], run: bool) -> dict:
  """bos_token_id and eos_token_id where `fields` lacks them or, in a run, has other eos ids.

  `start`: the bos id, if there is one; `ends`: the eos ids.
  """
  eos, changed = fields.get('eos_token_id'), {}
  if start and fields.get('bos_token_id') is None:
    changed['bos_token_id'] = start[0]
  if eos is None or run and {*(eos if isinstance(eos, list) else [eos])} != ends:
    changed['eos_token_id'] = min(ends) if len(ends) == 1 else sorted(ends)
  return changed


def _from_sentencepiece(model: bytes, ours: tokenizers.Tokenizer, before: dict) -> tuple[
    bytes, dict]:
  """tokenizer.model -> tokenizer.json, and the fields of tokenizer_config.json."""
  import transformers
  with tempfile.TemporaryDirectory() as local:  # alone, because settings would change the result
    pathlib.Path(local, 'tokenizer.model').write_bytes(model)
    made = transformers.PreTrainedTokenizerFast.from_pretrained(
        local, local_files_only=True, trust_remote_code=False)
  made.add_bos_token = bool(ours.start)
  kept = {key: before[key] for key in KEPT if key in before}
  return (made.backend_tokenizer.to_str(pretty=True) + '\n').encode(), kept | ours.special | dict(
      tokenizer_class=CLASS, unk_token=made.unk_token, add_bos_token=bool(ours.start),
      add_eos_token=False, clean_up_tokenization_spaces=False)


def _load(files: dict[str, bytes]):
  """The tokenizer of the export, as other programs load it."""
  with tempfile.TemporaryDirectory() as local:
    for name, data in files.items():
      path = pathlib.Path(local, name)
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(data)
    return tokenizers.load_transformers(local)


def _check_prompt(folder, chat: str, prompt: str, ours: tokenizers.Tokenizer, theirs):
  """Raises InputError if a prompt in the chat format has other ids in transformers."""
  wanted = templates.encode_prompt(chat, prompt, ours)
  found = theirs.apply_chat_template([dict(role='user', content=prompt)], tokenize=True,
                                     add_generation_prompt=True, return_dict=False)
  if found != wanted:
    raise InputError(f'{folder}: in the chat format {chat}, {prompt!r} has other ids in '
                     f'transformers; add the tokenizer.json of the model, or give another --chat')


def _texts(tokenizer) -> Sequence[str]:
  """TEXTS, and texts of three random pieces of the vocabulary each, always the same.

  Texts with the name of an added token are left out: only transformers reads it as that token.
  """
  pieces, draw = sorted(tokenizer.get_vocab()), random.Random(0)
  texts = [''.join(draw.choices(pieces, k=3)).replace('▁', ' ') for _ in range(RANDOM_TEXTS)]
  names = [name for name in tokenizer.get_added_vocab() if name.strip()]
  return [text for text in (*TEXTS, *texts) if not any(name in text for name in names)]
