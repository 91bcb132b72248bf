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
from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import math
import operator
import statistics

from srlm_jax import catalog, cli, conversation, hosts, records, schema, spill, stage
from srlm_jax.data import similar
from srlm_jax.reward import judges, scores as scoring

RESPONSES, JUDGEMENTS = 'respond/responses-*.jsonl', 'judge/judgements-*.jsonl'
SWAPPED = 'judge_swapped/judgements-*.jsonl'
Judgements = list[schema.Judgement]
Found = tuple[str, schema.Judgement, schema.Judgement, float]  # judge prompt, chosen, rejected, gap


@dataclasses.dataclass(frozen=True, slots=True)
class Rating:
  """What a pair of judgements is selected by."""
  id: str  # of the pair
  chosen_score: float
  gap: float  # how much better the chosen judgement is; only compared


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
    ratings.append(Rating(pair.id, pair.chosen_score, gap))
    pairs.add(pair.id, records.dump(pair))
  kept = limit(ratings, count, config.judge_pairs.share, config.judge_pairs.score_share)
  s.begin()
  if hosts.is_first_host():
    with records.replacing(s.folder / spec.writes[0]) as out:
      out.writelines(line for rating in kept for line in pairs.get(rating.id))
  s.finish(pairs=len(kept), over_the_limits=len(ratings) - len(kept),
           scores_chosen=scoring.histogram(rating.chosen_score for rating in kept))


def limit(made: Sequence[Rating], pair_count: int, share: float,
          score_share: float) -> list[Rating]:
  """Selects the pairs of judgements with the largest gap within two limits.

  1. They make up at most `share` of all pairs, including the `pair_count` pairs of responses.
  2. At most `score_share` of them have the same chosen score.
  """
  maximum = math.floor(share / (1 - share) * pair_count + 1e-9)
  counts = Counter(pair.chosen_score for pair in made)

  def most(size: int) -> int:
    """With the same chosen score, in a selection of this size."""
    return math.floor(score_share * size + 1e-9)
  size = next((size for size in range(min(maximum, len(made)), 0, -1)  # the largest that there is
               if sum(min(count, most(size)) for count in counts.values()) >= size), 0)
  taken, kept = Counter(), []
  for pair in sorted(made, key=lambda p: -p.gap):
    if taken[pair.chosen_score] < most(size) and len(kept) < size:
      taken[pair.chosen_score] += 1
      kept.append(pair)
  return kept


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


def swapped(read: Callable[[], Iterable[schema.Response]], config) -> Iterator[judges.Item]:
  """Yields each prompt with a response to another one, which is therefore worse than its own.

  The other prompt is the most similar one that has no response in common with this one; else it may
  ask for the same. Of its responses, the first that ended by itself is taken. read() -> responses,
  those of a prompt one after the other; config: the section `judge`.
  """
  names, index, said, first = [], similar.Index(), [], []
  for group in scoring.by_prompt(read()):
    names.append(group[0].prompt_id)
    index.add(conversation.shown(group[0]))
    texts = [judges.seen(r, config) for r in group]
    said.append({hash(text) for text in texts})
    first.append(next((text for r, text in zip(group, texts, strict=True)
                       if r.finish == schema.EOS), None))
  for i, name in enumerate(names):
    found = index.nearest(index.texts[i], lambda j, i=i: j != i and first[j] is not None
                          and said[i].isdisjoint(said[j]))
    if found:
      yield judges.Item(records.join(name, names[found[1]]), name, index.texts[i], first[found[1]])


def _majority(s: stage.Stage, config, judge: judges.Judge) -> Iterator[Found]:
  scores = scoring.Judged(s.read(JUDGEMENTS), config.judge.quorum, s.path(JUDGEMENTS))
  for r in s.read(RESPONSES):
    if found := vote(_usable(scores.of(r.id))):
      asked = judge.render(prompt=conversation.shown(r), response=judges.seen(r, config.judge))
      yield asked, *found
  scores.finish(s.path(RESPONSES))


def _swapped(s: stage.Stage, config, judge: judges.Judge) -> Iterator[Found]:
  scores = scoring.Judged(s.read(JUDGEMENTS), config.judge.quorum, s.path(JUDGEMENTS))
  others = scoring.Judged(s.read(SWAPPED), config.judge.quorum, s.path(SWAPPED))
  items = records.Matched(swapped(lambda: s.read(RESPONSES), config.judge),
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
        asked = judge.render(prompt=item.prompt, response=judges.seen(best, config.judge))
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
