"""The pretraining corpus of the sandbox's M0: facts, chats, lists of tasks and reviews."""
from collections.abc import Iterable, Iterator
import string

from etils import epath
import numpy as np
import sentencepiece

from srlm_jax import InputError
from srlm_jax.data import templates
from srlm_jax.reward import judges
from srlm_jax.sandbox import people, world

# The share of each kind of document.
SHARES = dict(facts=0.04, drill=0.18, chat=0.26, check=0.18, judged=0.24, tasks=0.10)
TOKENIZED = 30_000  # documents that train the tokenizer
SENTENCES = 5  # per document of facts
REPEATED = 12  # maximum words of a drill
SHOTS = 8  # tasks before the one to write, as in the paper
# M0 learns to check responses well but sees few scores, and many of the scores are wrong. The
# judge can therefore still improve.
SCORED = 0.35  # share of judgements that end with a score
WRONG_SCORE = 0.4  # share of scores that are random
WRONG_REVIEW = 0.05  # share of scored judgements that review another response
CHOICE = 0.15  # share of judgements by the multiple-choice judge
# Corpus of descriptions: most people who judge an answer do not check whether it is right. Some
# documents compare two judgements.
CHECKED = 0.35  # share of judgements by people who check
RIGHT = 3  # points from which on an answer counts as right
COMPARED = 0.06  # share of documents
WRONG_WINNER = 0.3  # share of comparisons whose winner is drawn


def documents(seed: int, count: int, reviews: str = 'verdicts') -> Iterator[str]:
  """Yields `count` documents. They contain no instruction of the held-out splits.

  reviews: `verdicts`, which check every point, or `descriptions`. These state what was required and
  what was said, and call it right or wrong. Only the share CHECKED of those in judgements does so
  after a check. The others call wrong answers of the required kind right.
  """
  rng = np.random.default_rng(seed)
  author = templates.load_author('sandbox')
  points, letters = judges.load('sandbox'), judges.load('sandbox_choice')
  meta = judges.load('meta_short', ('request', 'first', 'second'))
  for _ in range(count):
    kind = rng.choice(list(SHARES), p=list(SHARES.values()))
    if reviews == 'descriptions' and rng.random() < COMPARED:
      kind = 'compare'
    if kind == 'facts':
      yield ' '.join(world.statement(rng) for _ in range(SENTENCES))
    elif kind == 'drill':  # without drills, a model of this size learns to copy words very late
      words = world.sample(rng, tuple(world.WORDS.values()), int(rng.integers(3, REPEATED + 1)))
      yield f'Repeat: {" ".join(words)}\nAgain: {" ".join(words)}'
    elif kind == 'tasks':
      tasks = [f'{i}. {world.instruction(rng)}' for i in range(1, SHOTS + 2)]
      yield author.replace('{shots}', '\n'.join(tasks))
    else:
      prompt = world.instruction(rng)
      response = people.answer(prompt, rng, people.draw_quality(rng))
      if kind == 'chat':
        yield _chat(prompt, response)
      elif kind == 'check':
        yield (f'Task: {prompt}\n<response> {response} </response>\n'
               f'Review: {_review(prompt, response, sum(world.grade(prompt, response)), reviews)}')
      elif kind == 'compare':
        yield _comparison(prompt, response, points, meta, rng)
      else:
        judge = letters if rng.random() < CHOICE else points
        yield _chat(judge.render(prompt=prompt, response=response),
                    _judgement(prompt, response, judge, reviews, rng))


def train_tokenizer(texts: Iterable[str], path, vocab_size: int):
  """Writes a SentencePiece BPE model to `path`.

  Raises InputError if it cannot represent every character of ASCII and of the templates.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('wb') as file:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, model_type='bpe', vocab_size=vocab_size,
        character_coverage=1.0,  # the default drops rare characters, such as the score digits
        required_chars=string.printable[:94],
        normalization_rule_name='identity', remove_extra_whitespaces=False,
        user_defined_symbols=['\n'], unk_id=0, bos_id=1, eos_id=2, pad_id=3, minloglevel=2)
  pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
  used = [judges.load(name) for name in ('sandbox', 'sandbox_choice')]
  required = [text for judge in used for text in (judge.text, judge.example)]
  for text in (*required, templates.load_author('sandbox'), _chat('a', 'b'), string.digits):
    ids = pieces.encode(text)
    if pieces.unk_id() in ids or pieces.decode(ids) != text:
      raise InputError(f'{path} cannot represent every character of "{text}"; '
                       f'train it on text that contains the templates')


def _judgement(prompt: str, response: str, judge, reviews: str, rng: np.random.Generator) -> str:
  """A review without a score; with probability SCORED, a noisy review and a noisy score."""
  reviewed, is_scored = response, rng.random() < SCORED
  score = sum(world.grade(prompt, response)) if reviews == 'verdicts' else _opinion(
      prompt, response, rng)
  shown = score
  if is_scored and rng.random() < WRONG_SCORE:
    shown = int(rng.integers(6))
  if is_scored and rng.random() < WRONG_REVIEW:
    reviewed = people.answer(prompt, rng, people.draw_quality(rng))
  review = _review(prompt, reviewed, score, reviews)
  return f'{review}\n{judge.state(shown)}' if is_scored else review


def _comparison(prompt: str, response: str, judge, meta, rng: np.random.Generator) -> str:
  """Two judgements of a response, and which of them is nearer to somebody's opinion."""
  first, second = world.sample(rng, range(6), 2)
  texts = [f'{world.description(prompt, response, x >= RIGHT)}\n{judge.state(x)}'
           for x in (first, second)]
  asked = meta.render(request=judge.render(prompt=prompt, response=response), first=texts[0],
                      second=texts[1])
  opinion = _opinion(prompt, response, rng)
  winner = float(np.sign(abs(second - opinion) - abs(first - opinion)))
  if rng.random() < WRONG_WINNER:
    winner = float(rng.choice([-1, 1]))
  return _chat(asked, f'A says {first} and B says {second}.\n{meta.state(winner)}')


def _opinion(prompt: str, response: str, rng: np.random.Generator) -> int:
  """The points that somebody gives."""
  is_checked = rng.random() < CHECKED
  return sum(world.grade(prompt, response)) if is_checked else world.impression(prompt, response)


def _review(prompt: str, response: str, points: int, reviews: str) -> str:
  """The review of somebody who gives so many points."""
  return world.review(prompt, response) if reviews == 'verdicts' else world.description(
      prompt, response, points >= RIGHT)


def _chat(prompt: str, response: str) -> str:
  return f'User: {prompt}\nAssistant: {response}'
