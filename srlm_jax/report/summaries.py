"""Reads the summaries of a run that the page uses: manifest.json and done.json, and results.json.

A damaged one raises InputError with its path, instead of an error while the page is made.
"""
import dataclasses
from typing import Any

import msgspec

from srlm_jax import catalog, InputError, schema, stage
from srlm_jax.report import results


class Config(msgspec.Struct, rename=lambda name: name.replace('_', '.')):
  """The config in a manifest, which has only the keys that the stage reads.

  The field judge_n is the key judge.n.
  """
  model: str = ''
  judge_template: str = ''
  judge_n: schema.Count | None = None
  judge_quorum: schema.Count | None = None
  judge_by: str = ''           # '' if the writer of the responses judges them
  eval_quorum: schema.Count | None = None
  seed: schema.Count | None = None
  prompts_count: schema.Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Manifest:
  config: Config
  format: int = 0
  params: str = ''


@dataclasses.dataclass(frozen=True)
class Started:
  """A stage that has started."""
  config: Config
  seconds: float | None = None  # None if the stage has not finished
  summary: Any = None           # of `schema`; None for a stage without such a summary
  params: str = ''              # hash of the parameters of the model that it runs
  generated: int | None = None  # tokens that a model sampled since the last start of the stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
  model: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResults:
  """results.json, which the loop writes last. `stopped`: why it stopped early, or ''."""
  size: str = ''
  models: tuple[_Row, ...] = ()
  stopped: str = ''


def started(folder) -> Started | None:
  """The stage in a folder; None if it has not started."""
  path = folder / 'manifest.json'
  manifest = results.read(path, _Manifest)
  if not manifest:
    return None
  if manifest.format != stage.FORMAT:
    raise InputError(f'{path}: written by another version of srlm_jax; '
                     f'make the page with that version')
  done = results.read(folder / 'done.json', results.Done)
  return Started(manifest.config, done and done.seconds, summary(folder), manifest.params,
                 done and done.generated)


def summary(folder):
  """The summary of the stage in a folder; None if it has not finished, or has no typed summary."""
  kind = catalog.SUMMARIES.get(folder.name)
  return results.read(folder / 'done.json', kind) if kind else None


def run_results(workdir) -> RunResults:
  """The results.json of a run; empty if there is none."""
  return results.read(workdir / 'results.json', RunResults) or RunResults()
