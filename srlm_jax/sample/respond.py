"""Samples responses: N candidates per new prompt, or one response per held-out prompt."""
from collections import Counter

from srlm_jax import catalog, cli, conversation, InputError, schema, stage
from srlm_jax.data import templates
from srlm_jax.sample import engine as engines, shards


def run(config, workdir, on: str = 'prompts'):
  """Writes responses-*.jsonl. `on` selects the prompts, the model and the output folder:

  prompts  the sampler responds to MODEL/prompts -> MODEL/respond
  older    the older model (pairs.older) responds to the same prompts
           -> MODEL/respond_older
  heldout  MODEL itself responds once to each held-out prompt of eval.split -> MODEL/answers
  greedy   as heldout, with greedy sampling -> MODEL/answers_greedy
  """
  spec = catalog.find('sample.respond', on)
  config = spec.view(config)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  source, = spec.reads
  is_held_out = on in ('heldout', 'greedy')
  n = 1 if is_held_out else config.respond.n
  prefix = 'older' if on == 'older' else ''  # keeps the ids of a prompt's candidates distinct

  def items():
    rows = s.read(source)
    return (row for row in rows if row.split == config.eval.split) if is_held_out else rows
  total = sum(1 for _ in items())
  if not total:
    raise InputError(f'{s.path(source)} has no prompts to respond to; run the stage that writes it '
                     f'again, with a config that gives more of them')

  def prompt(item, tokenizer):
    return templates.encode_prompt(config.chat, conversation.of(item), tokenizer)

  def record(item, i, said, result):
    return schema.Response(
        id=f'{item.id}/{prefix}{i}', prompt_id=item.id, index=i, prompt=item.prompt,
        response=said.text, finish=result.finish, n_tokens=len(result.ids),
        logp=round(sum(result.token_logps), 4), thinking=said.thinking, token_ids=said.token_ids,
        messages=item.messages)
  responses = shards.write(s, 'responses', _sampling(config, on), items(), total, prompt, record, n)
  finishes = Counter(r.finish for r in responses)
  s.finish(responses=finishes.total(), finished=finishes[schema.EOS],
           cut=finishes[schema.CUT], too_long=finishes[schema.TOO_LONG])


def _sampling(config, on: str) -> engines.Sampling:
  if on == 'greedy':
    return engines.Sampling(0.0, 1.0, config.respond.max_tokens, 0)
  c = config.eval if on == 'heldout' else config.respond
  return engines.Sampling(c.temperature, c.top_p, config.respond.max_tokens, c.top_k)


if __name__ == '__main__':
  modes = ', '.join(catalog.modes('sample.respond'))
  cli.main(run, on=('prompts', f'What to respond to, and with which model: {modes}.'))
