"""Simulated human annotators of the sandbox: responses of mixed quality, ranks and seed data."""
import itertools

import numpy as np

from srlm_jax import records, schema
from srlm_jax.sandbox import world
from srlm_jax.sandbox.world import join, listing, one, OPENERS, sample

TAILS = ('Bye now.', 'And so on.', 'I am tired.', 'Ask me more.', 'It is late.')
EVASIONS = ('I do not know.', 'What do you mean?', 'Not today.', 'Maybe later.', 'I am busy.')
CHATTER = ('You ask about {}.', 'I like to talk about {}.', 'Do you like {}?',
           'People say much about {}.')
QUALITY = (0.12, 0.13, 0.20, 0.22, 0.16, 0.17)  # probability of the scores 0 to 5
# The same for IFT responses. They are worse, so that later models can win against the SFT baseline.
SEED_QUALITY = (0.14, 0.15, 0.25, 0.24, 0.15, 0.07)
DISAGREEMENT = 1.7  # standard deviation of an annotator's opinion around the score, in points


def answer(prompt: str, rng: np.random.Generator, quality: int) -> str:
  """Draws a response whose score is exactly `quality`, 0 to 5."""
  required = world.require(prompt)
  opener = one(rng, OPENERS) if quality >= 4 or rng.random() < 0.4 else ''
  tail = one(rng, TAILS) if quality == 4 or quality < 4 and rng.random() < 0.2 else ''
  if quality == 0 and rng.random() < 0.5:
    return one(rng, EVASIONS)
  if quality == 1:
    return join(one(rng, CHATTER).format(required.topic), tail)
  if quality == 0:
    off_topic = [word for word in world.WORDS.values() if word not in required.domain]
    items = sample(rng, off_topic, required.count)
  elif quality == 2:
    items = _wrong_items(required, rng)
  else:
    items = _right_items(required, rng)
  body = listing(items)
  if quality == 3:
    no_stop = int(rng.integers(3)) == 2  # otherwise the opener is missing
    return join(one(rng, OPENERS), body) if no_stop else join(body + '.', tail)
  return join(opener, body + '.', tail)


def draw_quality(rng: np.random.Generator, shares=QUALITY) -> int:
  """Draws the score of a human response, 0 to 5."""
  return int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares), side='right'))


def ranked(prompt: str, rng: np.random.Generator, n_replies: int) -> tuple[schema.Reply, ...]:
  """Draws distinct replies of varied quality with noisy ranks."""
  opinions = {}
  while len(opinions) < n_replies:
    text = answer(prompt, rng, draw_quality(rng))
    opinions[text] = sum(world.grade(prompt, text)) + DISAGREEMENT * rng.standard_normal()
  order = sorted(opinions, key=opinions.get, reverse=True)
  return tuple(schema.Reply(id=records.digest(prompt, text), text=text, rank=order.index(text))
               for text in opinions)


def seeds(seed: int, ift: int, ranked_train: int, ranked_eval: int, ranked_tune: int, test: int,
          valid: int) -> dict[str, list]:
  """Draws the seed data {"ift", "ranked", "heldout"} with the given numbers of records.

  Training prompts (ift, ranked_train) are distinct and come from the split `train`. Evaluation
  prompts come from the held-out splits and are the same for every seed. The `tune` and `eval` sets
  of ranked prompts are disjoint.
  """
  rng, fixed, tuning = (np.random.default_rng(s) for s in (seed, 0, 1))
  train = iter(_distinct(rng, 'train', ift + ranked_train))
  held_out = dict(test=_held_out(fixed, 'test', test), valid=_held_out(fixed, 'valid', valid))
  evaluation = _distinct(fixed, 'valid', ranked_eval)
  tune = _distinct(tuning, 'valid', ranked_tune, exclude={world.bare(p) for p in evaluation})
  return {
      'ift': [_demonstration(prompt, rng) for prompt in itertools.islice(train, ift)],
      'ranked': [*(_ranking(prompt, 'train', rng) for prompt in train),
                 *(_ranking(prompt, 'eval', fixed) for prompt in evaluation),
                 *(_ranking(prompt, 'tune', tuning) for prompt in tune)],
      'heldout': [schema.HeldOutPrompt(id=records.digest(prompt), prompt=prompt, split=name)
                  for name, prompts in held_out.items() for prompt in prompts],
  }


def _right_items(required: world.Requirement, rng: np.random.Generator) -> tuple[str, ...]:
  if len(required.right) == required.count:
    return required.right
  return sample(rng, required.right, required.count)


def _wrong_items(required: world.Requirement, rng: np.random.Generator) -> tuple[str, ...]:
  """Draws answers of the right type that do not satisfy the instruction.

  They are too few, too many or incorrect.
  """
  if len(required.right) > required.count:
    return sample(rng, required.right, one(rng, [n for n in (1, 2, 3, 4) if n != required.count]))
  others = [word for word in required.domain if word not in required.right]
  error = int(rng.integers(3))
  if error == 0 and required.count > 1:
    return sample(rng, required.right, required.count - 1)
  if error == 1:
    return (*required.right, one(rng, others))
  kept = int(rng.integers(required.count))
  return (*required.right[:kept], *sample(rng, others, min(required.count - kept, len(others))))


def _distinct(rng: np.random.Generator, split: str, count: int, exclude=frozenset()) -> list[str]:
  """Draws `count` distinct instructions whose core (`world.bare`) is not in `exclude`."""
  prompts = {}
  while len(prompts) < count:
    prompt = world.instruction(rng, split)
    if world.bare(prompt) not in exclude:
      prompts.setdefault(prompt)
  return list(prompts)


def _held_out(rng: np.random.Generator, split: str, count: int) -> list[str]:
  """Draws `count` distinct instructions, divided among the families by weight where possible.

  They have no context and no closing, so a search for the instruction finds it in any context.
  """
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


def _demonstration(prompt: str, rng: np.random.Generator) -> schema.Demonstration:
  response = answer(prompt, rng, draw_quality(rng, SEED_QUALITY))
  return schema.Demonstration(id=records.digest(prompt, response), prompt=prompt,
                              response=response, source='sandbox')


def _ranking(prompt: str, split: str, rng: np.random.Generator) -> schema.RankedPrompt:
  replies = ranked(prompt, rng, int(rng.integers(2, 5)))
  return schema.RankedPrompt(id=records.digest(prompt), prompt=prompt, split=split,
                             replies=replies, source='sandbox')
