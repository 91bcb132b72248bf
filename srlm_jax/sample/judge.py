"""LLM-as-a-judge: samples several judgements per response and keeps the text of each."""
from collections import Counter
import itertools

from srlm_jax import catalog, cli, config as configs, hosts, InputError, records, stage
from srlm_jax.data import ranked as ranking, templates
from srlm_jax.reward import judges
from srlm_jax.sample import engine as engines, shards


def run(config, workdir, on: str = ''):
  """Writes judgements-*.jsonl. `on` (by default `judge.on`) selects the responses and the judge:

  responses  the sampler judges its own candidates -> MODEL/judge
  again      the older model (pairs.older) judges the same candidates
             -> MODEL/judge_again
  older      the sampler judges the candidates of the older model -> MODEL/judge_older
  ranked     the sampler judges the ranked replies of the seed data, for EFT -> MODEL/judge
  eval       MODEL itself judges the ranked replies for evaluation (`config.ranked_split`)
             -> MODEL/judge_eval
  """
  on = on or config.judge.on
  spec = catalog.find('sample.judge', on)
  config = spec.view(config)
  if on == 'responses' and config.judge.by != 'model':
    raise InputError(f'config.judge.by is {config.judge.by}, so no model judges; '
                     f'run python -m srlm_jax.sandbox.control')
  judge = judges.load(config.judge.template)
  s = stage.Stage(spec, config, workdir, str(judge))
  if s.done:
    return
  total = sum(1 for _ in _items(config, s.inputs[0], on))
  if not total:
    raise InputError(f'{s.inputs[0]} has no responses to judge ({on}); '
                     f'run the stage that writes them first')
  c = config.judge
  sampling = engines.Sampling(c.temperature, c.top_p, c.max_tokens, c.top_k)

  def prompt(item, tokenizer):
    text = judge.render(prompt=item['prompt'], response=item['response'])
    return templates.encode_prompt(config.chat, text, tokenizer)

  def check(engine, tokenizer):
    rubric = len(prompt(dict(prompt='', response=''), tokenizer))
    if rubric >= engine.max_prompt_tokens(sampling):
      raise InputError(f'the rubric of config.judge.template = {c.template} has {rubric} tokens, '
                       f'and judge.max_tokens is {c.max_tokens}, so the model\'s context has no '
                       f'room for a prompt and a response; use a shorter template, or lower '
                       f'judge.max_tokens')

  def record(item, j, text, result):
    score, reason = judges.read(judge, text, result.finish)
    return dict(id=f'{item["id"]}/{j}', prompt_id=item['prompt_id'], response_id=item['id'], j=j,
                text=text, score=score, reason=reason, finish=result.finish)
  share = hosts.share(total)
  judgements = shards.write(
      s, config, 'judgements', sampling, itertools.islice(_items(config, s.inputs[0], on), *share),
      len(range(*share)), prompt, record, spec.count(config), check)
  reasons = Counter(j['reason'] if j['score'] is None else '' for j in judgements)
  made, parsed = reasons.total(), reasons.pop('', 0)
  s.finish(judgements=made, parsed=parsed, lowest=judge.lowest, highest=judge.highest,
           unparsed=dict(sorted(reasons.items())))


def _items(config, source, on: str):
  """Yields what to judge as {id, prompt_id, prompt, response}; `source`: the first input file."""
  if on in ('responses', 'again', 'older'):
    yield from records.read_shards(
        source.parent, 'responses', 'id', 'prompt_id', 'prompt', 'response')
    return
  split = 'train' if on == 'ranked' else configs.ranked_split(config)
  rows = records.read(source, 'id', 'prompt', 'split', 'replies')
  ranked = [r for r in rows if r['split'] == split]
  ranking.check(ranked, source)
  for r in ranked:
    for reply in r['replies']:
      yield dict(id=records.join(r['id'], reply['id']), prompt_id=r['id'], prompt=r['prompt'],
                 response=reply['text'])


if __name__ == '__main__':
  cli.main(run, on=('', 'What to judge: responses, again, older, ranked or eval; '
                        'by default config.judge.on.'))
