"""Gives each prompt a response to a similar other prompt, which is usually worse than its own.

  python -m srlm_jax.reward.swap --config=iter2:tiny --workdir=RUN

The sampler judges it (`sample/judge.py --on=swapped`), and a judgement that prefers it to the own
responses is probably wrong: see `reward/judge_pairs.py`. The idea is that of Self-Taught Evaluators
(Wang et al. 2024, 2408.02666), where the model itself writes the other prompt.
"""
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import itertools

from srlm_jax import catalog, cli, conversation, hosts, InputError, records, schema, stage
from srlm_jax.data import similar
from srlm_jax.reward import scores as scoring

POOL = 2_000  # prompts


def run(config, workdir):
  """Writes MODEL/swap/swapped.jsonl from MODEL/respond."""
  spec = catalog.find('reward.swap')
  s = stage.Stage(spec, spec.view(config), workdir)
  if s.done:
    return
  s.begin()
  if hosts.is_first_host():
    found = swapped(lambda: s.read('respond/responses-*.jsonl'))
    first = next(found, None)
    if first is None:
      raise InputError(f'{s.title}: no two prompts have a word in common and no response, so none '
                       f'can be swapped; take swapped_pairs out of train.data')
    records.write(s.folder / 'swapped.jsonl', itertools.chain([first], found))
  s.finish()


def swapped(read: Callable[[], Iterable[schema.Response]]) -> Iterator[schema.Response]:
  """Yields for each prompt a response to the most similar prompt without a response in common.

  A prompt with a common response may ask for the same thing. Of the responses to the other prompt,
  the first that ended by itself is taken. The other prompt is one of the first POOL, so time and
  memory grow with the number of prompts alone. read() -> responses, those of a prompt one after the
  other.
  """
  index, said, first = similar.Index(), [], []
  for group in itertools.islice(scoring.by_prompt(read()), POOL):
    index.add(conversation.shown(group[0]))
    said.append({r.response for r in group})
    first.append(next((r for r in group if r.finish == schema.EOS), None))
  for group in scoring.by_prompt(read()):
    own, texts = group[0], {r.response for r in group}
    found = index.nearest(conversation.shown(own), lambda j, own=own, texts=texts: (
        first[j] and first[j].prompt_id != own.prompt_id and texts.isdisjoint(said[j])))
    if found:
      other = first[found[1]]
      yield dataclasses.replace(other, id=records.join(own.prompt_id, other.prompt_id), index=0,
                                prompt_id=own.prompt_id, prompt=own.prompt, messages=own.messages)


if __name__ == '__main__':
  cli.main(run)
