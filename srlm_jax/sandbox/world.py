"""A small world of plain instructions whose answers a program can grade.

An instruction asks for two, three or four things of one kind. Five nested points, in the order of the judge's
rubric, say how good an answer is; all five are about behaviour, not about hard sums.

>>> grade('Name two nice fruits.', 'Sure, pear and fig.')
(True, True, True, True, True)
>>> sum(grade('Name two nice fruits.', 'pear, fig and plum.'))
2
"""
import re

import numpy as np

from srlm_jax import InputError
from srlm_jax.data import records

KINDS = {
    'fruits': ('apple', 'pear', 'plum', 'fig', 'peach', 'lemon', 'grape', 'melon'),
    'animals': ('dog', 'cat', 'cow', 'horse', 'pig', 'goat', 'sheep', 'lion'),
    'colours': ('red', 'blue', 'green', 'white', 'black', 'pink', 'brown', 'grey'),
    'tools': ('hammer', 'saw', 'drill', 'axe', 'knife', 'rope', 'spade', 'rake'),
    'drinks': ('tea', 'milk', 'water', 'juice', 'coffee', 'cider', 'soda', 'wine'),
    'clothes': ('hat', 'coat', 'shirt', 'sock', 'shoe', 'scarf', 'belt', 'glove'),
    'sports': ('golf', 'tennis', 'rugby', 'judo', 'hockey', 'boxing', 'rowing', 'polo'),
    'jobs': ('baker', 'nurse', 'pilot', 'farmer', 'tailor', 'clerk', 'driver', 'teacher'),
}
COUNTS = {'two': 2, 'three': 3, 'four': 4}
ADJECTIVES = ('', '', 'nice ', 'good ', 'common ', 'useful ', 'old ', 'cheap ')
CONTEXTS = ('I have a quiz.', 'My son is bored.', 'We are at school.', 'I am writing a story.',
            'It is a game.', 'My friend asked me.', 'I cannot sleep.', 'This is urgent.', 'We need ideas.')
FORMS = ('Name {}.', 'List {}.', 'Please name {}.', 'Give me {}.', 'Can you list {}?', 'Tell me {}.',
         'I need {}.', 'Help me find {}.', 'What are {}?', 'Think of {}.', 'Write down {}.',
         'Could you suggest {}?')
PURPOSES = ('for my class', 'for a party', 'for my sister', 'for a song', 'for a long trip', 'to remember')
OPENERS = ('Sure,', 'Of course,', 'Gladly,', 'Here you go:')
TAILS = ('Bye now.', 'And so on.', 'I am tired.', 'Ask me more.', 'It is late.')
EVASIONS = ('I do not know.', 'What do you mean?', 'Not today.', 'Maybe later.', 'I am busy.')
CHATTER = ('I like {}.', 'There are many {}.', 'Which {} do you mean?', 'All {} are nice.')
QUALITY = (0.08, 0.12, 0.20, 0.25, 0.17, 0.18)  # how often people's answers score 0 to 5
DISAGREEMENT = 1.7  # spread, in points, of a person's opinion around the score

_KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
_INSTRUCTION = re.compile(
    f'(?:(?:{"|".join(map(re.escape, CONTEXTS))}) )?(?:'
    + '|'.join(re.escape(form).replace(r'\{\}', '{}') for form in FORMS).replace(
        '{}', f'(?:{"|".join(COUNTS)}) (?:{"|".join(ADJECTIVES[1:])})(?:{"|".join(KINDS)})'
              f'(?: (?:{"|".join(PURPOSES)}))?') + ')')


def instruction(rng: np.random.Generator) -> str:
  """Draws an instruction of four words or more, in one of some 140,000 wordings."""
  request = f'{_one(rng, tuple(COUNTS))} {_one(rng, ADJECTIVES)}{_one(rng, tuple(KINDS))}'
  purpose = ' ' + _one(rng, PURPOSES) if rng.random() < 0.5 else ''
  text = _one(rng, FORMS).format(request + purpose)
  if rng.random() < 0.3 or text.count(' ') < 3:
    text = f'{_one(rng, CONTEXTS)} {text}'
  return text


def parse(prompt: str) -> tuple[int, str] | None:
  """How many of what an instruction asks for, or None where it is not of this world.

  >>> parse('It is a game. List three old tools for a party.')
  (3, 'tools')
  >>> parse('Name two.')
  """
  if not _INSTRUCTION.fullmatch(prompt):
    return None
  words = re.findall(r'\w+', prompt)
  return (next(COUNTS[word] for word in words if word in COUNTS), next(word for word in words if word in KINDS))


def bare(prompt: str) -> str:
  """An instruction without the sentence of context before it."""
  return next((prompt.removeprefix(c + ' ') for c in CONTEXTS if prompt.startswith(c + ' ')), prompt)


def grade(prompt: str, response: str) -> tuple[bool, ...]:
  """Five nested points: relevant, several things, the right count, an assistant's manner, nothing extra."""
  lost = next((i for i, (holds, _) in enumerate(_walk(prompt, response)) if not holds), 5)
  return tuple(i < lost for i in range(5))


def review(prompt: str, response: str) -> str:
  """Walks the points in order and stops at the first that is lost; no score is named.

  >>> review('Name two nice fruits.', 'pear and fig.')
  'It is on topic. It names several. It names 2 of 2. It is blunt.'
  """
  sentences = []
  for holds, sentence in _walk(prompt, response):
    sentences.append(sentence)
    if not holds:
      break
  return ' '.join(sentences)


def answer(prompt: str, rng: np.random.Generator, quality: int) -> str:
  """Draws an answer whose score is exactly `quality`, 0 to 5."""
  count, kind = _asked(prompt)
  words, others = KINDS[kind], tuple(word for word, k in _KIND_OF.items() if k != kind)
  opener = _one(rng, OPENERS) if quality >= 4 or rng.random() < 0.4 else ''
  tail = _one(rng, TAILS) if quality == 4 or quality < 4 and rng.random() < 0.2 else ''
  if quality == 0 and rng.random() < 0.5:
    return _one(rng, EVASIONS)
  if quality == 1 and rng.random() < 0.5:
    return _join(_one(rng, CHATTER).format(kind), tail)
  number = {0: int(rng.integers(2, 5)), 1: 1, 2: _one(rng, [n for n in (2, 3, 4) if n != count])}.get(quality, count)
  body = listing(_sample(rng, others if quality == 0 else words, number))
  if quality == 3:
    flaw = int(rng.integers(3))
    return _join('' if flaw < 2 else _one(rng, OPENERS), body + ('.' if flaw < 2 else ''), tail if flaw < 2 else '')
  return _join(opener, body + '.', tail)


def quality(rng: np.random.Generator) -> int:
  """Draws how good a person's answer is."""
  return int(np.searchsorted(np.cumsum(QUALITY), rng.random() * sum(QUALITY), side='right'))


def ranked(prompt: str, rng: np.random.Generator, n_replies: int) -> list[dict]:
  """Draws different replies {"id", "text", "rank"} of varied quality, with a person's ranks, 0 the best."""
  texts = {}
  while len(texts) < n_replies:
    text = answer(prompt, rng, quality(rng))
    texts[text] = sum(grade(prompt, text)) + DISAGREEMENT * rng.standard_normal()
  order = sorted(texts, key=texts.get, reverse=True)
  return [{'id': records.digest(prompt, text), 'text': text, 'rank': order.index(text)} for text in texts]


def seeds(seed: int, ift: int, ranked_train: int, ranked_eval: int, heldout: int) -> dict[str, list[dict]]:
  """Draws the seed data {"ift", "ranked", "heldout"} of so many records; all prompts are different."""
  rng = np.random.default_rng(seed)
  prompts = {}
  while len(prompts) < ift + ranked_train + ranked_eval + heldout:
    prompts.setdefault(instruction(rng))
  draw = iter(prompts)
  splits = ['train'] * ranked_train + ['eval'] * ranked_eval
  return {
      'ift': [_demonstration(next(draw), rng) for _ in range(ift)],
      'ranked': [_ranking(next(draw), split, rng) for split in splits],
      'heldout': [{'id': records.digest(prompt), 'prompt': prompt, 'split': 'test'} for prompt in draw],
  }


def listing(words) -> str:
  """
  >>> listing(['pear', 'fig', 'plum'])
  'pear, fig and plum'
  """
  *first, last = words
  return f'{", ".join(first)} and {last}' if first else last


def _walk(prompt, response):
  """Yields, for each of the five points, whether it holds by itself, and the sentence that says so."""
  count, kind = _asked(prompt)
  response = response.strip()
  words = re.findall('[a-z]+', response.lower())
  found = tuple(dict.fromkeys(word for word in words if word in KINDS[kind]))
  on_topic = bool(found) or kind in words
  yield on_topic, 'It is on topic.' if on_topic else 'It is off topic.'
  yield len(found) > 1, 'It names several.' if len(found) > 1 else 'It hardly names any.'
  yield len(found) == count, f'It names {len(found)} of {count}.'
  opener = next((o for o in OPENERS if response.startswith(o + ' ')), None)
  stop = response.endswith('.')
  yield opener and stop, 'It is blunt.' if opener is None else 'It is kind.' if stop else 'It has no stop.'
  clean = response == f'{opener} {listing(found)}.' if found else False
  yield clean, 'It is clean.' if clean else 'It has an odd end.'


def _asked(prompt):
  asked = parse(prompt)
  if asked is None:
    raise InputError(f'"{prompt}" is no instruction of the sandbox; drop it where world.parse gives None')
  return asked


def _demonstration(prompt, rng):
  response = answer(prompt, rng, quality(rng))
  return {'id': records.digest(prompt, response), 'prompt': prompt, 'response': response, 'source': 'sandbox'}


def _ranking(prompt, split, rng):
  replies = ranked(prompt, rng, int(rng.integers(2, 5)))
  return {'id': records.digest(prompt), 'prompt': prompt, 'split': split, 'replies': replies, 'source': 'sandbox'}


def _join(*texts):
  return ' '.join(text for text in texts if text)


def _one(rng, choices):
  return choices[int(rng.integers(len(choices)))]


def _sample(rng, choices, count):
  return tuple(choices[i] for i in rng.permutation(len(choices))[:count])
