"""The common part of the sampling stages: loads the model, samples, and writes a shard per host."""
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import itertools
from typing import TypeVar

import jax

from srlm_jax import catalog, hosts, preemption, records, stage
from srlm_jax.data import tokenizer as tokenizers
from srlm_jax.sample import engine as engines

Item = TypeVar('Item')


def write(s: stage.Stage, stem: str, sampling: engines.Sampling, items: Iterable[Item],
          count: int, prompt: Callable[[Item, tokenizers.Tokenizer], list[int]],
          record: Callable[[Item, int, str, engines.Result], records.Record], n: int = 1,
          check: Callable[[engines.Engine, tokenizers.Tokenizer], None] | None = None,
          ) -> Iterator[records.Record]:
  """Begins the stage, samples n texts for each of this host's items and writes their records.

  stem: records go to STEM-*.jsonl
  items: objects with an id, one per prompt; `count` of them
  prompt: (item, tokenizer) -> token ids of the prompt
  record: (item, index of the sample, text, result) -> record
  check: (engine, tokenizer); may raise InputError before anything is written

  Yields the records of all hosts in the order of the items. Resumes a killed run.
  """
  config = engines.choose(s.config, s.models)
  engine, tokenizer = engines.load(config, s.models[0], s.title)
  engine.max_prompt_tokens(sampling)  # raises InputError if the context is too short
  if check:
    check(engine, tokenizer)
  requests = (engines.Request(item.id, prompt(item, tokenizer), n, item) for item in items)
  first = list(itertools.islice(requests, 1))  # may be refused, for its chat format
  s.begin(config)

  def sample_record(request, i, result):
    return record(request.data, i, tokenizer.decode(result.ids).strip(), result)
  path = s.folder / records.shard_name(stem, jax.process_index(), jax.process_count())
  with continued(s, [stem], jax.process_count()):
    engines.run(engine, itertools.chain(first, requests), n * count, sampling, path, sample_record,
                records.kept(s.folder, stem))
  return records.read_shards(s.folder, stem, catalog.KINDS[stem + catalog.SHARDS])


@contextlib.contextmanager
def continued(s: stage.Stage, stems: Sequence[str], count: int):
  """A block in which every host completes its shards, from what a killed run left.

  `count`: the number of shards of each of the `stems`. All hosts must call it, and leave it
  together, because every shard must be complete before any host reads them.
  """
  if hosts.is_first_host():
    for stem in stems:
      records.keep_shards(s.folder, stem, count)
  hosts.sync(f'{s.title} continues')
  with preemption.together(s.title):
    yield
  if hosts.is_first_host():
    for stem in stems:
      records.drop_kept(s.folder, stem)
