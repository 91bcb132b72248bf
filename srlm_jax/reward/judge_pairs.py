"""Makes preference pairs of judgements, which train the judge, without a judge of judgements.

  python -m srlm_jax.reward.judge_pairs --config=iter2:tiny --workdir=RUN --on=majority

majority  The judgements of a response vote on its score. Chosen is a judgement with the score of
          most votes, rejected the one whose score is farthest from it (Self-Consistency Preference
          Optimization, Prasad et al. 2024, 2411.04109, which does this with answers).
swapped   A response to a similar other prompt is worse than the prompt's own. Chosen is a judgement
          that says so, rejected one that does not (Self-Taught Evaluators, Wang et al. 2024,
          2408.02666, which trains on the former alone).

`sample/meta_judge.py` makes such pairs with a judge of judgements.
"""
from collections import Counter
from collections.abc import Iterator
import operator
import statistics

from srlm_jax import catalog, cli, conversation, hosts, records, schema, spill, stage
from srlm_jax.reward import judges, scores as scoring
from srlm_jax.sample import judge as judging, meta_judge

RESPONSES, JUDGEMENTS = 'respond/responses-*.jsonl', 'judge/judgements-*.jsonl'
SWAPPED = 'judge_swapped/judgements-*.jsonl'
Judgements = list[schema.Judgement]
Found = tuple[str, schema.Judgement, schema.Judgement, float]  # judge prompt, chosen, rejected, gap


def run(config, workdir, on: str = 'majority'):
  """Writes MODEL/majority/majority_pairs.jsonl or MODEL/swapped/swapped_pairs.jsonl.

  Reads MODEL/respond and MODEL/judge, and for swapped MODEL/judge_swapped.
  """
  spec = catalog.find('reward.judge_pairs', on)
  config = spec.view(config)
  judge = judges.load(config.judge.template)
  s = stage.Stage(spec, config, workdir, str(judge))
  if s.done:
    return
  pairs, count = spill.Spill(), sum(1 for _ in s.read('pairs/pairs.jsonl'))
  ratings = []
  for asked, chosen, rejected, gap in dict(majority=_majority, swapped=_swapped)[on](
      s, config, judge):
    pair = _pair(on, asked, chosen, rejected)
    ratings.append(meta_judge.Rating(pair.id, pair.chosen_score, gap))
    pairs.add(pair.id, records.dump(pair))
  kept = meta_judge.limit(ratings, count, config.judge_pairs.share, config.judge_pairs.score_share)
  s.begin()
  if hosts.is_first_host():
    with records.replacing(s.folder / spec.writes[0]) as out:
      out.writelines(line for rating in kept for line in pairs.get(rating.id))
  s.finish(pairs=len(kept), over_the_limits=len(ratings) - len(kept),
           scores_chosen=scoring.histogram(rating.chosen_score for rating in kept))


def vote(judgements: Judgements) -> tuple[schema.Judgement, schema.Judgement, int] | None:
  """The judgements of a response -> chosen, rejected, and by how many votes chosen wins.

  None if no score has the most votes alone, or if all agree.
  """
  votes = Counter(j.score for j in judgements).most_common(2)
  if len(votes) < 2 or votes[0][1] == votes[1][1]:
    return None
  (score, most), _ = votes
  chosen = next(j for j in judgements if j.score == score)
  rejected = max(judgements, key=lambda j: abs(j.score - score))
  return chosen, rejected, most - sum(j.score == rejected.score for j in judgements)


def contradicting(judgements: Judgements, level: float, above: bool
                  ) -> tuple[schema.Judgement, schema.Judgement] | None:
  """-> the judgement that is farthest on the right side of the level, and that on the wrong side.

  above: whether the response must score above the level; else it must score below it. None if all
  judgements are on one side.
  """
  sign = 1 if above else -1
  ordered = sorted(judgements, key=lambda j: sign * (j.score - level))
  if not ordered or not sign * (ordered[0].score - level) <= 0 < sign * (ordered[-1].score - level):
    return None
  return ordered[-1], ordered[0]


def _majority(s: stage.Stage, config, judge: judges.Judge) -> Iterator[Found]:
  scores = scoring.Judged(s.read(JUDGEMENTS), config.judge.quorum, s.path(JUDGEMENTS))
  for r in s.read(RESPONSES):
    if found := vote(_usable(scores.of(r.id))):
      asked = judge.render(prompt=conversation.shown(r), response=judging.seen(r, config.judge))
      yield asked, *found
  scores.finish(s.path(RESPONSES))


def _swapped(s: stage.Stage, config, judge: judges.Judge) -> Iterator[Found]:
  scores = scoring.Judged(s.read(JUDGEMENTS), config.judge.quorum, s.path(JUDGEMENTS))
  others = scoring.Judged(s.read(SWAPPED), config.judge.quorum, s.path(SWAPPED))
  items = records.Matched(judging.swapped(lambda: s.read(RESPONSES), config.judge),
                          operator.attrgetter('prompt_id'), s.path(RESPONSES))
  for group in scoring.by_prompt(s.read(RESPONSES)):
    own = [(r, score) for r in group if (score := scores.of(r.id)).mean is not None]
    for item in items.of(group[0].prompt_id):
      other = others.of(item.id)
      if not own or other.mean is None:
        continue
      level = statistics.fmean(score.mean for _, score in own)
      if found := contradicting(_usable(other), level, above=False):
        asked = judge.render(prompt=item.prompt, response=item.response)
        yield asked, *found, found[1].score - found[0].score
      best, score = max(own, key=lambda x: x[1].mean)
      if found := contradicting(_usable(score), other.mean, above=True):
        asked = judge.render(prompt=item.prompt, response=judging.seen(best, config.judge))
        yield asked, *found, found[0].score - found[1].score
  for found in (scores, others):
    found.finish(s.path(RESPONSES))


def _usable(score: scoring.Score) -> Judgements:
  """The judgements that have a score and ended by themselves."""
  return [j for j in score.judgements if j.score is not None and j.finish == schema.EOS]


def _pair(on: str, asked: str, chosen: schema.Judgement, rejected: schema.Judgement
          ) -> schema.JudgePair:
  return schema.JudgePair(
      id=f'{chosen.response_id}/{on}', prompt=asked, chosen=chosen.text, rejected=rejected.text,
      chosen_finish=chosen.finish, rejected_finish=rejected.finish, chosen_id=chosen.id,
      rejected_id=rejected.id, chosen_score=chosen.score, rejected_score=rejected.score,
      chosen_token_ids=chosen.token_ids, rejected_token_ids=rejected.token_ids)


if __name__ == '__main__':
  cli.main(run, on=('majority', 'Where the pairs come from: majority or swapped.'))
