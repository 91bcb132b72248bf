"""Agreement of a judge's scores with human ranks: the five measures of PAPER table 4.

The paper does not say how ties and missing scores count. Here:

- Tied scores count as errors. A prompt with a tied or discordant pair is not an exact match.
- An undefined rank correlation (all scores equal) counts as 0.
- Replies with equal human ranks form no pair.
- A reply without a score (too few parsed judgements) is excluded from all measures except
  `pairwise_accuracy_all`, which counts its pairs as errors.

Every measure is a ratio of two sums over prompts. Its 95 % interval comes from a bootstrap over
prompts (`scores.intervals`), because the pairs of one prompt are not independent.
"""
import array
from collections.abc import Iterable
import functools
import itertools
import math

import numpy as np
from scipy import stats

from srlm_jax import catalog, cli, config as configs, hosts, InputError, records, stage
from srlm_jax.data import ranked as ranking
from srlm_jax.reward import judges, scores as scoring

MEASURES = ('pairwise_accuracy', 'pairwise_accuracy_all', 'ties', 'five_best', 'exact_match',
            'spearman', 'kendall_tau')


def run(config, workdir):
  """Writes MODEL/agreement/agreement.json.

  Reads the ranked replies of the split `configs.ranked_split`, and MODEL/judge_eval.
  """
  spec = catalog.find('eval.agreement')
  config = spec.view(config)
  highest = judges.load(config.judge.template).highest
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  split = configs.ranked_split(config)
  judged = scoring.Judged(s.read('judge_eval/judgements-*.jsonl'), config.eval.quorum,
                          s.path('judge_eval/judgements-*.jsonl'))
  unscored = 0

  def prompts():
    nonlocal unscored
    for r in ranking.of_split(s, split):
      replies = [(reply.rank, judged.of(records.join(r.id, reply.id)).mean) for reply in r.replies]
      unscored += sum(score is None for _, score in replies)
      yield replies
    judged.finish(s.path(ranking.SEEDS))
  result = agreement(prompts(), highest)
  result['split'] = split
  result['replies_without_score'] = unscored
  if not (made := judged.counts.total()):
    raise InputError(f'{s.path("judge_eval/judgements-*.jsonl")} has no judgements; run its stage '
                     f'again')
  result['parse_rate'] = (made - judged.counts[None]) / made
  s.begin()
  if hosts.is_first_host():
    stage.write_json(s.folder / 'agreement.json', result)
  hosts.log(f'{s.title}: {table(result)}')
  s.finish(**{k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()})


def agreement(prompts: Iterable[list[tuple[int, float | None]]], highest: float) -> dict:
  """(rank, score) per reply of every prompt -> the measures, their intervals and counts.

  Rank 0 is best. The score is None if the reply has none. `highest` is the highest possible score.

  pairwise_accuracy      concordant fraction of the `pairs` of scored replies
  pairwise_accuracy_all  concordant fraction of all `pairs_all`; pairs without a score are errors
  ties                   fraction of `pairs` with equal scores
  five_best              fraction of the `fives`, replies with the highest score, that have rank 0
  exact_match            fraction of `prompts` whose pairs are all concordant
  spearman, kendall_tau  mean rank correlation per prompt (tau-b)
  prompts                number of prompts with a pair of scored replies
  intervals              {measure: [low, high]}

  A measure and its interval are None where undefined.

  >>> agreement([[(0, 5.0), (1, 3.0), (2, 3.0), (3, None)]], 5)['pairwise_accuracy_all']
  0.3333333333333333
  """
  terms = array.array('d')  # [prompts, measures, 2]
  for prompt in prompts:
    found = _terms(prompt, highest)
    terms.extend(itertools.chain.from_iterable(found[m] for m in MEASURES))
  terms = np.array(terms).reshape(-1, len(MEASURES), 2)
  numerators, denominators = (np.ascontiguousarray(terms[..., i]) for i in range(2))
  totals = dict(zip(MEASURES, denominators.sum(0).astype(int).tolist(), strict=True))
  found = {m: float(total / totals[m]) if totals[m] else None
           for m, total in zip(MEASURES, numerators.sum(0), strict=True)}
  intervals = dict(zip(MEASURES, scoring.intervals(numerators, denominators), strict=True))
  return dict(
      found, pairs=totals['pairwise_accuracy'], pairs_all=totals['pairwise_accuracy_all'],
      fives=totals['five_best'], prompts=totals['exact_match'], intervals=intervals)


def _terms(replies: list[tuple[int, float | None]], highest: float) -> dict[str, tuple[float, int]]:
  """The contribution of one prompt to each measure: (numerator, denominator)."""
  scored = [(rank, score) for rank, score in replies if score is not None]
  orders = scoring.orders(scored)
  pairs, pairs_all = len(orders), len(scoring.orders([(rank, 0) for rank, _ in replies]))
  if not pairs:
    return dict.fromkeys(MEASURES, (0, 0)) | dict(pairwise_accuracy_all=(0, pairs_all))
  concordant = sum(order > 0 for order in orders)
  fives = [rank == 0 for rank, score in scored if score == highest]
  return dict(
      pairwise_accuracy=(concordant, pairs),
      pairwise_accuracy_all=(concordant, pairs_all),
      ties=(sum(order == 0 for order in orders), pairs),
      five_best=(sum(fives), len(fives)),
      exact_match=(int(concordant == pairs), 1),
      spearman=(_correlation(stats.spearmanr, scored), 1),
      kendall_tau=(_correlation(stats.kendalltau, scored), 1))


def table(found: dict) -> str:
  """Formats the measures with their intervals and counts."""
  counts = dict(
      pairwise_accuracy=('pairs', 'pairs'),
      pairwise_accuracy_all=('pairs_all', 'pairs, including unscored ones as errors'),
      ties=('pairs', 'pairs'), five_best=('fives', 'replies with the highest score'))
  lines = [f'agreement with the human ranks of the {found["split"]} split, '
           f'and 95 % intervals over prompts']
  for m in MEASURES:
    if found[m] is not None:
      low, high = found['intervals'][m]
      key, unit = counts.get(m, ('prompts', 'prompts'))
      lines.append(f'  {m:22}{found[m]:7.3f}  [{low:.3f}, {high:.3f}]  {found[key]:6} {unit}')
  lines.append(f'  {found["replies_without_score"]} replies without a score; '
               f'{found["parse_rate"]:.3f} of the judgements parsed; {found["prompts"]} prompts')
  return '\n'.join(lines)


def _correlation(measure, replies) -> float:
  """The rank correlation of human ranks and scores; 0 if undefined."""
  ranks, scores = zip(*replies, strict=True)
  return _of_ranks(measure, scoring.ranks(-r for r in ranks), scoring.ranks(scores))


@functools.lru_cache(10_000)  # scipy takes half a millisecond, and few replies have few orders
def _of_ranks(measure, ranks: tuple[int, ...], scores: tuple[int, ...]) -> float:
  if len({*scores}) == 1:
    return 0.0
  value = measure(ranks, scores).statistic
  return 0.0 if math.isnan(value) else float(value)


if __name__ == '__main__':
  cli.main(run)
