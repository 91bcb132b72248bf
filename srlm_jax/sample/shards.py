"""What the sampling stages share: load the model, sample requests, write records, one shard per host."""
from collections.abc import Callable, Iterable, Iterator

import jax

from srlm_jax import hosts, records, stage
from srlm_jax.data import tokenizer as tokenizers
from srlm_jax.sample import engine as engines


def write(s: stage.Stage, config, stem: str, sampling: engines.Sampling, items: Iterable[dict],
          count: int, prompt: Callable[[dict, tokenizers.Tokenizer], list[int]],
          record: Callable[[dict, int, str, engines.Result], dict], n: int = 1,
          check: Callable[[engines.Engine, tokenizers.Tokenizer], None] | None = None,
          ) -> Iterator[dict]:
  """Begins the stage, samples `n` texts for each of this host's items, and writes them.

  `items`, `count` of them, have an `id`; `prompt` gives the ids of one's prompt, `record` the record
  of its i-th sample: (item, i, text, result). `check` may raise InputError, before anything is
  written. Returns the records of all hosts, in the order of the items; a killed run is resumed.
  """
  engine, tokenizer = engines.load(config, s.models[0], s.title)
  engine.room(sampling)  # raises InputError if the context is too short
  if check:
    check(engine, tokenizer)
  s.begin(engines.host_mesh(config))
  requests = (engines.Request(item['id'], prompt(item, tokenizer), n, item) for item in items)

  def line(request, i, result):
    return record(request.about, i, tokenizer.decode(result.ids).strip(), result)
  path = s.folder / records.shard_name(stem, jax.process_index(), jax.process_count())
  engines.run(engine, requests, n * count, sampling, path, line)
  hosts.sync(f'{s.title} sampled')  # so that all shards are there to read
  return records.read_shards(s.folder, stem)
