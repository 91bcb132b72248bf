"""Answers prompts: N candidates for the next round's pairs, or one answer to each held-out prompt."""
from collections import Counter
import itertools

import jax

from srlm_jax import cli, declared, hosts, InputError, records, stage
from srlm_jax.data import templates
from srlm_jax.sample import engine as engines

GREEDY = ('chat', 'eval.split', 'respond.max_tokens', *engines.KEYS)
HELD_OUT = (*GREEDY, 'eval.temperature', 'eval.top_p', 'eval.top_k')
PROMPTS = ('chat', 'respond.n', 'respond.temperature', 'respond.top_p', 'respond.top_k', 'respond.max_tokens',
           *engines.KEYS)


@declared.reads(*dict.fromkeys((*PROMPTS, *HELD_OUT)), free=('pairs.older', *engines.FREE))
def run(config, workdir, on: str = 'prompts'):
  """Writes responses-*.jsonl. `on` says what is answered, by whom, and where it goes:

  prompts  MODEL/prompts by the sampler -> MODEL/respond
  older    MODEL/prompts by the model before the sampler (pairs.older) -> MODEL/respond_older
  heldout  the held-out prompts of eval.split by the model itself, once each -> MODEL/answers
  greedy   the same, always the most likely token -> MODEL/answers_greedy
  """
  if on in ('prompts', 'older'):
    name, model = dict(prompts=('respond', config.sampler), older=('respond_older', config.pairs.older))[on]
    n, knobs = config.respond.n, config.respond
    word = 'older' * (on == 'older')  # so that no two candidates of a prompt have one name
    source = stage.model_folder(workdir, config.name).parent / 'prompts' / 'prompts.jsonl'
  elif on in ('heldout', 'greedy'):
    name, model, n, knobs, word = dict(heldout='answers', greedy='answers_greedy')[on], config.name, 1, config.eval, ''
    source = stage.seeds(workdir) / 'heldout.jsonl'
  else:
    raise InputError(f'--on={on}: it is prompts, older, heldout or greedy')
  folder = stage.finished_model(workdir, model)
  s = stage.Stage(config, workdir, name, [source], [folder],
                  keys=dict(heldout=HELD_OUT, greedy=GREEDY).get(on, PROMPTS))
  if s.done:
    return
  def prompts():
    return (r for r in records.read(source, 'id', 'prompt')
            if on in ('prompts', 'older') or r['split'] == config.eval.split)
  total = sum(1 for _ in prompts())
  if not total:
    raise InputError(f'{source} holds no prompt to answer; make prompts first')
  sampling = engines.Sampling(0.0 if on == 'greedy' else knobs.temperature, knobs.top_p, config.respond.max_tokens,
                              knobs.top_k)
  engine, tokenizer = engines.load(config, folder, s.title)
  engine.room(sampling)  # raises where there is none
  s.begin(engines.host_mesh(config))
  requests = (engines.Request(r['id'], templates.encode_prompt(config.chat, r['prompt'], tokenizer), n, r)
              for r in itertools.islice(prompts(), *hosts.share(total)))

  def record(request, i, result):
    prompt = request.about
    return dict(id=f'{prompt["id"]}/{word}{i}', prompt_id=prompt['id'], n=i, prompt=prompt['prompt'],
                response=tokenizer.decode(result.ids).strip(), finish=result.finish, tokens=len(result.ids),
                logp=round(sum(result.logps), 4))
  path = s.folder / records.shard_name('responses', jax.process_index(), jax.process_count())
  engines.run(engine, requests, n * len(range(*hosts.share(total))), sampling, path, record)
  hosts.sync(f'{s.title} sampled')  # so that all shards are there to count
  finishes = Counter(r['finish'] for r in records.read_shards(s.folder, 'responses'))
  s.finish(responses=finishes.total(), finished=finishes['eos'], cut=finishes['length'],
           too_long=finishes['too_long'])


if __name__ == '__main__':
  cli.main(run, on=('prompts', 'What to answer: prompts, older (by the model before), heldout or greedy.'))
