"""Generated token ids -> text that can be sent: whole characters, without stop strings."""
from collections.abc import Sequence
import dataclasses

from srlm_jax.data import thinking

WINDOW = 32    # tokens that are decoded again with each new one
REPLACED = '\ufffd'  # what a tokenizer makes of bytes that are not a character
MOST_PARTS = 3  # bytes of a character that lacks its last one


class Detokenizer:
  """The text of token ids that arrive one by one.

  The parts together are `decode` of all ids without the text of those before. Some tokenizers drop
  the leading space of a text, so no token is decoded alone: with it, some tokens before it are.
  Only of bytes that are not UTF-8 the parts may differ, where a tokenizer replaces all bytes of a
  row: some of them were sent as characters.
  """

  def __init__(self, tokenizer, before: Sequence[int]):
    self._tokenizer, self._ids = tokenizer, list(before)
    self._anchor()

  def _anchor(self):
    """Forgets all ids but a few of the last, which have a text of whole characters."""
    count = 4
    while count < len(self._ids):
      text = self._tokenizer.decode(self._ids[-count:])
      if text.strip(' ') and REPLACED not in text:
        self._ids = self._ids[-count:]
        break
      count *= 2
    self._text = self._tokenizer.decode(self._ids)  # that has been returned, or is of those before
    self._most = max(WINDOW, 2 * len(self._ids))

  def add(self, i: int) -> str:
    """-> the text that a token adds, without a character that is not complete yet."""
    self._ids.append(i)
    text = self._tokenizer.decode(self._ids)
    parts = len(text) - len(text.rstrip(REPLACED))
    if parts and not text.startswith(self._text):
      return ''  # some tokenizers replace whole characters too, before one that is not complete
    whole = text[:len(text) - min(parts, MOST_PARTS)]
    new = whole[len(self._text):]
    self._text += new
    if not parts and len(self._ids) > self._most:
      self._anchor()
    return new

  def end(self) -> str:
    """-> the rest of the text."""
    return self._tokenizer.decode(self._ids)[len(self._text):]


class Stops:
  """Looks for stop strings in a text that arrives in parts. The one that ends first counts."""

  def __init__(self, stops: Sequence[str]):
    self._stops, self._held = stops, ''

  def add(self, text: str) -> tuple[str, bool]:
    """-> the text that can be sent, and whether a stop string follows it."""
    self._held += text
    ends = [(start + len(stop), start) for stop in self._stops
            if (start := self._held.find(stop)) >= 0]
    if ends:
      _, start = min(ends)
      return self._held[:start], True
    kept = max((n for stop in self._stops for n in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:n])), default=0)
    cut = len(self._held) - kept
    sent, self._held = self._held[:cut], self._held[cut:]
    return sent, False

  def end(self) -> str:
    """-> the rest of the text, in which there is no stop string."""
    return self._held


@dataclasses.dataclass
class Token:
  """A token, for log-probs."""
  id: int
  logp: float | None     # None: the first of a prompt
  top: dict[int, float]  # {id: log-prob} of the most likely tokens
  offset: int            # characters before it


@dataclasses.dataclass
class Delta:
  """What a sample adds to its answer."""
  text: str = ''
  tokens: list[Token] = dataclasses.field(default_factory=list)
  finish: str = ''  # stop, length
  thinking: str = ''  # if it is told from the text


class Answer:
  """The text of one sample, while it is generated.

  `count`: its tokens so far; with a stop string, up to the one that completes it.
  """

  def __init__(self, tokenizer, prompt_ids: Sequence[int], stops: Sequence[str], offset: int,
               tells_thinking: bool = False):
    """`offset`: characters before the text; `tells_thinking`: whether thinking is no text."""
    self._detokenizer, self._stops = Detokenizer(tokenizer, prompt_ids), Stops(stops)
    self._made = self._sent = offset  # characters
    self._tokens: list[Token] = []    # whose text is not sent yet
    self.count, self.finish = 0, ''
    self._thinking = tokenizer.thinking if tells_thinking else None
    self._thinks = self._thinking is not None and thinking.is_open(tokenizer, prompt_ids)
    self._marks: list[tuple[int, int, bool]] = []  # (start, end, whether it opens), not sent yet
    self._is_after_mark = self._thinks

  def add(self, ids: Sequence[int], logps: Sequence[float], top: Sequence[dict[int, float]],
          finish: str) -> Delta:
    """Adds generated tokens -> what can be sent. `finish`: that of the engine, '' before it."""
    start = self._sent
    delta = self._added(ids, logps, top, finish)
    if self._thinking:
      self._tell_thinking(delta, start)
    return delta

  def _added(self, ids, logps, top, finish) -> Delta:
    """`add`, with thinking as text."""
    delta = Delta()
    for i, (token, logp) in enumerate(zip(ids, logps, strict=True)):
      self.count += 1
      new = self._detokenizer.add(token)
      if self._thinking and token in self._thinking:
        self._marks.append((self._made, self._made + len(new), token == self._thinking[0]))
      self._tokens.append(Token(token, logp, top[i] if top else {}, self._made))
      if self._add(delta, new):
        return delta
    if finish:
      if not self._add(delta, self._detokenizer.end()):
        delta.text += self._stops.end()
        delta.tokens += self._tokens
        self.finish = delta.finish = 'length' if finish == 'length' else 'stop'
    return delta

  def _add(self, delta: Delta, text: str) -> bool:
    """Adds text -> whether a stop string ends the sample."""
    self._made += len(text)
    sent, is_stopped = self._stops.add(text)
    delta.text += sent
    self._sent += len(sent)
    ready = sum(token.offset < self._sent for token in self._tokens)
    delta.tokens += self._tokens[:ready]
    del self._tokens[:ready]
    if is_stopped:
      self.finish = delta.finish = 'stop'
    return is_stopped

  def _tell_thinking(self, delta: Delta, start: int):
    """Splits the text of a delta, which has `start` characters before it, at the marks."""
    text, delta.text, at = delta.text, '', 0
    while self._marks and self._marks[0][0] - start <= len(text):
      first, last, opens = self._marks[0]
      self._say(delta, text[at:max(first - start, at)])
      at = min(last - start, len(text))
      if last - start > len(text):
        break  # the rest of the mark comes later, or a stop string is in it
      self._thinks, self._is_after_mark = opens, True
      self._marks.pop(0)
    self._say(delta, text[at:])

  def _say(self, delta: Delta, text: str):
    """Adds text to the thinking or the text of a delta, without the spaces after a mark."""
    if self._is_after_mark:
      text = text.lstrip()
      self._is_after_mark = not text
    if self._thinks:
      delta.thinking += text
    else:
      delta.text += text


class Names:
  """The text of single tokens, for log-probs."""

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    self._before = tokenizer.encode('a')
    self._start = len(tokenizer.decode(self._before))
    self._known: dict[int, str] = {}

  def __getitem__(self, i: int) -> str:
    """The text of a token; `token_id:7` of one that has no text or a part of a character."""
    if i not in self._known:
      text = self._tokenizer.decode([*self._before, i])[self._start:]
      self._known[i] = text if text and REPLACED not in text else f'token_id:{i}'
    return self._known[i]
