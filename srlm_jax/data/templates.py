"""The texts around prompts and responses: chat forms, the judge's rubric and its score, few-shot authoring."""
import dataclasses
import re

from etils import epath

from srlm_jax import InputError

_FOLDER = epath.resource_path('srlm_jax') / 'data'
CHATS = ('plain', 'llama2', 'tokenizer')


def chat(kind: str, prompt: str, tokenizer) -> str:
  """The prompt up to where the response begins.

  >>> chat('plain', 'Name a fruit.', None)
  'User: Name a fruit.\\nAssistant:'
  """
  if kind == 'plain':
    return f'User: {prompt}\nAssistant:'
  if kind == 'llama2':
    return f'[INST] {prompt} [/INST]'
  if kind == 'tokenizer':
    return tokenizer.chat(prompt)
  raise InputError(f'config.chat is {kind!r}; it is one of {", ".join(CHATS)}')


def encode_prompt(kind: str, prompt: str, tokenizer) -> list[int]:
  """Ids of the prompt in its chat form, bos first: what the model answers."""
  text = chat(kind, prompt, tokenizer)
  return [tokenizer.bos_id, *tokenizer.encode(text, special=kind == 'tokenizer')]


def encode_pair(kind: str, prompt: str, response: str, tokenizer) -> tuple[list[int], list[int]] | None:
  """(prompt ids, response ids); None if the tokenizer merges a piece across the seam between them.

  The pieces of prompt + response must be those of the whole text, or training would show the model a seam
  that sampling never makes.
  """
  before = encode_prompt(kind, prompt, tokenizer)
  response = tokenizer.plain(response.strip()) if kind == 'tokenizer' else ' ' + response.strip()
  text = chat(kind, prompt, tokenizer) + response
  whole = [tokenizer.bos_id, *tokenizer.encode(text, special=kind == 'tokenizer')]
  if whole[:len(before)] != before:
    return None
  return before, whole[len(before):]


@dataclasses.dataclass(frozen=True)
class Judge:
  """A rubric with the slots {prompt} and {response}, and the range of its score."""
  text: str
  lowest: float
  highest: float

  def render(self, prompt: str, response: str) -> str:
    """The judge's prompt; a response cannot close its own tags, nor fill the other slot."""
    slots = dict(prompt=prompt, response=_neutralise(response))
    return re.sub(r'\{(prompt|response)\}', lambda m: slots[m[1]], self.text)

  def parse(self, judgement: str) -> tuple[float | None, str]:
    """The score on the last score line of the judge's own words, or None with the reason.

    >>> Judge('', 0, 5).parse('1 point for relevance, 3 for the rest.\\n**Score:** 4/5')
    (4.0, '')
    >>> Judge('', 0, 5).parse('Score: 7')
    (None, 'out of range')
    """
    lines = re.findall(r'\bscore\b[\s*_]*:(.*)', judgement, flags=re.IGNORECASE)
    if not lines:
      return None, 'no score'
    found = _VALUE.fullmatch(lines[-1])
    if not found:
      return None, 'unreadable'
    score, top = float(found['score']), found['top']
    if not self.lowest <= score <= self.highest or (top and float(top) != self.highest):
      return None, 'out of range'
    return score, ''


# What may follow 'Score:' up to the end of its line: 4, **4**, 3.5, 4/5, 4 out of 5, 4 points, <4>, "4".
_VALUE = re.compile(r'''[\s*_"'“<(\[]*(?P<score>\d+(?:\.\d+)?)[\s*_]*(?:(?:/|out\s+of)[\s*_]*(?P<top>\d+))?[\s*_]*'''
                    r'''(?:points?)?[\s*_"'”>)\].]*''', re.IGNORECASE)


def load_judge(name: str, lowest: float, highest: float) -> Judge:
  """A template of the package by name (`additive`), or any file by path; one that lacks a slot is refused."""
  path = epath.Path(name) if '/' in name or name.endswith('.txt') else _FOLDER / f'judge_{name}.txt'
  text = _read(path, 'config.judge.template').replace('{instruction}', '{prompt}')  # the paper's word for it
  for slot in ('{prompt}', '{response}'):
    if text.count(slot) != 1:
      raise InputError(f'{path} holds the slot {slot} {text.count(slot)} times; a judge template holds it once')
  return Judge(text, lowest, highest)


def load_author(name: str) -> str:
  """The template that asks for new prompts; its slot {shots} is a numbered list."""
  path = epath.Path(name) if '/' in name or name.endswith('.txt') else _FOLDER / f'author_{name}.txt'
  text = _read(path, 'config.prompts.template')
  if text.count('{shots}') != 1:
    raise InputError(f'{path} holds the slot {{shots}} {text.count("{shots}")} times; an author template holds it once')
  return text


def _neutralise(response: str) -> str:
  return re.sub(r'<\s*(/?)\s*response\s*>', r'< \1response >', response, flags=re.IGNORECASE)


def _read(path, key: str) -> str:
  if not path.exists():
    raise InputError(f'{key}: {path} does not exist; name a template of srlm_jax/data or the path of a file')
  return path.read_text().rstrip('\n')
