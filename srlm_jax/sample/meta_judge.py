"""Meta-judging: compares judgements of the same response and makes preference pairs of judgements.

Meta-Rewarding (Wu et al. 2024, 2407.19594), section 2.3. The model decides which of two judgements
is better, in both orders. Wins are weighted by position, to correct for position bias. Elo scores
rank the judgements of a response. The best and the worst judgement form a preference pair. Two
limits apply: `judge_pairs.share` bounds the share of these pairs among all pairs.
`judge_pairs.score_share` bounds the share of them whose chosen judgements have the same score.
Without it the judge would learn to give its favourite score.
"""
from collections import Counter
from collections.abc import Iterable, Iterator
import dataclasses
import functools
import itertools
import math
import operator

import msgspec
import numpy as np
from scipy import optimize

from srlm_jax import catalog, cli, conversation, hosts, InputError, records, schema, spill, stage
from srlm_jax.data import templates
from srlm_jax.reward import judge_pairs, judges, scores as scoring
from srlm_jax.sample import engine as engines, shards

SLOTS = ('request', 'first', 'second')
# Precision of a normal prior on Elo scores. It keeps them finite if a judgement always wins or
# always loses.
PRIOR = 1e-2
Group = list[schema.Judgement]  # of one response


@dataclasses.dataclass(frozen=True)
class Judged:
  """A response whose judgements are compared."""
  asked: str    # the judge prompt
  group: Group


@dataclasses.dataclass(frozen=True)
class Item:
  """Two judgements of a response to compare, in this order."""
  id: str
  asked: str
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
  pair_count = sum(1 for _ in s.read('pairs/pairs.jsonl'))
  selected = select(s, config, judge)
  items = sum(len(judged.group) * (len(judged.group) - 1) for judged in selected)
  winners = Winners(_compare(s, config, meta, selected, items))
  if not hosts.is_first_host():
    return s.finish()
  made = Made(selected, s, winners.weights)
  kept = judge_pairs.limit(
      made.ratings, judge_pairs.allowed(pair_count, config.judge_pairs.share),
      config.judge_pairs.score_share)
  dropped = made.dropped + Counter({'over the limits': len(made.ratings) - len(kept)})
  with records.replacing(s.folder / 'judge_pairs.jsonl') as out:
    out.writelines(map(made.line, kept))
  if not kept:
    reasons = ', '.join(f'{n} {why}' for why, n in dropped.items())
    hosts.log(f'{s.title}: no pairs of judgements from {len(selected)} responses with at least two '
              f'distinct judgements; dropped: {reasons or "none"}')
  s.finish(
      judge_pairs=len(kept), responses=len(selected), comparisons=winners.count,
      parsed=winners.count - winners.unparsed.total(),
      unparsed=dict(sorted(winners.unparsed.items())), first_wins=winners.first,
      second_wins=winners.second, dropped=dict(dropped),
      scores_chosen=scoring.histogram(rating.chosen_score for rating in kept))


class Selected:
  """The responses whose judgements are compared, in the order of their prompts' ids; on a disk."""

  def __init__(self):
    self._lines, self._count = spill.Spill(), 0

  def add(self, prompt_id: str, judged: Judged):
    self._lines.add(prompt_id, msgspec.json.encode(judged).decode())
    self._count += 1

  def __len__(self) -> int:
    return self._count

  def __iter__(self) -> Iterator[Judged]:
    decode = msgspec.json.Decoder(Judged).decode
    return map(decode, self._lines.sorted())


def select(s: stage.Stage, config, judge: judges.Judge) -> Selected:
  """Reads the responses and their judgements, prompt by prompt -> those to compare.

  The order is that of the ids, so that it does not depend on the number of hosts.
  """
  selected, file, answers = Selected(), 'judge/judgements-*.jsonl', 'respond/responses-*.jsonl'
  scores = scoring.Judged(s.read(file), config.judge.quorum, s.path(file))
  for responses in scoring.by_prompt(s.read(answers)):
    by_id = {r.id: r for r in responses}
    for group in most_uncertain([scores.of(r.id) for r in responses], config.meta_judge.responses):
      r = by_id[group[0].response_id]
      asked = judge.render(prompt=conversation.shown(r), response=judges.seen(r, config.judge))
      selected.add(r.prompt_id, Judged(asked, group))
  scores.finish(s.path(answers))
  return selected


def _compare(s: stage.Stage, config, meta: judges.Judge, selected: Selected,
             count: int) -> Iterator[schema.Comparison]:
  """Samples the comparisons of every ordered pair in a group, `count` in all.

  Returns the records of all hosts.
  """
  c = config.meta_judge
  items = (Item(_comparison_id(first, second), judged.asked, first, second)
           for judged in selected for first, second in itertools.permutations(judged.group, 2))

  def prompt(item, tokenizer):
    text = meta.render(request=item.asked, first=item.first.text, second=item.second.text)
    return templates.encode_prompt(config.chat, text, tokenizer)

  def record(item, _, said, result):
    winner, reason = judges.read(meta, said.text, result.finish)
    return schema.Comparison(
        id=item.id, response_id=item.first.response_id, first=item.first.id,
        second=item.second.id, text=said.text, winner=winner, reason=reason, finish=result.finish)
  sampling = engines.Sampling(c.temperature, c.top_p, c.max_tokens, c.top_k)
  return shards.write(s, 'comparisons', sampling, items, count, prompt, record)


def _comparison_id(first: schema.Judgement, second: schema.Judgement) -> str:
  """A unique id for two judgements in this order; a colon in the second id is escaped."""
  return f'{first.id}:{second.id.replace("%", "%25").replace(":", "%3A")}'


class Winners:
  """Counts of comparisons: all, wins in each position, and those without a winner by reason."""

  def __init__(self, comparisons: Iterable[schema.Comparison]):
    winners, self.unparsed = Counter(), Counter()
    for comparison in comparisons:
      winners[comparison.winner] += 1
      if comparison.reason:
        self.unparsed[comparison.reason] += 1
    self.count, self.first, self.second = winners.total(), winners[1], winners[-1]
    self.weights = position_weights(self.first, self.second)


class Made:
  """The pairs of judgements, one per response.

  ratings: of each pair; dropped: the number of responses without one, by reason
  """

  def __init__(self, selected: Selected, s: stage.Stage, weights: tuple[float, float]):
    """`s`: the stage, which has written the comparisons."""
    self.ratings, self.dropped, self._pairs = [], Counter(), spill.Spill()
    comparisons = records.Matched(
        records.read_shards(s.folder, 'comparisons', schema.Comparison),
        operator.attrgetter('response_id'), s.folder / 'comparisons-*.jsonl')
    for judged in selected:
      response_id = judged.group[0].response_id
      found = best_and_worst(judged.group, comparisons.of(response_id), weights)
      if isinstance(found, str):
        self.dropped[found] += 1
        continue
      pair = _pair(judged.asked, *found)
      gap = pair.chosen_elo - pair.rejected_elo
      self.ratings.append(judge_pairs.Rating(pair.id, pair.chosen_score, gap))
      self._pairs.add(pair.id, records.dump(pair))
    comparisons.finish(s.path('judge/judgements-*.jsonl'))

  def line(self, rating: judge_pairs.Rating) -> str:
    """The pair as a line of a file."""
    line, = self._pairs.get(rating.id)
    return line


def most_uncertain(scores: Iterable[scoring.Score], responses: int) -> list[Group]:
  """The scores of a prompt's responses -> groups of at least two judgements, one per response.

  Selects the `responses` responses whose judgements have the largest spread. A group has the
  finished, parsed judgements with distinct texts.
  """
  found = []
  for score in scores:
    first_of_text = {j.text: j for j in reversed(judge_pairs.usable(score))}
    if score.mean is not None and len(first_of_text) > 1:
      group = list(reversed(first_of_text.values()))
      found.append((-score.spread, group[0].response_id, group))
  return [group for *_, group in sorted(found, key=operator.itemgetter(0, 1))[:responses]]


def position_weights(first: int, second: int) -> tuple[float, float]:
  """The wins in each position -> the weight of a win in the first and of a win in the second.

  The weight is the other position's share of all wins. So wins in the position that the model
  prefers count less.

  >>> position_weights(3, 1)
  (0.25, 0.75)
  """
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


@functools.lru_cache(10_000)  # scipy takes milliseconds, and few groups have other wins
def _elo(wins: tuple[tuple[float, ...], ...]) -> np.ndarray:
  return elo(np.array(wins))


def best_and_worst(
    group: Group, comparisons: list[schema.Comparison], weights) -> tuple[Rated, Rated] | str:
  """-> the judgements of a response with the highest and the lowest Elo score, or a reason."""
  index = {j.id: i for i, j in enumerate(group)}
  wins = np.zeros((len(group), len(group)))
  for x in comparisons:
    if x.first not in index or x.second not in index:
      raise InputError(f'the comparison {x.id} is of a judgement that this stage does not compare; '
                       f'delete the folder meta_judge of that model and run its stage again')
    first, second = index[x.first], index[x.second]
    if x.winner == 1:
      wins[first, second] += weights[0]
    elif x.winner == -1:
      wins[second, first] += weights[1]
  if not wins.any():
    return 'no comparison has a winner'
  scores = np.asarray(_elo(tuple(map(tuple, wins.tolist()))))
  best, worst = int(scores.argmax()), int(scores.argmin())
  if math.isclose(scores[best], scores[worst], abs_tol=1e-6):
    return 'all Elo scores are equal'
  return (Rated(group[best], round(float(scores[best]), 4)),
          Rated(group[worst], round(float(scores[worst]), 4)))


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
