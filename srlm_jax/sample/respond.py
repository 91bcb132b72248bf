"""Samples responses: N candidates per new prompt, or one answer per held-out prompt or prompt of a
file.

  python -m srlm_jax.sample.respond --config=iter2:tiny --workdir=runs/demo --prompts=FILE

FILE is AlpacaEval's, MT-Bench's or plain (`data.prompt_files`). Beside the records are
`model_outputs.json` for alpaca_eval, or `model_answer/MODEL.jsonl` for FastChat.
"""
from collections import Counter
import dataclasses
import functools
import json

from etils import epath

from srlm_jax import catalog, cli, conversation, hosts, InputError, records, schema, stage
from srlm_jax.data import prompt_files, templates
from srlm_jax.sample import engine as engines, shards


def run(config, workdir, on: str = 'prompts', prompts: str = ''):
  """Writes responses-*.jsonl. `on` selects the prompts, the model and the output folder:

  prompts  the sampler responds to MODEL/prompts -> MODEL/respond
  older    the older model (pairs.older) responds to the same prompts
           -> MODEL/respond_older
  heldout  MODEL itself responds once to each held-out prompt of eval.split -> MODEL/answers
  greedy   as heldout, with greedy sampling -> MODEL/answers_greedy

  With `prompts`, MODEL itself answers the prompts of that file, NAME.jsonl or of another kind
  -> MODEL/answers_to_NAME.
  """
  if prompts:
    if on != 'prompts':
      raise InputError(f'--on={on} and --prompts={prompts}: give one of them')
    return answer_file(config, workdir, prompts)
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
  responses = shards.write(
      s, 'responses', _sampling(config, on), items(), total,
      functools.partial(_encode, config.chat), functools.partial(_response, prefix), n)
  _finish(s, responses)


def answer_file(config, workdir, path: str):
  """One answer to each prompt of a file; in turn 2, the model sees its own answer of turn 1."""
  questions = prompt_files.read(path)
  spec = catalog.answers_to(epath.Path(path.removesuffix('.gz')).stem)
  config = spec.view(config)
  s = stage.Stage(spec, config, workdir, more_inputs=[path])
  if s.done:
    return
  sampling, is_fastchat = _sampling(config, 'heldout'), prompt_files.is_fastchat(questions)

  def own(question: prompt_files.Question) -> engines.Sampling:
    return dataclasses.replace(sampling, temperature=question.temperature)

  def answer(stem: str, asked: list[prompt_files.Question]) -> list[schema.Response]:
    return list(shards.write(
        s, stem, sampling, asked, len(asked), functools.partial(_encode, config.chat),
        functools.partial(_response, ''), own=own if is_fastchat else None)) if asked else []
  with engines.kept():
    first = answer('responses', questions)
    second = answer('responses_2', [q.then(a.response)
                                    for q, a in zip(questions, first, strict=True) if q.second])
  if hosts.is_first_host():
    if is_fastchat:
      records.write(s.folder / records.ANSWERS / f'{config.name}.jsonl',
                    prompt_files.model_answers(questions, first, second, config.name))
    else:
      outputs = prompt_files.model_outputs(questions, first, config.name)
      with records.replacing(s.folder / 'model_outputs.json') as file:
        file.write(json.dumps(outputs, ensure_ascii=False, indent=1) + '\n')
  _finish(s, first + second)


def _encode(chat: str, item, tokenizer) -> list[int]:
  return templates.encode_prompt(chat, conversation.of(item), tokenizer)


def _response(prefix: str, item, i: int, said, result) -> schema.Response:
  """`item`: with id, prompt and messages."""
  return schema.Response(
      id=f'{item.id}/{prefix}{i}', prompt_id=item.id, index=i, prompt=item.prompt,
      response=said.text, finish=result.finish, n_tokens=len(result.ids),
      logp=round(sum(result.token_logps), 4), thinking=said.thinking, token_ids=said.token_ids,
      messages=item.messages)


def _finish(s: stage.Stage, responses):
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
  cli.main(run, on=('prompts', f'What to respond to, and with which model: {modes}.'),
           prompts=('', 'File of prompts that the model of --config answers, in place of --on: '
                        'AlpacaEval, MT-Bench, JSON lines with prompt, or .txt.'))
