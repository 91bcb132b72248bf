"""Implicit rewards of candidates: log p under the sampler minus log p under the older model.

DPO's reward is beta times this difference, up to a constant per prompt (Rafailov et al. 2023,
eq. 5). beta is omitted because it scales all candidates alike.
"""
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
import itertools

import tqdm

from srlm_jax import catalog, cli, conversation, hosts, records, schema, stage
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.sample import engine as engines, shards

ROWS = 64  # responses whose log-probs are computed, and written, together


def run(config, workdir):
  """Writes MODEL/implicit/rewards-*.jsonl with reward = logp - older_logp.

  Reads MODEL/respond. Both log-probabilities are sums over the tokens of a response, including the
  eos token of a finished one. All three are null if the candidate could not be encoded.
  """
  spec = catalog.find('sample.implicit')
  config = spec.view(config)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  config = engines.choose(s.config, s.models)
  group = engines.group(config)
  total = sum(1 for _ in s.read('respond/responses-*.jsonl'))
  count = len(range(*group.share(total)))

  def responses(start: int = 0) -> Iterator[schema.Response]:
    """Those of this group of hosts, from number `start` on."""
    mine = itertools.islice(s.read('respond/responses-*.jsonl'), *group.share(total))
    return itertools.islice(mine, start, None)
  for folder in s.models:
    engines.refuse_too_large(config, folder)
    templates.encode_prompt(config.chat, 'a', tokenizers.load(folder))  # may be refused
  s.begin(config)
  paths = [_logps(s, config, folder, responses, count, name)
           for name, folder in zip(('logp', 'older_logp'), s.models, strict=True)]
  with shards.completed(s, 'rewards', group) as out:
    logps, older_logps = (records.read(path, schema.Logp) for path in paths)
    rows = zip(responses(), logps, older_logps, strict=True)
    rewards = (_reward(r.id, logp.logp, older.logp) for r, logp, older in rows)
    for batch in _batches(itertools.islice(rewards, out.count, None)):
      out.append(batch)
  made = records.read_shards(s.folder, 'rewards', schema.ImplicitReward)
  missing = Counter(r.reward is None for r in made)
  s.finish(responses=missing.total(), without_reward=missing[True])


def _batches(rows: Iterable) -> Iterator[list]:
  """Lists of ROWS rows; the last one may be shorter."""
  rows = iter(rows)
  while batch := list(itertools.islice(rows, ROWS)):
    yield batch


def _reward(name: str, logp: float | None, older_logp: float | None) -> schema.ImplicitReward:
  is_missing = logp is None or older_logp is None
  reward = None if is_missing else round(logp - older_logp, 4)
  return schema.ImplicitReward(id=name, reward=reward, logp=logp, older_logp=older_logp)


def _logps(s: stage.Stage, config, folder, responses: Callable[[int], Iterator[schema.Response]],
           count: int, stem: str):
  """Computes the summed log-probability of each response under the model in `folder`.

  responses: number -> the responses of this group of hosts from that one on; it has `count`.
  Appends to the shard STEM-*.jsonl of the group, and resumes what a killed run wrote there. Returns
  its path.
  """
  title = f'{s.title} {stem}'
  engine, tokenizer = engines.load(config, folder, title)
  # Batches start at the same places as in an uninterrupted run, so that the results are the same.
  with shards.completed(s, stem, engines.group(config), engine.work) as out:
    start = out.count // ROWS * ROWS
    for batch in tqdm.tqdm(_batches(responses(start)), desc=title, unit='batch', delay=2,
                           total=-(-(count - start) // ROWS), leave=False,
                           disable=not hosts.is_first_host()):
      engine.stop_if_requested()
      kept = [out.kept.get(r.id) for r in batch]
      rows = [None if known else _encode(config.chat, r, tokenizer, engine.context)
              for r, known in zip(batch, kept, strict=True)]
      scored = [row for row in rows if row]
      values = (score.logp for score in engine.score(scored, share=False))
      engine.work.scored += sum(len(before) + len(after) for before, after in scored)
      new = [known[0] if known else
             schema.Logp(id=r.id, logp=round(next(values), 4) if row else None)
             for r, known, row in zip(batch, kept, rows, strict=True)]
      out.append(new[max(out.count - start, 0):])
      start += len(batch)
  return out.path


def _encode(
    chat, response: schema.Response, tokenizer, context: int) -> tuple[list[int], list[int]] | None:
  """-> (prompt ids, response ids), or None if the response is empty or too long.

  Also None if the tokenizer merges a piece of the response with its prompt.
  """
  pair = templates.encode_response(chat, conversation.of(response), response.response,
                                   response.finish, response.token_ids, tokenizer)
  return None if isinstance(pair, str) or sum(map(len, pair)) > context else pair


if __name__ == '__main__':
  cli.main(run)
