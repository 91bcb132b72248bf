"""A world of plain instructions whose answers a program can grade.

Thirteen families: lists of things of a kind, picking things of a kind out of some, and questions on the facts of
`facts.py`, about one thing or two. Five nested points, in the order of the judge's rubric, say how good an answer is.

>>> grade('Name two nice fruits.', 'Sure, pear and fig.')
(True, True, True, True, True)
>>> sum(grade('I have a quiz. What do cows and cats eat?', 'grass and nuts'))
2
"""
import dataclasses
import functools
import hashlib
import re

import numpy as np

from srlm_jax import InputError
from srlm_jax.sandbox.facts import FACTS, KINDS, NUMBERS

CONTEXTS = ('I have a quiz.', 'My son is bored.', 'We are at school.', 'I am writing a story.', 'It is a game.',
            'My friend asked me.', 'I cannot sleep.', 'This is urgent.', 'We need ideas.', 'I am new here.',
            'My teacher wants to know.', 'I always forget this.', 'We have a bet.', 'I am learning English.')
CLOSINGS = ('Thank you.', 'Please be quick.', 'I need it today.', 'It is for my class.', 'Please help.',
            'I am curious.')
LISTS = ('Name {x}.', 'List {x}.', 'Please name {x}.', 'Give me {x}.', 'Can you list {x}?', 'Tell me {x}.',
         'I need {x}.', 'Help me find {x}.', 'Think of {x}.', 'Write down {x}.', 'Could you suggest {x}?')
PICKS = ('Which of these are {kind}: {x}?', 'Pick the {kind} from {x}.', 'Find the {kind} among {x}.',
         'Here we have {x}. Name the {kind}.')
ADJECTIVES = ('nice', 'good', 'common', 'useful', 'famous', 'cheap')
COUNTS = ('two', 'three', 'four')

OPENERS = ('Sure,', 'Of course,', 'Gladly,', 'Here you go:')
SHARES = dict(test=0.08, valid=0.08)  # of all instructions, context and closing aside: never in a text to train on

_KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
_DOMAINS = {family: tuple(dict.fromkeys(f.answers.values())) for family, f in FACTS.items()}
WORDS = {word.lower(): word for words in (*KINDS.values(), *_DOMAINS.values()) for word in words}
FAMILIES = dict(list=3, pick=2) | dict.fromkeys(FACTS, 1)  # how often, one to another

_DRAWN = tuple(family for family, often in FAMILIES.items() for _ in range(often))


@dataclasses.dataclass(frozen=True)
class Asked:
  """What an instruction wants."""
  family: str
  topic: str               # the word that says what it is about
  count: int               # of answers
  right: tuple[str, ...]   # where any `count` of them do, more than that
  domain: tuple[str, ...]  # answers of that kind, right or wrong

  @property
  def wanted(self) -> str:
    return f'{self.count}, {listing(self.right) if len(self.right) == self.count else self.topic}'


def instruction(rng: np.random.Generator, split: str = 'train') -> str:
  """Draws an instruction of a split: train, valid or test. The part without context and closing is of one split."""
  while True:
    core = _core(rng, one(rng, _DRAWN))
    if _split(core) == split and (context := rng.random() < 0.5) + core.count(' ') > 2:
      return join(one(rng, CONTEXTS) if context else '', core, one(rng, CLOSINGS) if rng.random() < 0.3 else '')


def split(prompt: str) -> str:
  """train, valid or test."""
  return _split(bare(prompt))


def bare(prompt: str) -> str:
  """An instruction without the sentences of context before it and of closing after it."""
  before = next((c for c in CONTEXTS if prompt.startswith(c + ' ')), '')
  after = next((c for c in CLOSINGS if prompt.endswith(' ' + c)), '')
  return prompt[len(before):len(prompt) - len(after)].strip()


@functools.lru_cache(maxsize=100_000)
def parse(prompt: str) -> Asked | None:
  """What an instruction wants, or None where it is not of this world.

  >>> parse('It is a game. What do cows and cats eat?').right
  ('grass', 'fish')
  >>> parse('Name two.')
  """
  core = bare(prompt)
  for family, pattern in _PATTERNS:
    if match := pattern.fullmatch(core):
      return _asked(family, **match.groupdict())
  return None


def grade(prompt: str, response: str) -> tuple[bool, ...]:
  """Five nested points: on topic, an answer, the right and whole one, an assistant's manner, nothing extra."""
  lost = next((i for i, (holds, _) in enumerate(_walk(prompt, response)) if not holds), 5)
  return tuple(i < lost for i in range(5))


def review(prompt: str, response: str) -> str:
  """Walks the points in order and stops at the first that is lost; no score is named.

  >>> review('What do cows and cats eat?', 'grass and nuts.')
  'It is on topic. It says something. It should say 2, grass and fish. It says 1 grass yes 2 nuts no. It is wrong.'
  """
  sentences = []
  for holds, sentence in _walk(prompt, response):
    sentences.append(sentence)
    if not holds:
      break
  return ' '.join(sentences)


def statement(rng: np.random.Generator) -> str:
  """Draws a sentence that states a fact."""
  family = one(rng, ('kind', *FACTS))
  if family == 'kind':
    word = one(rng, tuple(_KIND_OF))
    return f'{word.capitalize()} is one of the {_KIND_OF[word]}.'
  facts = FACTS[family]
  x = one(rng, tuple(facts.answers))
  text = facts.statement.format(x=x, y=facts.answers[x])
  return text[0].upper() + text[1:]


def listing(words) -> str:
  """
  >>> listing(['pear', 'fig', 'plum'])
  'pear, fig and plum'
  """
  *first, last = words
  return f'{", ".join(first)} and {last}' if first else last


def _walk(prompt, response):
  """Yields, for each of the five points, whether it holds by itself, and the sentence that says so."""
  asked, response = must(prompt), response.strip()
  words = re.findall('[A-Za-z]+', response)
  given = [WORDS[word.lower()] for word in words if word.lower() in WORDS]
  items = [word for word in given if word in asked.domain]
  on_topic = bool(items) or asked.topic in response.lower()
  yield on_topic, 'It is on topic.' if on_topic else 'It is off topic.'
  yield bool(items), 'It says something.' if items else 'It says nothing.'
  right = len(set(given)) == asked.count and set(given) <= set(asked.right)
  yield right, (f'It should say {asked.wanted}. It says {" ".join(_checked(given, asked))}. '
                f'It is {"right" if right else "wrong"}.')
  opener = next((o for o in OPENERS if response.startswith(o + ' ')), None)
  stop = response.endswith('.')
  manner = 'It is kind.' if stop else 'It has no stop.'
  yield opener and stop, f'It opens with {words[0]}. ' + ('It is blunt.' if opener is None else manner)
  clean = response == f'{opener} {listing(given)}.' and len(given) == asked.count
  yield clean, f'It ends with {words[-1]}. It is {"clean" if clean else "not clean"}.'


def _checked(given, asked):
  """Counts the different ones, and says of each whether it is right: "1 golf yes 2 dog no golf again"."""
  seen = {}
  for word in given:
    yield (f'{word} again' if word in seen else
           f'{seen.setdefault(word, len(seen) + 1)} {word} {"yes" if word in asked.right else "no"}')


def _core(rng, family) -> str:
  """Draws an instruction without context and closing."""
  if family == 'list':
    adjective = one(rng, ADJECTIVES) + ' ' if rng.random() < 0.6 else ''
    return one(rng, LISTS).format(x=f'{one(rng, COUNTS)} {adjective}{one(rng, tuple(KINDS))}')
  if family == 'pick':
    kind, count = one(rng, tuple(KINDS)), int(rng.integers(1, 3))
    words = [*sample(rng, KINDS[kind], count),
             *sample(rng, [w for w, k in _KIND_OF.items() if k != kind], int(rng.integers(2, 4)))]
    return one(rng, PICKS).format(kind=kind, x=listing(sample(rng, words, len(words))))
  facts = FACTS[family]
  while True:
    about = sample(rng, tuple(facts.answers), 1 if family == 'sum' else int(rng.integers(1, 3)))
    if len({facts.answers[x] for x in about}) == len(about):
      return one(rng, facts.forms).format(x=' and '.join(about))


def _asked(family, x, kind='') -> Asked | None:
  """What the slots of a form say."""
  if family == 'list':
    count, kind = re.match(r'(\w+) .*?(\w+)$', x).groups()
    return Asked(family, kind, NUMBERS.index(count) + 1, KINDS[kind], KINDS[kind])
  if family == 'pick':
    words = tuple(re.split(', | and ', x))
    right = tuple(word for word in words if _KIND_OF[word] == kind)
    return Asked(family, kind, len(right), right, words) if right else None
  facts = FACTS[family]
  about = [x] if x in facts.answers else x.split(' and ')
  right = tuple(dict.fromkeys(facts.answers[a] for a in about))
  return Asked(family, facts.topic, len(about), right, _DOMAINS[family]) if len(right) == len(about) else None


def _patterns():
  """(family, what matches an instruction of it); the groups are the slots of its forms."""
  either = '|'.join
  word = f'(?:{either(_KIND_OF)})'
  slots = dict(kind=f'(?P<kind>{either(KINDS)})', x=f'(?P<x>{word}(?:, {word})* and {word})')
  count = f'(?P<x>(?:{either(COUNTS)}) (?:(?:{either(ADJECTIVES)}) )?(?:{either(KINDS)}))'
  yield from (('list', _pattern(form, x=count)) for form in LISTS)
  yield from (('pick', _pattern(form, **slots)) for form in PICKS)
  for family, facts in FACTS.items():
    about = f'(?:{either(facts.answers)})'
    x = f'(?P<x>{about}(?: and {about})?)' if family != 'sum' else f'(?P<x>{about})'
    yield from ((family, _pattern(form, x=x)) for form in facts.forms)


def _pattern(form: str, **slots: str) -> re.Pattern:
  return re.compile(re.sub(r'\\\{(\w+)\\\}', lambda m: slots[m[1]], re.escape(form)))


_PATTERNS = tuple(_patterns())


def must(prompt: str) -> Asked:
  """What an instruction wants; refused where it is not of this world."""
  asked = parse(prompt)
  if asked is None:
    raise InputError(f'"{prompt}" is no instruction of the sandbox; drop it where world.parse gives None')
  return asked


def _split(core: str) -> str:
  place = int(hashlib.sha256(core.encode()).hexdigest()[:8], 16) / 2 ** 32
  return 'test' if place < SHARES['test'] else 'valid' if place < SHARES['test'] + SHARES['valid'] else 'train'


def join(*texts):
  """Those that are not empty, with spaces between."""
  return ' '.join(text for text in texts if text)


def one(rng, choices):
  return choices[int(rng.integers(len(choices)))]


def sample(rng, choices, count):
  return tuple(choices[i] for i in rng.permutation(len(choices))[:count])
