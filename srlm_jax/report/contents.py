"""Everything that the report shows, as plain data: `read` makes it, `page` renders it."""
import dataclasses

from srlm_jax import schema
from srlm_jax.report import compare, differences, external, paper, rounds, samples, steps
from srlm_jax.report.doubts import Doubt
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import Lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
  """A line of metrics.jsonl: a logged training step, counted from 0. None: not written."""
  step: int
  loss: float | None = None
  margin: float | None = None
  accuracy: float | None = None
  chosen_reward: float | None = None
  rejected_reward: float | None = None
  chosen_logp: float | None = None
  rejected_logp: float | None = None
  grad_norm: float | None = None
  learning_rate: float | None = None
  tokens_per_second: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
  """A stage that has started."""
  owner: str                 # data, or a model
  stage: str
  seconds: float | None      # None: not finished
  tokens: int | None         # sampled, or trained on; None: not known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One workdir. Dictionaries by model have only the models with such data."""
  name: str
  size: str
  model: str                       # preset of the model; '' if not known
  seed: int | None
  stopped: str                     # why the loop stopped early, or ''
  models: tuple[str, ...]          # trained, in order
  rows: list[dict]                 # see results.of_models: the tables of the loop
  values: dict[str, dict[str, Value]]   # {model: {key of measures.MEASURES: value}}
  answer: str                      # did it get better? one sentence
  steps: tuple[steps.Step, ...]
  doubts: tuple[Doubt, ...]        # reasons to doubt the whole run
  wins: tuple[differences.WinTieLoss, ...]    # every pair of models that was compared
  rounds: tuple[rounds.Round, ...]
  eft: dict[str, schema.EftSummary]
  training: dict[str, schema.TrainingSummary]
  curves: dict[str, list[Metrics]]
  characters: dict[str, Lengths]   # of the held-out answers, by model
  tokens: dict[str, Lengths]
  oracle_scores: dict[str, dict[str, int]]  # histogram of the held-out answers, by model
  costs: tuple[StageCost, ...]
  unfinished: tuple[str, ...]      # OWNER/STAGE that started and did not finish
  missing: tuple[str, ...]         # what the report could show and the run does not have
  external: external.External
  samples: tuple[samples.Samples, ...]
  held_out: samples.HeldOut
  warnings: tuple[str, ...]        # sentences of the health checks
  distributions: schema.Distributions | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
  """What the report shows: one run, several runs side by side, or the arms of a study."""
  title: str
  runs: tuple[Run, ...]
  arms: tuple[compare.Arm, ...]            # a study's runs with several seeds, as one
  across: tuple[compare.Across, ...]       # between two runs, or between two arms
  refused: tuple[str, ...]                 # why runs cannot be compared: one sentence each
  paper: tuple[paper.Table, ...]  # see paper.tables
