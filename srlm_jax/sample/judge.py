"""Judges responses with the rubric: several judgements each, every raw text kept."""
import jax

from srlm_jax import checkpoint, InputError, stage
from srlm_jax.data import records, templates
from srlm_jax.sample import engine as engines


def run(config, workdir, on: str = ''):
  """Writes judgements-*.jsonl. `on` responses: the sampler judges its own candidates -> MODEL/judge; ranked: the
  sampler judges the seeds' ranked replies, for EFT -> MODEL/judge; eval: the model itself judges the ranked
  replies of the evaluation split -> MODEL/judge_eval. By default ranked for m1 and responses for the others."""
  on = on or config.judge.on
  name, model = ('judge_eval', config.name) if on == 'eval' else ('judge', config.sampler)
  sources, items = _items(config, workdir, on)
  folder = stage.finished_model(workdir, model)
  judge = templates.load_judge(config.judge.template, config.judge.lowest, config.judge.highest)
  s = stage.Stage(config, workdir, name, ('judge', 'chat', 'sample'), sources, checkpoint.recorded_hash(folder),
                  judge.text)
  if s.done:
    return
  items = list(items)
  if not items:
    raise InputError(f'{sources[0]} holds nothing to judge ({on})')
  items = items[jax.process_index()::jax.process_count()]
  sampling = engines.Sampling(config.judge.temperature, config.judge.top_p, config.judge.max_tokens)
  s.begin()
  engine, tokenizer = engines.load(config, folder, s.title)
  rows = [(item, j) for item in items for j in range(config.judge.n)]
  requests = [engines.Request(f'{item["id"]}/{j}', templates.encode_prompt(
      config.chat, judge.render(item['prompt'], item['response']), tokenizer)) for item, j in rows]

  def record(row, result):
    item, j = rows[row]
    text = tokenizer.decode(result.ids).strip()
    score, reason = judge.parse(text) if result.finish != 'too_long' else (None, 'too long')
    return dict(id=result.id, prompt_id=item['prompt_id'], response_id=item['id'], j=j, text=text, score=score,
                reason=reason, finish=result.finish)
  path = s.folder / records.shard_name('judgements', jax.process_index(), jax.process_count())
  engines.run(engine, requests, sampling, path, record, s.title)
  stage.sync(f'{s.title} sampled')  # so that all shards are there to count
  made = list(records.read_shards(s.folder, 'judgements'))
  reasons = [r['reason'] for r in made if r['reason']]
  s.finish(judgements=len(made), parsed=len(made) - len(reasons),
           unparsed={reason: reasons.count(reason) for reason in sorted(set(reasons))})


def _items(config, workdir, on: str):
  """The files that name what is judged, and {id, prompt_id, prompt, response} of each."""
  if on == 'responses':
    folder = stage.model_folder(workdir, config.name).parent / 'respond'
    items = (dict(r) for r in records.read_shards(folder, 'responses', 'id', 'prompt_id', 'prompt', 'response'))
    return sorted(folder.glob('responses-*.jsonl')) or [folder / 'responses.jsonl'], items
  if on not in ('ranked', 'eval'):
    raise InputError(f'--on={on}: it is responses, ranked or eval')
  source, split = stage.seeds(workdir) / 'ranked.jsonl', 'train' if on == 'ranked' else 'eval'
  items = (dict(id=f'{r["id"]}/{reply["id"]}', prompt_id=r['id'], prompt=r['prompt'], response=reply['text'])
           for r in records.read(source, 'id', 'prompt', 'split', 'replies') if r['split'] == split
           for reply in r['replies'])
  return [source], items


if __name__ == '__main__':
  stage.main(run, on=('', 'What to judge: responses, ranked or eval; by default what the config says.'))
