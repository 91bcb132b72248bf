"""Strategies that select the chosen and the rejected response among a prompt's candidates.

`pairs.strategy` names the strategy. Each strategy maps the scored candidates of one prompt to
(chosen, rejected), or to the reason why the prompt gives no pair. All of them follow these rules:

- A candidate must have text and a score. A response whose thinking did not end has no text.
- A response that was cut at the length limit may be rejected. It may be chosen only if
  `pairs.unfinished_chosen` is set.
- The chosen response has the higher score, and the two texts differ.
- Among equal candidates the first one is taken.
"""
from collections.abc import Callable
import dataclasses
import functools
import itertools

from scipy import stats

from srlm_jax import closest, InputError
from srlm_jax.reward import scores as scoring


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One response to a prompt, with the scores that the strategies use."""
  id: str
  response: str
  finish: str
  score: float | None            # mean of the sampler's judgements
  spread: float | None = None    # standard deviation of these judgements
  again: float | None = None     # consistency: mean of the older model's judgements
  implicit: float | None = None  # implicit_reward: log p under the sampler - under the older model
  older: bool = False            # temporal: the older model wrote it
  token_ids: tuple[int, ...] = ()  # as in schema.Response

  @property
  def valid(self) -> bool:
    return bool(self.response.strip()) and self.score is not None


Choice = tuple[Candidate, Candidate] | str


def max_min(candidates: list[Candidate], config) -> Choice:
  """The highest mean score against the lowest: Yuan et al. 2024, section 2.2."""
  return _best_and_worst(candidates, candidates, config)


def margin(candidates: list[Candidate], config) -> Choice:
  """`max_min`, restricted to pairs whose scores differ by at least `margin` points.

  West-of-N (Pace et al. 2024, 2401.12086) likewise keeps only the most confident of its best-of-N
  pairs.
  """
  choice = max_min(candidates, config)
  if not isinstance(choice, str) and choice[0].score - choice[1].score < config.margin:
    return 'score gap below the margin'
  return choice


def length_controlled(candidates: list[Candidate], config) -> Choice:
  """The shortest response of the top score band against the longest of the bottom band.

  Each band spans the fraction `rho` of the score range: Meta-Rewarding (Wu et al. 2024,
  2407.19594), section 2.2. With rho = 0, a band holds only equal scores.
  """
  choice = max_min(candidates, config)
  if isinstance(choice, str):
    return choice
  high, low = choice[0].score, choice[1].score
  top = [c for c in candidates if _may_be_chosen(c, config)
         and c.score >= (1 - config.rho) * high + config.rho * low]
  chosen = min(top, key=_length)
  bottom = [c for c in candidates if c.valid and c.response != chosen.response
            and c.score <= (1 - config.rho) * low + config.rho * high]
  if not bottom:
    return 'same text'
  rejected = max(bottom, key=_length)
  return 'score bands overlap' if chosen.score <= rejected.score else (chosen, rejected)


def consistency(candidates: list[Candidate], config) -> Choice:
  """`max_min`; training weights the pairs with the confidence of `consistency_rate`.

  CREAM (Wang et al. 2024, 2410.12735) ranks by the likelihood under two models. Here the two models
  act as judges.
  """
  choice = max_min(candidates, config)
  if not isinstance(choice, str) and kendall_tau(candidates) is None:
    return 'not ranked by the older model'
  return choice


def implicit_reward(candidates: list[Candidate], config) -> Choice:
  """`max_min`, restricted to pairs for which the implicit reward prefers the same response.

  The implicit reward is log p under the sampler minus log p under the older model. This is the data
  selection of SCIR (Zhou et al. 2025, 2502.08922). Its consistency loss is not implemented.
  """
  choice = max_min(candidates, config)
  if not isinstance(choice, str):
    if choice[0].implicit is None or choice[1].implicit is None:
      return 'no implicit reward'
    if choice[0].implicit <= choice[1].implicit:
      return 'implicit reward disagrees'
  return choice


def temporal(candidates: list[Candidate], config) -> Choice:
  """The sampler's best response against the worst response of the older model.

  This keeps chosen and rejected responses from becoming similar. It follows Temporal Self-Rewarding
  (2508.06026), which takes rejected responses from the initial model and chosen responses from the
  next model.
  """
  return _best_and_worst([c for c in candidates if not c.older],
                         [c for c in candidates if c.older], config)


PAIRS: dict[str, Callable[[list[Candidate], object], Choice]] = dict(
    max_min=max_min, margin=margin, length_controlled=length_controlled, consistency=consistency,
    implicit_reward=implicit_reward, temporal=temporal)
POSITIVES = 'positives_only'


def check(strategy: str):
  """Raises InputError if `strategy` is unknown."""
  names = (*PAIRS, POSITIVES)
  if strategy == 'agreement':
    raise InputError('config.pairs.strategy = agreement is now implicit_reward; write the new name')
  if strategy not in names:
    raise InputError(f'config.pairs.strategy is {strategy!r}{closest(strategy, names)}; '
                     f'choose one of {", ".join(names)}')


def positives_only(candidates: list[Candidate], config) -> list[Candidate] | str:
  """The finished candidates with a mean score of at least `positive`, for SFT.

  This is the ablation of Yuan et al. 2024, section 3.3, which brought no gain. Duplicate texts are
  kept once.
  """
  found = {c.response: c for c in reversed(candidates)
           if _may_be_chosen(c, config) and c.score >= config.positive}
  return list(reversed(found.values())) or 'no candidate scored high enough'


def kendall_tau(candidates: list[Candidate]) -> float | None:
  """Kendall's tau-b between the scores of the sampler and of the older model.

  0 if either model gives equal scores to all. None if fewer than two candidates have both scores.
  """
  both = [(c.score, c.again) for c in candidates if c.valid and c.again is not None]
  if len(both) < 2:
    return None
  return _kendall_tau(*map(scoring.ranks, zip(*both, strict=True)))


@functools.lru_cache(10_000)  # scipy takes half a millisecond, and few candidates have few orders
def _kendall_tau(a: tuple[int, ...], b: tuple[int, ...]) -> float:
  """Of two rankings, see `scores.ranks`."""
  return 0.0 if len({*a}) == 1 or len({*b}) == 1 else float(stats.kendalltau(a, b).statistic)


def consistency_rate(taus: list[float]) -> float:
  """CREAM's consistency rate C: the mean over prompts of (tau + 1) / 2.

  The loss of a pair is C times its DPO loss plus (1 - C) times the DPO loss with chosen and
  rejected swapped.
  """
  return sum((tau + 1) / 2 for tau in taus) / len(taus)


def has_tie(candidates: list[Candidate]) -> bool:
  """Whether there are two or more valid candidates and all their scores are equal."""
  scores = [c.score for c in candidates if c.valid]
  return len(scores) > 1 and len(set(scores)) == 1


def _best_and_worst(highs: list[Candidate], lows: list[Candidate], config) -> Choice:
  """The best candidate of `highs` against the worst of `lows`."""
  highs, lows = [c for c in highs if c.valid], [c for c in lows if c.valid]
  distinct = {c.id for c in itertools.chain(highs, lows)}
  if not highs or not lows or len(distinct) < 2:
    return 'fewer than two scored candidates'
  finished = [c for c in highs if _may_be_chosen(c, config)]
  if not finished:
    return 'no finished candidate'
  chosen = max(finished, key=lambda c: c.score)
  others = [c for c in lows if c.response != chosen.response]
  if not others:
    return 'same text'
  rejected = min(others, key=lambda c: c.score)
  if chosen.score <= rejected.score:
    if max(c.score for c in highs) > chosen.score:
      return 'best candidate is unfinished'
    return 'not better than the older model' if rejected.older else 'all scores equal'
  return chosen, rejected


def _may_be_chosen(candidate: Candidate, config) -> bool:
  return candidate.valid and (config.unfinished_chosen or candidate.finish == 'eos')


def _length(candidate: Candidate) -> int:
  return len(candidate.response)
