"""What people of the sandbox write: answers of mixed quality, and rankings of them; the seeds of a run."""
import itertools

import numpy as np

from srlm_jax import records
from srlm_jax.sandbox import world
from srlm_jax.sandbox.world import join, listing, one, OPENERS, sample

TAILS = ('Bye now.', 'And so on.', 'I am tired.', 'Ask me more.', 'It is late.')
EVASIONS = ('I do not know.', 'What do you mean?', 'Not today.', 'Maybe later.', 'I am busy.')
CHATTER = ('You ask about {}.', 'I like to talk about {}.', 'Do you like {}?', 'People say much about {}.')
QUALITY = (0.12, 0.13, 0.20, 0.22, 0.16, 0.17)  # how often people's answers score 0 to 5
SEED_QUALITY = (0.14, 0.15, 0.25, 0.24, 0.15, 0.07)  # of IFT's: where the baseline is flawless, nothing can win
DISAGREEMENT = 1.7  # spread, in points, of a person's opinion around the score


def answer(prompt: str, rng: np.random.Generator, quality: int) -> str:
  """Draws an answer whose score is exactly `quality`, 0 to 5."""
  asked = world.must(prompt)
  opener = one(rng, OPENERS) if quality >= 4 or rng.random() < 0.4 else ''
  tail = one(rng, TAILS) if quality == 4 or quality < 4 and rng.random() < 0.2 else ''
  if quality == 0 and rng.random() < 0.5:
    return one(rng, EVASIONS)
  if quality == 1:
    return join(one(rng, CHATTER).format(asked.topic), tail)
  if quality == 0:
    items = sample(rng, [w for w in world.WORDS.values() if w not in asked.domain], asked.count)
  else:
    items = _wrong(asked, rng) if quality == 2 else _right(asked, rng)
  body = listing(items)
  if quality == 3:
    flaw = int(rng.integers(3))
    return join('' if flaw < 2 else one(rng, OPENERS), body + ('.' if flaw < 2 else ''), tail if flaw < 2 else '')
  return join(opener, body + '.', tail)


def quality(rng: np.random.Generator, shares=QUALITY) -> int:
  """Draws how good a person's answer is."""
  return int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares), side='right'))


def ranked(prompt: str, rng: np.random.Generator, n_replies: int) -> list[dict]:
  """Draws different replies {"id", "text", "rank"} of varied quality, with a person's ranks, 0 the best."""
  texts = {}
  while len(texts) < n_replies:
    text = answer(prompt, rng, quality(rng))
    texts[text] = sum(world.grade(prompt, text)) + DISAGREEMENT * rng.standard_normal()
  order = sorted(texts, key=texts.get, reverse=True)
  return [{'id': records.digest(prompt, text), 'text': text, 'rank': order.index(text)} for text in texts]


def seeds(seed: int, ift: int, ranked_train: int, ranked_eval: int, ranked_tune: int, test: int,
          valid: int) -> dict[str, list[dict]]:
  """Draws the seed data {"ift", "ranked", "heldout"} with the given numbers of records.

  Prompts to learn from are all different and of the split `train`. Prompts to measure on (eval, test) and to tune on
  (tune, valid) are of other splits, and the same for every seed; no ranked prompt to tune on is also one to measure on.
  """
  rng, fixed, tuning = np.random.default_rng(seed), np.random.default_rng(0), np.random.default_rng(1)
  train = iter(_different(rng, 'train', ift + ranked_train))
  held = dict(test=_held_out(fixed, 'test', test), valid=_held_out(fixed, 'valid', valid))
  measured = _different(fixed, 'valid', ranked_eval)
  tuned = _different(tuning, 'valid', ranked_tune, but={world.bare(prompt) for prompt in measured})
  return {
      'ift': [_demonstration(prompt, rng) for prompt in itertools.islice(train, ift)],
      'ranked': [*(_ranking(prompt, 'train', rng) for prompt in train),
                 *(_ranking(prompt, 'eval', fixed) for prompt in measured),
                 *(_ranking(prompt, 'tune', tuning) for prompt in tuned)],
      'heldout': [{'id': records.digest(prompt), 'prompt': prompt, 'split': name}
                  for name, prompts in held.items() for prompt in prompts],
  }


def _right(asked, rng):
  return asked.right if len(asked.right) == asked.count else sample(rng, asked.right, asked.count)


def _wrong(asked, rng):
  """Something of the domain, and not what is wanted: too few, too many, or others."""
  if len(asked.right) > asked.count:
    return sample(rng, asked.right, one(rng, [n for n in (1, 2, 3, 4) if n != asked.count]))
  others = [word for word in asked.domain if word not in asked.right]
  way = int(rng.integers(3))
  if way == 0 and asked.count > 1:
    return sample(rng, asked.right, asked.count - 1)
  if way == 1:
    return (*asked.right, one(rng, others))
  kept = int(rng.integers(asked.count))
  return (*asked.right[:kept], *sample(rng, others, min(asked.count - kept, len(others))))


def _different(rng, split: str, count: int, but=frozenset()) -> list[str]:
  """Draws `count` different instructions, none that is in `but` without its context."""
  prompts = {}
  while len(prompts) < count:
    prompt = world.instruction(rng, split)
    if world.bare(prompt) not in but:
      prompts.setdefault(prompt)
  return list(prompts)


def _held_out(rng, split: str, count: int) -> list[str]:
  """Draws `count` different instructions, of every family its share while it has so many. They are bare, so that who
  holds one in some context holds it as a part."""
  found = {family: {} for family in world.FAMILIES}
  for _ in range(20 * count):
    prompt = world.bare(world.instruction(rng, split))
    found[world.parse(prompt).family].setdefault(prompt)
  total = sum(world.FAMILIES.values())
  first, rest = [], []
  for family, prompts in found.items():
    share = round(count * world.FAMILIES[family] / total)
    first += [*prompts][:share]
    rest += [*prompts][share:]
  return (first + rest)[:count]


def _demonstration(prompt, rng):
  response = answer(prompt, rng, quality(rng, SEED_QUALITY))
  return {'id': records.digest(prompt, response), 'prompt': prompt, 'response': response, 'source': 'sandbox'}


def _ranking(prompt, split, rng):
  replies = ranked(prompt, rng, int(rng.integers(2, 5)))
  return {'id': records.digest(prompt), 'prompt': prompt, 'split': split, 'replies': replies, 'source': 'sandbox'}
