"""Log-probs of DPO's reference, computed once: MODEL/reference/logps.jsonl, one line per pair."""
import hashlib

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import tqdm

from srlm_jax import (
  catalog,
  hosts,
  InputError,
  metrics,
  preemption,
  records,
  schema,
  sharding,
  stage,
)
from srlm_jax.checkpoint import store
from srlm_jax.data.packing import Packing
from srlm_jax.train import batch as batches, step as train_step

FILE = 'logps.jsonl'


def cached(config, workdir, source, model, packed: Packing, mesh) -> dict[str, list[float]]:
  """-> {id of a pair: log-probs [chosen, rejected]} under the parameters in `source`.

  A mesh must be set. Reads a finished file, and resumes one that an interrupted run left. The
  stage's manifest holds hashes of parameters, pairs, tokens and chat template; InputError for a
  folder made with others.
  """
  tokens = hashlib.sha256()
  for i, example in enumerate(packed.all):
    tokens.update(f'{chr(10) if i else ""}{example!r}'.encode())
  s = stage.Stage(catalog.find('train', 'reference'), config, workdir,
                  f'{config.chat} {tokens.hexdigest()}')
  path = s.folder / FILE
  if not s.done:
    c = config.train
    params, _ = store.restore_params(source, mesh, c.dtype, merge=not c.lora_rank)
    s.begin(config)  # after all that can be refused
    with preemption.deferred():
      _compute(s, path, params, model, packed, mesh)
    s.finish(pairs=len(packed.all))
  found = {r.id: [r.chosen_logp, r.rejected_logp] for r in records.read(path, schema.PairLogps)}
  if found.keys() != {e.id for e in packed.all}:
    raise InputError(f'{path} does not hold every pair exactly once; delete {s.folder}')
  return found


def _compute(s, path, params, model, packed: Packing, mesh):
  """Appends a line for every pair that has none."""
  def logps(params, batch):
    return train_step.pair_logps(train_step.token_logps(model, params, batch, key=None), batch)
  run = jax.jit(logps, out_shardings=NamedSharding(mesh, P()))
  out = records.Appender(path) if hosts.is_first_host() else None
  hosts.sync(f'{s.title} was opened')
  have = {r.id for r in records.read(path, schema.PairLogps)}
  hosts.sync(f'{s.title} was read')  # before the first host appends a line
  agreement = preemption.Agreement()
  for step in tqdm.trange(len(packed), desc=s.title, unit='step', delay=2, leave=False):
    if agreement.reached():
      raise preemption.after_records(s.title)
    rows = packed.rows(step)
    if {e.id for row in rows for e in row} <= have:
      continue
    batch = batches.pack_pairs(rows, packed.shape)
    found = np.asarray(run(params, sharding.put_batch(batch, mesh)))  # [B, M, 2]
    lines = [schema.PairLogps(id=e.id, chosen_logp=float(pair[0]), rejected_logp=float(pair[1]))
             for row, pairs in zip(rows, found, strict=True)
             for e, pair in zip(row, pairs, strict=False)]  # the rest of a row is padding
    metrics.finite(s.title, {f'the log-prob of {side} of pair {r.id}': getattr(r, f'{side}_logp')
                             for r in lines for side in ('chosen', 'rejected')})
    if out:
      out.append(r for r in lines if r.id not in have)
  if out:
    out.close()
