"""Meta-judging: compares judgements of the same response and makes preference pairs of judgements.

Meta-Rewarding (Wu et al. 2024, 2407.19594), section 2.3. The model decides which of two judgements
is better, in both orders. Wins are weighted by position, to correct for position bias. Elo scores
rank the judgements of a response. The best and the worst judgement form a preference pair. Two
limits apply: `meta_judge.share` bounds the share of these pairs among all pairs.
`meta_judge.score_share` bounds the share of them whose chosen judgements have the same score.
Without it the judge would learn to give its favourite score.
"""
from collections import Counter
import dataclasses
import itertools
import math

import numpy as np
from scipy import optimize

from srlm_jax import catalog, cli, conversation, hosts, InputError, records, schema, stage
from srlm_jax.data import templates
from srlm_jax.reward import judges, scores as scoring
from srlm_jax.sample import engine as engines, judge as judging, shards

SLOTS = ('request', 'first', 'second')
# Precision of a normal prior on Elo scores. It keeps them finite if a judgement always wins or
# always loses.
PRIOR = 1e-2
Group = list[schema.Judgement]  # of one response


@dataclasses.dataclass(frozen=True)
class Item:
  """Two judgements of a response to compare, in this order."""
  id: str
  first: schema.Judgement
  second: schema.Judgement


@dataclasses.dataclass(frozen=True)
class Rated:
  """A judgement with its Elo score in natural logits."""
  judgement: schema.Judgement
  elo: float


def run(config, workdir):
  """Writes MODEL/meta_judge: comparisons-*.jsonl and judge_pairs.jsonl.

  Reads MODEL/respond, MODEL/judge and MODEL/pairs. comparisons-*.jsonl keeps the raw text of each
  comparison. judge_pairs.jsonl has the format of pairs.jsonl; its prompts are judge prompts.
  """
  spec = catalog.find('sample.meta_judge')
  config = spec.view(config)
  c = config.meta_judge
  judge = judges.load(config.judge.template)
  meta = judges.load(c.template, SLOTS, 'config.meta_judge.template')
  s = stage.Stage(spec, config, workdir, f'{judge} {meta}')
  if s.done:
    return
  if config.judge.n < 2:
    raise InputError(f'config.judge.n is {config.judge.n}, but comparing judgements needs at least '
                     f'two per response; set it to 2 or more')
  asked = {r.id: judge.render(prompt=conversation.shown(r), response=judging.seen(r, config.judge))
           for r in s.read('respond/responses-*.jsonl')}
  judgements = s.read('judge/judgements-*.jsonl')
  pair_count = sum(1 for _ in s.read('pairs/pairs.jsonl'))
  groups = most_uncertain(scoring.by_response(judgements, config.judge.quorum), c.responses)
  comparisons = _compare(s, config, meta, asked, groups)
  if not hosts.is_first_host():
    return s.finish()
  made, dropped = _make_pairs(asked, groups, comparisons)
  kept = limit(made, pair_count, c.share, c.score_share)
  dropped['over the share limits'] = len(made) - len(kept)
  records.write(s.folder / 'judge_pairs.jsonl', kept)
  if not kept:
    reasons = ', '.join(f'{n} {why}' for why, n in (+dropped).items())
    hosts.log(f'{s.title}: no pairs of judgements from {len(groups)} responses with at least two '
              f'distinct judgements; dropped: {reasons or "none"}')
  unparsed = Counter(x.reason for x in comparisons if x.reason)
  s.finish(
      judge_pairs=len(kept), responses=len(groups), comparisons=len(comparisons),
      parsed=len(comparisons) - unparsed.total(), unparsed=dict(sorted(unparsed.items())),
      first_wins=sum(x.winner == 1 for x in comparisons),
      second_wins=sum(x.winner == -1 for x in comparisons),
      dropped=dict(+dropped), scores_chosen=scoring.histogram(p.chosen_score for p in kept))


def _compare(s: stage.Stage, config, meta: judges.Judge, asked: dict[str, str],
             groups: list[Group]) -> list[schema.Comparison]:
  """Samples the comparisons of every ordered pair in a group -> the records of all hosts.

  asked: {response id: judge prompt}.
  """
  c = config.meta_judge
  items = [Item(_comparison_id(first, second), first, second)
           for group in groups for first, second in itertools.permutations(group, 2)]

  def prompt(item, tokenizer):
    text = meta.render(request=asked[item.first.response_id], first=item.first.text,
                       second=item.second.text)
    return templates.encode_prompt(config.chat, text, tokenizer)

  def record(item, _, said, result):
    winner, reason = judges.read(meta, said.text, result.finish)
    return schema.Comparison(
        id=item.id, response_id=item.first.response_id, first=item.first.id,
        second=item.second.id, text=said.text, winner=winner, reason=reason, finish=result.finish)
  sampling = engines.Sampling(c.temperature, c.top_p, c.max_tokens, c.top_k)
  return list(shards.write(
      s, 'comparisons', sampling, items, len(items), prompt, record))


def _comparison_id(first: schema.Judgement, second: schema.Judgement) -> str:
  """A unique id for two judgements in this order; a colon in the second id is escaped."""
  return f'{first.id}:{second.id.replace("%", "%25").replace(":", "%3A")}'


def _make_pairs(
    asked: dict[str, str], groups: list[Group],
    comparisons: list[schema.Comparison]) -> tuple[list[schema.JudgePair], Counter]:
  """-> one pair per response, and the number of responses without one, by reason."""
  weights = position_weights([x.winner for x in comparisons])
  of_response = {}
  for comparison in comparisons:
    of_response.setdefault(comparison.response_id, []).append(comparison)
  made, dropped = [], Counter()
  for group in groups:
    response_id = group[0].response_id
    found = best_and_worst(group, of_response[response_id], weights)
    if isinstance(found, str):
      dropped[found] += 1
    else:
      made.append(_pair(asked[response_id], *found))
  return made, dropped


def most_uncertain(scores: dict[str, scoring.Score], responses: int) -> list[Group]:
  """-> groups of judgements, one per selected response, at least two judgements each.

  Selects, per prompt, the `responses` responses whose judgements have the largest spread. A group
  has the finished, parsed judgements with distinct texts. The order is that of the ids, so that it
  does not depend on the number of hosts.
  """
  by_prompt = {}
  for score in scores.values():
    usable = [j for j in score.judgements if j.score is not None and j.finish == schema.EOS]
    first_of_text = {j.text: j for j in reversed(usable)}
    if score.mean is not None and len(first_of_text) > 1:
      judgement = score.judgements[0]
      group = list(reversed(first_of_text.values()))
      by_prompt.setdefault(judgement.prompt_id, []).append(
          (-score.spread, judgement.response_id, group))
  return [group for _, found in sorted(by_prompt.items())
          for _, _, group in sorted(found)[:responses]]


def position_weights(winners: list[float | None]) -> tuple[float, float]:
  """Winners of comparisons -> the weight of a win in the first position and of a win in the second.

  The weight is the other position's share of all wins. So wins in the position that the model
  prefers count less.

  >>> position_weights([1.0, 1.0, 1.0, -1.0])
  (0.25, 0.75)
  """
  first, second = winners.count(1), winners.count(-1)
  wins = first + second
  return (second / wins, first / wins) if wins else (0.5, 0.5)


def elo(wins: np.ndarray) -> np.ndarray:
  """wins [N, N], the weight of i's wins over j -> Elo scores [N] in natural logits, with mean 0.

  Maximizes sum_ij wins_ij log sigmoid(e_i - e_j) with a weak normal prior (`PRIOR`).
  """
  def loss_and_gradient(e):
    difference = e[:, None] - e[None, :]  # [N, N]
    p_loss = np.exp(-np.logaddexp(0, difference))  # sigmoid(-difference)
    slope = wins * p_loss
    loss = (wins * np.logaddexp(0, -difference)).sum() + PRIOR / 2 * e @ e
    return loss, slope.sum(0) - slope.sum(1) + PRIOR * e
  e = optimize.minimize(loss_and_gradient, np.zeros(len(wins)), jac=True, method='L-BFGS-B').x
  return e - e.mean()


def best_and_worst(
    group: Group, comparisons: list[schema.Comparison], weights) -> tuple[Rated, Rated] | str:
  """-> the judgements of a response with the highest and the lowest Elo score, or a reason."""
  index = {j.id: i for i, j in enumerate(group)}
  wins = np.zeros((len(group), len(group)))
  for x in comparisons:
    first, second = index[x.first], index[x.second]
    if x.winner == 1:
      wins[first, second] += weights[0]
    elif x.winner == -1:
      wins[second, first] += weights[1]
  if not wins.any():
    return 'no comparison has a winner'
  scores = elo(wins)
  best, worst = int(scores.argmax()), int(scores.argmin())
  if math.isclose(scores[best], scores[worst], abs_tol=1e-6):
    return 'all Elo scores are equal'
  return (Rated(group[best], round(float(scores[best]), 4)),
          Rated(group[worst], round(float(scores[worst]), 4)))


def limit(made: list[schema.JudgePair], pair_count: int, share: float,
          score_share: float) -> list[schema.JudgePair]:
  """Selects the pairs of judgements with the largest Elo difference within two limits.

  1. They make up at most `share` of all pairs, including the `pair_count` pairs of responses.
  2. At most `score_share` of them have the same chosen score.
  """
  maximum = math.floor(share / (1 - share) * pair_count + 1e-9)
  ordered = sorted(made, key=lambda p: p.rejected_elo - p.chosen_elo)
  for size in range(min(maximum, len(made)), 0, -1):  # the largest selection that satisfies both
    per_score = math.floor(score_share * size + 1e-9)
    count, kept = Counter(), []
    for pair in ordered:
      if count[pair.chosen_score] < per_score and len(kept) < size:
        count[pair.chosen_score] += 1
        kept.append(pair)
    if len(kept) == size:
      return kept
  return []


def _pair(prompt: str, best: Rated, worst: Rated) -> schema.JudgePair:
  chosen, rejected = best.judgement, worst.judgement
  return schema.JudgePair(
      id=f'{chosen.response_id}/judge', prompt=prompt, chosen=chosen.text, rejected=rejected.text,
      chosen_finish=chosen.finish, rejected_finish=rejected.finish, chosen_id=chosen.id,
      rejected_id=rejected.id, chosen_score=chosen.score, rejected_score=rejected.score,
      chosen_elo=best.elo, rejected_elo=worst.elo, chosen_token_ids=chosen.token_ids,
      rejected_token_ids=worst.judgement.token_ids)


if __name__ == '__main__':
  cli.main(run)
