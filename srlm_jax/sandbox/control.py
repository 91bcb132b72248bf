"""Control experiments: the oracle or random scores replace the judge."""
import zlib

from srlm_jax import catalog, cli, hosts, InputError, records, schema, stage
from srlm_jax.reward import judges
from srlm_jax.sample import judge as judging
from srlm_jax.sandbox import world


def run(config, workdir):
  """MODEL/respond -> MODEL/judge in the format of the judge stage, scored by `judge.by`."""
  spec = catalog.find('sandbox.control')
  config = spec.view(config)
  by = config.judge.by
  if by not in ('oracle', 'random'):
    program = 'eval.endpoint' if by == 'endpoint' else 'sample.judge'
    raise InputError(f'config.judge.by is {by}; run python -m srlm_jax.{program}, or set it to '
                     f'oracle or random')
  judge = judges.load(config.judge.template)
  s = stage.Stage(spec, config, workdir, str(judge))
  if s.done:
    return
  for _ in s.read('respond/responses-*.jsonl'):  # may raise InputError before anything is written
    pass
  s.begin()

  def judged():
    return (_judgement(r, j, by, config.seed, judge)
            for r in s.read('respond/responses-*.jsonl') for j in range(config.judge.n))
  if hosts.is_first_host():
    records.write(s.folder / records.shard_name('judgements', 0, 1), judged())
  s.finish(judging.summary(judge, judged()))


def _judgement(response: schema.Response, j: int, by: str, seed: int, judge) -> schema.Judgement:
  """The judgement number `j` of a response; no score for prompts outside the sandbox."""
  name = f'{response.id}/{j}'
  score = None
  if by == 'random':  # a hash of the id, so the score does not depend on the order of the records
    values = judge.highest - judge.lowest + 1
    score = float(judge.lowest + zlib.crc32(f'{seed}/{name}'.encode()) % values)
  elif world.parse(response.prompt):
    score = float(sum(world.grade(response.prompt, response.response)))
  return schema.Judgement(
      id=name, prompt_id=response.prompt_id, response_id=response.id, index=j,
      text=judge.state(score) if score is not None else '', score=score,
      reason='' if score is not None else 'not a sandbox prompt', finish=schema.EOS)


if __name__ == '__main__':
  cli.main(run)
