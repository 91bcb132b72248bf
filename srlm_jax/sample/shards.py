"""The common part of the sampling stages: loads the model, samples, writes a shard per group."""
from collections.abc import Callable, Iterable, Iterator
import contextlib
import itertools
import sys
from typing import TypeVar

import jax
import tqdm

from srlm_jax import catalog, hosts, InputError, preemption, records, stage
from srlm_jax.data import thinking, tokenizer as tokenizers
from srlm_jax.sample import engine as engines, monitor

Item = TypeVar('Item')


class Shard:
  """A file that grows record by record: the records of one group of hosts, whose first host writes.

  count: the records that are in it; equal on all hosts of the group
  kept: {request: records} that runs on another number of hosts left; they need no sampling
  """

  def __init__(self, folder, stem: str, group: hosts.Group, kind: type | None = None,
               work: engines.Work | None = None):
    """Opens FOLDER/STEM-*.jsonl, which a killed run may have left; all hosts must call it.

    With `kind`, that of the records, TensorBoard shows them; `work`: of the engine that samples.
    """
    if hosts.is_first_host():
      records.keep_shards(folder, stem, group.count)
    hosts.sync(f'{folder} {stem} continues')
    self.kept = records.Kept(folder, stem)
    self.path = folder / records.shard_name(stem, group.index, group.count)
    self._file = records.Appender(self.path) if group.is_first_host else None
    self.count = group.gather(self._file.count if self._file else 0)[group.index]
    self._monitor = None
    if self._file and kind:
      name = self.path.stem.removesuffix('-00000-of-00001')
      self._monitor = monitor.Monitor(folder, name, kind, self.count, work)
      self._monitor.add(records.read(self.path, kind))

  def append(self, new: list):
    """Appends records."""
    self.count += len(new)
    if self._file:
      self._file.append(new)
    if self._monitor:
      self._monitor.add(new)

  def close(self):
    """Closes the file."""
    if self._file:
      self._file.close()
    if self._monitor:
      self._monitor.close()


@contextlib.contextmanager
def completed(s: stage.Stage, stem: str, group: hosts.Group,
              work: engines.Work | None = None) -> Iterator[Shard]:
  """A block in which every group of hosts completes its shard; all hosts must call it.

  All leave it together, because every shard must be complete before any host reads them. `work`: as
  in `Shard`, of this block alone; done.json then has the tokens that were generated.
  """
  shard = Shard(s.folder, stem, group, catalog.KINDS[stem + catalog.SHARDS], work)
  with preemption.together(s.title):
    yield shard
    shard.close()
  if work:
    s.add(generated=sum(group.gather(work.generated)))
  if hosts.is_first_host():
    records.drop_kept(s.folder, stem)


def write(s: stage.Stage, stem: str, sampling: engines.Sampling, items: Iterable[Item],
          count: int, prompt: Callable[[Item, tokenizers.Tokenizer], list[int]],
          record: Callable[[Item, int, thinking.Said, engines.Result], records.Record], n: int = 1,
          check: Callable[[engines.Engine, tokenizers.Tokenizer], None] | None = None,
          own: Callable[[Item], engines.Sampling] | None = None) -> Iterator[records.Record]:
  """Begins the stage, samples n texts for each item and writes their records.

  stem: records go to STEM-*.jsonl
  items: objects with an id, one per prompt; `count` of them. The groups of hosts divide them.
  prompt: (item, tokenizer) -> token ids of the prompt
  record: (item, index of the sample, what it says, result) -> record
  check: (engine, tokenizer); may raise InputError before anything is written
  own: item -> how it is sampled, if that differs between items; max_tokens as in `sampling`

  Yields the records of all groups in the order of the items. Resumes a killed run.
  """
  config = engines.choose(s.config, s.models)
  engine, tokenizer = engines.load(config, s.models[0], s.title, config.chat)
  engine.max_prompt_tokens(sampling)  # raises InputError if the context is too short
  if check:
    check(engine, tokenizer)
  group = engines.group(config)
  share = group.share(count)
  requests = (engines.Request(item.id, prompt(item, tokenizer), n, item,
                              sampling=own(item) if own else None)
              for item in itertools.islice(items, *share))
  first = list(itertools.islice(requests, 1))  # may be refused, for its chat format
  s.begin(config)

  def sample_record(request, i, result):
    return record(request.data, i, thinking.read(tokenizer, request.ids, result.ids), result)
  with completed(s, stem, group, engine.work) as out:
    run(engine, itertools.chain(first, requests), n * len(range(*share)), sampling, out,
        sample_record)
  return records.read_shards(s.folder, stem, catalog.KINDS[stem + catalog.SHARDS])


def run(engine: engines.Engine, requests: Iterable[engines.Request], samples: int,
        sampling: engines.Sampling, out: Shard, record: Callable):
  """Appends `record(request, i, result)` of every sample to a shard, in order.

  Leaves out the samples that the shard has or keeps. `samples`: their total number.
  """
  known, row = out.count, 0
  progress = tqdm.tqdm(
      total=samples, initial=known, desc=engine.title, unit='rows', delay=2, leave=False,
      mininterval=2 if sys.stderr.isatty() else 30, disable=jax.process_index() != 0)
  for request, results in engine.generate(requests, sampling, known, out.kept):
    made = ([record(request, i, result) for i, result in enumerate(results)] if results else
            out.kept.get(request.id, ()))
    new = made[max(known - row, 0):]
    out.append(new)
    progress.update(len(new))
    row += request.n
  progress.close()
  if out.count != samples:
    raise InputError(f'{out.path} has {out.count} records, but its hosts write {samples}; delete '
                     f'{out.path.parent} and run its stage again')
  work = engine.work
  if work.generated:
    hosts.log(f'{engine.title}: {work.generated} generated tokens, slot utilization '
              f'{work.slot_utilization:.0%}; {work.prefilled} prefilled tokens, '
              f'{work.prefilled / work.unshared_prompt_tokens:.0%} of the tokens without sharing; '
              f'kernels: {engine.kernels}')
