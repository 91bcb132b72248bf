"""Gives each prompt a response to a similar other prompt, which is usually worse than its own.

  python -m srlm_jax.reward.swap --config=iter2:tiny --workdir=RUN

The sampler judges it (`sample/judge.py --on=swapped`), and a judgement that prefers it to the own
responses is probably wrong: see `reward/judge_pairs.py`. The idea is that of Self-Taught Evaluators
(Wang et al. 2024, 2408.02666), where the model itself writes the other prompt.
"""
from collections.abc import Callable, Iterable, Iterator
import dataclasses

from srlm_jax import catalog, cli, conversation, hosts, records, schema, spill, stage
from srlm_jax.data import similar
from srlm_jax.reward import scores as scoring


def run(config, workdir):
  """Writes MODEL/swap/swapped.jsonl from MODEL/respond."""
  spec = catalog.find('reward.swap')
  s = stage.Stage(spec, spec.view(config), workdir)
  if s.done:
    return
  s.begin()
  if hosts.is_first_host():
    records.write(s.folder / 'swapped.jsonl',
                  swapped(lambda: s.read('respond/responses-*.jsonl')))
  s.finish()


def swapped(read: Callable[[], Iterable[schema.Response]]) -> Iterator[schema.Response]:
  """Yields for each prompt a response to the most similar prompt without a response in common.

  A prompt with a common response may ask for the same thing. Of the responses to the other prompt,
  the first that ended by itself is taken. read() -> responses, those of a prompt one after the
  other. Time grows with the square of the number of prompts.
  """
  index, said, first = similar.Index(), [], spill.Spill()
  for i, group in enumerate(scoring.by_prompt(read())):
    index.add(conversation.shown(group[0]))
    said.append({hash(r.response) for r in group})
    if ended := next((r for r in group if r.finish == schema.EOS), None):
      first.add(str(i), records.dump(ended))
  for i, group in enumerate(scoring.by_prompt(read())):
    found = index.nearest(index.texts[i], lambda j, i=i: (
        j != i and str(j) in first and said[i].isdisjoint(said[j])))
    if found:
      line, = first.get(str(found[1]))
      other, own = records.parse(line.encode(), 'a response', schema.Response), group[0]
      yield dataclasses.replace(other, id=records.join(own.prompt_id, other.prompt_id), index=0,
                                prompt_id=own.prompt_id, prompt=own.prompt, messages=own.messages)


if __name__ == '__main__':
  cli.main(run)
