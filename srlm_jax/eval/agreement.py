"""How well a model's judgements agree with people's ranks: the five numbers of PAPER table 4.

Rules for ties, which the paper does not state: a pair that the judge scores equal is not ordered right; a prompt
whose scores hold such a tie is no exact match; a rank correlation that is undefined (all scores equal) counts as 0. A
pair that people rank equal has no order, and counts nowhere. Replies without a score (too few judgements parsed) are
left out and counted.
"""
import itertools
import math

from scipy import stats

from srlm_jax import stage
from srlm_jax.data import judges, records, scores as scoring


def run(config, workdir):
  """The seeds' ranked evaluation replies and MODEL/judge_eval -> MODEL/agreement/agreement.json."""
  source = stage.seeds(workdir) / 'ranked.jsonl'
  folder = stage.model_folder(workdir, config.name).parent / 'judge_eval'
  highest = judges.load(config.judge.template).highest
  s = stage.Stage(config, workdir, 'agreement', ('judge.template', 'eval.quorum'),
                  [source, *sorted(folder.glob('judgements-*.jsonl'))])
  if s.done:
    return
  ranked = [r for r in records.read(source, 'id', 'split', 'replies') if r['split'] == 'eval']
  judgements = list(records.read_shards(folder, 'judgements', 'response_id', 'score'))
  scores = scoring.by_response(judgements, config.eval.quorum)
  s.begin()
  replies = [[(reply['rank'], scores[name].mean) for reply in r['replies']
              if (name := f'{r["id"]}/{reply["id"]}') in scores and scores[name].mean is not None] for r in ranked]
  result = agreement(replies, highest)
  result['replies_without_score'] = sum(len(r['replies']) for r in ranked) - sum(map(len, replies))
  result['parse_rate'] = sum(j['score'] is not None for j in judgements) / len(judgements)
  if stage.is_first_host():
    stage.write_json(s.folder / 'agreement.json', result)
  s.finish(**{k: v if v is None or isinstance(v, int) else round(v, 4) for k, v in result.items()})


def agreement(prompts: list[list[tuple[int, float]]], highest: float) -> dict:
  """Per prompt the (rank, score) of each scored reply, rank 0 best -> the five measures; None where undefined.

  pairwise_accuracy: share of pairs of replies that the scores order as people do; ties: share of pairs with
  equal scores; five_best: of the replies with the highest score, the share that people rank first; exact_match:
  share of prompts whose whole order is right; spearman, kendall_tau (tau-b): means over prompts.

  >>> agreement([[(0, 5.0), (1, 3.0), (2, 3.0)]], 5)['pairwise_accuracy']
  0.6666666666666666
  """
  prompts = [p for p in prompts if len({rank for rank, _ in p}) >= 2]
  ordered = [[(b[0] - a[0]) * (a[1] - b[1]) for a, b in itertools.combinations(p, 2) if a[0] != b[0]] for p in prompts]
  pairs = [d for p in ordered for d in p]
  fives = [rank == 0 for p in prompts for rank, score in p if score == highest]
  exact = [min(p) > 0 for p in ordered]
  return dict(
      pairwise_accuracy=_mean(d > 0 for d in pairs), ties=_mean(d == 0 for d in pairs), five_best=_mean(fives),
      exact_match=_mean(exact), spearman=_mean(_correlation(stats.spearmanr, p) for p in prompts),
      kendall_tau=_mean(_correlation(stats.kendalltau, p) for p in prompts), pairs=len(pairs), prompts=len(prompts))


def _correlation(measure, prompt) -> float:
  ranks, scores = zip(*prompt, strict=True)
  if len(set(scores)) == 1:
    return 0.0
  value = measure([-r for r in ranks], scores).statistic
  return 0.0 if math.isnan(value) else float(value)


def _mean(values) -> float | None:
  values = [float(v) for v in values]
  return sum(values) / len(values) if values else None


if __name__ == '__main__':
  stage.main(run)
