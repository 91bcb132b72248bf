"""Implicit rewards of candidates: log p under the sampler minus log p under the older model.

DPO's reward is beta times this difference, up to a constant per prompt (Rafailov et al. 2023,
eq. 5). beta is omitted because it scales all candidates alike.
"""
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
  responses = list(s.read('respond/responses-*.jsonl'))
  responses = responses[slice(*group.share(len(responses)))]
  for folder in s.models:
    engines.refuse_too_large(config, folder)
    templates.encode_prompt(config.chat, 'a', tokenizers.load(folder))  # may be refused
  s.begin(config)
  logps, older_logps = (
      _logps(s, config, folder, responses, name)
      for name, folder in zip(('logp', 'older_logp'), s.models, strict=True))
  with shards.completed(s, 'rewards', group) as out:
    rows = zip(responses, logps, older_logps, strict=True)
    out.append([_reward(r.id, logp, older) for r, logp, older in rows][out.count:])
  made = records.read_shards(s.folder, 'rewards', schema.ImplicitReward)
  rewards = [r.reward for r in made]
  s.finish(responses=len(rewards), without_reward=rewards.count(None))


def _reward(name: str, logp: float | None, older_logp: float | None) -> schema.ImplicitReward:
  is_missing = logp is None or older_logp is None
  reward = None if is_missing else round(logp - older_logp, 4)
  return schema.ImplicitReward(id=name, reward=reward, logp=logp, older_logp=older_logp)


def _logps(s: stage.Stage, config, folder, responses, stem: str) -> list[float | None]:
  """The summed log-probability of each response under the model in `folder`.

  Appends the results to the shard STEM-*.jsonl of this group of hosts. Resumes from what a killed
  run wrote there.
  """
  title = f'{s.title} {stem}'
  engine, tokenizer = engines.load(config, folder, title)
  encoded = [_encode(config.chat, r, tokenizer, engine.context) for r in responses]
  # Batches start at the same places as in an uninterrupted run, so that the results are the same.
  with shards.completed(s, stem, engines.group(config)) as out:
    starts = range(out.count // ROWS * ROWS, len(responses), ROWS)
    for start in tqdm.tqdm(starts, desc=title, unit='batch', delay=2, leave=False,
                           disable=not hosts.is_first_host()):
      engine.stop_if_requested()
      batch = responses[start:start + ROWS]
      rows = [None if r.id in out.kept else row
              for r, row in zip(batch, encoded[start:], strict=False)]
      scored = [row for row in rows if row]
      values = (score.logp for score in engine.score(scored, share=False))
      new = [out.kept[r.id][0] if r.id in out.kept else
             schema.Logp(id=r.id, logp=round(next(values), 4) if row else None)
             for r, row in zip(batch, rows, strict=True)]
      out.append(new[max(out.count - start, 0):])
  return [r.logp for r in records.read(out.path, schema.Logp)]


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
