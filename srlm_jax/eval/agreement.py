"""How well a model's judgements agree with people's ranks: the five measures of PAPER table 4.

Rules for ties, which the paper does not state: ties of scores count as errors; a prompt with a tied or wrong pair is no
exact match; a rank correlation that is undefined (all scores equal) counts as 0. Replies that people rank equal form no
pair. A reply without a score (too few judgements parsed) takes part in one measure alone, `pairwise_accuracy_all`,
which counts its pairs as errors.

Every measure is a sum over prompts divided by another, and has a 95 % interval: the percentiles of that ratio when
whole prompts are drawn with replacement (the bootstrap of Efron 1979), because the pairs of one prompt are not
independent.
"""
import math

import numpy as np
from scipy import stats

from srlm_jax import catalog, cli, config as configs, hosts, records, stage
from srlm_jax.reward import judges, scores as scoring

MEASURES = ('pairwise_accuracy', 'pairwise_accuracy_all', 'ties', 'five_best', 'exact_match', 'spearman', 'kendall_tau')


def run(config, workdir):
  """The seeds' ranked replies of `configs.ranked_split` and MODEL/judge_eval -> MODEL/agreement/agreement.json."""
  spec = catalog.find('eval.agreement')
  config = spec.view(config)
  highest = judges.load(config.judge.template).highest
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  split = configs.ranked_split(config)
  ranked = [r for r in records.read(s.inputs[0], 'id', 'split', 'replies') if r['split'] == split]
  judgements = list(records.read_shards(s.inputs[1].parent, 'judgements', 'response_id', 'score'))
  scores = scoring.by_response(judgements, config.eval.quorum)
  s.begin()
  missing = scoring.Score(None, None, [])
  replies = [[(reply['rank'], scores.get(records.join(r['id'], reply['id']), missing).mean) for reply in r['replies']]
             for r in ranked]
  result = agreement(replies, highest)
  result['split'] = split
  result['replies_without_score'] = sum(score is None for prompt in replies for _, score in prompt)
  result['parse_rate'] = sum(j['score'] is not None for j in judgements) / len(judgements)
  if hosts.is_first_host():
    stage.write_json(s.folder / 'agreement.json', result)
  hosts.say(f'{s.title}: {table(result)}')
  s.finish(**{k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()})


def agreement(prompts: list[list[tuple[int, float | None]]], highest: float) -> dict:
  """Per prompt the (rank, score) of each reply, rank 0 the best, score None where there is none -> the measures.

  pairwise_accuracy: share of the `pairs` of scored replies that the scores order as people do; pairwise_accuracy_all:
  the same of all `pairs_all`, those with an unscored reply as errors; ties: share of pairs with equal scores;
  five_best: of the `fives`, replies with the highest score, the share that people rank first; exact_match: share of
  `prompts` whose whole order is right; spearman, kendall_tau (tau-b): means over prompts. None where undefined.
  intervals: {measure: [low, high]}, None where undefined. prompts: those with a pair of scored replies.

  >>> agreement([[(0, 5.0), (1, 3.0), (2, 3.0), (3, None)]], 5)['pairwise_accuracy_all']
  0.3333333333333333
  """
  parts = [_parts(p, highest) for p in prompts]
  sums, counts = (np.array([[part[m][i] for m in MEASURES] for part in parts], float).reshape(-1, len(MEASURES))
                  for i in range(2))
  totals = dict(zip(MEASURES, counts.sum(0).astype(int).tolist(), strict=True))
  found = {m: float(s / n) if n else None for m, s, n in zip(MEASURES, sums.sum(0), counts.sum(0), strict=True)}
  intervals = dict(zip(MEASURES, scoring.intervals(sums, counts), strict=True))
  return dict(found, pairs=totals['pairwise_accuracy'], pairs_all=totals['pairwise_accuracy_all'],
              fives=totals['five_best'], prompts=totals['exact_match'], intervals=intervals)


def _parts(replies: list[tuple[int, float | None]], highest: float) -> dict[str, tuple[float, int]]:
  """What one prompt adds to each measure: (numerator, denominator)."""
  scored = [(rank, score) for rank, score in replies if score is not None]
  orders = scoring.orders(scored)
  right, pairs, pairs_all = sum(d > 0 for d in orders), len(orders), len(scoring.orders([(r, 0) for r, _ in replies]))
  some = int(pairs > 0)
  fives = [rank == 0 for rank, score in scored if score == highest] if some else []
  return dict(
      pairwise_accuracy=(right, pairs), pairwise_accuracy_all=(right, pairs_all),
      ties=(sum(d == 0 for d in orders), pairs), five_best=(sum(fives), len(fives)),
      exact_match=(int(right == pairs) * some, some),
      spearman=(_correlation(stats.spearmanr, scored) if some else 0.0, some),
      kendall_tau=(_correlation(stats.kendalltau, scored) if some else 0.0, some))


def table(found: dict) -> str:
  """The measures with their intervals and counts, laid out for reading."""
  counts = dict(pairwise_accuracy=('pairs', 'pairs'), pairwise_accuracy_all=('pairs_all', 'pairs, unscored are errors'),
                ties=('pairs', 'pairs'), five_best=('fives', 'replies with the highest score'))
  lines = [f'agreement with the ranks of the {found["split"]} split, and 95 % intervals over prompts']
  for m in MEASURES:
    if found[m] is not None:
      low, high = found['intervals'][m]
      key, what = counts.get(m, ('prompts', 'prompts'))
      lines.append(f'  {m:22}{found[m]:7.3f}  [{low:.3f}, {high:.3f}]  {found[key]:6} {what}')
  lines.append(f'  {found["replies_without_score"]} replies without a score; {found["parse_rate"]:.3f} of the '
               f'judgements parsed; {found["prompts"]} prompts')
  return '\n'.join(lines)


def _correlation(measure, prompt) -> float:
  ranks, scores = zip(*prompt, strict=True)
  if len(set(scores)) == 1:
    return 0.0
  value = measure([-r for r in ranks], scores).statistic
  return 0.0 if math.isnan(value) else float(value)


if __name__ == '__main__':
  cli.main(run)
