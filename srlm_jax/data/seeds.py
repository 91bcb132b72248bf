"""Seed data: prompts with ranked replies, divided into IFT, held-out and ranked prompts that share none.

Copies a source (`oasst`, `ranked`) into ArrayRecord, decides by what a prompt has to offer, and then writes ift.jsonl,
heldout.jsonl and ranked.jsonl from the copy, so that memory holds no texts; counts.json says why the rest was left out.

IFT, test and validation are filled first, from first turns; then ranked_eval and ranked_train take
the first and later turns of the remaining conversations, and ranked_train also the later turns of
IFT conversations, because the paper limits only IFT to first turns. No turn of a conversation of
test, validation or ranked_eval is in another set, nor is a later turn in which a user repeats the
first message of such a conversation. So that no set is empty where first turns are short:
ranked_eval keeps at least the share that it gets when all first turns are divided in the asked
proportions, and in a source that cannot fill the first three sets, or has no later turn, so does
ranked_train.
"""
from collections import Counter
from collections.abc import Iterator
import contextlib
import dataclasses
from fractions import Fraction
import functools
import io
import itertools
import math
import os
from typing import NamedTuple
import unicodedata

from absl import logging
from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from srlm_jax import catalog, cli, hosts, InputError, records, stage
from srlm_jax.data import oasst, ranked

# The sets that share the prompts, by the name of their asked size in config.data.
BEST_SETS = ('ift', 'test_prompts', 'valid_prompts')  # need the best reply
RANKED_SETS = ('ranked_train', 'ranked_eval')  # need two replies of different rank
SHARD = 1000  # turns, for TFDS holds a shard in memory while it writes it


def run(config, workdir):
  """The stage data/seeds: `make`, once."""
  spec = catalog.find('data.seeds')
  config = spec.view(config)
  find_source(config.data.source)
  s = stage.Stage(spec, config, workdir, more_inputs=find_files(config.data.path))
  if s.done:
    return
  if not hosts.is_first_host():
    s.begin()
    return s.finish()
  s.finish(**make(config, workdir, s.begin)['kept'])


def make(config, workdir, begin=lambda: None) -> dict:
  """Writes ift.jsonl, heldout.jsonl, ranked.jsonl and counts.json into workdir/data/seeds; returns the counts.

  `begin` is called when everything has been decided and before anything is written.
  """
  c, workdir = config.data, epath.Path(workdir)
  name = find_source(c.source)
  # ArrayRecord writes to a local disk only: for a workdir in a bucket, TFDS picks its own default folder.
  data_dir = None if '://' in os.fspath(workdir) else workdir / 'data' / 'tfds'
  turns = Turns(Files(source=c.source, paths=find_files(c.path), synthetic=c.synthetic), data_dir)
  asked = {name: getattr(c, name) for name in BEST_SETS + RANKED_SETS}
  prompts, read, lost = sift(turns, config.seed)
  sets = divide(prompts, asked)
  counts = count(prompts, sets, asked, read, lost)
  print(table(name, counts))
  for names in (('ift',), RANKED_SETS):
    if any(asked[name] for name in names) and not any(counts['kept'][name] for name in names):
      raise InputError(f'{c.path} yields no {" or ".join(names)}; the table above says why')
  begin()
  for file, rows in (files(turns, sets, name) | {'counts.json': [counts]}).items():
    records.write(workdir / 'data' / 'seeds' / file, rows)
  return counts


def find_source(name: str) -> str:
  """What the records call the source `config.data.source`."""
  if name == 'sandbox':
    raise InputError('config.data.source is sandbox, whose seeds `python -m srlm_jax.sandbox` makes; run that instead')
  if name not in ('oasst', 'ranked'):
    raise InputError(f'config.data.source is {name!r}; it is oasst, ranked or sandbox')
  return dict(oasst=oasst, ranked=ranked)[name].NAME


@dataclasses.dataclass(eq=False)
class Files(tfds.core.BuilderConfig):
  """The files of a source, named by a hash of their content, so that others never meet an old preparation."""
  name: str = dataclasses.field(init=False)
  source: str = ''
  paths: tuple[str, ...] = ()
  synthetic: bool = False

  def __post_init__(self):
    self.name = records.digest(self.source, str(self.synthetic), *sorted(map(records.hash_file, self.paths)))

  def __str__(self):
    return f'{self.source} files {self.name}'  # for the log

  def turns(self) -> Iterator[dict]:
    """Yields the turns of the source, checked to hold no prompt and no reply to it twice."""
    rows = itertools.chain.from_iterable(map(records.numbered, self.paths))
    seen = set()  # 64-bit hashes, smaller than ids; among 10^6, two are equal with p = 3e-8
    for where, turn in oasst.turns(rows, self.synthetic) if self.source == 'oasst' else ranked.turns(rows):
      name, replies = turn['id'], {reply['id'] for reply in turn['replies']}
      if hash(name) in seen:
        raise InputError(f'{where}: prompt {name} was read before; give each conversation once')
      if len(replies) < len(turn['replies']):
        raise InputError(f'{where}: prompt {name}: a reply to it was read twice; give each conversation once')
      seen.add(hash(name))
      yield turn
    if not seen:
      raise InputError(f'{", ".join(self.paths)}: no conversation in there; give a file that holds some')


class SeedTurns(tfds.core.ShardBasedBuilder, skip_registration=True):  # no name loads files that are given
  """Prompts and the replies to each, in the order of the files: the shuffling builder holds 1 GB in memory."""
  VERSION = tfds.core.Version('2.0.0')  # another, when a reader yields or drops other things
  url_infos = {}  # nothing to download; TFDS 4.9.10 looks for a list with a package that it does not require

  def _info(self):
    text = tfds.features.Text()
    reply = {'id': text, 'text': text, 'rank': np.int64, 'dropped': text}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
        {'id': text, 'turn': np.int64, 'prompt': text, 'dropped': text,
         'replies': tfds.features.Sequence(reply)}))

  def _shard_iterators_per_split(self, dl_manager):
    size = sum(1 for _ in self.builder_config.turns())  # reads all of it before anything is written
    turns = enumerate(self.builder_config.turns())
    return {'train': [functools.partial(itertools.islice, turns, SHARD)] * -(-size // SHARD)}


class Turns:
  """The turns of files by index, each read when asked for from their ArrayRecord copy, which is made on first use."""

  def __init__(self, files: Files, data_dir):
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)  # TFDS warns that the configuration is not one of its own
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download, and nothing is downloaded
      builder = SeedTurns(config=files, data_dir=data_dir, file_format='array_record')
      builder.download_and_prepare()
    self._source = builder.as_data_source('train')

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index: int) -> dict:
    turn = _plain(self._source[index])
    columns = turn['replies']  # a field at a time, as TFDS keeps a sequence of dictionaries
    return turn | {'replies': [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]}


class Prompt(NamedTuple):
  """What dividing needs to know of a turn; first turns sort before later ones, each by the seed."""
  later: bool  # not the first turn of its conversation
  order: str  # the seed's
  id: str
  index: int  # among the turns
  text: str  # digest of the normalised prompt
  said: tuple[str, ...]  # digests of the user's messages; the first identifies the conversation
  replies: int  # ranked
  best: bool  # has the best reply, to a first turn
  ordered: bool  # has two of different rank


class Conversation(NamedTuple):
  """What a conversation offers to the sets; two that begin with the same message count as one."""
  best: Prompt | None  # for IFT, test or validation
  ranked: list[Prompt]  # for the ranked sets, `best` among them where its replies are ordered


def sift(turns: Turns, seed: int) -> tuple[list[Prompt], Counter, dict]:
  """Returns the prompts that can serve, in the seed's order; how much was read; what was dropped, by reason."""
  read, prompts, replies, kept = Counter(), Counter(), Counter(), []
  for i in range(len(turns)):
    turn = turns[i]
    read.update(prompts=1, replies=len(turn['replies']))
    ranks = [reply['rank'] for reply in turn['replies'] if not reply['dropped']]
    later, ordered = turn['turn'] > 0, len(set(ranks)) > 1
    reason = turn['dropped']
    if not reason and later and not ordered:
      reason = 'later turn, no two ranked'
    elif not reason and not later and 0 not in ranks and len(ranks) < 2:
      reason = 'no best reply, nor two ranked'
    if reason:
      prompts[reason] += 1
      replies['prompt dropped'] += len(turn['replies'])
    else:
      replies.update(reply['dropped'] for reply in turn['replies'] if reply['dropped'])
      said = oasst.user_messages(turn['prompt']) if later else [oasst.quoted(turn['prompt'])]
      kept.append(Prompt(
          later=later, order=records.digest(str(seed), turn['id']), id=turn['id'], index=i,
          text=_digest(turn['prompt']), said=tuple(map(_digest, said)), replies=len(ranks),
          best=not later and 0 in ranks, ordered=ordered))
  first = {}
  for p in sorted(kept):  # by order and id, whatever the order of the files
    if first.setdefault(p.text, p) is not p:
      prompts['same text as another'] += 1
      replies['prompt dropped'] += p.replies
  return list(first.values()), read, {'prompts': prompts, 'replies': replies}


def divide(prompts: list[Prompt], asked: dict[str, int]) -> dict[str, list[Prompt]]:
  """Gives each prompt, in the seed's order, to one set at most, by the rule of this module."""
  ask_best = sum(asked[name] for name in BEST_SETS)
  least = guarantee(prompts, asked)
  rest = conversations(prompts)
  evaluated = reserve_rich(rest, spare(rest, ask_best), asked['ranked_eval'], least['ranked_eval'])
  rest = without(rest, evaluated)
  # Later turns of IFT conversations count towards ranked_train.
  later = sum(p.later for c in rest if c.best for p in c.ranked) * asked['ift'] // max(1, ask_best)
  trained = reserve(
      rest, spare(rest, ask_best), asked['ranked_train'], least['ranked_train'] - later)
  best = [c.best for c in without(rest, trained) if c.best][:ask_best]
  sets, start = {}, 0
  parts = apportion(len(best), [asked[name] for name in BEST_SETS])
  for name, size in zip(BEST_SETS, parts, strict=True):
    sets[name] = best[start:start + size]
    start += size
  used = set(best)
  for name, pool in (('ranked_eval', evaluated), ('ranked_train', rest)):
    barred = unseen(sets)
    fit = sorted(p for c in pool for p in c.ranked if p not in used and barred.isdisjoint(p.said))
    sets[name] = fit[:asked[name]]
  return {name: sets[name] for name in asked}


def conversations(prompts: list[Prompt]) -> list[Conversation]:
  """Groups prompts by the first message of their conversation, in their order."""
  groups = {}
  for p in prompts:
    groups.setdefault(p.said[0], []).append(p)
  return [Conversation(next((p for p in group if p.best), None), [p for p in group if p.ordered])
          for group in groups.values()]


def guarantee(prompts: list[Prompt], asked: dict[str, int]) -> dict[str, int]:
  """What the ranked sets get in any case: their share of first turns divided in proportion; but
  ranked_train nothing where first turns can fill the best sets and later turns are left for it."""
  ask_best, ask_several = (sum(asked[name] for name in names) for names in (BEST_SETS, RANKED_SETS))
  share = min(Fraction(have, max(1, ask)) for have, ask in (
      (sum(p.best for p in prompts), ask_best), (sum(p.ordered for p in prompts), ask_several),
      (sum(not p.later for p in prompts), ask_best + ask_several)))
  total = min(ask_several, int(share * ask_several))
  sizes = apportion(total, [asked[name] for name in RANKED_SETS])
  least = dict(zip(RANKED_SETS, sizes, strict=True))
  if sum(p.best for p in prompts) >= ask_best and any(p.later for p in prompts):
    least['ranked_train'] = 0
  return least


def spare(rest: list[Conversation], ask_best: int) -> int:
  """How many conversations with a best reply the best sets do not need."""
  return max(0, sum(c.best is not None for c in rest) - ask_best)


def reserve(rest: list[Conversation], limit: float, goal: int, least: int) -> list[Conversation]:
  """Takes conversations in their order until they hold `goal` ranked prompts.

  At most `limit` of them have a best reply; more only to reach `least` ranked prompts.
  """
  taken, total = [], 0
  for c in rest:
    if total < goal and c.ranked and (limit > 0 or not c.best):
      taken.append(c)
      total += len(c.ranked)
      limit -= c.best is not None
  if total < least:
    return reserve(sorted(rest, key=lambda c: c.best is not None), math.inf, least, 0)
  return taken


def reserve_rich(rest: list[Conversation], limit: int, goal: int, least: int) -> list[Conversation]:
  """`reserve`, but where `limit` conversations hold too few prompts, takes only longer ones.

  Tries conversations with at least 1, 2, .. ranked prompts, until the taken ones hold `goal`, and
  returns those that hold the most.
  """
  most = max((len(c.ranked) for c in rest), default=0)
  found = []
  for size in range(1, most + 1):
    longer = [c for c in rest if len(c.ranked) >= size or not c.best]
    found = max(found, reserve(longer, limit, goal, 0), key=held)
    if held(found) >= goal:
      break
  return found if held(found) >= least else reserve(rest, limit, goal, least)


def held(taken: list[Conversation]) -> int:
  """How many ranked prompts conversations hold."""
  return sum(len(c.ranked) for c in taken)


def without(rest: list[Conversation], taken: list[Conversation]) -> list[Conversation]:
  """The conversations that were not taken, in their order."""
  gone = {id(c) for c in taken}
  return [c for c in rest if id(c) not in gone]


def unseen(sets: dict[str, list[Prompt]]) -> set[str]:
  """First messages of the conversations that no other set may hold."""
  return {p.said[0] for name in (*BEST_SETS[1:], 'ranked_eval') for p in sets.get(name, ())}


def apportion(total: int, asked: list[int]) -> list[int]:
  """Divides at most sum(asked) things in the asked proportions, by the largest remainder.

  >>> apportion(22, [3200, 256, 253])
  [19, 2, 1]
  """
  whole = max(1, sum(asked))
  sizes = [total * ask // whole for ask in asked]
  by_remainder = sorted(range(len(asked)), key=lambda i: -(total * asked[i] % whole))
  for i in by_remainder[:total - sum(sizes)]:
    sizes[i] += 1
  return sizes


def count(prompts: list[Prompt], sets: dict[str, list[Prompt]], asked: dict[str, int], read, lost: dict) -> dict:
  """The record of counts.json, in which every prompt and reply is kept or dropped once; adds to `lost`."""
  replies = {name: sum(p.replies for p in members) for name, members in sets.items()}
  kept = {name: len(members) for name, members in sets.items()}
  used, barred = {p for members in sets.values() for p in members}, unseen(sets)
  unusable = sum(not barred.isdisjoint(p.said) for p in prompts if p not in used)
  lost['prompts']['of a held-out conversation'] = unusable
  lost['prompts']['more than asked for'] = len(prompts) - len(used) - unusable
  lost['replies']['prompt dropped'] += sum(p.replies for p in prompts) - sum(replies.values())
  lost['replies']['prompt held out'] = sum(replies[name] for name in BEST_SETS[1:])
  lost['replies']['not the best of its ift prompt'] = replies['ift'] - kept['ift']
  later = {name: sum(p.later for p in sets[name]) for name in RANKED_SETS}
  return {'read': read, 'asked': asked, 'kept': kept, 'kept_later': later,
          'kept_replies': {'ift': kept['ift']} | {name: replies[name] for name in RANKED_SETS},
          'dropped': {what: dict(sorted((+reasons).items())) for what, reasons in lost.items()}}


def files(turns: Turns, sets: dict[str, list[Prompt]], source: str) -> dict[str, Iterator[dict]]:
  """The records of each file, read from the turns one by one."""
  def rows(names):
    return ((turns[p.index], name.removesuffix('_prompts').removeprefix('ranked_'))
            for name in names for p in sets[name])
  return {
      'ift.jsonl': ({'id': turn['id'], 'prompt': turn['prompt'], 'response': best_first(turn)[0]['text'],
                     'source': source} for turn, _ in rows(BEST_SETS[:1])),
      'heldout.jsonl': ({'id': turn['id'], 'prompt': turn['prompt'], 'split': split}
                        for turn, split in rows(BEST_SETS[1:])),
      'ranked.jsonl': ({'id': turn['id'], 'prompt': turn['prompt'], 'split': split, 'replies': best_first(turn),
                        'source': source} for turn, split in rows(RANKED_SETS))}


def best_first(turn: dict) -> list[dict]:
  """The ranked replies of a turn, ranked anew without those that were dropped; equal ones stay in their order."""
  kept = sorted((reply for reply in turn['replies'] if not reply['dropped']), key=lambda reply: reply['rank'])
  ranks = ranked.competition([reply['rank'] for reply in kept])
  return [{'id': reply['id'], 'text': reply['text'], 'rank': rank} for reply, rank in zip(kept, ranks, strict=True)]


def normalise(text: str) -> str:
  """Makes equal what differs in case, white space and the width of characters alone."""
  return ' '.join(unicodedata.normalize('NFKC', text).casefold().split())


def _digest(text: str) -> str:
  return records.digest(normalise(text))


def table(source: str, counts: dict) -> str:
  """Lays counts.json out for reading."""
  read, kept, asked, later, replies = (
      counts[name] for name in ('read', 'kept', 'asked', 'kept_later', 'kept_replies'))
  columns = ('prompts', 'asked', 'missing', 'later', 'replies')
  lines = [f'{source}: {read["prompts"]} prompts with {read["replies"]} replies',
           f'  {"kept":32}' + ''.join(f'{column:>8}' for column in columns)]
  for name, size in kept.items():
    numbers = (size, asked[name], asked[name] - size, later.get(name, 0), replies.get(name, 0))
    lines += [f'  {name:32}' + ''.join(f'{number:8}' for number in numbers)]
  for what, reasons in counts['dropped'].items():
    lines += [f'  {"dropped " + what:32}{sum(reasons.values()):8}']
    lines += [f'    {reason:30}{number:8}' for reason, number in reasons.items()]
  lines += [f'  Short: {name} {size:,} of {asked[name]:,}'
            for name, size in kept.items() if size < asked[name]]
  return '\n'.join(lines)


def find_files(spec: str) -> tuple[str, ...]:
  """Resolves a path, a glob of file names, or several with commas between them."""
  paths = []
  for part in map(str.strip, spec.split(',')):
    path = epath.Path(part).expanduser()
    found = [path] if path.exists() else sorted(path.parent.glob(path.name))
    if not found or any(p.is_dir() for p in found):
      raise InputError(f'data.path: "{part}" is no file; give, say, 2023-04-12_oasst_ready.trees.jsonl.gz')
    paths += map(os.fspath, found)
  return tuple(dict.fromkeys(paths))


def _plain(value):
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_plain(v) for v in value]
  return value.decode() if isinstance(value, bytes) else np.asarray(value).item()


if __name__ == '__main__':
  cli.main(run)
