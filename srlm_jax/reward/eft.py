"""Builds EFT, what teaches a model to judge: judge prompts with a justification and a score as the answer (PAPER 3.1).

The SFT baseline judges every ranked reply several times (`eft.tries`); a reply's score is the mean of its parsed
judgements. The paper keeps what agrees with the ranking of people and does not say what partial agreement counts as.
The rule here, for one prompt: every reply has a score (`eft.quorum` parsed judgements); no two replies are scored
against people's order; and at least two are scored in it. So ties are allowed where something is in order. A reply's
target is then the judgement whose score is nearest to its mean. The targets, too, must not contradict people's order,
or the prompt is dropped. Last, the most frequent score is downsampled to the runner-up's count.
"""
from collections import Counter

from srlm_jax import catalog, cli, hosts, InputError, records, stage
from srlm_jax.data import ranked as ranking
from srlm_jax.reward import judges, scores as scoring


def run(config, workdir):
  """The seeds' ranked replies, and the SFT baseline's judgements of them (MODEL/judge) -> MODEL/eft/eft.jsonl, and
  dropped.jsonl: every reply that is not in it, with the reason."""
  spec = catalog.find('reward.eft')
  config = spec.view(config)
  baseline = config.eft.targets == 'baseline'
  judge = judges.load(config.judge.template)
  s = stage.Stage(spec, config, workdir, str(judge))
  if s.done:
    return
  source, *judged = s.inputs
  ranked = [r for r in records.read(source, 'id', 'prompt', 'split', 'replies') if r['split'] == 'train']
  check(ranked, source)
  if baseline:
    judgements = list(records.read_shards(judged[0].parent, 'judgements', 'response_id', 'score', 'text', 'finish'))
    agreed, dropped = from_baseline(ranked, scoring.by_response(judgements, config.eft.quorum), judge)
  else:
    judgements = []
    agreed, dropped = from_ranks(ranked, judge)
  kept = balance(agreed)
  names = {e['id'] for e in kept}
  dropped |= {e['id']: 'of the commonest score' for e in agreed if e['id'] not in names}
  replies = sum(len(r['replies']) for r in ranked)
  found = dict(
      examples=len(kept), prompts=len(ranked), replies=replies, judgements=len(judgements),
      parsed=sum(j['score'] is not None for j in judgements),
      dropped=dict(sorted(Counter(dropped.values()).items())),
      scores_judged=scoring.histogram(j['score'] for j in judgements if j['score'] is not None),
      scores_before=scoring.histogram(e['score'] for e in agreed), scores=scoring.histogram(e['score'] for e in kept))
  hosts.say(f'{s.title}: {table(found)}')
  if not kept:
    hosts.say(f'{s.title}: no judgement of the SFT baseline agrees with people on any of {len(ranked)} prompts; '
              f'a model this weak cannot write EFT, and eft.targets=ranks can take its place')
  s.begin()
  if hosts.is_first_host():
    records.write(s.folder / 'dropped.jsonl', (dict(id=name, why=why) for name, why in sorted(dropped.items())))
    records.write(s.folder / 'eft.jsonl', kept)
  s.finish(**found)


def check(ranked: list[dict], source):
  """Raises InputError where ranks are not a ranking (0 the best, equal ranks for equals, as 0, 1, 1, 3), or where a
  reply has no text."""
  for r in ranked:
    if not isinstance(r['replies'], list) or not all(isinstance(reply, dict) for reply in r['replies']):
      raise InputError(f'{source}: the replies of {r["id"]} are no list of {{"id", "text", "rank"}}; mend that record')
    ranks = [reply.get('rank') for reply in r['replies']]
    if len(ranks) < 2 or not all(type(rank) is int for rank in ranks) or ranks != ranking.competition(ranks):
      raise InputError(f'{source}: the ranks {ranks} of the replies of {r["id"]} are not a ranking (0 is the best, '
                       f'then 1, ..; equals share a rank); mend or delete that record')
    for reply in r['replies']:
      for field in ('id', 'text'):
        if not isinstance(reply.get(field), str) or not reply[field].strip():
          raise InputError(f'{source}: a reply of {r["id"]} has no {field}; mend or delete that record')


def from_baseline(ranked, scores: dict[str, scoring.Score], judge) -> tuple[list[dict], dict[str, str]]:
  """-> the examples by the rule above, and {reply id: why} of the others."""
  examples, dropped = [], {}
  for r in ranked:
    replies = [(reply, scores.get(_name(r, reply))) for reply in r['replies']]
    why = _disagreement([(reply['rank'], s.mean if s else None) for reply, s in replies])
    if why:
      dropped |= {_name(r, reply): why for reply, _ in replies}
      continue
    targets = []
    for reply, s in replies:
      finished = [j for j in s.judgements if j['score'] is not None and j['finish'] == 'eos']
      if finished:
        targets.append((reply, min(finished, key=lambda j: abs(j['score'] - s.mean))))  # the first of equals
      else:
        dropped[_name(r, reply)] = 'no finished judgement'
    # Means in people's order can still give single judgements that are not: 3.5 and 3.3 may give 3 and 4.
    if min(scoring.orders([(reply['rank'], target['score']) for reply, target in targets]), default=0) < 0:
      dropped |= {_name(r, reply): 'targets against the order of people' for reply, _ in targets}
    else:
      examples += [_example(r, reply, target['text'], target['score'], judge) for reply, target in targets]
  return examples, dropped


def _disagreement(replies: list[tuple[int, float | None]]) -> str:
  """Why the (rank, score) of one prompt's replies do not agree; '' where they do."""
  if any(score is None for _, score in replies):
    return 'a reply of the prompt without a score'
  orders = scoring.orders(replies)
  if min(orders, default=0) < 0:
    return 'against the order of people'
  return '' if max(orders, default=0) > 0 else 'no two scored in the order of people'


def from_ranks(ranked, judge) -> tuple[list[dict], dict[str, str]]:
  """People's ranks as scores, best highest and worst lowest, evenly between; the justification only states the rank."""
  examples, dropped = [], {}
  for r in ranked:
    last = max(reply['rank'] for reply in r['replies'])
    for reply in r['replies']:
      if not last:
        dropped[_name(r, reply)] = 'people rank all equal'
        continue
      score = judge.nearest(judge.highest - (judge.highest - judge.lowest) * reply['rank'] / last)
      text = f'People ranked it {reply["rank"] + 1} of {len(r["replies"])}.\n{judge.state(score)}'
      examples.append(_example(r, reply, text, score, judge))
  return examples, dropped


def balance(examples: list[dict]) -> list[dict]:
  """Downsamples the most frequent score to the runner-up's count, so that scores are not skewed (PAPER 3.1)."""
  counts = Counter(scoring.whole(e['score']) for e in examples).most_common()
  if len(counts) < 2:
    return examples
  commonest, limit = counts[0][0], counts[1][1]
  of_it = sorted((e['id'] for e in examples if scoring.whole(e['score']) == commonest), key=records.digest)
  left_out = set(of_it[limit:])
  return [e for e in examples if e['id'] not in left_out]


def table(found: dict) -> str:
  """The yield, why the rest was dropped, and the scores before and after, laid out for reading."""
  lines = [f'{found["examples"]} examples from {found["replies"]} ranked replies of {found["prompts"]} prompts',
           f'  {"judgements parsed":40}{found["parsed"]:8} of {found["judgements"]}']
  lines += [f'  {"dropped, " + why:40}{count:8}' for why, count in found['dropped'].items()]
  columns = dict(judged=found['scores_judged'], agreed=found['scores_before'], kept=found['scores'])
  lines.append(f'  {"score":>5}' + ''.join(f'{name:>8}' for name in columns))
  for score in sorted({key for column in columns.values() for key in column}, key=float):
    lines.append(f'  {score:>5}' + ''.join(f'{column.get(score, 0):8}' for column in columns.values()))
  return '\n'.join(lines)


def _example(ranked, reply, text: str, score: float, judge) -> dict:
  return dict(id=_name(ranked, reply), prompt=judge.render(prompt=ranked['prompt'], response=reply['text']),
              response=text, score=score)


def _name(ranked, reply) -> str:
  return records.join(ranked['id'], reply['id'])


if __name__ == '__main__':
  cli.main(run)
