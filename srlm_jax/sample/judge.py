"""Judges responses with the rubric: several judgements each, every raw text kept."""
from collections import Counter
import itertools

from srlm_jax import catalog, cli, config as configs, hosts, InputError, records, stage
from srlm_jax.data import templates
from srlm_jax.reward import eft, judges
from srlm_jax.sample import engine as engines, shards

# --on: the key of how many judgements each response gets
TIMES = dict(responses='judge.n', again='judge.n', older='judge.n', ranked='eft.tries',
             eval='eval.judgements')


def run(config, workdir, on: str = ''):
  """Writes judgements-*.jsonl. `on`, by default `judge.on`, says what is judged, by whom, and where it goes:

  responses  the sampler judges its own candidates -> MODEL/judge
  again      the model before the sampler (pairs.older) judges the same candidates -> MODEL/judge_again
  older      the sampler judges that model's candidates -> MODEL/judge_older
  ranked     the sampler judges the seeds' ranked replies, for EFT -> MODEL/judge
  eval       the model itself judges the ranked replies to measure on (`config.ranked_split`) -> MODEL/judge_eval
  """
  on = on or config.judge.on
  spec = catalog.find('sample.judge', on)
  config = spec.view(config)
  if on == 'responses' and config.judge.by != 'model':
    raise InputError(f'config.judge.by is {config.judge.by}: no model judges; run python -m srlm_jax.sandbox.control')
  judge = judges.load(config.judge.template)
  s = stage.Stage(spec, config, workdir, str(judge))
  if s.done:
    return
  total = sum(1 for _ in _items(config, s.inputs[0], on))
  if not total:
    raise InputError(f'{s.inputs[0]} holds nothing to judge ({on})')
  c = config.judge
  sampling = engines.Sampling(c.temperature, c.top_p, c.max_tokens, c.top_k)

  def prompt(item, tokenizer):
    asked = judge.render(prompt=item['prompt'], response=item['response'])
    return templates.encode_prompt(config.chat, asked, tokenizer)

  def check(engine, tokenizer):
    rubric = len(prompt(dict(prompt='', response=''), tokenizer))
    if rubric >= engine.room(sampling):
      raise InputError(f'the rubric of config.judge.template = {c.template} has {rubric} tokens, '
                       f'and with judge.max_tokens = {c.max_tokens} nothing is left of the '
                       f'model\'s context for a prompt and a response; take a shorter template, '
                       f'or lower judge.max_tokens')

  def record(item, j, text, result):
    score, reason = read(judge, text, result.finish)
    return dict(id=f'{item["id"]}/{j}', prompt_id=item['prompt_id'], response_id=item['id'], j=j,
                text=text, score=score, reason=reason, finish=result.finish)
  share = hosts.share(total)
  judgements = shards.write(
      s, config, 'judgements', sampling, itertools.islice(_items(config, s.inputs[0], on), *share),
      len(range(*share)), prompt, record, catalog.look_up(config, TIMES[on]), check)
  reasons = Counter(j['reason'] if j['score'] is None else '' for j in judgements)
  made, parsed = reasons.total(), reasons.pop('', 0)
  s.finish(judgements=made, parsed=parsed, lowest=judge.lowest, highest=judge.highest,
           unparsed=dict(sorted(reasons.items())))


def read(judge: judges.Judge, text: str, finish: str) -> tuple[float | None, str]:
  """Score and reason of one judgement. A request that did not fit was never judged; of a judgement that was cut at
  the length limit the last line does not count, for its number may be half a number."""
  if finish == 'too_long':
    return None, 'too long'
  return judge.parse(text.rpartition('\n')[0] if finish == 'length' else text)


def _items(config, source, on: str):
  """Yields {id, prompt_id, prompt, response} of what is judged; `source`: the first file with it."""
  if on in ('responses', 'again', 'older'):
    yield from records.read_shards(source.parent, 'responses', 'id', 'prompt_id', 'prompt', 'response')
    return
  split = 'train' if on == 'ranked' else configs.ranked_split(config)
  ranked = [r for r in records.read(source, 'id', 'prompt', 'split', 'replies') if r['split'] == split]
  eft.check(ranked, source)
  for r in ranked:
    for reply in r['replies']:
      yield dict(id=records.join(r['id'], reply['id']), prompt_id=r['id'], prompt=r['prompt'],
                 response=reply['text'])


if __name__ == '__main__':
  cli.main(run, on=('', 'What to judge: responses, again, older, ranked or eval; by default what the config says.'))
