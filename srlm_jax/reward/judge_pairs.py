"""Makes preference pairs of judgements, which train the judge, without comparing two of them.

  python -m srlm_jax.reward.judge_pairs --config=iter2:tiny --workdir=RUN --on=majority

majority  The judgements of a response vote on its score. Chosen is a judgement with the score of
          most votes, rejected the one whose score is farthest from it (Self-Consistency Preference
          Optimization, Prasad et al. 2024, 2411.04109, which makes such pairs of answers).
swapped   A response to a similar other prompt (`reward/swap.py`) is usually worse than the prompt's
          own responses (Self-Taught Evaluators, Wang et al. 2024, 2408.02666, whose judge compares
          two responses). Of its judgements, chosen is one with a score below the mean of the own
          responses, and rejected one with a score that is not. Of the judgements of an own
          response, chosen is one with a score above the mean of the swapped one. As many pairs of
          either kind are kept (`judge_pairs.of`): one kind alone can teach the judge to give every
          response low scores, or high ones.

`sample/meta_judge.py` makes such pairs by comparing two judgements with each other.
"""
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
import dataclasses
import math
import operator
import statistics

from srlm_jax import catalog, cli, conversation, hosts, InputError, records, schema, spill, stage
from srlm_jax.reward import judges, scores as scoring

RESPONSES, JUDGEMENTS = 'respond/responses-*.jsonl', 'judge/judgements-*.jsonl'
SWAPPED, OF_SWAPPED = 'swap/swapped.jsonl', 'judge_swapped/judgements-*.jsonl'
Judgements = list[schema.Judgement]
# Kind of the pair, judge prompt, chosen, rejected and gap; or why there is no pair.
Found = tuple[str, str, schema.Judgement, schema.Judgement, float] | str
KINDS = 'own', 'swapped'  # the responses whose judgements make a pair
# The fewest judgements of a response from which a pair can be made. Of two, none is the majority.
LEAST = dict(judge_pairs=2, majority_pairs=3, swapped_pairs=2)


@dataclasses.dataclass(frozen=True, slots=True)
class Rating:
  """What a pair of judgements is selected by."""
  id: str  # of the pair
  chosen_score: float
  gap: float  # how much better the chosen judgement is; only compared


def run(config, workdir, on: str = 'majority'):
  """Writes MODEL/majority/majority_pairs.jsonl or MODEL/swapped/swapped_pairs.jsonl.

  Reads MODEL/respond and MODEL/judge, and for swapped MODEL/swap and MODEL/judge_swapped.
  """
  refuse_mistakes(config, [f'{on}_pairs'])
  spec = catalog.find('reward.judge_pairs', on)
  config = spec.view(config)
  judge = judges.load(config.judge.template)
  s = stage.Stage(spec, config, workdir, str(judge))
  if s.done:
    return
  pairs, dropped = spill.Spill(), Counter()
  ratings = {kind: [] for kind in _kinds(config, on)}
  for found in dict(majority=_majority, swapped=_swapped)[on](s, config, judge, ratings):
    if isinstance(found, str):
      dropped[found] += 1
      continue
    kind, asked, chosen, rejected, gap = found
    pair = _pair(on, asked, chosen, rejected)
    ratings[kind].append(Rating(pair.id, pair.chosen_score, gap))
    pairs.add(pair.id, records.dump(pair))
  c, count = config.judge_pairs, sum(1 for _ in s.read('pairs/pairs.jsonl'))
  kept = even(ratings.values(), allowed(count, c.share), c.score_share)
  dropped['over the limits'] = sum(map(len, ratings.values())) - len(kept)
  s.begin()
  if hosts.is_first_host():
    with records.replacing(s.folder / spec.writes[0]) as out:
      out.writelines(line for rating in kept for line in pairs.get(rating.id))
  hosts.log(f'{s.title}: {len(kept)} pairs of judgements; dropped: ' + ', '.join(
      f'{n} {reason}' for reason, n in sorted(dropped.items()) if n))
  s.finish(pairs=len(kept), dropped=dict(sorted(dropped.items())),
           scores_chosen=scoring.histogram(rating.chosen_score for rating in kept))


def refuse_mistakes(config, data: Collection[str]):
  """Raises InputError if `data`, as in `train.data`, names pairs of judgements that cannot be made.

  They need judgements by the sampler, and enough of each response.
  """
  for name, least in LEAST.items():
    if name not in data:
      continue
    if config.judge.by != 'model':
      raise InputError(f'config.judge.by is {config.judge.by}, and {name} train the model on its '
                       f'own judgements; set judge.by=model, or take {name} out of train.data')
    if config.judge.n < least:
      raise InputError(f'config.judge.n is {config.judge.n}, and {name} need {least} judgements of '
                       f'a response; raise judge.n, or take {name} out of train.data')


def allowed(pair_count: int, share: float) -> int:
  """How many pairs of judgements make up at most `share` of all, beside `pair_count` others."""
  return math.floor(share / (1 - share) * pair_count + 1e-9)


def limit(made: Sequence[Rating], maximum: int, score_share: float) -> list[Rating]:
  """Selects up to `maximum` pairs of judgements with the largest gap.

  At most `score_share` of them have the same chosen score. Among equal gaps, a hash of the id
  decides, so no part of the prompts is preferred.
  """
  counts = Counter(pair.chosen_score for pair in made)

  def most(size: int) -> int:
    """With the same chosen score, in a selection of this size."""
    return math.floor(score_share * size + 1e-9)
  size = next((size for size in range(min(maximum, len(made)), 0, -1)  # the largest that there is
               if sum(min(count, most(size)) for count in counts.values()) >= size), 0)
  taken, kept = Counter(), []
  for pair in sorted(made, key=lambda p: (-p.gap, records.digest(p.id))):
    if taken[pair.chosen_score] < most(size) and len(kept) < size:
      taken[pair.chosen_score] += 1
      kept.append(pair)
  return kept


def even(kinds: Collection[Sequence[Rating]], maximum: int, score_share: float) -> list[Rating]:
  """Selects up to `maximum` pairs, as many of each kind as of the others; see `limit`."""
  most, size = -1, maximum // len(kinds)
  while size != most:  # `limit` cannot reach every size
    most, size = size, min(len(limit(made, size, score_share)) for made in kinds)
  return [pair for made in kinds for pair in limit(made, size, score_share)]


def usable(score: scoring.Score) -> Judgements:
  """The judgements of a response that have a score and ended by themselves."""
  return [j for j in score.judgements if j.score is not None and j.finish == schema.EOS]


def vote(judgements: Judgements) -> tuple[schema.Judgement, schema.Judgement, int] | str:
  """The judgements of a response -> chosen, rejected, and by how many votes chosen wins.

  Else the reason why there is no pair.
  """
  votes = Counter(j.score for j in judgements).most_common(2)
  if len(votes) < 2:
    return 'fewer than two scores'
  if votes[0][1] == votes[1][1]:
    return 'no score has most votes'
  (score, most), _ = votes
  chosen = next(j for j in judgements if j.score == score)
  rejected = max(judgements, key=lambda j: abs(j.score - score))
  return chosen, rejected, most - sum(j.score == rejected.score for j in judgements)


def apart(judgements: Judgements, level: float, is_better: bool
          ) -> tuple[schema.Judgement, schema.Judgement, float] | str:
  """The judgements of a response that is better or worse than others -> chosen, rejected.

  `level` is the mean score of the others. Chosen is the judgement nearest to it on the right side,
  rejected the farthest of the rest. The third is by how much their scores differ. Else the reason
  why there is no pair.
  """
  sign = 1 if is_better else -1
  ahead = [sign * (j.score - level) for j in judgements]
  if not ahead:
    return 'no usable judgement'
  if statistics.fmean(ahead) <= 0:
    return 'the mean score is on the wrong side'
  if min(ahead) > 0:
    return 'all judgements agree'
  chosen = judgements[ahead.index(min(x for x in ahead if x > 0))]
  rejected = judgements[ahead.index(min(ahead))]
  return chosen, rejected, abs(chosen.score - rejected.score)


def _kinds(config, on: str) -> tuple[str, ...]:
  if on == 'majority':
    return 'own',
  return KINDS if config.judge_pairs.of == 'both' else (config.judge_pairs.of,)


def _majority(s: stage.Stage, config, judge: judges.Judge, kinds) -> Iterator[Found]:
  kind, = kinds
  scores = scoring.Judged(s.read(JUDGEMENTS), config.judge.quorum, s.path(JUDGEMENTS))
  for r in s.read(RESPONSES):
    score = scores.of(r.id)
    found = vote(usable(score)) if score.mean is not None else 'no score'
    yield found if isinstance(found, str) else (kind, _asked(r, config, judge), *found)
  scores.finish(s.path(RESPONSES))


def _swapped(s: stage.Stage, config, judge: judges.Judge, kinds) -> Iterator[Found]:
  scores = scoring.Judged(s.read(JUDGEMENTS), config.judge.quorum, s.path(JUDGEMENTS))
  others = scoring.Judged(s.read(OF_SWAPPED), config.judge.quorum, s.path(OF_SWAPPED))
  items = records.Matched(s.read(SWAPPED), operator.attrgetter('prompt_id'), s.path(SWAPPED))
  for group in scoring.by_prompt(s.read(RESPONSES)):
    swapped = items.of(group[0].prompt_id)
    judged = [[scores.of(r.id) for r in group], [others.of(r.id) for r in swapped]]
    own, other = (
        [score.mean for score in found if score.mean is not None] for found in judged)
    if not (own and other):
      yield 'no score' if swapped else 'no similar prompt'
      continue
    for kind, responses, found, level in (
        ('own', group, judged[0], statistics.fmean(other)),
        ('swapped', swapped, judged[1], statistics.fmean(own))):
      for r, score in zip(responses, found, strict=True) if kind in kinds else ():
        made = apart(usable(score), level, kind == 'own') if score.mean is not None else 'no score'
        yield made if isinstance(made, str) else (kind, _asked(r, config, judge), *made)
  for found in (scores, items):
    found.finish(s.path(RESPONSES))
  others.finish(s.path(SWAPPED))


def _asked(r: schema.Response, config, judge: judges.Judge) -> str:
  return judge.render(prompt=conversation.shown(r), response=judges.seen(r, config.judge))


def _pair(on: str, asked: str, chosen: schema.Judgement, rejected: schema.Judgement
          ) -> schema.JudgePair:
  return schema.JudgePair(
      id=f'{chosen.response_id}/{on}', prompt=asked, chosen=chosen.text, rejected=rejected.text,
      chosen_finish=chosen.finish, rejected_finish=rejected.finish, chosen_id=chosen.id,
      rejected_id=rejected.id, chosen_score=chosen.score, rejected_score=rejected.score,
      chosen_token_ids=chosen.token_ids, rejected_token_ids=rejected.token_ids)


if __name__ == '__main__':
  cli.main(run, on=('majority', 'Where the pairs come from: majority or swapped.'))
