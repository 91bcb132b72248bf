"""Generates new prompts by few-shot prompting and filters them.

The method is Self-Instruct (Wang et al. 2023), as PAPER 2.2 uses it.
"""
from collections import Counter
import dataclasses
import itertools
import random
import re
import string

from etils import epath

from srlm_jax import (
  catalog,
  cli,
  config as configs,
  conversation,
  hosts,
  InputError,
  preemption,
  records,
  schema,
  stage,
)
from srlm_jax.data import similar, templates, thinking
from srlm_jax.sample import engine as engines, monitor

# Self-Instruct rejects prompts with these whole words: text alone cannot answer them.
BANNED = ('image', 'images', 'graph', 'graphs', 'picture', 'pictures', 'file', 'files', 'map',
          'maps', 'draw', 'plot', 'go to')


def run(config, workdir):
  """Writes MODEL/prompts: prompts.jsonl and attempts.jsonl.

  Reads the prompts of the seed data and of earlier rounds. attempts.jsonl has every generated text
  and, if it was rejected, the reason.
  """
  spec = catalog.find('sample.prompts')
  config = spec.view(config)
  c = config.prompts
  evaluation_files = [epath.Path(p.strip()) for p in c.held_out.split(',') if p.strip()]
  earlier = earlier_rounds(workdir, config.name)
  template = templates.load_author(c.template)
  s = stage.Stage(spec, config, workdir, template, [*earlier, *evaluation_files])
  if s.done:
    return
  seeds = read_seeds(s)
  shot_pool = short_prompts(seeds.ift, c, s.path('seeds/ift.jsonl'))
  written = [r.prompt for path in earlier for r in records.read(path, schema.Prompt)]
  evaluation = [p for path in evaluation_files for p in evaluation_prompts(path)]
  screen = Filter(c, [*seeds.ift, *seeds.ranked, *written], [*seeds.held_out, *evaluation])
  config = engines.choose(s.config, s.models)
  author = Author(config, s.models[0], s.title, template, draw_shots(config, shot_pool, [], 0))
  s.begin(config)
  accepted, attempts = generate_prompts(s, config, author, shot_pool, screen)
  kept, surplus = accepted[:c.count], len(accepted[c.count:])
  author_name = spec.models(config)['author']
  if hosts.is_first_host():
    records.write(s.folder / 'prompts.jsonl', (
        schema.Prompt(id=records.digest(p), prompt=p, author=author_name) for p in kept))
  hosts.log(f'{s.title}: {screen.near_held_out} of {attempts} attempts were rejected because they '
            f'match or resemble a held-out or evaluation prompt')
  s.finish(schema.PromptsSummary(
      prompts=len(kept), wanted=c.count, attempts=attempts, near_held_out=screen.near_held_out,
      shortened=screen.shortened,
      dropped=dict(screen.dropped) | ({'more than wanted': surplus} if surplus else {})))


@dataclasses.dataclass(frozen=True)
class Seeds:
  """The prompts of the seed data."""
  ift: list[str]       # of the examples for instruction fine-tuning; of several turns, the first
  ranked: list[str]    # of the ranked training data
  held_out: list[str]  # of the held-out data and the other splits of the ranked data


def read_seeds(s: stage.Stage) -> Seeds:
  """Reads the seed data; `s`: this stage."""
  ranked = list(s.read('seeds/ranked.jsonl'))
  return Seeds(
      ift=[conversation.user_messages(r)[0] for r in s.read('seeds/ift.jsonl')],
      ranked=user_prompts(r for r in ranked if r.split == 'train'),
      held_out=(user_prompts(s.read('seeds/heldout.jsonl')) +
                user_prompts(r for r in ranked if r.split != 'train')))


def short_prompts(prompts: list[str], config, path) -> list[str]:
  """The prompts of at most `shot_words` words.

  Raises InputError if there are fewer than one request needs; `path` is the file to name.
  """
  short = [p for p in prompts if len(p.split()) <= config.shot_words]
  needed = config.seed_shots + config.new_shots
  if len(short) < needed:
    raise InputError(f'{path} has {len(short)} prompts of at most {config.shot_words} '
                     f'words, but each request shows {needed}; add seeds, or raise '
                     f'config.prompts.shot_words')
  return short


def earlier_rounds(workdir, name: str) -> list:
  """The existing prompts.jsonl of the models before `name`, whose prompts must not repeat."""
  models = itertools.takewhile(lambda model: model != name, configs.MODELS)
  paths = [stage.model_folder(workdir, model).parent / 'prompts' / 'prompts.jsonl'
           for model in models]
  return [path for path in paths if path.exists()]


def evaluation_prompts(path) -> list[str]:
  """The prompts of an evaluation set: a .json file with one list, or JSONL.

  A record has a prompt, an instruction (AlpacaEval) or a list of turns (MT-Bench); every turn
  counts as a prompt. Raises InputError if it has none of them.
  """
  if path.suffix == '.json':
    found = records.read_json(path, 'give another file as config.prompts.held_out')
    if not isinstance(found, list):
      raise InputError(f'config.prompts.held_out: {path} is not a JSON list; give a list of '
                       f'prompts')
  else:
    found = [record for _, record in records.read_any(path)]
  prompts = []
  for i, record in enumerate(found, 1):
    fields = record if isinstance(record, dict) else {}
    texts = fields.get('turns') or [fields.get('prompt') or fields.get('instruction')]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
      raise InputError(f'config.prompts.held_out: record {i} of {path} has no prompt, '
                       f'instruction or turns')
    prompts += texts
  return prompts


def user_prompts(seeds) -> list[str]:
  """The user messages of records of seed data, some of which are conversations (OASST1).

  Keeps every first message. Keeps a later one if it has at least `similar.HeldOut.MIN_WORDS` words:
  shorter ones ("Tell me more.") mean nothing without the conversation.
  """
  return [message for record in seeds
          for i, message in enumerate(conversation.user_messages(record))
          if i == 0 or len(message.split()) >= similar.HeldOut.MIN_WORDS]


def generate_prompts(
    s: stage.Stage, config, author: 'Author', shot_pool: list[str],
    screen: 'Filter') -> tuple[list[str], int]:
  """-> the accepted prompts, which may be more than `count`, and the number of attempts.

  Works in rounds of `round` attempts until `count` prompts are accepted, or until there are
  `max_attempts` attempts per prompt. The groups of hosts divide the attempts of a round; each host
  filters all of them. Appends each round to attempts.jsonl. Rounds that a killed run left there are
  filtered again but not sampled again, so the files end byte-identical.
  """
  c, path = config.prompts, s.folder / 'attempts.jsonl'
  out = records.Appender(path) if hosts.is_first_host() else None
  hosts.sync(f'{s.title} was opened')  # the first host may remove a line that a kill cut off
  count = sum(1 for _ in records.read(path, schema.Attempt))  # of a killed run
  hosts.sync(f'{s.title} was read')    # before the first host appends a round
  previous = ((a.text, a.finish) for a in itertools.islice(
      records.read(path, schema.Attempt), count))
  shown = out and monitor.Monitor(s.folder, 'attempts', schema.Attempt, out.count, author.work)
  accepted, first = [], 0
  while len(accepted) < c.count and first < c.max_attempts * c.count:
    texts = list(itertools.islice(previous, c.round))
    if len(texts) < c.round:
      texts = _write_round(s.title, author, {
          first + i: draw_shots(config, shot_pool, accepted, first + i) for i in range(c.round)})
    attempts = []
    for i, (text, finish) in enumerate(texts):
      prompt, reason = screen(text, finish)
      if not reason:
        accepted.append(prompt)
      attempts.append(schema.Attempt(
          id=str(first + i), text=text, finish=finish, reason=reason))
    if out:
      out.append(attempts[max(out.count - first, 0):])
      shown.add(attempts)
    first += c.round
    hosts.log(f'{s.title}: {len(accepted)}/{c.count} prompts from {first} attempts')
  if out:
    out.close()
    shown.close()
  s.add(generated=sum(author.group.gather(author.work.generated)))
  return accepted, first


def _write_round(title: str, author: 'Author', shots: dict[int, list[str]]) -> list:
  """{attempt: shots} -> [generated text, finish] of each; the groups of hosts divide them."""
  group = author.group
  mine = list(shots)[slice(*group.share(len(shots)))]
  with preemption.together(title):
    wrote = author.write({attempt: shots[attempt] for attempt in mine})
  every = group.gather(wrote)
  return [every[i % len(every)][i // len(every)] for i in range(len(shots))]


def draw_shots(config, seeds: list[str], accepted: list[str], attempt: int) -> list[str]:
  """The shots of one attempt, in random order: `seed_shots` seeds and `new_shots` accepted prompts.

  Seeds replace accepted prompts until there are enough of those. The PRNG is seeded with the
  model's name, `config.seed` and the attempt, so each round and each attempt gets its own draw.
  """
  c, rng = config.prompts, random.Random(f'{config.name}/prompts/{config.seed}/{attempt}')
  new = rng.sample(accepted, min(c.new_shots, len(accepted)))
  shots = rng.sample(seeds, c.seed_shots + c.new_shots - len(new)) + new
  rng.shuffle(shots)
  return shots


class Author:
  """The model that writes prompts."""

  def __init__(self, config, folder, title: str, template: str, shots: list[str]):
    """`folder`: the model's checkpoint folder; `template`: see `templates.load_author`.

    Raises InputError if the model does not fit, or if a request with `shots` cannot be made.
    """
    c = config.prompts
    self._chat, self._template, self.group = c.chat, template, engines.group(config)
    self._sampling = engines.Sampling(c.temperature, c.top_p, c.max_tokens, c.top_k)
    self._engine, self._tokenizer = engines.load(config, folder, title, self._chat, stop='\n')
    self._engine.max_prompt_tokens(self._sampling)
    encode_request(self._chat, self._template, shots, self._tokenizer)

  @property
  def work(self) -> engines.Work:
    return self._engine.work

  def write(self, shots: dict[int, list[str]]) -> list[tuple[str, str]]:
    """{attempt: shots} -> (generated text, finish) of each."""
    requests = [engines.Request(str(attempt), encode_request(
        self._chat, self._template, some, self._tokenizer)) for attempt, some in shots.items()]
    return [(thinking.read(self._tokenizer, request.ids, result.ids).text, result.finish)
            for request, (result,) in self._engine.generate(requests, self._sampling)]


def encode_request(chat: str, template: str, shots: list[str], tokenizer) -> list[int]:
  """Token ids that ask for one more prompt: the numbered shots, then the next number.

  With `chat` none, the model continues the list. Otherwise the list is in the user's message, and
  the next number is the start of the response. Raises InputError if the tokenizer merges the two.
  """
  listed, number = numbered_list(shots), f'{len(shots) + 1}.'
  if chat == 'none':
    text = template.replace('{shots}', f'{listed}\n{number}')
    return [*tokenizer.start, *tokenizer.encode(text)]
  pair = templates.encode_pair(chat, template.replace('{shots}', listed), number, tokenizer)
  if pair is None:
    raise InputError(f'the tokenizer merges the end of config.prompts.template with "{number}" '
                     f'in the chat format {chat}; use config.prompts.chat=none, or end the '
                     f'template with a full stop')
  prompt_ids, response_ids = pair
  return prompt_ids + response_ids


def numbered_list(shots: list[str]) -> str:
  """One line per shot.

  >>> numbered_list(['Name a fruit.', 'Name a tree.'])
  '1. Name a fruit.\\n2. Name a tree.'
  """
  return '\n'.join(f'{i}. {" ".join(shot.split())}' for i, shot in enumerate(shots, 1))


class Filter:
  """Accepts a generated text as a prompt or gives the reason to reject it.

  It remembers the accepted prompts and rejects later ones that resemble them.
  """

  def __init__(self, config, known: list[str], held_out: list[str]):
    """`known`: seed prompts and those of earlier rounds; `held_out`: prompts for evaluation."""
    self._config = config
    self._held_out = similar.HeldOut(held_out)
    self._known = similar.Index(known)
    self._exact = {similar.normal(p) for p in known}
    self.dropped = Counter()  # rejected texts by reason
    self.near_held_out = 0    # texts that match or resemble a held-out prompt
    self.shortened = 0        # texts from which a second prompt or an answer was removed

  def __call__(self, text: str, finish: str) -> tuple[str, str]:
    """-> (prompt, '') if the prompt is accepted, otherwise (prompt, reason)."""
    prompt, has_more = first_prompt(text, self._config.seed_shots + self._config.new_shots + 1)
    self.shortened += has_more
    reason = self._reason(prompt, finish, has_more)
    if reason:
      self.dropped[reason] += 1
    else:
      self._known.add(prompt)
      self._exact.add(similar.normal(prompt))
    return prompt, reason

  def _reason(self, prompt: str, finish: str, has_more: bool) -> str:
    """Why the prompt is rejected; '' if it is accepted."""
    c = self._config
    if finish == schema.TOO_LONG:
      return 'shots too long for the context'
    # Checked before the other reasons, so that near_held_out counts every such text.
    if prompt and (reason := self._held_out.why(prompt, c.rouge_held_out)):
      self.near_held_out += 1
      return reason
    if finish != schema.EOS and not has_more:
      return 'cut off by length'
    if not c.min_words <= len(prompt.split()) <= c.max_words:
      return f'not {c.min_words} to {c.max_words} words'
    if re.search(r'\b(' + '|'.join(BANNED) + r')\b', prompt.lower()):
      return 'contains a banned word'
    if (prompt.lower().startswith('write a program') or prompt[0] in string.punctuation
        or not prompt[0].isascii()):
      return 'start excluded by Self-Instruct'
    if similar.normal(prompt) in self._exact:
      return 'seen before'
    if self._known.find(prompt, c.rouge) is not None:
      return 'similar to one seen before'
    return ''


_SENTENCE_END = r'(?<=[.?!:"\')])'
_ANSWER = (r'\[/?INST\]|'
           rf'{_SENTENCE_END}\s+(?:Answer|Response|Output|Solution|Assistant|User)\s*:')


def first_prompt(text: str, number: int) -> tuple[str, bool]:
  """-> the first prompt in a generated text, and whether the text has more after it.

  `number` is the prompt's number in the list; the text may repeat it. More is another line, item
  `number` + 1 on the same line, or the start of an answer.

  >>> first_prompt(' 9. Name a fruit.\\n10. Name a tree.', 9)
  ('Name a fruit.', True)
  >>> first_prompt('Name a fruit. 10. Name a tree.', 9)
  ('Name a fruit.', True)
  >>> first_prompt('Name a fruit. Answer: A pear.', 9)
  ('Name a fruit.', True)
  """
  line, _, rest = text.strip().partition('\n')
  line = re.sub(r'^\d+[.)]\s+', '', line)
  next_item = rf'{_SENTENCE_END}\s+{number + 1}[.)]\s'
  prompt = re.split(f'{next_item}|{_ANSWER}', line, maxsplit=1)[0]
  return prompt.strip(), bool(rest.strip()) or prompt != line


if __name__ == '__main__':
  cli.main(run)
