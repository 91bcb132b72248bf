"""Finds similar texts: ROUGE-L against many texts at once, and leaks of held-out prompts."""
import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
import re

import numpy as np
from rouge_score import rouge_scorer, tokenizers


class _Tokens:
  """A tokenizer for rouge-score whose input is already tokenized."""

  def tokenize(self, tokens):
    return tokens


_SCORER = rouge_scorer.RougeScorer(['rougeL'], tokenizer=_Tokens())
_TOKENIZER = tokenizers.DefaultTokenizer(use_stemmer=False)
_TOLERANCE = 1e-9  # rounding in the bound must not hide a text that is exactly at the limit


class Index:
  """A set of texts that can be searched for one with a high ROUGE-L F (as in rouge-score).

  The longest common subsequence of two texts is never longer than the overlap of their bags of
  words. An inverted index gives this bound for all texts at once. `find` computes ROUGE-L only
  where the bound is above the limit. The result equals that of a comparison with every text.
  """

  def __init__(self, texts: Iterable[str] = ()):
    self.texts = []
    self.compared = 0      # number of ROUGE-L computations over all calls
    self._words = {}       # word -> its number, which takes less memory in texts
    self._tokens = []      # the numbers of the words of each text
    self._lengths = array.array('i')
    self._places = {}      # (number, its index among equal words) -> texts that contain it
    for text in texts:
      self.add(text)

  def add(self, text: str):
    words = array.array('i', [self._words.setdefault(word, len(self._words))
                              for word in tokens(text)])
    for key in _bag(words):
      self._places.setdefault(key, array.array('i')).append(len(self.texts))
    self.texts.append(text)
    self._tokens.append(words)
    self._lengths.append(len(words))

  def find(self, text: str, limit: float) -> str | None:
    """A text of the index whose ROUGE-L F with `text` is above the limit, or None.

    >>> Index(['Name a nice fruit.', 'Why is the sky blue?']).find('Why is the sea blue?', 0.7)
    'Why is the sky blue?'
    """
    words = self._numbers(text)
    common, lengths = self._common(words), np.frombuffer(self._lengths, np.int32)
    near = np.flatnonzero(2 * common > (limit - _TOLERANCE) * (len(words) + lengths))
    for i in near[np.argsort(-common[near], kind='stable')]:
      self.compared += 1
      if rouge_l(self._tokens[i], words) > limit:
        return self.texts[i]
    return None

  def nearest(self, text: str, allowed: Callable[[int], bool] = lambda i: True,
              ) -> tuple[float, int] | None:
    """The highest ROUGE-L F of a text with one of the index, and the position of that one.

    Among equal ones, the first added. None if no text whose position is `allowed` has a word in
    common with it.

    >>> Index(['Name a nice fruit.', 'Why is the sky blue?']).nearest('Is the sky blue?')
    (0.888888888888889, 1)
    """
    words = self._numbers(text)
    common, lengths = self._common(words), np.frombuffer(self._lengths, np.int32)
    bounds = 2 * common / np.maximum(len(words) + lengths, 1)
    best = 0.0, 0
    for i in np.argsort(-bounds, kind='stable').tolist():
      if not common[i] or bounds[i] < best[0] - _TOLERANCE:
        break
      if not allowed(i):
        continue
      self.compared += 1
      best = max(best, (rouge_l(self._tokens[i], words), -i))
    return (best[0], -best[1]) if best[0] else None

  def _numbers(self, text: str) -> list[int]:
    """Its words; -1 for each that no text of the index contains."""
    return [self._words.get(word, -1) for word in tokens(text)]

  def _common(self, words: list[int]) -> np.ndarray:
    """Words -> [texts], the size of the overlap of their bag with that of each text."""
    places = [np.frombuffer(self._places[key], np.int32)
              for key in _bag(words) if key in self._places]
    if not places:
      return np.zeros(len(self.texts), int)
    return np.bincount(np.concatenate(places), minlength=len(self.texts))


class HeldOut:
  """Finds held-out texts in other texts: exact copies, parts in either direction, and paraphrases.

  A held-out text of at least `MIN_WORDS` words is found anywhere inside another text. A shorter one
  is found only as whole sentences, because such words are common inside other sentences ("name two
  jobs").
  """

  MIN_WORDS = 4  # words

  def __init__(self, texts: Iterable[str]):
    texts = list(texts)
    self._index = Index(texts)
    self._exact = {normal(t) for t in texts}
    self._short = {t for t in self._exact if 0 < len(t.split()) < self.MIN_WORDS}
    self._short_parts = {part for t in texts for part in _sentence_runs(t, self.MIN_WORDS - 1)}
    self._words = [normal(t).split() for t in texts]
    self._starts = {}  # every `MIN_WORDS` consecutive words -> (text, position)
    for i, words in enumerate(self._words):
      for at in range(len(words) - self.MIN_WORDS + 1):
        self._starts.setdefault(tuple(words[at:at + self.MIN_WORDS]), []).append((i, at))

  def why(self, text: str, limit: float) -> str:
    """The reason to reject a text, or ''.

    The text is a held-out prompt, contains one, is part of one, or is similar to one (ROUGE-L F
    above the limit).

    >>> HeldOut(['Where is the moon?']).why('It is late. Where is the moon? Tell me.', 0.7)
    'contains a held-out prompt'
    """
    if (whole := normal(text)) in self._exact:
      return 'held out'
    if not self._short.isdisjoint(_sentence_runs(text, self.MIN_WORDS - 1)):
      return 'contains a held-out prompt'
    if whole in self._short_parts:
      return 'part of a held-out prompt'
    words = whole.split()
    for at in range(len(words) - self.MIN_WORDS + 1):
      for i, start in self._starts.get(tuple(words[at:at + self.MIN_WORDS]), ()):
        held = self._words[i]
        if start == 0 and words[at:at + len(held)] == held:
          return 'contains a held-out prompt'
        if at == 0 and held[start:start + len(words)] == words:
          return 'part of a held-out prompt'
    return 'similar to a held-out prompt' if self._index.find(text, limit) is not None else ''


def tokens(text: str) -> list[str]:
  """The words as in rouge-score: lower case, a to z and digits only, no stemming."""
  return _TOKENIZER.tokenize(text)


def rouge_l(a: Sequence, b: Sequence) -> float:
  """ROUGE-L F of two token lists."""
  return _SCORER.score(a, b)['rougeL'].fmeasure


def normal(text: str) -> str:
  """The words of a text in lower case, without punctuation."""
  return ' '.join(re.findall(r'\w+', text.lower()))


def _sentence_runs(text: str, longest: int) -> Iterator[str]:
  """Yields every run of consecutive sentences with at most `longest` words, normalized.

  >>> list(_sentence_runs('We have a bet. Name two jobs. Hurry!', 4))
  ['we have a bet', 'name two jobs', 'name two jobs hurry', 'hurry']
  """
  parts = re.split(r'\b\d+[.)]|[.?!:;\n"“”‘’«»()\[\]|…–—。！？]+', text)
  sentences = [words for part in parts if (words := normal(part).split())]
  for start in range(len(sentences)):
    run = []
    for words in sentences[start:]:
      run += words
      if len(run) > longest:
        break
      yield ' '.join(run)


def _bag(words: Iterable) -> list[tuple]:
  """Each word with its index among equal words.

  The intersection of two such sets has the size of the intersection of the bags of words.
  """
  return [(word, i) for word, count in Counter(words).items() for i in range(count)]
