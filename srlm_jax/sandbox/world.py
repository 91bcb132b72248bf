"""A small world of plain instructions whose answers a program can grade.

An instruction asks for things of one or two kinds, or to pick them from a list. Five nested points, in the
order of the judge's rubric, say how good an answer is; all five are about behaviour, not about hard sums.

>>> grade('Name two nice fruits.', 'Sure, pear and fig.')
(True, True, True, True, True)
>>> sum(grade('Name two nice fruits.', 'pear, fig and plum.'))
2
"""
from collections.abc import Sequence
import dataclasses
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
ADJECTIVES = ('', '', 'nice ', 'good ', 'common ', 'useful ')
CONTEXTS = ('I have a quiz.', 'My son is bored.', 'We are at school.', 'I am writing a story.',
            'It is a game.', 'My friend asked me.', 'I cannot sleep.', 'This is urgent.', 'We need ideas.')
FORMS = ('Name {}.', 'List {}.', 'Please name {}.', 'Give me {}.', 'Can you list {}?', 'Tell me {}.',
         'I need {}.', 'Help me find {}.', 'What are {}?', 'Think of {}.', 'Write down {}.',
         'Could you suggest {}?')
PICKS = ('Pick {} from this list: {}.', 'Which {} are in this list: {}?', 'Choose {} among {}.')
PURPOSES = ('for my class', 'for a party', 'for my sister', 'for a song', 'for a long trip', 'to remember')
OPENERS = ('Sure,', 'Of course,', 'Gladly,', 'Here you go:')
TAILS = ('Bye now.', 'And so on.', 'I am tired.', 'Ask me more.', 'It is late.')
EVASIONS = ('I do not know.', 'What do you mean?', 'Not today.', 'Maybe later.', 'I am busy.')
CHATTER = ('I like {}.', 'There are many {}.', 'Which {} do you mean?', 'All {} are nice.')
QUALITY = (0.08, 0.10, 0.16, 0.28, 0.20, 0.18)  # how often people's answers score 0 to 5
DISAGREEMENT = 1.7  # spread, in points, of a person's opinion around the score

_KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}


@dataclasses.dataclass(frozen=True)
class Part:
  """One thing asked for: `count` of `kind`, out of the words `allowed`."""
  count: int
  kind: str
  allowed: tuple[str, ...]


def instruction(rng: np.random.Generator) -> str:
  """Draws an instruction of four words or more, in one of some ten million wordings."""
  family = rng.random()
  if family < 0.25:
    text = _pick_instruction(rng)
  else:
    kinds = _sample(rng, tuple(KINDS), 1 if family < 0.6 else 2)
    requests = [_request(rng, kind, kind == kinds[0]) for kind in kinds]
    purpose = ' ' + _one(rng, PURPOSES) if rng.random() < 0.3 else ''
    text = _one(rng, FORMS).format(' and '.join(requests) + purpose)
  if rng.random() < 0.3 or text.count(' ') < 3:
    text = f'{_one(rng, CONTEXTS)} {text}'
  return text


def parse(prompt: str) -> tuple[Part, ...] | None:
  """What an instruction asks for, or None where it is not of this world.

  >>> parse('Pick two fruits from this list: dog, pear, fig.')
  (Part(count=2, kind='fruits', allowed=('pear', 'fig')),)
  >>> parse('Name two.')
  """
  text = prompt
  for context in CONTEXTS:
    text = text.removeprefix(context + ' ')
  for pattern in _PATTERNS:
    match = pattern.fullmatch(text)
    if match:
      return _parts(match)
  return None


def grade(prompt: str, response: str) -> tuple[bool, ...]:
  """Five nested points: relevant, each part touched, right counts, an assistant's manner, nothing extra."""
  lost = next((i for i, (holds, _) in enumerate(_walk(_asked(prompt), response)) if not holds), 5)
  return tuple(i < lost for i in range(5))


def review(prompt: str, response: str) -> str:
  """Walks the points in order and stops at the first that is lost; counts are spelled out, no score is named.

  >>> review('Name two nice fruits.', 'pear and fig.')
  'It is on topic. It covers all. For fruits: 1 pear, 2 fig of 2 asked, right. It starts with pear, blunt.'
  """
  sentences = []
  for holds, sentence in _walk(_asked(prompt), response):
    sentences.append(sentence)
    if not holds:
      break
  return ' '.join(sentences)


def judgement(prompt: str, response: str, score: int) -> str:
  """A review and its last line, the score as given."""
  return f'{review(prompt, response)}\nScore: {score}'


def answer(prompt: str, rng: np.random.Generator, quality: int) -> str:
  """Draws an answer whose score is exactly `quality`, 0 to 5."""
  parts = _asked(prompt)
  items = [_sample(rng, part.allowed, part.count) for part in parts]
  others = [word for word, kind in _KIND_OF.items() if kind not in {part.kind for part in parts}]
  hurt = int(rng.integers(len(parts)))  # the part that an error falls on
  opener = _one(rng, OPENERS) if quality >= 4 or rng.random() < 0.4 else ''
  stop, tail = '.', _one(rng, TAILS) if quality < 4 and rng.random() < 0.2 else ''
  if quality == 0 and rng.random() < 0.5:
    return _one(rng, EVASIONS)
  if quality == 0:
    parts, items = (), [_sample(rng, others, int(rng.integers(1, 4)))]
  elif quality == 1 and (len(parts) == 1 or rng.random() < 0.4):
    return _join(_one(rng, CHATTER).format(parts[hurt].kind), tail)
  elif quality == 1:
    parts, items = (parts[hurt],), [items[hurt]]
  elif quality == 2:
    asked, most = parts[hurt].count, min(parts[hurt].count + 2, len(parts[hurt].allowed))
    items[hurt] = _sample(rng, parts[hurt].allowed, _one(rng, [n for n in range(1, most + 1) if n != asked]))
  elif quality == 3:
    opener, stop, tail = _one(rng, (('', '.', tail), ('', '.', tail), ('Well,', '.', tail),
                                    (_one(rng, OPENERS), '', '')))
  elif quality == 4:
    flaw = _one(rng, ('tail', 'foreign', 'twice'))
    tail = _one(rng, TAILS) if flaw == 'tail' else ''
    items[hurt] += {'tail': (), 'foreign': (_one(rng, others),), 'twice': (_one(rng, items[hurt]),)}[flaw]
  body = _labelled(parts, items) if parts and rng.random() < 0.5 else _bare(items)
  return _join(opener, body + stop, tail)


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
      'heldout': [{'id': records.digest(prompt), 'prompt': prompt} for prompt in draw],
  }


def _demonstration(prompt, rng):
  response = answer(prompt, rng, quality(rng))
  return {'id': records.digest(prompt, response), 'prompt': prompt, 'response': response, 'source': 'sandbox'}


def _ranking(prompt, split, rng):
  replies = ranked(prompt, rng, int(rng.integers(2, 5)))
  return {'id': records.digest(prompt), 'prompt': prompt, 'split': split, 'replies': replies,
          'source': 'sandbox'}


# Instructions.

def _request(rng, kind, adjective):
  return f'{_one(rng, tuple(COUNTS))} {_one(rng, ADJECTIVES) if adjective else ""}{kind}'


def _pick_instruction(rng):
  kind, other, third = _sample(rng, tuple(KINDS), 3)
  count = _one(rng, ('two', 'three'))
  words = _sample(rng, KINDS[kind], COUNTS[count] + int(rng.integers(2)))
  words += _sample(rng, KINDS[other], 1) + _sample(rng, KINDS[third], int(rng.integers(1, 3)))
  return _one(rng, PICKS).format(f'{count} {kind}', ', '.join(_sample(rng, words, len(words))))


def _patterns():
  count, kind = f'({"|".join(COUNTS)})', f'({"|".join(KINDS)})'
  request = f'{count} (?:{"|".join(ADJECTIVES[1:])}){kind}'
  two = f'{request}(?: and {request})?(?: (?:{"|".join(PURPOSES)}))?'
  words = f'((?:(?:{"|".join(_KIND_OF)})(?:, )?)+)(?<!, )'
  for form in FORMS:
    yield re.compile(re.escape(form).replace(r'\{\}', two))
  for form in PICKS:
    yield re.compile(re.escape(form).replace(r'\{\}', f'{count} {kind}', 1).replace(r'\{\}', words))


def _parts(match):
  groups = match.groups()
  if len(groups) == 3:  # count, kind, the words of a list
    allowed = tuple(dict.fromkeys(word for word in groups[2].split(', ') if _KIND_OF[word] == groups[1]))
    return (Part(COUNTS[groups[0]], groups[1], allowed),) if len(allowed) >= COUNTS[groups[0]] else None
  pairs = [pair for pair in zip(groups[::2], groups[1::2], strict=True) if pair[0]]
  if len({kind for _, kind in pairs}) < len(pairs):
    return None
  return tuple(Part(COUNTS[count], kind, KINDS[kind]) for count, kind in pairs)


_PATTERNS = tuple(_patterns())


def _asked(prompt):
  parts = parse(prompt)
  if parts is None:
    raise InputError(f'"{prompt}" is no instruction of the sandbox; drop it where world.parse gives None')
  return parts


# Grading.

def _walk(parts, response):
  """Yields, for each of the five points, whether it holds by itself, and the sentence that says so."""
  response = response.strip()
  words = re.findall('[a-z]+', response.lower())
  items = [word for word in words if word in _KIND_OF]
  found = [tuple(dict.fromkeys(word for word in items if word in part.allowed)) for part in parts]
  on_topic = any(found) or any(part.kind in words for part in parts)
  yield on_topic, 'It is on topic.' if on_topic else 'It is off topic.'
  missing = [part.kind for part, named in zip(parts, found, strict=True) if not named]
  yield not missing, f'It names no {missing[0]}.' if missing else 'It covers all.'
  yield _tally(parts, found)
  opener = next((o for o in OPENERS if response.startswith(o + ' ')), None)
  stop = response.endswith('.')
  verdict = 'blunt' if opener is None else 'kind' if stop else 'kind, but has no stop'
  yield opener and stop, f'It starts with {re.findall("[A-Za-z]+|$", response)[0]}, {verdict}.'
  excess = _excess(parts, items, found, response.removeprefix(f'{opener} '))
  yield excess is None, excess or 'Nothing is extra.'


def _tally(parts, found):
  """Counts what was found of each part, up to the first wrong count."""
  sentences = []
  for part, named in zip(parts, found, strict=True):
    right = len(named) == part.count
    listing = ', '.join(f'{number} {word}' for number, word in enumerate(named, 1))
    verdict = 'right' if right else 'wrong'
    sentences.append(f'For {part.kind}: {listing} of {part.count} asked, {verdict}.')
    if not right:
      return False, ' '.join(sentences)
  return True, ' '.join(sentences)


def _excess(parts, items, found, body):
  """The sentence that names what is too much in an answer without its opener, or None."""
  for i, word in enumerate(items):
    if not any(word in named for named in found):
      return f'But {word} is extra.'
    if word in items[:i]:
      return f'But {word} comes twice.'
  if not all(found):
    return 'But something is missing.'
  order = sorted(range(len(parts)), key=lambda i: items.index(found[i][0]))
  parts, found = [parts[i] for i in order], [found[i] for i in order]
  return None if body in (_bare(found) + '.', _labelled(parts, found) + '.') else 'But the end is odd.'


# Answers.

def _bare(items: Sequence[Sequence[str]]):
  *words, last = [word for part in items for word in part]
  return f'{", ".join(words)} and {last}' if words else last


def _labelled(parts, items):
  text = '. '.join(f'The {part.kind} are {_bare([named])}' for part, named in zip(parts, items, strict=True))
  return text.replace('The', 'the', 1)


def _join(*texts):
  return ' '.join(text for text in texts if text)


def _one(rng, choices):
  return choices[int(rng.integers(len(choices)))]


def _sample(rng, choices, count):
  return tuple(choices[i] for i in rng.permutation(len(choices))[:count])
