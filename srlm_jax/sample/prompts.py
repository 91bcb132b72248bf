"""Writes new prompts from few shots, and filters them (Self-Instruct, Wang et al. 2023; PAPER 2.2)."""
from collections import Counter
import functools
import random
import re
import string

from rouge_score import tokenizers as rouge_tokenizers

from srlm_jax import checkpoint, InputError, stage
from srlm_jax.data import records, templates
from srlm_jax.sample import engine as engines

# What text cannot show (Self-Instruct), as whole words.
BANNED = ('image', 'images', 'graph', 'graphs', 'picture', 'pictures', 'file', 'files', 'map', 'maps', 'draw', 'plot',
          'go to')


def run(config, workdir):
  """The seeds' prompts -> MODEL/prompts/prompts.jsonl, and every attempt with its fate in attempts.jsonl."""
  c = config.prompts
  author = config.sampler if c.author == 'sampler' else c.author
  folder = stage.finished_model(workdir, author)
  sources = [stage.seeds(workdir) / f'{name}.jsonl' for name in ('ift', 'ranked', 'heldout')]
  template = templates.load_author(c.template)
  params = checkpoint.recorded_hash(folder)
  s = stage.Stage(config, workdir, 'prompts', ('prompts', 'sample'), sources, params, template)
  if s.done:
    return
  ift, ranked, heldout = (list(records.read(path, 'prompt')) for path in sources)
  seeds = [r['prompt'] for r in ift]
  shown = [p for p in seeds if len(p.split()) <= c.shot_words]
  if len(shown) < c.seed_shots + c.new_shots:
    raise InputError(f'{sources[0]} holds {len(shown)} prompts of at most {c.shot_words} words, fewer than the '
                     f'{c.seed_shots + c.new_shots} shots; add seeds, or raise config.prompts.shot_words')
  sampling = engines.Sampling(c.temperature, c.top_p, c.max_tokens)
  s.begin()
  if not stage.is_first_host():
    return s.finish()
  # What is held out or judged on may not enter.
  screen = Filter(c, seeds + [r['prompt'] for r in ranked], [r['prompt'] for r in heldout])
  out = records.Appender(s.folder / 'attempts.jsonl')
  before = list(records.read(s.folder / 'attempts.jsonl'))  # of a killed run
  author_of = functools.cache(lambda: engines.load(config, folder, s.title, stop='\n'))  # when there is work to do
  accepted, first, size = [], 0, config.sample.slots
  while len(accepted) < c.count and first < c.max_attempts * c.count:
    texts = [(a['text'], a['finish']) for a in before[first:first + size]]
    if len(texts) < size:
      shots = [draw_shots(c, shown, accepted, f'{config.seed}/{first + i}') for i in range(size)]
      texts = _write(*author_of(), [template.replace('{shots}', numbered(shot)) for shot in shots], first, sampling)
    attempts = []
    for i, (text, finish) in enumerate(texts):
      prompt, why = screen(text, finish)
      accepted += [prompt] * (not why)
      attempts.append(dict(id=str(first + i), text=text, finish=finish, dropped=why))
    out.append(attempts[max(out.count - first, 0):])
    first += size
    stage.say(f'{s.title}: {len(accepted)}/{c.count} prompts from {first} attempts')
  out.close()
  accepted = accepted[:c.count]
  records.write(s.folder / 'prompts.jsonl', (dict(id=records.digest(p), prompt=p, author=author) for p in accepted))
  s.finish(prompts=len(accepted), wanted=c.count, attempts=first, dropped=dict(screen.dropped))


def _write(engine, tokenizer, texts: list[str], first: int, sampling) -> list[tuple[str, str]]:
  """(continuation, finish) of each text; attempts are numbered from `first`."""
  requests = [engines.Request(str(first + i), [tokenizer.bos_id, *tokenizer.encode(text)])
              for i, text in enumerate(texts)]
  return [(tokenizer.decode(r.ids), r.finish) for results in engine.generate(requests, sampling) for r in results]


class Filter:
  """Calls a generated text a prompt, or says why not; remembers what it accepted."""

  def __init__(self, config, seeds: list[str], held_out: list[str]):
    self._config = config
    self._held_out = {_normal(p) for p in held_out}
    self._tokenizer = rouge_tokenizers.DefaultTokenizer(use_stemmer=False)
    self._known = [self._tokenizer.tokenize(p) for p in seeds]
    self._exact = {_normal(p) for p in seeds}
    self.dropped = Counter()

  def __call__(self, text: str, finish: str) -> tuple[str, str]:
    """-> (prompt, '') or (prompt, reason)."""
    prompt = cut(text)
    why = self._reason(prompt, text, finish)
    if why:
      self.dropped[why] += 1
    else:
      self._known.append(self._tokenizer.tokenize(prompt))
      self._exact.add(_normal(prompt))
    return prompt, why

  def _reason(self, prompt, text, finish) -> str:
    c = self._config
    words = prompt.split()
    if finish == 'too_long':
      return 'shots too long for the context'
    if finish != 'eos' and '\n' not in text.strip():
      return 'cut off by length'
    if not c.min_words <= len(words) <= c.max_words:
      return f'not {c.min_words} to {c.max_words} words'
    if re.search(r'\b(' + '|'.join(BANNED) + r')\b', prompt.lower()):
      return 'asks for what text cannot show'
    if prompt.lower().startswith('write a program') or prompt[0] in string.punctuation or not prompt[0].isascii():
      return 'a start that Self-Instruct refuses'
    if _normal(prompt) in self._held_out:
      return 'held out'
    if _normal(prompt) in self._exact:
      return 'seen before'
    tokens = self._tokenizer.tokenize(prompt)
    if any(rouge_l_above(tokens, known, c.rouge) for known in self._known):
      return 'like one seen before'
    return ''


def rouge_l_above(a: list[str], b: list[str], limit: float) -> bool:
  """Is ROUGE-L F of two token lists above the limit? A bound that ignores order skips most of the work."""
  if not a or not b:
    return False
  common = sum((Counter(a) & Counter(b)).values())
  return 2 * common > limit * (len(a) + len(b)) and 2 * _lcs(a, b) > limit * (len(a) + len(b))


def _lcs(a, b) -> int:
  """Length of the longest common subsequence: F = 2 LCS / (|a| + |b|), rouge-score's definition."""
  row = [0] * (len(b) + 1)
  for x in a:
    diagonal = 0
    for j, y in enumerate(b, 1):
      diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
  return row[-1]


def cut(text: str) -> str:
  """The first prompt in a generation: its first line, without the number or a second instruction of the list.

  >>> cut(' 9. Name a fruit.\\n10. Name a tree.')
  'Name a fruit.'
  """
  lines = [line for line in text.strip().splitlines() if line.strip()]
  return re.sub(r'^\s*\d+[.)]\s*', '', lines[0]).strip() if lines else ''


def draw_shots(config, seeds: list[str], accepted: list[str], word: str) -> list[str]:
  """6 seed prompts and 2 written before (more seeds while there are none), in random order."""
  rng = random.Random(word)
  new = rng.sample(accepted, min(config.new_shots, len(accepted)))
  shots = rng.sample(seeds, config.seed_shots + config.new_shots - len(new)) + new
  rng.shuffle(shots)
  return shots


def numbered(shots: list[str]) -> str:
  """The shots as a list that goes on: after the last comes the next number.

  >>> numbered(['Name a fruit.', 'Name a tree.'])
  '1. Name a fruit.\\n2. Name a tree.\\n3.'
  """
  return '\n'.join([*(f'{i}. {" ".join(shot.split())}' for i, shot in enumerate(shots, 1)), f'{len(shots) + 1}.'])


def _normal(text: str) -> str:
  return ' '.join(re.findall(r'\w+', text.lower()))


if __name__ == '__main__':
  stage.main(run)
