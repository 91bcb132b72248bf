"""The implicit reward of a model's own candidates: log p under the sampler minus log p under the model before it.

DPO's reward is beta times this, up to a constant of the prompt (Rafailov et al. 2023, eq. 5); beta scales all
candidates alike, so it is left out.
"""
import jax
import tqdm

from srlm_jax import catalog, cli, hosts, records, stage
from srlm_jax.data import templates
from srlm_jax.sample import engine as engines


def run(config, workdir):
  """MODEL/respond -> MODEL/implicit/rewards-*.jsonl: reward = logp - older_logp, each the sum over the response's
  tokens (and the eos of a finished one); null where the candidate could not be encoded."""
  spec = catalog.find('sample.implicit')
  config = spec.view(config)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  responses = list(records.read_shards(s.inputs[0].parent, 'responses', 'id', 'prompt', 'response', 'finish'))
  responses = responses[jax.process_index()::jax.process_count()]
  s.begin(engines.host_mesh(config))
  logps = {}
  for name, folder in zip(('logp', 'older_logp'), s.models, strict=True):
    path = s.folder / records.shard_name(name, jax.process_index(), jax.process_count())
    logps[name] = _logps(config, folder, responses, path, f'{s.title} {name}')
  records.write(s.folder / records.shard_name('rewards', jax.process_index(), jax.process_count()), (
      dict(id=r['id'], reward=None if None in pair else round(pair[0] - pair[1], 4), logp=pair[0], older_logp=pair[1])
      for r, pair in zip(responses, zip(*logps.values(), strict=True), strict=True)))
  hosts.sync(f'{s.title} scored')
  rewards = [r['reward'] for r in records.read_shards(s.folder, 'rewards')]
  s.finish(responses=len(rewards), without_reward=rewards.count(None))


def _logps(config, folder, responses, path, title) -> list[float | None]:
  """Sum of log-probs of each response under the model in `folder`; what a killed run wrote to `path` is kept."""
  records.same_hosts(path)
  out = records.Appender(path)
  engine, tokenizer = engines.load(config, folder, title)
  encoded = [_encode(config.chat, r, tokenizer, engine.context) for r in responses]
  start = out.count // engines.SCORED * engines.SCORED
  for at in tqdm.trange(start, len(responses), engines.SCORED, desc=title, unit='batch', delay=2, leave=False):
    batch = encoded[at:at + engines.SCORED]
    values = iter(engine.logps([row for row in batch if row]) if any(batch) else ())
    new = [dict(id=r['id'], logp=round(next(values), 4) if row else None)
           for r, row in zip(responses[at:at + engines.SCORED], batch, strict=True)]
    out.append(new[max(out.count - at, 0):])
  out.close()
  return [r['logp'] for r in records.read(path, 'id', 'logp')]


def _encode(chat, response, tokenizer, context: int) -> tuple[list[int], list[int]] | None:
  """(prompt ids, response ids), or None where the response is empty, merges with its prompt, or is too long."""
  if not response['response'].strip():
    return None
  pair = templates.encode_pair(chat, response['prompt'], response['response'], tokenizer)
  if pair is None:
    return None
  before, after = pair[0], pair[1] + [tokenizer.eos_ids[0]] * (response['finish'] == 'eos')
  return (before, after) if len(before) + len(after) <= context else None


if __name__ == '__main__':
  cli.main(run)
