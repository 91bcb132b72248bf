"""Reasons to doubt a result, each computed from the files of the run."""
import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doubt:
  """`kind` names the rule, for tests and styles; `sentence` is for readers."""
  kind: str
  sentence: str
