"""Writes new prompts from few shots, and filters them (Self-Instruct, Wang et al. 2023; PAPER 2.2)."""
from collections import Counter
import functools
import itertools
import json
import random
import re
import string

from etils import epath

from srlm_jax import catalog, cli, config as configs, hosts, InputError, records, stage
from srlm_jax.data import oasst, similar, templates
from srlm_jax.sample import engine as engines

# What text cannot show (Self-Instruct), as whole words.
BANNED = ('image', 'images', 'graph', 'graphs', 'picture', 'pictures', 'file', 'files', 'map', 'maps', 'draw', 'plot',
          'go to')


def run(config, workdir):
  """The seeds' prompts -> MODEL/prompts/prompts.jsonl, and every attempt with its fate in attempts.jsonl."""
  spec = catalog.find('sample.prompts')
  config = spec.view(config)
  c = config.prompts
  author = spec.models(config)[0]
  others = [epath.Path(p.strip()) for p in c.held_out.split(',') if p.strip()]
  earlier = earlier_rounds(workdir, config.name)
  template = templates.load_author(c.template)
  s = stage.Stage(spec, config, workdir, template, [*earlier, *others])
  if s.done:
    return
  ift, ranked, heldout = (list(records.read(path, 'prompt')) for path in s.inputs[:3])
  seeds = [r['prompt'] for r in ift]
  shown = [p for p in seeds if len(p.split()) <= c.shot_words]
  if len(shown) < c.seed_shots + c.new_shots:
    raise InputError(f'{s.inputs[0]} holds {len(shown)} prompts of at most {c.shot_words} words, fewer than the '
                     f'{c.seed_shots + c.new_shots} shots; add seeds, or raise config.prompts.shot_words')
  written = [r['prompt'] for path in earlier for r in records.read(path, 'prompt')]
  held = [r['prompt'] for r in heldout] + requests(r['prompt'] for r in ranked if r['split'] != 'train')
  screen = Filter(c, seeds + requests(r['prompt'] for r in ranked if r['split'] == 'train') + written,
                  held + [p for path in others for p in evaluation_prompts(path)])
  sampling = engines.Sampling(c.temperature, c.top_p, c.max_tokens, c.top_k)
  s.begin(engines.host_mesh(config))
  if not hosts.is_first_host():
    return s.finish()
  out = records.Appender(s.folder / 'attempts.jsonl')
  before = list(records.read(s.folder / 'attempts.jsonl'))  # of a killed run
  author_of = functools.cache(lambda: engines.load(config, s.models[0], s.title, stop='\n'))  # when there is work to do
  accepted, first, size = [], 0, c.round
  while len(accepted) < c.count and first < c.max_attempts * c.count:
    texts = [(a['text'], a['finish']) for a in before[first:first + size]]
    if len(texts) < size:
      shots = [draw_shots(config, shown, accepted, first + i) for i in range(size)]
      texts = _write(*author_of(), c.chat, template, shots, first, sampling)
    attempts = []
    for i, (text, finish) in enumerate(texts):
      prompt, why = screen(text, finish)
      accepted += [prompt] * (not why)
      attempts.append(dict(id=str(first + i), text=text, finish=finish, dropped=why))
    out.append(attempts[max(out.count - first, 0):])
    first += size
    hosts.say(f'{s.title}: {len(accepted)}/{c.count} prompts from {first} attempts')
  out.close()
  surplus, accepted = max(len(accepted) - c.count, 0), accepted[:c.count]
  records.write(s.folder / 'prompts.jsonl', (dict(id=records.digest(p), prompt=p, author=author) for p in accepted))
  hosts.say(f'{s.title}: {screen.near_held_out} of {first} attempts were held-out or evaluation prompts, or near one; '
            f'none entered')
  s.finish(prompts=len(accepted), wanted=c.count, attempts=first, near_held_out=screen.near_held_out,
           shortened=screen.shortened,
           dropped=dict(screen.dropped) | ({'more than wanted': surplus} if surplus else {}))


def earlier_rounds(workdir, name: str) -> list:
  """The prompts.jsonl of every model before `name` that has one: a prompt is written in one round alone."""
  models = itertools.takewhile(lambda model: model != name, configs.MODELS)
  paths = [stage.model_folder(workdir, model).parent / 'prompts' / 'prompts.jsonl' for model in models]
  return [path for path in paths if path.exists()]


def requests(prompts) -> list[str]:
  """What users ask in prompts that may be whole conversations (later turns of OASST1): the first message, and later
  ones of at least `similar.HeldOut.SHORTEST` words, because shorter ones ("Tell me more.") are no prompts alone.

  >>> requests(['[user]\\nName a fruit.\\n\\n[assistant]\\nPear.\\n\\n[user]\\nWhy?', 'Name a tree.'])
  ['Name a fruit.', 'Name a tree.']
  """
  return [message for prompt in prompts for i, message in enumerate(oasst.user_messages(prompt))
          if i == 0 or len(message.split()) >= similar.HeldOut.SHORTEST]


def _write(engine, tokenizer, chat: str, template: str, shots: list[list[str]], first: int, sampling):
  """(continuation, finish) of each list of shots; attempts are numbered from `first`."""
  requests = [engines.Request(str(first + i), ask(chat, template, shot, tokenizer)) for i, shot in enumerate(shots)]
  return [(tokenizer.decode(r.ids), r.finish) for _, (r,) in engine.generate(requests, sampling)]


def ask(chat: str, template: str, shots: list[str], tokenizer) -> list[int]:
  """Ids that a new prompt continues: the shots as a numbered list, and the next number. A model of conversations
  (`chat` is not none) is asked in its own form, and finds the number at the beginning of its response."""
  listed, number = numbered(shots), f'{len(shots) + 1}.'
  if chat == 'none':
    return [tokenizer.bos_id, *tokenizer.encode(template.replace('{shots}', f'{listed}\n{number}'))]
  pair = templates.encode_pair(chat, template.replace('{shots}', listed), number, tokenizer)
  if pair is None:
    raise InputError(f'the tokenizer merges the end of config.prompts.template with "{number}" in the form {chat}; '
                     f'use config.prompts.chat=none, or end the template with a full stop')
  return pair[0] + pair[1]


def evaluation_prompts(path) -> list[str]:
  """The prompts of a file: JSONL, or one JSON list; their field is prompt, instruction (AlpacaEval) or turns (MT-Bench,
  a list)."""
  if path.suffix == '.json':
    try:
      found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
      raise InputError(f'config.prompts.held_out: {path} cannot be read as JSON ({error})') from error
  else:
    found = list(records.read(path))
  prompts = []
  for i, record in enumerate(found, 1):
    fields = record if isinstance(record, dict) else {}
    texts = fields.get('turns') or [fields.get('prompt') or fields.get('instruction')]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
      raise InputError(f'config.prompts.held_out: record {i} of {path} has no prompt, instruction or turns')
    prompts += texts
  return prompts


class Filter:
  """Calls a generated text a prompt, or says why not; remembers what it accepted."""

  def __init__(self, config, seeds: list[str], held_out: list[str]):
    self._config = config
    self._held_out = similar.HeldOut(held_out)
    self._known = similar.Index(seeds)
    self._exact = {similar.normal(p) for p in seeds}
    self.dropped = Counter()
    self.near_held_out = 0  # texts that were held-out prompts, or near one
    self.shortened = 0  # texts with more than one prompt, or with an answer begun

  def __call__(self, text: str, finish: str) -> tuple[str, str]:
    """-> (prompt, '') or (prompt, reason)."""
    prompt, more = cut(text, self._config.seed_shots + self._config.new_shots + 1)
    self.shortened += more
    why = self._reason(prompt, finish, more)
    if why:
      self.dropped[why] += 1
    else:
      self._known.add(prompt)
      self._exact.add(similar.normal(prompt))
    return prompt, why

  def _reason(self, prompt, finish, more) -> str:
    c = self._config
    if finish == 'too_long':
      return 'shots too long for the context'
    if prompt and (why := self._held_out.why(prompt, c.rouge_held_out)):
      self.near_held_out += 1  # asked first, so that all that tried are counted
      return why
    if finish != 'eos' and not more:
      return 'cut off by length'
    if not c.min_words <= len(prompt.split()) <= c.max_words:
      return f'not {c.min_words} to {c.max_words} words'
    if re.search(r'\b(' + '|'.join(BANNED) + r')\b', prompt.lower()):
      return 'asks for what text cannot show'
    if prompt.lower().startswith('write a program') or prompt[0] in string.punctuation or not prompt[0].isascii():
      return 'a start that Self-Instruct refuses'
    if similar.normal(prompt) in self._exact:
      return 'seen before'
    return 'like one seen before' if self._known.find(prompt, c.rouge) is not None else ''


_END = r'(?<=[.?!:"\')])'  # of a sentence
_ANSWER = rf'\[/?INST\]|{_END}\s+(?:Answer|Response|Output|Solution|Assistant|User)\s*:'


def cut(text: str, number: int) -> tuple[str, bool]:
  """The first prompt in a generation, without the number it may repeat, and whether more came after it: another of
  the list, on its own line or as `number` + 1, or an answer to it.

  >>> cut(' 9. Name a fruit.\\n10. Name a tree.', 9)
  ('Name a fruit.', True)
  >>> cut('Name a fruit. 10. Name a tree.', 9), cut('Name a fruit. Answer: A pear.', 9)
  (('Name a fruit.', True), ('Name a fruit.', True))
  """
  line, _, more = text.strip().partition('\n')
  line = re.sub(r'^\d+[.)]\s+', '', line)
  prompt = re.split(rf'{_END}\s+{number + 1}[.)]\s|{_ANSWER}', line, maxsplit=1)[0]
  return prompt.strip(), bool(more.strip()) or prompt != line


def draw_shots(config, seeds: list[str], accepted: list[str], attempt: int) -> list[str]:
  """6 seed prompts and 2 accepted before (more seeds while there are none), in random order. The draw depends on the
  model whose prompts are written, the seed and the attempt, so no two rounds see the same shots."""
  c, rng = config.prompts, random.Random(f'{config.name}/prompts/{config.seed}/{attempt}')
  new = rng.sample(accepted, min(c.new_shots, len(accepted)))
  shots = rng.sample(seeds, c.seed_shots + c.new_shots - len(new)) + new
  rng.shuffle(shots)
  return shots


def numbered(shots: list[str]) -> str:
  """
  >>> numbered(['Name a fruit.', 'Name a tree.'])
  '1. Name a fruit.\\n2. Name a tree.'
  """
  return '\n'.join(f'{i}. {" ".join(shot.split())}' for i, shot in enumerate(shots, 1))


if __name__ == '__main__':
  cli.main(run)
