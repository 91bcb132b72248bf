"""DPO's reference log-probs, computed once and kept: MODEL/reference/logps.jsonl, a line a pair."""
import hashlib

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import tqdm

from srlm_jax import catalog, hosts, InputError, metrics, records, sharding, stage
from srlm_jax.checkpoint import store
from srlm_jax.data.packing import Batches
from srlm_jax.train import step as train_step

FILE = 'logps.jsonl'


def cached(config, workdir, files, source, model, batches: Batches, mesh) -> dict[str, list[float]]:
  """{id of a pair: [log p of chosen, of rejected]} under the parameters in `source`; a mesh must be set.

  What is there already is read, and what a kill left half-written is gone on with. The stage's manifest holds the
  hashes of parameters, pairs, tokens and chat template: a folder made with others is an InputError.
  """
  tokens = hashlib.sha256('\n'.join(map(repr, batches.examples)).encode()).hexdigest()
  s = stage.Stage(catalog.find('train', 'reference'), config, workdir, f'{config.chat} {tokens}',
                  files)
  path = s.folder / FILE
  if not s.done:
    s.begin(mesh)
    _compute(s, path, store.restore_params(source, mesh, config.train.dtype)[0], model, batches, mesh)
    s.finish(pairs=len(batches.examples))
  found = {r['id']: [r['chosen'], r['rejected']] for r in records.read(path, 'id')}
  if found.keys() != {e.id for e in batches.examples}:
    raise InputError(f'{path} does not hold every pair once; delete {s.folder}')
  return found


def _compute(s, path, params, model, batches: Batches, mesh):
  """Appends a line for every pair that has none."""
  run = jax.jit(lambda params, batch: train_step.response_logps(train_step.logps(model, params, batch), batch),
                out_shardings=NamedSharding(mesh, P()))
  out = records.Appender(path) if hosts.is_first_host() else None
  hosts.sync(f'{s.title} was opened')
  have = {r['id'] for r in records.read(path, 'id')}
  hosts.sync(f'{s.title} was read')  # before a line is added
  for step in tqdm.trange(len(batches), desc=s.title, unit='step', delay=2, leave=False):
    rows = batches.ids(step)
    if {name for row in rows for name in row} <= have:
      continue
    logps = np.asarray(run(params, sharding.put_batch(batches.at(step), mesh)))  # [B, pairs, 2]
    lines = [dict(id=name, chosen=float(pair[0]), rejected=float(pair[1]))
             for row, values in zip(rows, logps, strict=True) for name, pair in zip(row, values, strict=False)]
    metrics.finite(s.title, {f'the log-prob of {side} of pair {r["id"]}': r[side]
                          for r in lines for side in ('chosen', 'rejected')})
    if out:
      out.append(r for r in lines if r['id'] not in have)
  if out:
    out.close()
