"""Seed data: prompts with ranked replies, divided into disjoint IFT, held-out and ranked sets.

Copies a source (`oasst`, `ranked`) to ArrayRecord and divides its prompts (`splits`). Then writes
ift.jsonl, heldout.jsonl and ranked.jsonl from the copy, so the texts are never all in memory.
counts.json has the numbers of prompts and replies that were kept, and those that were dropped by
reason.
"""
from collections import Counter
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import unicodedata

from absl import logging
from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from srlm_jax import catalog, cli, conversation, hosts, InputError, records, schema, stage, storage
from srlm_jax.data import oasst, ranked, splits
from srlm_jax.data.splits import SeedPrompt
from srlm_jax.data.turns import Message, Turn

SHARD = 1000  # turns per shard; TFDS holds a shard in memory while it writes it


def run(config, workdir):
  """The stage data/seeds: runs `make` once."""
  spec = catalog.find('data.seeds')
  config = spec.view(config)
  source_name(config.data.source)
  s = stage.Stage(spec, config, workdir, more_inputs=find_files(config.data.path))
  if s.done:
    return
  if not hosts.is_first_host():
    s.begin()
    return s.finish()
  s.finish(**make(config, workdir, s.begin)['kept'])


def make(config, workdir, begin=lambda: None) -> dict:
  """Writes ift.jsonl, heldout.jsonl, ranked.jsonl and counts.json into WORKDIR/data/seeds.

  Returns the counts. Calls `begin` after all checks and before it writes. Raises InputError if the
  source is not valid or has no usable prompt for IFT or for the ranked sets.
  """
  c, workdir = config.data, epath.Path(workdir)
  name = source_name(c.source)
  # ArrayRecord writes only to local disks.
  with storage.local_folder(workdir / 'data' / 'tfds') as data_dir:
    turns = Turns(Files(source=c.source, paths=find_files(c.path), synthetic=c.synthetic), data_dir)
    requested = {name: getattr(c, name) for name in splits.BEST_SETS + splits.RANKED_SETS}
    usable = select_usable(turns, config.seed)
    sets = splits.divide(usable.prompts, requested)
    counts = count(usable, sets, requested)
    print(table(name, counts))
    for names in (('ift',), splits.RANKED_SETS):
      if any(requested[name] for name in names) and not any(
          counts['kept'][name] for name in names):
        raise InputError(f'{c.path} yields no {" or ".join(names)}; '
                         f'see the reasons in the table above')
    begin()
    for file, rows in (files(turns, sets, name) | {'counts.json': [counts]}).items():
      records.write(workdir / 'data' / 'seeds' / file, rows)
  return counts


def source_name(source: str) -> str:
  """The `source` field of the records, for `config.data.source`."""
  if source == 'sandbox':
    raise InputError('config.data.source is sandbox; run python -m srlm_jax.sandbox instead')
  names = dict(oasst=oasst.NAME, ranked=ranked.NAME)
  if source not in names:
    raise InputError(f'config.data.source is {source!r}; choose oasst, ranked or sandbox')
  return names[source]


def find_files(spec: str) -> tuple[str, ...]:
  """Resolves comma-separated paths or globs. Raises InputError for one that matches no file."""
  paths = []
  for part in map(str.strip, spec.split(',')):
    path = epath.Path(part).expanduser()
    found = [path] if path.exists() else sorted(path.parent.glob(path.name))
    if not found or any(p.is_dir() for p in found):
      raise InputError(f'config.data.path: "{part}" is not a file; give a file such as '
                       f'2023-04-12_oasst_ready.trees.jsonl.gz')
    paths += map(os.fspath, found)
  return tuple(dict.fromkeys(paths))


@dataclasses.dataclass(eq=False)
class Files(tfds.core.BuilderConfig):
  """The files of a source. The name is a hash of their content, so changed files are read again."""
  name: str = dataclasses.field(init=False)
  source: str = ''
  paths: tuple[str, ...] = ()
  synthetic: bool = False

  def __post_init__(self):
    hashes = sorted(map(records.hash_file, self.paths))
    self.name = records.digest(self.source, str(self.synthetic), *hashes)

  def __str__(self):
    return f'{self.source} files {self.name}'  # for the log

  def turns(self) -> Iterator[Turn]:
    """Yields the turns of the source. Raises InputError for duplicate prompt or reply ids."""
    rows = itertools.chain.from_iterable(map(records.read_any, self.paths))
    found = oasst.turns(rows, self.synthetic) if self.source == 'oasst' else ranked.turns(rows)
    seen = set()  # 64-bit hashes take less memory than ids; 10^6 ids collide with p = 3e-8
    for where, turn in found:
      if hash(turn.id) in seen:
        raise InputError(f'{where}: prompt {turn.id} is a duplicate; give each conversation once')
      if len({reply.id for reply in turn.replies}) < len(turn.replies):
        raise InputError(f'{where}: prompt {turn.id} has a duplicate reply; '
                         f'give each conversation once')
      seen.add(hash(turn.id))
      yield turn
    if not seen:
      raise InputError(f'{", ".join(self.paths)}: no conversation found; give a file with at least '
                       f'one')


class SeedTurns(tfds.core.ShardBasedBuilder, skip_registration=True):  # not loadable by name
  """The turns in the order of the files. TFDS's builder that shuffles takes 1 GB of memory."""
  VERSION = tfds.core.Version('3.0.0')  # increase it when a reader yields or drops other turns
  url_infos = {}  # nothing to download; TFDS 4.9.10 otherwise imports an optional package

  def _info(self):
    text = tfds.features.Text()
    reply = {'id': text, 'text': text, 'rank': np.int64, 'dropped': text}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
        {'id': text, 'turn': np.int64, 'prompt': text, 'dropped': text,
         'replies': tfds.features.Sequence(reply),
         'messages': tfds.features.Sequence({'role': text, 'content': text})}))

  def _shard_iterators_per_split(self, dl_manager):
    size = sum(1 for _ in self.builder_config.turns())  # reads and checks all before it writes
    turns = enumerate(map(dataclasses.asdict, self.builder_config.turns()))
    return {'train': [functools.partial(itertools.islice, turns, SHARD)] * -(-size // SHARD)}


class Turns:
  """The turns of files by index, read one by one from an ArrayRecord copy made on first use."""

  def __init__(self, files: Files, data_dir):
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)  # TFDS warns that it does not know the configuration
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download; there is none
      builder = SeedTurns(config=files, data_dir=data_dir, file_format='array_record')
      builder.download_and_prepare()
    self._source = builder.as_data_source('train')

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index: int) -> Turn:
    fields = _plain(self._source[index])
    replies = [Message(**row) for row in _rows(fields.pop('replies'))]
    messages = tuple(conversation.Message(**row) for row in _rows(fields.pop('messages')))
    return Turn(**fields, replies=replies, messages=messages)


@dataclasses.dataclass
class Usable:
  """The usable prompts of a source, the numbers read, and the numbers dropped by reason."""
  prompts: list[SeedPrompt]  # sorted
  read: Counter
  dropped_prompts: Counter
  dropped_replies: Counter


def select_usable(turns: Turns, seed: int) -> Usable:
  """Selects the turns that can be in a set. Keeps one of several turns with the same prompt."""
  read, prompts, replies, kept = Counter(), Counter(), Counter(), []
  for i in range(len(turns)):
    turn = turns[i]
    read.update(prompts=1, replies=len(turn.replies))
    if reason := _flaw(turn):
      prompts[reason] += 1
      replies['prompt dropped'] += len(turn.replies)
    else:
      replies.update(reply.dropped for reply in turn.replies if reply.dropped)
      kept.append(_prompt(turn, i, seed))
  first = {}
  for p in sorted(kept):  # independent of the order of the files
    if first.setdefault(p.text, p) is not p:
      prompts['duplicate prompt'] += 1
      replies['prompt dropped'] += p.replies
  return Usable(list(first.values()), read, prompts, replies)


def count(usable: Usable, sets: dict[str, list[SeedPrompt]], requested: dict[str, int]) -> dict:
  """The record of counts.json. Every prompt and reply is counted once, as kept or dropped."""
  replies = {name: sum(p.replies for p in members) for name, members in sets.items()}
  kept = {name: len(members) for name, members in sets.items()}
  used = {p for members in sets.values() for p in members}
  held_out = splits.held_out_messages(sets)
  unused = [p for p in usable.prompts if p not in used]
  blocked = sum(not held_out.isdisjoint(p.messages) for p in unused)
  prompts_lost = usable.dropped_prompts + Counter({
      'in a held-out conversation': blocked, 'more than requested': len(unused) - blocked})
  replies_lost = usable.dropped_replies + Counter({
      'prompt dropped': sum(p.replies for p in unused),
      'prompt held out': sum(replies[name] for name in splits.HELD_OUT_SETS),
      'not the best reply for ift': replies['ift'] - kept['ift']})
  ranked_replies = {name: replies[name] for name in splits.RANKED_SETS}
  return {'read': usable.read, 'asked': requested, 'kept': kept,
          'kept_later': {name: sum(p.later for p in sets[name]) for name in splits.RANKED_SETS},
          'kept_replies': {'ift': kept['ift']} | ranked_replies,
          'dropped': {'prompts': dict(sorted(prompts_lost.items())),
                      'replies': dict(sorted(replies_lost.items()))}}


def files(turns: Turns, sets: dict[str, list[SeedPrompt]], source: str) -> dict[str, Iterator]:
  """{file name: its records}; reads the turns one by one."""
  def rows(names):
    for name in names:
      split = name.removesuffix('_prompts').removeprefix('ranked_')
      for p in sets[name]:
        yield turns[p.index], split

  return {
      'ift.jsonl': (
          schema.Demonstration(id=turn.id, prompt=turn.prompt, response=best_first(turn)[0].text,
                               source=source, messages=turn.messages)
          for turn, _ in rows(['ift'])),
      'heldout.jsonl': (
          schema.HeldOutPrompt(id=turn.id, prompt=turn.prompt, split=split,
                               messages=turn.messages)
          for turn, split in rows(splits.HELD_OUT_SETS)),
      'ranked.jsonl': (
          schema.RankedPrompt(id=turn.id, prompt=turn.prompt, split=split,
                              replies=best_first(turn), source=source,
                              messages=turn.messages)
          for turn, split in rows(splits.RANKED_SETS))}


def best_first(turn: Turn) -> tuple[schema.Reply, ...]:
  """The replies that are not dropped, sorted by rank and ranked again; ties keep their order."""
  kept = sorted((reply for reply in turn.replies if not reply.dropped), key=lambda r: r.rank)
  ranks = ranked.competition([reply.rank for reply in kept])
  return tuple(schema.Reply(id=reply.id, text=reply.text, rank=rank)
               for reply, rank in zip(kept, ranks, strict=True))


def normalize(text: str) -> str:
  """Removes differences of case, white space and character width."""
  return ' '.join(unicodedata.normalize('NFKC', text).casefold().split())


def table(source: str, counts: dict) -> str:
  """The counts as a text table."""
  read, kept, requested, later, replies = (
      counts[name] for name in ('read', 'kept', 'asked', 'kept_later', 'kept_replies'))
  columns = ('prompts', 'asked', 'missing', 'later', 'replies')
  lines = [f'{source}: {read["prompts"]} prompts with {read["replies"]} replies',
           f'  {"kept":32}' + ''.join(f'{column:>8}' for column in columns)]
  for name, size in kept.items():
    numbers = (size, requested[name], requested[name] - size, later.get(name, 0),
               replies.get(name, 0))
    lines += [f'  {name:32}' + ''.join(f'{number:8}' for number in numbers)]
  for what, reasons in counts['dropped'].items():
    lines += [f'  {"dropped " + what:32}{sum(reasons.values()):8}']
    lines += [f'    {reason:30}{number:8}' for reason, number in reasons.items()]
  lines += [f'  Short: {name} {size:,} of {requested[name]:,}'
            for name, size in kept.items() if size < requested[name]]
  return '\n'.join(lines)


def _flaw(turn: Turn) -> str:
  """The reason why a turn cannot be in any set, or ''."""
  if turn.dropped:
    return turn.dropped
  ranks = _ranks(turn)
  if turn.turn > 0:
    return '' if len(set(ranks)) > 1 else 'later turn without a ranking'
  return '' if 0 in ranks or len(ranks) > 1 else 'no best reply and no ranking'


def _prompt(turn: Turn, index: int, seed: int) -> SeedPrompt:
  ranks, later = _ranks(turn), turn.turn > 0
  said = [m.content for m in turn.messages if m.role == 'user'] or [turn.prompt]
  messages = [conversation.quoted(text).strip() for text in said]
  return SeedPrompt(
      later=later, order=records.digest(str(seed), turn.id), id=turn.id, index=index,
      text=_digest(turn.prompt), messages=tuple(map(_digest, messages)), replies=len(ranks),
      best=not later and 0 in ranks, ordered=len(set(ranks)) > 1)


def _ranks(turn: Turn) -> list[int]:
  return [reply.rank for reply in turn.replies if not reply.dropped]


def _digest(text: str) -> str:
  return records.digest(normalize(text))


def _rows(columns: dict[str, list]) -> list[dict]:
  """A sequence of dictionaries, which TFDS stores field by field."""
  return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _plain(value):
  """Converts the NumPy values and bytes of TFDS to Python values."""
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_plain(v) for v in value]
  return value.decode() if isinstance(value, bytes) else np.asarray(value).item()


if __name__ == '__main__':
  cli.main(run)
