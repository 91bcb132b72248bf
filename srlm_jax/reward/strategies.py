"""Which of a prompt's candidates are chosen and rejected: the strategies of `pairs.strategy`, each with its source.

Every strategy takes the scored candidates of one prompt and gives (chosen, rejected), or the reason why there is
none. What holds for all of them: only candidates with text and a score take part; a response that was cut at the
length limit may be rejected, and chosen only if the config says so; the chosen one's score is the higher, and its text
another; of equals the first candidate is taken.
"""
from collections.abc import Callable
import dataclasses
import itertools

from scipy import stats

from srlm_jax import closest, InputError


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One response to a prompt, and all that is known of it."""
  id: str
  response: str
  finish: str
  score: float | None            # mean of the sampler's judgements
  spread: float | None = None    # their standard deviation
  again: float | None = None     # mean of the older model's judgements (consistency)
  implicit: float | None = None  # log p under the sampler minus log p under the older model (agreement)
  older: bool = False            # written by the older model (temporal)

  @property
  def valid(self) -> bool:
    return bool(self.response.strip()) and self.score is not None


Choice = tuple[Candidate, Candidate] | str


def max_min(candidates: list[Candidate], config) -> Choice:
  """Highest mean score against lowest: Yuan et al. 2024, 2.2."""
  return _best_and_worst(candidates, candidates, config)


def margin(candidates: list[Candidate], config) -> Choice:
  """`max_min` where the two are at least `margin` points apart: of best-of-N pairs only the confident ones, as Pace et
  al. 2024 (West-of-N, 2401.12086) keep those whose predicted preference is surest."""
  choice = max_min(candidates, config)
  if not isinstance(choice, str) and choice[0].score - choice[1].score < config.margin:
    return 'scores nearer than the margin'
  return choice


def length_controlled(candidates: list[Candidate], config) -> Choice:
  """The shortest of the best band against the longest of the worst; each band is the share `rho` of the range of
  scores: Wu et al. 2024 (Meta-Rewarding, 2407.19594), 2.2. With rho 0 only equal scores share a band."""
  choice = max_min(candidates, config)
  if isinstance(choice, str):
    return choice
  high, low = choice[0].score, choice[1].score
  top = [c for c in candidates if _choosable(c, config) and c.score >= (1 - config.rho) * high + config.rho * low]
  chosen = min(top, key=_length)
  bottom = [c for c in candidates if c.valid and c.response != chosen.response
            and c.score <= (1 - config.rho) * low + config.rho * high]
  if not bottom:
    return 'same text'
  rejected = max(bottom, key=_length)
  return 'bands meet' if chosen.score <= rejected.score else (chosen, rejected)


def consistency(candidates: list[Candidate], config) -> Choice:
  """`max_min`; its pairs are trained on with the confidence of `consistency_rate`: Wang et al. 2024 (CREAM,
  2410.12735), who rank by the likelihood under the two models; here both judge."""
  choice = max_min(candidates, config)
  if not isinstance(choice, str) and kendall_tau(candidates) is None:
    return 'not ranked by the older model'
  return choice


def agreement(candidates: list[Candidate], config) -> Choice:
  """`max_min` where the implicit reward, log p under the sampler minus log p under the older model, prefers the same
  one: the data selection of Zhou et al. 2025 (SCIR, 2502.08922). SCIR's consistency loss is not implemented."""
  choice = max_min(candidates, config)
  if not isinstance(choice, str):
    if choice[0].implicit is None or choice[1].implicit is None:
      return 'without an implicit reward'
    if choice[0].implicit <= choice[1].implicit:
      return 'implicit reward disagrees'
  return choice


def temporal(candidates: list[Candidate], config) -> Choice:
  """The sampler's best against the worst of the model before it, so that the two do not become alike: after Temporal
  Self-Rewarding (2508.06026), which takes rejected responses from the initial model and chosen ones from the next."""
  return _best_and_worst([c for c in candidates if not c.older], [c for c in candidates if c.older], config)


PAIRS: dict[str, Callable[[list[Candidate], object], Choice]] = dict(
    max_min=max_min, margin=margin, length_controlled=length_controlled, consistency=consistency, agreement=agreement,
    temporal=temporal)
POSITIVES = 'positives_only'


def check(strategy: str):
  """Raises InputError for a strategy that there is not."""
  names = (*PAIRS, POSITIVES)
  if strategy not in names:
    raise InputError(f'config.pairs.strategy is {strategy!r}{closest(strategy, names)}; it is one of '
                     f'{", ".join(names)}')


def positives_only(candidates: list[Candidate], config) -> list[Candidate] | str:
  """Every finished candidate with a mean of `positive` or more, for SFT: the ablation of Yuan et al. 2024, 3.3, which
  gained nothing. Equal texts are taken once."""
  found = {c.response: c for c in reversed(candidates) if _choosable(c, config) and c.score >= config.positive}
  return list(reversed(found.values())) or 'no candidate scored high enough'


def kendall_tau(candidates: list[Candidate]) -> float | None:
  """Kendall's tau-b between the sampler's and the older model's scores; 0 where either scores all equal; None with
  fewer than two candidates that both scored."""
  both = [(c.score, c.again) for c in candidates if c.valid and c.again is not None]
  if len(both) < 2:
    return None
  ours, older = zip(*both, strict=True)
  return 0.0 if len(set(ours)) == 1 or len(set(older)) == 1 else float(stats.kendalltau(ours, older).statistic)


def consistency_rate(taus: list[float]) -> float:
  """CREAM's C: the mean over prompts of (tau + 1) / 2. The loss of a pair is C times DPO's plus 1 - C times DPO's with
  chosen and rejected exchanged."""
  return sum((tau + 1) / 2 for tau in taus) / len(taus)


def has_tie(candidates: list[Candidate]) -> bool:
  """Are all scores equal?"""
  scores = {c.score for c in candidates if c.valid}
  return len(scores) == 1 and sum(c.valid for c in candidates) > 1


def _best_and_worst(highs: list[Candidate], lows: list[Candidate], config) -> Choice:
  scored = [c for c in {c.id: c for c in itertools.chain(highs, lows)}.values() if c.valid]
  highs, lows = [c for c in highs if c.valid], [c for c in lows if c.valid]
  if not highs or not lows or len(scored) < 2:
    return 'fewer than two scored candidates'
  finished = [c for c in highs if _choosable(c, config)]
  if not finished:
    return 'no finished candidate'
  chosen = max(finished, key=lambda c: c.score)
  others = [c for c in lows if c.response != chosen.response]
  if not others:
    return 'same text'
  rejected = min(others, key=lambda c: c.score)
  if chosen.score <= rejected.score:
    if max(c.score for c in highs) > chosen.score:
      return 'best candidate unfinished'
    return 'not better than the older model' if rejected.older else 'all scores equal'
  return chosen, rejected


def _choosable(candidate: Candidate, config) -> bool:
  return candidate.valid and (config.unfinished_chosen or candidate.finish == 'eos')


def _length(candidate: Candidate) -> int:
  return len(candidate.response)
