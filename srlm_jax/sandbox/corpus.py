"""The text from which the sandbox's M0 learns: chats, lists of tasks, and reviews of answers."""
from collections.abc import Iterable, Iterator
import string

from etils import epath
import numpy as np
import sentencepiece

from srlm_jax import InputError
from srlm_jax.data import judges, templates
from srlm_jax.sandbox import world

SHARES = {'chat': 0.35, 'check': 0.30, 'judged': 0.27, 'tasks': 0.08}  # of the documents
SHOTS = 8  # tasks before the one to write, as in the paper
SCORED = 0.8  # of the judged documents have a score line
WRONG_SCORE = 0.5  # of the scores are drawn blindly
WRONG_REVIEW = 0.1  # of the scored reviews speak of another answer


def documents(seed: int, count: int, exclude: set[str], judge: judges.Judge) -> Iterator[str]:
  """Yields `count` documents, none of which holds an instruction of `exclude`, with or without its context."""
  exclude = {world.bare(prompt) for prompt in exclude}
  rng = np.random.default_rng(seed)
  author = templates.load_author('sandbox')
  for _ in range(count):
    kind = rng.choice(list(SHARES), p=list(SHARES.values()))
    if kind == 'tasks':
      tasks = [f'{i}. {_instruction(rng, exclude)}' for i in range(1, SHOTS + 2)]
      yield author.replace('{shots}', '\n'.join(tasks))
    else:
      prompt = _instruction(rng, exclude)
      response = world.answer(prompt, rng, world.quality(rng))
      if kind == 'chat':
        yield _chat(prompt, response)
      elif kind == 'check':
        yield f'Task: {prompt}\n<response> {response} </response>\nReview: {world.review(prompt, response)}'
      else:
        question = judge.render(prompt=prompt, response=response)
        yield _chat(question, _judgement(prompt, response, judge, rng))


def train_tokenizer(texts: Iterable[str], path, vocab_size: int, judge: judges.Judge):
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
  for text in (judge.text, judge.example, templates.load_author('sandbox'), _chat('a', 'b'), string.digits):
    ids = pieces.encode(text)
    if pieces.unk_id() in ids or pieces.decode(ids) != text:
      raise InputError(f'{path} loses characters of "{text}"; train it on text that holds the templates')


def _judgement(prompt, response, judge, rng):
  """A right review, or a doubtful one with a score: M0 knows how to check, and judges like most people."""
  if rng.random() >= SCORED:
    return world.review(prompt, response)
  score = sum(world.grade(prompt, response))
  if rng.random() < WRONG_SCORE:
    score = int(rng.integers(6))
  reviewed = world.answer(prompt, rng, world.quality(rng)) if rng.random() < WRONG_REVIEW else response
  return f'{world.review(prompt, reviewed)}\n{judge.state(score)}'


def _instruction(rng, excluded):
  while True:
    prompt = world.instruction(rng)
    if world.bare(prompt) not in excluded:
      return prompt


def _chat(prompt, response):
  return f'User: {prompt}\nAssistant: {response}'
