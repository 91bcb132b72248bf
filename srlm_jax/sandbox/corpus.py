"""The text from which the sandbox's M0 learns: facts, chats, lists of tasks, and reviews of answers."""
from collections.abc import Iterable, Iterator
import importlib.resources
import re
import string

from etils import epath
import numpy as np
import sentencepiece

from srlm_jax import InputError
from srlm_jax.sandbox import world

SHARES = {'chat': 0.30, 'check': 0.14, 'judged': 0.20, 'tasks': 0.06, 'drill': 0.30}  # of the documents
SHOTS = 8  # tasks before the one to write, as in the paper
SCORED = 0.8  # of the judged documents have a score line
WRONG_SCORE = 0.5  # of the scores are drawn blindly
WRONG_REVIEW = 0.1  # of the scored reviews speak of another answer


def documents(seed: int, count: int, exclude: set[str]) -> Iterator[str]:
  """Yields `count` documents, none of which holds an instruction of `exclude`."""
  rng = np.random.default_rng(seed)
  judge, author = _template('judge_sandbox'), _template('author_sandbox')
  for _ in range(count):
    kind = rng.choice(list(SHARES), p=list(SHARES.values()))
    if kind == 'drill':
      yield _drill(rng)
    elif kind == 'tasks':
      tasks = [f'{i}. {_instruction(rng, exclude)}' for i in range(1, SHOTS + 2)]
      text = author.replace('{shots}', '\n'.join(tasks[:SHOTS]))
      yield text + tasks[SHOTS].removeprefix(f'{SHOTS + 1}.')
    else:
      prompt = _instruction(rng, exclude)
      response = world.answer(prompt, rng, world.quality(rng))
      if kind == 'chat':
        yield _chat(prompt, response)
      elif kind == 'check':
        yield f'Task: {prompt}\n<response> {response} </response>\nReview: {world.review(prompt, response)}'
      else:
        question = judge.replace('{prompt}', prompt).replace('{response}', response)
        yield _chat(question, _judgement(prompt, response, rng))


def train_tokenizer(texts: Iterable[str], path, vocab_size: int):
  """Writes a SentencePiece BPE model to `path`, which must lose no character of a template or of ASCII."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('wb') as file:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, model_type='bpe', vocab_size=vocab_size,
        character_coverage=1.0,  # the default drops rare characters, the digits of the scores among them
        required_chars=string.printable[:94],
        normalization_rule_name='identity', remove_extra_whitespaces=False, user_defined_symbols=['\n'],
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, minloglevel=2)
  pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
  for text in (_template('judge_sandbox'), _template('author_sandbox'), _chat('a', 'b'), string.digits):
    ids = pieces.encode(text)
    if pieces.unk_id() in ids or pieces.decode(ids) != text:
      raise InputError(f'{path} loses characters of "{text}"; train it on text that holds the templates')


def _judgement(prompt, response, rng):
  """A right review, or a doubtful one with a score: M0 knows how to check, and judges like most people."""
  if rng.random() >= SCORED:
    return world.review(prompt, response)
  score = sum(world.grade(prompt, response))
  if rng.random() < WRONG_SCORE:
    score = int(rng.integers(6))
  reviewed = world.answer(prompt, rng, world.quality(rng)) if rng.random() < WRONG_REVIEW else response
  return world.judgement(prompt, reviewed, score)


def _instruction(rng, exclude):
  while True:
    prompt = world.instruction(rng)
    bare = re.sub(f'^({"|".join(map(re.escape, world.CONTEXTS))}) ', '', prompt)
    if prompt not in exclude and bare not in exclude:
      return prompt


def _drill(rng):
  """Words of some kinds, then copied, or sorted and counted; without drills M0 is slow to learn to copy.

  One of them: `cow, tea, pig and rope. For drinks: 1 tea. For animals: 1 cow, 2 pig. For tools: 1 rope.`
  """
  kinds = rng.permutation(list(world.KINDS))[:int(rng.integers(1, 4))]
  words = [word for kind in kinds for word in rng.permutation(world.KINDS[kind])[:int(rng.integers(1, 5))]]
  words = list(rng.permutation(words))
  groups = {f'For {kind}': [word for word in words if word in world.KINDS[kind]] for kind in kinds}
  if rng.random() < 0.5:
    groups = {'Again': words}
  lists = [f'{name}: {", ".join(f"{n} {word}" for n, word in enumerate(group, 1))}.'
           for name, group in groups.items()]
  return f'{", ".join(words)}. {" ".join(lists)}'


def _chat(prompt, response):
  return f'User: {prompt}\nAssistant: {response}'


def _template(name):
  return importlib.resources.files('srlm_jax.data').joinpath(f'{name}.txt').read_text().removesuffix('\n')
