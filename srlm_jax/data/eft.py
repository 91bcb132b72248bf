"""Builds EFT, what teaches a model to judge: judge prompts with a justification and a score as the answer."""
from collections import Counter

from srlm_jax import InputError
from srlm_jax.data import records, scores as scoring, templates


def run(config, workdir):
  """The seeds' ranked replies, and the SFT baseline's judgements of them (MODEL/judge) -> MODEL/eft/eft.jsonl."""
  from srlm_jax import stage  # here, for stage knows JAX and data does not
  source = stage.seeds(workdir) / 'ranked.jsonl'
  folder = stage.model_folder(workdir, config.name).parent / 'judge'
  baseline = config.eft.targets == 'baseline'
  if config.eft.targets not in ('baseline', 'ranks'):
    raise InputError(f'config.eft.targets is {config.eft.targets!r}; it is baseline or ranks')
  judge = templates.load_judge(config.judge.template, config.judge.lowest, config.judge.highest)
  s = stage.Stage(config, workdir, 'eft', ('eft', 'judge'), template=judge.text,
                  inputs=[source, *(sorted(folder.glob('judgements-*.jsonl')) if baseline else [])])
  if s.done:
    return
  ranked = [r for r in records.read(source, 'id', 'prompt', 'split', 'replies') if r['split'] == 'train']
  for r in ranked:
    if len(r['replies']) < 2 or sorted(reply['rank'] for reply in r['replies']) != list(range(len(r['replies']))):
      raise InputError(f'{source}: the replies of {r["id"]} are not ranked 0, 1, ..; mend or delete that record')
  if baseline:
    scores = scoring.by_response(records.read_shards(folder, 'judgements', 'response_id', 'score', 'text'), 1)
    examples, dropped = from_baseline(ranked, scores, judge)
  else:
    examples, dropped = from_ranks(ranked, judge), Counter()
  if not examples:
    stage.say(f'{s.title}: no judgement of the SFT baseline agrees with people on any of {len(ranked)} prompts; '
              f'a model this weak cannot write EFT, and eft.targets=ranks can take its place')
  before = scoring.histogram(e['score'] for e in examples)
  kept = balance(examples)
  s.begin()
  if stage.is_first_host():
    records.write(s.folder / 'eft.jsonl', kept)
  s.finish(examples=len(kept), replies=sum(len(r['replies']) for r in ranked), dropped=dict(dropped),
           of_the_commonest_score=len(examples) - len(kept), scores_before=before,
           scores=scoring.histogram(e['score'] for e in kept))


def from_baseline(ranked, scores: dict[str, scoring.Score], judge) -> tuple[list[dict], Counter]:
  """Keeps a prompt if the mean scores of its replies put no two replies against people's order, and at least two in
  it; a reply's target is the judgement whose score is nearest to its mean (the first of equals)."""
  examples, dropped = [], Counter()
  for r in ranked:
    replies = [(reply, scores.get(f'{r["id"]}/{reply["id"]}')) for reply in r['replies']]
    means = [(reply['rank'], s.mean) for reply, s in replies if s is not None and s.mean is not None]
    if len(means) < len(replies):
      dropped['a reply without a parsed score'] += 1
      continue
    ordered = [(b[1] - a[1]) * (a[0] - b[0]) for i, a in enumerate(means) for b in means[i + 1:]]
    if min(ordered) < 0:
      dropped['against the order of people'] += 1
    elif max(ordered) == 0:
      dropped['all scores equal'] += 1
    else:
      for reply, s in replies:
        target = min((j for j in s.judgements if j['score'] is not None), key=lambda j: abs(j['score'] - s.mean))
        examples.append(_example(r, reply, target['text'], target['score'], judge))
  return examples, dropped


def from_ranks(ranked, judge) -> list[dict]:
  """People's ranks as scores, best highest and worst lowest, evenly between; the justification only states the rank."""
  examples = []
  for r in ranked:
    last = len(r['replies']) - 1
    for reply in r['replies']:
      score = round(judge.highest - (judge.highest - judge.lowest) * reply['rank'] / last)
      text = f'People ranked it {reply["rank"] + 1} of {last + 1}.\nScore: {score}'
      examples.append(_example(r, reply, text, float(score), judge))
  return examples


def balance(examples: list[dict]) -> list[dict]:
  """Drops of the commonest score what it has more than the next, so that scores are not skewed (PAPER 3.1)."""
  counts = Counter(round(e['score']) for e in examples).most_common()
  if len(counts) < 2:
    return examples
  commonest, limit = counts[0][0], counts[1][1]
  of_it = sorted((e['id'] for e in examples if round(e['score']) == commonest), key=records.digest)
  left_out = set(of_it[limit:])
  return [e for e in examples if e['id'] not in left_out]


def _example(ranked, reply, text: str, score: float, judge) -> dict:
  return dict(id=f'{ranked["id"]}/{reply["id"]}', prompt=judge.render(ranked['prompt'], reply['text']), response=text,
              score=score)


if __name__ == '__main__':
  from srlm_jax import stage
  stage.main(run)
