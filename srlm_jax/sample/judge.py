"""LLM-as-a-judge: samples several judgements per response and keeps the text of each."""
from collections import Counter
from collections.abc import Iterable, Iterator

from srlm_jax import (
  catalog,
  cli,
  config as configs,
  conversation,
  InputError,
  records,
  schema,
  stage,
)
from srlm_jax.data import ranked as ranking, templates
from srlm_jax.reward import judges
from srlm_jax.sample import engine as engines, shards

# Values of --on that judge sampled responses.
OF_RESPONSES = ('responses', 'again', 'older', 'swapped')


def run(config, workdir, on: str = ''):
  """Writes judgements-*.jsonl. `on` selects the responses and the judge:

  responses  the sampler judges its own candidates -> MODEL/judge
  again      the older model (pairs.older) judges the same candidates
             -> MODEL/judge_again
  older      the sampler judges the candidates of the older model -> MODEL/judge_older
  swapped    the sampler judges responses to similar other prompts (MODEL/swap)
             -> MODEL/judge_swapped
  ranked     the sampler judges the ranked replies of the seed data, for EFT -> MODEL/judge
  eval       MODEL itself judges the ranked replies for evaluation (`config.ranked_split`)
             -> MODEL/judge_eval

  The default is `ranked` for M1 and `responses` for later models.
  """
  on = on or ('ranked' if config.name == 'm1' else 'responses')
  spec = catalog.find('sample.judge', on)
  config = spec.view(config)
  if on == 'responses' and config.judge.by != 'model':
    program = 'eval.endpoint' if config.judge.by == 'endpoint' else 'sandbox.control'
    raise InputError(f'config.judge.by is {config.judge.by}, so the sampler does not judge; '
                     f'run python -m srlm_jax.{program}')
  judge = judges.load(config.judge.template)
  s = stage.Stage(spec, config, workdir, str(judge))
  if not s.done:
    sample(s, config, judge, on)


def sample(s: stage.Stage, config, judge: judges.Judge, on: str):
  """The work of a stage that judges `on` with a model; `config`: what the stage may read."""
  spec = s.spec
  total = sum(1 for _ in items(s, config, on))
  if not total:
    raise InputError(f'{s.path(*spec.reads)} has no responses to judge ({on}); '
                     f'run the stage that writes them first')
  c = config.judge
  sampling = engines.Sampling(c.temperature, c.top_p, c.max_tokens, c.top_k)

  def prompt(item, tokenizer):
    text = judge.render(prompt=item.prompt, response=item.response)
    return templates.encode_prompt(config.chat, text, tokenizer)

  def check(engine, tokenizer):
    _check_rubric(c, len(prompt(judges.Item('', '', '', ''), tokenizer)),
                  engine.max_prompt_tokens(sampling))

  def record(item, j, said, result):
    score, reason = judges.read(judge, said.text, result.finish)
    return schema.Judgement(
        id=f'{item.id}/{j}', prompt_id=item.prompt_id, response_id=item.id, index=j, text=said.text,
        score=score, reason=reason, finish=result.finish, thinking=said.thinking,
        token_ids=said.token_ids)
  judgements = shards.write(s, 'judgements', sampling, items(s, config, on), total, prompt, record,
                            spec.count(config), check)
  s.finish(summary(judge, judgements))


def _check_rubric(c, rubric: int, most: int):
  """Raises InputError if a judge prompt of `most` tokens has no room beside the rubric."""
  if rubric >= most:
    raise InputError(f'the rubric of config.judge.template = {c.template} has {rubric} tokens, '
                     f'and judge.max_tokens is {c.max_tokens}, so the model\'s context has no '
                     f'room for a prompt and a response; use a shorter template, or lower '
                     f'judge.max_tokens')


def summary(judge: judges.Judge, judgements: Iterable[schema.Judgement]) -> schema.JudgeSummary:
  """Counts judgements, with and without a score."""
  reasons = Counter(j.reason if j.score is None else '' for j in judgements)
  made, parsed = reasons.total(), reasons.pop('', 0)
  return schema.JudgeSummary(judgements=made, parsed=parsed, lowest=judge.lowest,
                             highest=judge.highest, unparsed=dict(sorted(reasons.items())))


def items(s: stage.Stage, config, on: str) -> Iterator[judges.Item]:
  """Yields what to judge."""
  if on in OF_RESPONSES:
    source, = s.spec.reads
    for r in s.read(source):
      yield judges.Item(r.id, r.prompt_id, conversation.shown(r), judges.seen(r, config.judge))
    return
  for r in ranking.of_split(s, 'train' if on == 'ranked' else configs.ranked_split(config)):
    for reply in r.replies:
      yield judges.Item(records.join(r.id, reply.id), r.id, conversation.shown(r), reply.text)


if __name__ == '__main__':
  modes = ', '.join(catalog.modes('sample.judge'))
  cli.main(run, on=('', f'What to judge, and with which model: {modes}; by default ranked for m1, '
                        f'and responses for later models.'))
