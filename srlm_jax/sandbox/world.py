"""The sandbox world: short instructions whose responses a program can grade.

There are thirteen families of instructions. They ask for a list of things of one kind, for the
things of one kind in a given list, or for one or two of the facts in `facts.py`. A response earns
up to five nested points, in the order of the judge's rubric.

>>> grade('Name two nice fruits.', 'Sure, pear and fig.')
(True, True, True, True, True)
>>> sum(grade('I have a quiz. What do cows and cats eat?', 'grass and nuts'))
2
"""
from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import itertools
import re

import numpy as np

from srlm_jax import InputError
from srlm_jax.sandbox.facts import FACTS, KINDS, NUMBERS

CONTEXTS = ('I have a quiz.', 'My son is bored.', 'We are at school.', 'I am writing a story.',
            'It is a game.', 'My friend asked me.', 'I cannot sleep.', 'This is urgent.',
            'We need ideas.', 'I am new here.', 'My teacher wants to know.',
            'I always forget this.', 'We have a bet.', 'I am learning English.')
CLOSINGS = ('Thank you.', 'Please be quick.', 'I need it today.', 'It is for my class.',
            'Please help.', 'I am curious.')
LISTS = ('Name {x}.', 'List {x}.', 'Please name {x}.', 'Give me {x}.', 'Can you list {x}?',
         'Tell me {x}.', 'I need {x}.', 'Help me find {x}.', 'Think of {x}.', 'Write down {x}.',
         'Could you suggest {x}?')
PICKS = ('Which of these are {kind}: {x}?', 'Pick the {kind} from {x}.',
         'Find the {kind} among {x}.', 'Here we have {x}. Name the {kind}.')
ADJECTIVES = ('nice', 'good', 'common', 'useful', 'famous', 'cheap')
COUNTS = ('two', 'three', 'four')

OPENERS = ('Sure,', 'Of course,', 'Gladly,', 'Here you go:')
# The share of instructions in each held-out split. Context and closing do not affect the split.
SHARES = dict(test=0.08, valid=0.08)

_KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
_DOMAINS = {family: tuple(dict.fromkeys(f.answers.values())) for family, f in FACTS.items()}
WORDS = {word.lower(): word
         for words in (*KINDS.values(), *_DOMAINS.values()) for word in words}
FAMILIES = dict(list=3, pick=2) | dict.fromkeys(FACTS, 1)  # relative sampling weights

_WEIGHTED_FAMILIES = tuple(family for family, weight in FAMILIES.items() for _ in range(weight))


@dataclasses.dataclass(frozen=True)
class Requirement:
  """What an instruction asks for."""
  family: str
  topic: str               # the word that names the subject
  count: int               # required number of answers
  right: tuple[str, ...]   # correct answers; if there are more than `count`, any `count` will do
  domain: tuple[str, ...]  # all answers of the right type, correct or not

  @property
  def wanted(self) -> str:
    """The requirement as text in a review."""
    return f'{self.count}, {listing(self.right) if len(self.right) == self.count else self.topic}'


def instruction(rng: np.random.Generator, split: str = 'train') -> str:
  """Draws an instruction of a split: train, valid or test.

  The split depends on the core, which is the instruction without context and closing.
  """
  while True:
    core = _core(rng, one(rng, _WEIGHTED_FAMILIES))
    if _split(core) != split:
      continue
    has_context = rng.random() < 0.5
    if core.count(' ') + has_context <= 2:  # too short
      continue
    context = one(rng, CONTEXTS) if has_context else ''
    closing = one(rng, CLOSINGS) if rng.random() < 0.3 else ''
    return join(context, core, closing)


def split(prompt: str) -> str:
  """The split of an instruction: train, valid or test."""
  return _split(bare(prompt))


def bare(prompt: str) -> str:
  """The core of an instruction: removes the context before it and the closing after it."""
  before = next((c for c in CONTEXTS if prompt.startswith(c + ' ')), '')
  after = next((c for c in CLOSINGS if prompt.endswith(' ' + c)), '')
  return prompt[len(before):len(prompt) - len(after)].strip()


@functools.lru_cache(maxsize=100_000)
def parse(prompt: str) -> Requirement | None:
  """What an instruction asks for; None if it is not a sandbox instruction.

  >>> parse('It is a game. What do cows and cats eat?').right
  ('grass', 'fish')
  >>> parse('Name two.')
  """
  core = bare(prompt)
  for family, pattern in _PATTERNS:
    if match := pattern.fullmatch(core):
      return _requirement(family, **match.groupdict())
  return None


def require(prompt: str) -> Requirement:
  """What an instruction asks for. Raises InputError if it is not a sandbox instruction."""
  required = parse(prompt)
  if required is None:
    raise InputError(f'"{prompt}" is not a sandbox instruction; '
                     f'remove prompts for which world.parse returns None')
  return required


def grade(prompt: str, response: str) -> tuple[bool, ...]:
  """Five nested points; a point counts only if all points before it hold.

  The points are: on topic, gives an answer, correct and complete, polite and well-formed, nothing
  extra. Raises InputError if the prompt is not a sandbox instruction.
  """
  first_lost = next((i for i, (holds, _) in enumerate(_points(prompt, response)) if not holds), 5)
  return tuple(i < first_lost for i in range(5))


def review(prompt: str, response: str) -> str:
  """Describes the points in order up to the first lost one. The text contains no score.

  >>> review('What do cows eat?', 'nuts')
  'It is on topic. It says something. It should say 1, grass. It says 1 nuts no. It is wrong.'
  """
  sentences = []
  for holds, sentence in _points(prompt, response):
    sentences.append(sentence)
    if not holds:
      break
  return ' '.join(sentences)


def description(prompt: str, response: str, is_right: bool) -> str:
  """What a judge has to compare, and whether it calls the answers right. The text has no score.

  >>> description('What do cows eat?', 'nuts', False)
  'It opens with nuts. It ends with nuts. It should say 1, grass. It says nuts. It is wrong.'
  """
  required, words, given = require(prompt), _words(response), _answers(response)
  return (f'It opens with {words[0]}. It ends with {words[-1]}. It should say {required.wanted}. '
          f'It says {" ".join(given) or "nothing"}. It is {"right" if is_right else "wrong"}.')


def impression(prompt: str, response: str) -> int:
  """The points, 0 to 5, that somebody gives who does not check whether the answers are right.

  >>> sum(grade('What do cows eat?', 'Sure, nuts.')), impression('What do cows eat?', 'Sure, nuts.')
  (2, 5)
  """
  required, response, given = require(prompt), response.strip(), _answers(response)
  says = any(word in required.domain for word in given)
  on_topic = says or required.topic in response.lower()
  opener = _opener(response)
  polite = opener is not None and response.endswith('.')
  clean = bool(given) and response == f'{opener} {listing(given)}.'
  return list(itertools.accumulate((on_topic, says, True, polite, clean, False), min)).index(False)


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
  """Words as an English list.

  >>> listing(['pear', 'fig', 'plum'])
  'pear, fig and plum'
  """
  *first, last = words
  return f'{", ".join(first)} and {last}' if first else last


def join(*texts: str) -> str:
  """Joins the non-empty texts with spaces."""
  return ' '.join(text for text in texts if text)


def one(rng: np.random.Generator, choices):
  """Draws one of `choices`."""
  return choices[int(rng.integers(len(choices)))]


def sample(rng: np.random.Generator, choices, count: int) -> tuple:
  """Draws up to `count` of `choices` without replacement, in random order."""
  return tuple(choices[i] for i in rng.permutation(len(choices))[:count])


def _points(prompt: str, response: str) -> Iterator[tuple[bool, str]]:
  """Yields (whether the point holds by itself, the sentence of the review) for the five points."""
  required, response = require(prompt), response.strip()
  words, given = _words(response), _answers(response)
  items = [word for word in given if word in required.domain]
  on_topic = bool(items) or required.topic in response.lower()
  yield on_topic, 'It is on topic.' if on_topic else 'It is off topic.'
  yield bool(items), 'It says something.' if items else 'It says nothing.'
  right = _is_right(required, given)
  yield right, (f'It should say {required.wanted}. It says {" ".join(_checked(given, required))}. '
                f'It is {"right" if right else "wrong"}.')
  opener = _opener(response)
  stop = response.endswith('.')
  manner = 'It is blunt.' if opener is None else 'It is kind.' if stop else 'It has no stop.'
  yield opener is not None and stop, f'It opens with {words[0]}. {manner}'
  clean = response == f'{opener} {listing(given)}.' and len(given) == required.count
  yield clean, f'It ends with {words[-1]}. It is {"clean" if clean else "not clean"}.'


def _words(response: str) -> list[str]:
  return re.findall('[A-Za-z]+', response)


def _answers(response: str) -> list[str]:
  """The words of the response that are answers in this world, in order."""
  return [WORDS[word.lower()] for word in _words(response) if word.lower() in WORDS]


def _is_right(required: Requirement, given: list[str]) -> bool:
  return len(set(given)) == required.count and set(given) <= set(required.right)


def _opener(response: str) -> str | None:
  return next((o for o in OPENERS if response.startswith(o + ' ')), None)


def _checked(given: list[str], required: Requirement) -> Iterator[str]:
  """Yields the distinct answers with number and correctness: 1 golf yes 2 dog no golf again."""
  seen = set()
  for word in given:
    if word in seen:
      yield f'{word} again'
    else:
      seen.add(word)
      yield f'{len(seen)} {word} {"yes" if word in required.right else "no"}'


def _core(rng: np.random.Generator, family: str) -> str:
  """Draws an instruction without context and closing."""
  if family == 'list':
    adjective = one(rng, ADJECTIVES) + ' ' if rng.random() < 0.6 else ''
    return one(rng, LISTS).format(x=f'{one(rng, COUNTS)} {adjective}{one(rng, tuple(KINDS))}')
  if family == 'pick':
    kind, count = one(rng, tuple(KINDS)), int(rng.integers(1, 3))
    others = [word for word, other in _KIND_OF.items() if other != kind]
    words = [*sample(rng, KINDS[kind], count), *sample(rng, others, int(rng.integers(2, 4)))]
    return one(rng, PICKS).format(kind=kind, x=listing(sample(rng, words, len(words))))
  facts = FACTS[family]
  while True:
    subjects = sample(rng, tuple(facts.answers), 1 if family == 'sum' else int(rng.integers(1, 3)))
    if len({facts.answers[x] for x in subjects}) == len(subjects):
      return one(rng, facts.forms).format(x=' and '.join(subjects))


def _requirement(family: str, x: str, kind: str = '') -> Requirement | None:
  """Interprets the slots of a matched form; None if the instruction has no correct answer."""
  if family == 'list':
    count, kind = re.match(r'(\w+) .*?(\w+)$', x).groups()
    return Requirement(family, kind, NUMBERS.index(count) + 1, KINDS[kind], KINDS[kind])
  if family == 'pick':
    words = tuple(re.split(', | and ', x))
    right = tuple(word for word in words if _KIND_OF[word] == kind)
    return Requirement(family, kind, len(right), right, words) if right else None
  facts = FACTS[family]
  subjects = [x] if x in facts.answers else x.split(' and ')
  right = tuple(dict.fromkeys(facts.answers[subject] for subject in subjects))
  if len(right) != len(subjects):
    return None
  return Requirement(family, facts.topic, len(subjects), right, _DOMAINS[family])


def _patterns() -> Iterator[tuple[str, re.Pattern]]:
  """Yields (family, pattern of one form); the groups of the pattern are the slots of the form."""
  either = '|'.join
  word = f'(?:{either(_KIND_OF)})'
  slots = dict(kind=f'(?P<kind>{either(KINDS)})', x=f'(?P<x>{word}(?:, {word})* and {word})')
  count = (f'(?P<x>(?:{either(COUNTS)}) (?:(?:{either(ADJECTIVES)}) )?'
           f'(?:{either(KINDS)}))')
  yield from (('list', _pattern(form, x=count)) for form in LISTS)
  yield from (('pick', _pattern(form, **slots)) for form in PICKS)
  for family, facts in FACTS.items():
    subject = f'(?:{either(facts.answers)})'
    second = '' if family == 'sum' else f'(?: and {subject})?'
    yield from ((family, _pattern(form, x=f'(?P<x>{subject}{second})')) for form in facts.forms)


def _pattern(form: str, **slots: str) -> re.Pattern:
  return re.compile(re.sub(r'\\\{(\w+)\\\}', lambda m: slots[m[1]], re.escape(form)))


_PATTERNS = tuple(_patterns())


def _split(core: str) -> str:
  place = int(hashlib.sha256(core.encode()).hexdigest()[:8], 16) / 2 ** 32  # in [0, 1)
  if place < SHARES['test']:
    return 'test'
  return 'valid' if place < SHARES['test'] + SHARES['valid'] else 'train'
