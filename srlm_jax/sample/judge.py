"""Judges responses with the rubric: several judgements each, every raw text kept."""
from collections import Counter
import itertools

import jax

from srlm_jax import cli, closest, config as configs, declared, hosts, InputError, records, stage
from srlm_jax.data import templates
from srlm_jax.reward import eft, judges
from srlm_jax.sample import engine as engines

KEYS = ('chat', 'judge.template', 'judge.temperature', 'judge.top_p', 'judge.top_k', 'judge.max_tokens', *engines.KEYS)


@declared.reads(*KEYS, 'judge.n', 'eft.tries', 'eval.judgements', 'eval.split', 'data.ranked_tune',
                free=('judge.on', 'judge.by', 'pairs.older', *engines.FREE))
def run(config, workdir, on: str = ''):
  """Writes judgements-*.jsonl. `on`, by default `judge.on`, says what is judged, by whom, and where it goes:

  responses  the sampler judges its own candidates -> MODEL/judge
  again      the model before the sampler (pairs.older) judges the same candidates -> MODEL/judge_again
  older      the sampler judges that model's candidates -> MODEL/judge_older
  ranked     the sampler judges the seeds' ranked replies, for EFT -> MODEL/judge
  eval       the model itself judges the ranked replies to measure on (configs.ranked_split) -> MODEL/judge_eval
  """
  on = on or config.judge.on
  ways = dict(  # on: stage, judge, the key of how often it judges each response, other keys that it reads
      responses=('judge', config.sampler, 'judge.n'), again=('judge_again', config.pairs.older, 'judge.n'),
      older=('judge_older', config.sampler, 'judge.n'), ranked=('judge', config.sampler, 'eft.tries'),
      eval=('judge_eval', config.name, 'eval.judgements', 'eval.split', 'data.ranked_tune'))
  if on not in ways:
    raise InputError(f'--on={on}{closest(on, ways)}: it is one of {", ".join(ways)}')
  name, model, *also = ways[on]
  n = declared.look_up(config, also[0])
  if on == 'responses' and config.judge.by != 'model':
    raise InputError(f'config.judge.by is {config.judge.by}: no model judges; run python -m srlm_jax.sandbox.control')
  sources, items = _items(config, workdir, on)
  folder = stage.finished_model(workdir, model)
  judge = judges.load(config.judge.template)
  s = stage.Stage(config, workdir, name, sources, [folder], str(judge), keys=(*KEYS, *also))
  if s.done:
    return
  total = sum(1 for _ in items())
  if not total:
    raise InputError(f'{sources[0]} holds nothing to judge ({on})')
  sampling = engines.Sampling(config.judge.temperature, config.judge.top_p, config.judge.max_tokens,
                              config.judge.top_k)
  engine, tokenizer = engines.load(config, folder, s.title)
  rubric = len(templates.encode_prompt(config.chat, judge.render(prompt='', response=''), tokenizer))
  if rubric >= engine.room(sampling):
    raise InputError(f'the rubric of config.judge.template = {config.judge.template} has {rubric} tokens, and with '
                     f'judge.max_tokens = {sampling.max_tokens} nothing is left of the model\'s context for a prompt '
                     f'and a response; take a shorter template, or lower judge.max_tokens')
  s.begin(engines.host_mesh(config))
  requests = (engines.Request(item['id'], templates.encode_prompt(
      config.chat, judge.render(prompt=item['prompt'], response=item['response']), tokenizer), n, item)
      for item in itertools.islice(items(), *hosts.share(total)))

  def record(request, j, result):
    item = request.about
    text = tokenizer.decode(result.ids).strip()
    score, reason = read(judge, text, result.finish)
    return dict(id=f'{item["id"]}/{j}', prompt_id=item['prompt_id'], response_id=item['id'], j=j, text=text,
                score=score, reason=reason, finish=result.finish)
  path = s.folder / records.shard_name('judgements', jax.process_index(), jax.process_count())
  engines.run(engine, requests, n * len(range(*hosts.share(total))), sampling, path, record)
  hosts.sync(f'{s.title} sampled')  # so that all shards are there to count
  reasons = Counter(j['reason'] if j['score'] is None else '' for j in records.read_shards(s.folder, 'judgements'))
  made, parsed = reasons.total(), reasons.pop('', 0)
  s.finish(judgements=made, parsed=parsed, lowest=judge.lowest, highest=judge.highest,
           unparsed=dict(sorted(reasons.items())))


def read(judge: judges.Judge, text: str, finish: str) -> tuple[float | None, str]:
  """Score and reason of one judgement. A request that did not fit was never judged; of a judgement that was cut at
  the length limit the last line does not count, for its number may be half a number."""
  if finish == 'too_long':
    return None, 'too long'
  return judge.parse(text.rpartition('\n')[0] if finish == 'length' else text)


def _items(config, workdir, on: str):
  """The files that name what is judged, and a function that reads {id, prompt_id, prompt, response} of each."""
  if on in ('responses', 'again', 'older'):
    folder = stage.model_folder(workdir, config.name).parent / ('respond_older' if on == 'older' else 'respond')
    return records.shards(folder, 'responses'), lambda: records.read_shards(
        folder, 'responses', 'id', 'prompt_id', 'prompt', 'response')
  source = stage.seeds(workdir) / 'ranked.jsonl'
  split = 'train' if on == 'ranked' else configs.ranked_split(config)

  def replies():
    ranked = [r for r in records.read(source, 'id', 'prompt', 'split', 'replies') if r['split'] == split]
    eft.check(ranked, source)
    return (dict(id=records.join(r['id'], reply['id']), prompt_id=r['id'], prompt=r['prompt'], response=reply['text'])
            for r in ranked for reply in r['replies'])
  return [source], replies


if __name__ == '__main__':
  cli.main(run, on=('', 'What to judge: responses, again, older, ranked or eval; by default what the config says.'))
