"""Judges the judge: compares judgements of one response pairwise, and makes pairs of judgements to train on.

Wu et al. 2024 (Meta-Rewarding, 2407.19594), 2.3: the same model says which of two judgements is the better one, in
both orders; positions are weighed so that a model that likes the first place does not decide by it; Elo scores order
the judgements of a response, and the highest against the lowest is a preference pair. Two things bound the pairs: their
share of all pairs (`meta_judge.share`), and the share of them that has one score chosen (`meta_judge.score_share`),
without which the judge would learn to give the score that it likes best.
"""
from collections import Counter
import itertools
import math

import jax
import numpy as np
from scipy import optimize

from srlm_jax import catalog, cli, hosts, InputError, records, stage
from srlm_jax.data import templates
from srlm_jax.reward import judges, scores as scoring
from srlm_jax.sample import engine as engines, judge as judge_stage, shards

SLOTS = ('request', 'first', 'second')
PRIOR = 1e-2  # of a normal prior on Elo scores: keeps those finite of a judgement that won or lost every time


def run(config, workdir):
  """MODEL/respond, MODEL/judge, MODEL/pairs -> MODEL/meta_judge: comparisons-*.jsonl, one a line with its raw text,
  and judge_pairs.jsonl, records as of pairs.jsonl whose prompt is the judge's."""
  spec = catalog.find('sample.meta_judge')
  config = spec.view(config)
  c, folder = config.meta_judge, spec.folder(workdir, config).parent
  judge, meta = judges.load(config.judge.template), judges.load(c.template, SLOTS, 'config.meta_judge.template')
  s = stage.Stage(spec, config, workdir, f'{judge} {meta}')
  if s.done:
    return
  if config.judge.n < 2:
    raise InputError(f'config.judge.n is {config.judge.n}: with one judgement a response there are none to compare; '
                     f'set it to 2 or more')
  asked = {r['id']: judge.render(prompt=r['prompt'], response=r['response'])
           for r in records.read_shards(folder / 'respond', 'responses', 'id', 'prompt', 'response')}
  judgements = records.read_shards(folder / 'judge', 'judgements', 'id', 'prompt_id', 'response_id', 'text', 'score',
                                   'finish')
  pairs = sum(1 for _ in records.read(s.inputs[-1]))
  chosen = doubtful(scoring.by_response(judgements, config.judge.quorum), c.responses)
  mine = chosen[jax.process_index()::jax.process_count()]
  rows = [(a, b) for group in mine for a, b in itertools.permutations(group, 2)]
  sampling = engines.Sampling(c.temperature, c.top_p, c.max_tokens, c.top_k)

  def prompt(item, tokenizer):
    first, second = item['pair']
    asks = meta.render(request=asked[first['response_id']], first=first['text'],
                       second=second['text'])
    return templates.encode_prompt(config.chat, asks, tokenizer)

  def record(item, _, text, result):
    first, second = item['pair']
    winner, reason = judge_stage.read(meta, text, result.finish)
    return dict(id=item['id'], response_id=first['response_id'], first=first['id'],
                second=second['id'], text=text, winner=winner, reason=reason, finish=result.finish)
  comparisons = list(shards.write(
      s, config, 'comparisons', sampling,
      [dict(id=_pair_id(a, b), pair=(a, b)) for a, b in rows], len(rows), prompt, record))
  if not hosts.is_first_host():
    return s.finish()
  weights = position_weights(comparisons)
  of_response = {}
  for comparison in comparisons:
    of_response.setdefault(comparison['response_id'], []).append(comparison)
  made, dropped = [], Counter()
  for group in chosen:
    found = best_and_worst(group, of_response[group[0]['response_id']], weights)
    if isinstance(found, str):
      dropped[found] += 1
    else:
      made.append(_pair(asked[group[0]['response_id']], *found))
  kept = bounded(made, pairs, c.share, c.score_share)
  dropped['above the shares'] = len(made) - len(kept)
  records.write(s.folder / 'judge_pairs.jsonl', kept)
  if not kept:
    hosts.say(f'{s.title}: no pair of judgements; of {len(chosen)} responses with two different judgements '
              f'{", ".join(f"{n} {why}" for why, n in (+dropped).items()) or "none was dropped"}')
  reasons = Counter(x['reason'] for x in comparisons if x['reason'])
  s.finish(judge_pairs=len(kept), responses=len(chosen), comparisons=len(comparisons),
           parsed=len(comparisons) - reasons.total(), unparsed=dict(sorted(reasons.items())),
           first_wins=sum(x['winner'] == 1 for x in comparisons),
           second_wins=sum(x['winner'] == -1 for x in comparisons),
           dropped=dict(+dropped), scores_chosen=scoring.histogram(p['chosen_score'] for p in kept))


def _pair_id(a: dict, b: dict) -> str:
  """A name for two judgements in this order; a colon in the second id is escaped, so that no others have it."""
  return f'{a["id"]}:{b["id"].replace("%", "%25").replace(":", "%3A")}'


def doubtful(scores: dict[str, scoring.Score], responses: int) -> list[list[dict]]:
  """Of each prompt the `responses` on whose judgements the judge differs most -> their finished, parsed judgements of
  different texts, two or more of each. In the order of ids, however many hosts wrote them."""
  groups = {}
  for score in scores.values():
    texts = {j['text']: j for j in reversed(score.judgements) if j['score'] is not None and j['finish'] == 'eos'}
    if score.mean is not None and len(texts) > 1:
      judgement = score.judgements[0]
      groups.setdefault(judgement['prompt_id'], []).append(
          (-score.spread, judgement['response_id'], list(reversed(texts.values()))))
  return [judged for _, group in sorted(groups.items()) for _, _, judged in sorted(group)[:responses]]


def position_weights(comparisons: list[dict]) -> tuple[float, float]:
  """What a win in the first and in the second place is worth: the other place's share of all wins, so that wins at
  the place that the model likes count less.

  >>> position_weights([dict(winner=1.0)] * 3 + [dict(winner=-1.0)])
  (0.25, 0.75)
  """
  first, second = (sum(x['winner'] == place for x in comparisons) for place in (1, -1))
  return (second / (first + second), first / (first + second)) if first + second else (0.5, 0.5)


def elo(wins: np.ndarray) -> np.ndarray:
  """wins [N, N], the weight with which i beat j -> Elo scores [N] in the scale of natural logits, of sum 0.

  They maximise sum_ij wins_ij log sigmoid(e_i - e_j), with a weak normal prior (`PRIOR`).
  """
  def loss(e):
    apart = e[:, None] - e[None, :]  # [N, N]
    p = np.exp(-np.logaddexp(0, apart))  # sigmoid(-apart)
    slope = wins * p
    return (wins * np.logaddexp(0, -apart)).sum() + PRIOR / 2 * e @ e, slope.sum(0) - slope.sum(1) + PRIOR * e
  e = optimize.minimize(loss, np.zeros(len(wins)), jac=True, method='L-BFGS-B').x
  return e - e.mean()


def best_and_worst(group: list[dict], comparisons: list[dict], weights) -> tuple[dict, dict] | str:
  """The judgements of one response with the highest and the lowest Elo, or why there are none."""
  places = {j['id']: i for i, j in enumerate(group)}
  wins = np.zeros((len(group), len(group)))
  for x in comparisons:
    first, second = places[x['first']], places[x['second']]
    if x['winner'] == 1:
      wins[first, second] += weights[0]
    elif x['winner'] == -1:
      wins[second, first] += weights[1]
  if not wins.any():
    return 'no comparison has a winner'
  scores = elo(wins)
  best, worst = int(scores.argmax()), int(scores.argmin())
  if math.isclose(scores[best], scores[worst], abs_tol=1e-6):
    return 'all judgements equal'
  return dict(group[best], elo=round(float(scores[best]), 4)), dict(group[worst], elo=round(float(scores[worst]), 4))


def bounded(made: list[dict], pairs: int, share: float, score_share: float) -> list[dict]:
  """The widest apart in Elo first, as many that they are at most `share` of all pairs with the `pairs` of responses,
  and at most `score_share` of them have one score chosen."""
  limit = math.floor(share / (1 - share) * pairs + 1e-9)
  order = sorted(made, key=lambda p: p['rejected_elo'] - p['chosen_elo'])  # a stable sort: the first of equals
  for size in range(min(limit, len(made)), 0, -1):  # the largest set that keeps both bounds
    each = math.floor(score_share * size + 1e-9)
    count, kept = Counter(), []
    for pair in order:
      if count[pair['chosen_score']] < each and len(kept) < size:
        count[pair['chosen_score']] += 1
        kept.append(pair)
    if len(kept) == size:
      return kept
  return []


def _pair(prompt: str, best: dict, worst: dict) -> dict:
  record = dict(id=f'{best["response_id"]}/judge', prompt=prompt, chosen=best['text'], rejected=worst['text'])
  for side, judgement in (('chosen', best), ('rejected', worst)):
    record |= {f'{side}_{key}': judgement[key] for key in ('score', 'elo', 'finish', 'id')}
  return record


if __name__ == '__main__':
  cli.main(run)
