"""Seed data: prompts with ranked replies, divided into IFT, held-out and ranked prompts that share none.

Copies a source (`oasst`, `ranked`) into ArrayRecord, decides by what a prompt has to offer, and then writes ift.jsonl,
heldout.jsonl and ranked.jsonl from the copy, so that memory holds no texts; counts.json says why the rest was left out.
"""
from collections import Counter
from collections.abc import Iterator
import contextlib
import dataclasses
from fractions import Fraction
import functools
import io
import itertools
import os
from typing import NamedTuple
import unicodedata

from absl import logging
from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from srlm_jax import InputError
from srlm_jax.data import oasst, ranked, records

# The sets that share the prompts, by the name of their asked size in config.data.
BEST_SETS = ('ift', 'test_prompts', 'valid_prompts')  # need the best reply
RANKED_SETS = ('ranked_train', 'ranked_eval')  # need two replies of different rank
SHARD = 1000  # turns, for TFDS holds a shard in memory while it writes it


def run(config, workdir):
  """The stage data/seeds: `make`, once."""
  from srlm_jax import stage  # here, for stage knows JAX and data does not
  find_source(config.data.source)
  s = stage.Stage(config, workdir, 'seeds', ('data',), find_files(config.data.path), model='data')
  if s.done:
    return
  if not stage.is_first_host():
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
  asked = {name: c[name] for name in BEST_SETS + RANKED_SETS}
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
    from srlm_jax import stage  # here, for stage knows JAX and data does not
    self.name = records.digest(self.source, str(self.synthetic), *sorted(map(stage.hash_file, self.paths)))

  def __str__(self):
    return f'{self.source} files {self.name}'  # for the log

  def turns(self) -> Iterator[dict]:
    """Yields the turns of the source, checked to hold no prompt and no reply to it twice."""
    rows = itertools.chain.from_iterable(map(records.numbered, self.paths))
    seen = set()
    for where, turn in oasst.turns(rows, self.synthetic) if self.source == 'oasst' else ranked.turns(rows):
      name, replies = turn['id'], {reply['id'] for reply in turn['replies']}
      if name in seen:
        raise InputError(f'{where}: prompt {name} was read before; give each conversation once')
      if len(replies) < len(turn['replies']):
        raise InputError(f'{where}: prompt {name}: a reply to it was read twice; give each conversation once')
      seen.add(name)
      yield turn
    if not seen:
      raise InputError(f'{", ".join(self.paths)}: no conversation in there; give a file that holds some')


class SeedTurns(tfds.core.ShardBasedBuilder, skip_registration=True):  # no name loads files that are given
  """Prompts and the replies to each, in the order of the files: the shuffling builder holds 1 GB in memory."""
  VERSION = tfds.core.Version('1.0.0')  # another, when a reader drops other things
  url_infos = {}  # nothing to download; TFDS 4.9.10 looks for a list with a package that it does not require

  def _info(self):
    text = tfds.features.Text()
    reply = {'id': text, 'text': text, 'rank': np.int64, 'dropped': text}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
        {'id': text, 'prompt': text, 'dropped': text, 'replies': tfds.features.Sequence(reply)}))

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
  """What dividing needs to know of a turn."""
  order: str  # the seed's
  id: str
  index: int  # among the turns
  text: str  # digest of the normalised prompt
  replies: int  # ranked
  best: bool  # has the best reply
  ordered: bool  # has two of different rank


def sift(turns: Turns, seed: int) -> tuple[list[Prompt], Counter, dict]:
  """Returns the prompts that can serve, in the seed's order; how much was read; what was dropped, by reason."""
  read, prompts, replies, kept = Counter(), Counter(), Counter(), []
  for i in range(len(turns)):
    turn = turns[i]
    read.update(prompts=1, replies=len(turn['replies']))
    ranks = [reply['rank'] for reply in turn['replies'] if not reply['dropped']]
    reason = turn['dropped'] or ('no best reply, nor two ranked' if 0 not in ranks and len(ranks) < 2 else '')
    if reason:
      prompts[reason] += 1
      replies['prompt dropped'] += len(turn['replies'])
    else:
      replies.update(reply['dropped'] for reply in turn['replies'] if reply['dropped'])
      kept.append(Prompt(records.digest(str(seed), turn['id']), turn['id'], i,
                         records.digest(normalise(turn['prompt'])), len(ranks), 0 in ranks, len(set(ranks)) > 1))
  first = {}
  for p in sorted(kept):  # by order and id, whatever the order of the files
    if first.setdefault(p.text, p) is not p:
      prompts['same text as another'] += 1
      replies['prompt dropped'] += p.replies
  return list(first.values()), read, {'prompts': prompts, 'replies': replies}


def divide(prompts: list[Prompt], asked: dict[str, int]) -> dict[str, list[Prompt]]:
  """Gives each prompt to one set at most; too few prompts are divided in the asked proportions."""
  best = [p for p in prompts if p.best]
  several = [p for p in prompts if p.ordered]
  ask_best, ask_several = (sum(asked[name] for name in names) for names in (BEST_SETS, RANKED_SETS))
  share = min(Fraction(have, max(1, ask)) for have, ask in (
      (len(best), ask_best), (len(several), ask_several), (len(prompts), ask_best + ask_several)))
  take_several = min(ask_several, int(share * ask_several))
  take_best = min(ask_best, len(best), len(prompts) - take_several)
  take_several = min(ask_several, len(several), len(prompts) - take_best)  # what the best sets cannot use
  # Prompts without a best reply go first: they can serve in no other set.
  taken = {p.id for p in sorted(several, key=lambda p: p.best)[:take_several]}
  sets = {}
  for names, members in ((BEST_SETS, [p for p in best if p.id not in taken][:take_best]),
                         (RANKED_SETS, [p for p in several if p.id in taken])):
    start = 0
    for name, size in zip(names, apportion(len(members), [asked[name] for name in names]), strict=True):
      sets[name] = members[start:start + size]
      start += size
  return sets


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
  lost['prompts']['more than asked for'] = len(prompts) - sum(kept.values())
  lost['replies']['prompt dropped'] += sum(p.replies for p in prompts) - sum(replies.values())
  lost['replies']['prompt held out'] = sum(replies[name] for name in BEST_SETS[1:])
  lost['replies']['not the best of its ift prompt'] = replies['ift'] - kept['ift']
  return {'read': read, 'asked': asked, 'kept': kept,
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


def table(source: str, counts: dict) -> str:
  """Lays counts.json out for reading."""
  read, kept, asked, replies = (counts[name] for name in ('read', 'kept', 'asked', 'kept_replies'))
  lines = [f'{source}: {read["prompts"]} prompts with {read["replies"]} first replies',
           f'  {"kept":32}{"prompts":>8}{"asked":>8}{"replies":>8}']
  lines += [f'  {name:32}{kept[name]:8}{asked[name]:8}{replies.get(name, 0):8}' for name in kept]
  for what, reasons in counts['dropped'].items():
    lines += [f'  {"dropped " + what:32}{sum(reasons.values()):8}']
    lines += [f'    {reason:30}{number:8}' for reason, number in reasons.items()]
  if kept != asked:
    lines += [f'  Fewer than asked, {sum(kept.values())} of {sum(asked.values())}: divided in proportion.']
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
  from srlm_jax import stage
  stage.main(run)
