"""The data that each model was trained on: who wrote and judged it, its yields and its scores."""
import dataclasses

from srlm_jax import schema
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import Lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yield:
  """A bar of the funnel: what is left, and what was lost on the way to it."""
  label: str
  count: int
  lost: dict[str, int] = dataclasses.field(default_factory=dict)  # reason: count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
  """The data of one iteration. None or empty: the run does not have it."""
  model: str                      # trained on this data
  writer: str                     # the model that wrote the responses; '' if not known
  judge: str                      # the model or program that scored them; '' if not known
  funnel: tuple[Yield, ...]       # prompts wanted, attempts, accepted, .. pairs
  scale: tuple[float, float] | None        # lowest and highest score of the judge
  judge_mean: Value | None        # mean score of a candidate, by its judge
  oracle_mean: Value | None       # mean oracle score of a candidate (sandbox)
  judge_scores: dict[str, int]    # histogram of the judgements' scores
  oracle_scores: dict[str, int]   # histogram of the candidates' oracle scores (sandbox)
  right: Value | None             # share of pairs whose chosen response the oracle prefers
  wrong: Value | None             # share of pairs whose rejected response the oracle prefers
  parsed: Value | None            # share of judgements with a score
  characters: Lengths | None      # of the candidates
  tokens: Lengths | None
  chosen: Lengths | None          # in characters
  rejected: Lengths | None
  pairs: schema.PairsSummary | None
  warnings: tuple[str, ...]       # of the health checks
