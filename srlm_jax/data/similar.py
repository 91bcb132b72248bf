"""Texts that resemble one another: ROUGE-L against many at once, and copies with words before or after them."""
import array
from collections import Counter
from collections.abc import Iterable, Iterator
import re

import numpy as np
from rouge_score import rouge_scorer, tokenizers


class _Tokens:
  """rouge-score's tokenizer for what is tokenized already."""

  def tokenize(self, tokens):
    return tokens


_SCORER = rouge_scorer.RougeScorer(['rougeL'], tokenizer=_Tokens())
_TOKENIZER = tokenizers.DefaultTokenizer(use_stemmer=False)
_BELOW = 1e-9  # the bound's floats may not hide a text that stands exactly at the limit


class Index:
  """Texts, and whether another resembles one of them by ROUGE-L F, as rouge-score defines it.

  A longest common subsequence is never longer than what two texts have in common as bags of words. An inverted
  index gives the size of that for all texts at once, so that only those are compared word for word that the bound
  does not rule out: the answers are those of comparing with every text.
  """

  def __init__(self, texts: Iterable[str] = ()):
    self.texts = []
    self.compared = 0      # texts compared word for word, of all calls
    self._tokens = []
    self._lengths = array.array('l')
    self._places = {}      # (word, its index among equal words) -> texts that hold it
    for text in texts:
      self.add(text)

  def add(self, text: str):
    words = tokens(text)
    for key in _bag(words):
      self._places.setdefault(key, array.array('l')).append(len(self.texts))
    self.texts.append(text)
    self._tokens.append(words)
    self._lengths.append(len(words))

  def find(self, text: str, limit: float) -> str | None:
    """A text whose ROUGE-L F with this one is above the limit, or None.

    >>> Index(['Name a nice fruit.', 'Why is the sky blue?']).find('Why is the sea blue?', 0.7)
    'Why is the sky blue?'
    """
    words = tokens(text)
    places = [np.frombuffer(self._places[key], np.int_) for key in _bag(words) if key in self._places]
    if not places:
      return None
    common = np.bincount(np.concatenate(places), minlength=len(self.texts))  # words in common with each text
    lengths = np.frombuffer(self._lengths, np.int_)
    near = np.flatnonzero(2 * common > (limit - _BELOW) * (len(words) + lengths))
    for i in near[np.argsort(-common[near], kind='stable')]:
      self.compared += 1
      if rouge_l(self._tokens[i], words) > limit:
        return self.texts[i]
    return None


class HeldOut:
  """Finds held-out texts in others: as they are, inside a longer text, as a part, or reworded.

  A held-out text of at least `SHORTEST` words is found anywhere inside another. A shorter one is
  found only as whole sentences, because its words alone are common ("name two jobs").
  """

  SHORTEST = 4  # words

  def __init__(self, texts: Iterable[str]):
    texts = list(texts)
    self._index = Index(texts)
    self._exact = {normal(t) for t in texts}
    self._short = {t for t in self._exact if 0 < len(t.split()) < self.SHORTEST}
    self._short_parts = {part for t in texts for part in _sentence_runs(t, self.SHORTEST - 1)}
    self._words = [normal(t).split() for t in texts]
    self._starts = {}  # every four words in a row -> (text, position)
    for i, words in enumerate(self._words):
      for at in range(len(words) - self.SHORTEST + 1):
        self._starts.setdefault(tuple(words[at:at + self.SHORTEST]), []).append((i, at))

  def why(self, text: str, limit: float) -> str:
    """'' or the reason: held out, holds a held-out prompt, part of one, or like one (ROUGE-L F above the limit).

    >>> HeldOut(['Where is the moon?']).why('It is late. Where is the moon? Tell me.', 0.7)
    'holds a held-out prompt'
    """
    if (whole := normal(text)) in self._exact:
      return 'held out'
    if not self._short.isdisjoint(_sentence_runs(text, self.SHORTEST - 1)):
      return 'holds a held-out prompt'
    if whole in self._short_parts:
      return 'part of a held-out prompt'
    words = whole.split()
    for at in range(len(words) - self.SHORTEST + 1):
      for i, start in self._starts.get(tuple(words[at:at + self.SHORTEST]), ()):
        held = self._words[i]
        if start == 0 and words[at:at + len(held)] == held:
          return 'holds a held-out prompt'
        if at == 0 and held[start:start + len(words)] == words:
          return 'part of a held-out prompt'
    return 'like a held-out prompt' if self._index.find(text, limit) is not None else ''


def tokens(text: str) -> list[str]:
  """The words as rouge-score sees them: a to z and digits, in lower case, no stemming."""
  return _TOKENIZER.tokenize(text)


def rouge_l(a: list[str], b: list[str]) -> float:
  """ROUGE-L F of two token lists."""
  return _SCORER.score(a, b)['rougeL'].fmeasure


def normal(text: str) -> str:
  """The words in lower case, without punctuation."""
  return ' '.join(re.findall(r'\w+', text.lower()))


def _sentence_runs(text: str, longest: int) -> Iterator[str]:
  """Yields every run of whole sentences that has at most `longest` words, normalised.

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


def _bag(words: list[str]) -> list[tuple[str, int]]:
  """Every word with its index among equal ones: two such sets share what the two bags of words share."""
  return [(word, i) for word, count in Counter(words).items() for i in range(count)]
