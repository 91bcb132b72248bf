"""Several runs: paired differences between them, and the seeds of a study as one."""
import dataclasses

from srlm_jax.report.estimates import Value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Across:
  """A measure of a model in one run, or arm, minus that of the same model in another one."""
  model: str
  measure: str          # key of measures.MEASURES
  run: str              # names of the runs or arms
  against: str
  change: Value         # over prompts between runs; over seeds between arms
  ours: float
  theirs: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """The runs of a study that differ in their seeds only."""
  name: str
  seeds: tuple[int, ...]
  changes: tuple[str, ...]               # --set changes, if NAME.json has them
  values: dict[str, dict[str, Value]]    # {model: {measure: mean over seeds}}
  # {(model, against): {measure: mean over seeds of the paired difference}} within the runs
  gains: dict[tuple[str, str], dict[str, Value]]
