"""Judge templates: the rubric, how its score is written, and the reading of scores from what a judge wrote.

A template is a text file with slots. It travels with its score in a header of TOML between two lines `+++`:

  scale    [lowest, highest]: the range of the score; [0, 5] where there is no header
  lines    labels of the lines that hold the score, each `LABEL: value`; ["Score"] where there is no header. The score
           is the mean over the labels
  pattern  in the place of `lines`: a regular expression whose one group is the value
  words    {word = points, ..}: values are these words; without it they are numbers
  example  a judgement in the form that the template asks for; the header must be able to read it
"""
from collections.abc import Mapping
import dataclasses
import math
import re
import tomllib

from srlm_jax import InputError
from srlm_jax.data import templates

_DEFAULT = dict(scale=[0, 5], lines=['Score'], example='It is relevant and useful.\nScore: 3')
_KEYS = ('scale', 'lines', 'pattern', 'words', 'example')


@dataclasses.dataclass(frozen=True)
class Judge:
  """A rubric with slots, and the form and range of its score."""
  text: str                     # with its slots
  slots: tuple[str, ...]
  lowest: float
  highest: float
  patterns: tuple[tuple[str, ...], ...]  # of each value whose mean is the score: regular expressions of one group, the
                                         # first that matches anything counts
  words: Mapping[str, float]    # points of each word, in lower case; empty: values are numbers
  example: str

  def render(self, **texts: str) -> str:
    """The judge's prompt; no text can fill another slot, close a tag of the template, or end the chat's turn."""
    shown = {slot: _neutralise(texts[slot], self._tags()) for slot in self.slots}
    return re.sub(_slot(self.slots), lambda m: shown[m[1]], self.text)

  def parse(self, judgement: str) -> tuple[float | None, str]:
    """The score in the judge's own words, or None with the reason; of several score lines the last counts.

    >>> load('additive').parse('1 point for relevance, 3 for the rest.\\n**Score:** 4/5')
    (4.0, '')
    >>> load('additive').parse('Score: 7')
    (None, 'out of range')
    """
    values = []
    for ways in self.patterns:
      found = _last(ways, judgement)
      if not found:
        return None, 'no score'
      value, reason = self._value(found[1] or '')
      if reason:
        return None, reason
      values.append(value)
    return sum(values) / len(values), ''

  def state(self, score: float) -> str:
    """The score in the form of the template: a number as it is, or the word nearest to it.

    >>> load('additive').state(4.0), load('multiple_choice').state(4.0)
    ('Score: 4', 'Answer: D')
    """
    value = min(self.words, key=lambda w: abs(self.words[w] - score)) if self.words else f'{score:g}'
    lines = []
    for ways in self.patterns:
      match = _last(ways, self.example)
      start, end = match.span(1)
      written = match[1].strip()
      value = value.upper() if written.isupper() else value
      before = self.example[:start] + match[1][:len(match[1]) - len(match[1].lstrip())]
      lines.append(before.rpartition('\n')[2] + value + self.example[end:].partition('\n')[0])
    stated = '\n'.join(lines)
    if self.parse(stated)[0] is None:
      raise InputError(f'the judge template can read its example and not the line "{stated}" of it; '
                       f'write pattern so that it matches within one line')
    return stated

  def nearest(self, score: float) -> float:
    """The score that the template can state nearest to this one: a whole number, or the points of a word."""
    return float(min(self.words.values(), key=lambda p: abs(p - score)) if self.words else math.floor(score + 0.5))

  def _value(self, text: str) -> tuple[float | None, str]:
    plain = _plain(text)
    if self.words:
      value = self.words.get(plain.rstrip('.').strip().lower())
      return (None, 'unreadable') if value is None else (float(value), '')
    found = _NUMBER.fullmatch(plain)
    if not found:
      return None, 'unreadable'
    score, top = float(found[1]), found[2]
    if not self.lowest <= score <= self.highest or (top and float(top) != self.highest):
      return None, 'out of range'
    return score, ''

  def _tags(self) -> set[str]:
    return set(re.findall(r'</?\s*([A-Za-z_][\w-]*)\s*>', self.text))


_MARKUP = re.compile(r'''[*_`|"'“”<>()\[\]]''')
_NUMBER = re.compile(r'([-+]?[0-9]+(?:\.[0-9]+)?)(?: ?(?:/|out of) ?([0-9]+(?:\.[0-9]+)?))?(?: ?points?)? ?\.?',
                     re.IGNORECASE)
# What begins or ends a turn of one of the chat forms, or looks like a special token.
_TURN = re.compile(r'\[(?=/?INST\])|<(?=</?SYS>>)|<(?=/?s>)|<(?=\|[^|<>]{1,40}\|>)', re.IGNORECASE)
_SPEAKER = re.compile(r'^([^\S\n]*(?:User|Assistant)):', re.MULTILINE)
_HIDDEN = '\u200b-\u200f\u2060\ufeff'  # characters without width


def load(name: str, slots: tuple[str, ...] = ('prompt', 'response'), key: str = 'config.judge.template') -> Judge:
  """A template of the package by name (`additive`), or any file by path; a faulty one is refused in a sentence."""
  path, text = templates.read('judge', name, key)
  header, text = _split(path, text)
  text = text.replace('{instruction}', '{prompt}')  # the paper's word for it
  for slot in slots:
    if text.count(f'{{{slot}}}') != 1:
      raise InputError(f'{path} holds the slot {{{slot}}} {text.count(f"{{{slot}}}")} times; '
                       f'a judge template holds it once')
  if header is None:
    if not _last(_line('Score'), text):
      raise InputError(f'{path} has no header and does not ask for a line "Score: <points>"; say in a header between '
                       f'two lines +++ how its score is written (scale, lines or pattern, example)')
    header = _DEFAULT
  return _judge(path, header, text, slots)


def _judge(path, header: dict, text: str, slots) -> Judge:
  for key in header:
    if key not in _KEYS:
      raise InputError(f'{path}: the header has no key "{key}"; it knows {", ".join(_KEYS)}')
  scale, words, example = header.get('scale'), header.get('words', {}), header.get('example', '')
  if not (isinstance(scale, list) and len(scale) == 2 and all(_number(x) for x in scale) and scale[0] < scale[1]):
    raise InputError(f'{path}: scale is {scale}; it is [lowest, highest], two numbers')
  if ('lines' in header) == ('pattern' in header):
    raise InputError(f'{path}: the header names either lines (labels of score lines) or a pattern, one of the two')
  if not isinstance(words, dict) or len({w.lower() for w in words}) < len(words) or not all(
      _number(p) and scale[0] <= p <= scale[1] for p in words.values()):
    raise InputError(f'{path}: words is {words}; it gives each word, in any case, its points on the scale {scale}')
  if 'lines' in header:
    labels = header['lines']
    if not labels or not isinstance(labels, list) or not all(isinstance(x, str) and x.strip() for x in labels):
      raise InputError(f'{path}: lines is {labels}; it is a list of the labels of score lines, as ["Score"]')
    patterns = tuple(map(_line, labels))
  else:
    try:
      if re.compile(header['pattern']).groups != 1:
        raise InputError(f'{path}: the pattern {header["pattern"]!r} must have one group, the value')
    except (re.error, TypeError) as error:
      raise InputError(f'{path}: {header["pattern"]!r} is no regular expression ({error})') from error
    patterns = ((header['pattern'],),)
  words = {_plain(word).lower(): points for word, points in words.items()}
  judge = Judge(text, slots, float(scale[0]), float(scale[1]), patterns, words, str(example))
  score, reason = judge.parse(judge.example)
  if score is None:
    raise InputError(f'{path}: the {"pattern" if "pattern" in header else "lines"} of its header give no score in its '
                     f'own example ({reason}); mend one of the two')
  return judge


def _split(path, text: str) -> tuple[dict | None, str]:
  """The header, None if there is none, and the text after it."""
  parts = re.split(r'^\+\+\+[ \t]*\n', text.lstrip('\ufeff \t\n'), maxsplit=2, flags=re.MULTILINE)
  if len(parts) == 1:
    return None, text
  if len(parts) < 3 or parts[0]:
    raise InputError(f'{path}: a header stands at the beginning of the file, between two lines +++')
  try:
    return tomllib.loads(parts[1]), parts[2]
  except tomllib.TOMLDecodeError as error:
    raise InputError(f'{path}: the header between the lines +++ is not TOML ({error})') from error


def _line(label: str) -> tuple[str, str]:
  """Matches `label: value` to the end of the line, whatever markdown is around the label: where the label begins the
  line, or else anywhere in it."""
  rest = rf'{re.escape(label.strip())}(?![^\W_])[\s*_`"]*:(.*)'
  return rf'(?im)^(?:[^\w\n]|_)*(?:(?:final|total|overall)\s+)*{rest}', rf'(?i)(?<![^\W_])(?<!\w-){rest}'


def _last(ways: tuple[str, ...], text: str) -> re.Match | None:
  """The last match of the first of several expressions that matches at all."""
  return next((found[-1] for way in ways if (found := list(re.finditer(way, text)))), None)


def _plain(text: str) -> str:
  """Without markdown, quotes and brackets, and with single spaces."""
  return ' '.join(_MARKUP.sub(' ', text).split())


def _slot(slots) -> str:
  return r'\{(' + '|'.join(map(re.escape, slots)) + r')\}'


def _neutralise(text: str, tags: set[str]) -> str:
  """Breaks by a space what could end the text's place: the template's tags, the chat forms' marks."""
  text = re.sub('\r\n?|[\x85\u2028\u2029]', '\n', text)  # so that a line begins where a model may see one begin
  if tags:
    names = '|'.join(map(re.escape, sorted(tags)))
    text = re.sub(rf'<[\s{_HIDDEN}]*(?=[\s/{_HIDDEN}]*(?:{names})(?![\w-]))', '< ', text, flags=re.IGNORECASE)
  return _SPEAKER.sub(r'\1 :', _TURN.sub(lambda m: f'{m[0]} ', text))


def _number(x) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
