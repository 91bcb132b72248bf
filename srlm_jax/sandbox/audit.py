"""Compares one iteration's judgements and preference pairs with the oracle.

The oracle is the program that grades sandbox responses (`world.grade`).
"""
import statistics

from srlm_jax import catalog, cli, hosts, schema, stage
from srlm_jax.report import estimates
from srlm_jax.reward import scores as scoring
from srlm_jax.sandbox import world


def run(config, workdir):
  """MODEL/respond, MODEL/judge and MODEL/pairs -> MODEL/audit/audit.json."""
  spec = catalog.find('sandbox.audit')
  config = spec.view(config)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  responses = list(s.read('respond/responses-*.jsonl'))
  judgements = s.read('judge/judgements-*.jsonl')
  means = {name: score.mean
           for name, score in scoring.by_response(judgements, config.judge.quorum).items()
           if score.mean is not None}
  found = measure(responses, means, list(s.read('pairs/pairs.jsonl')))
  s.begin()
  if hosts.is_first_host():
    stage.write_json(s.folder / 'audit.json', found)
  s.finish(**{key: found[key] for key in ('right', 'tied', 'wrong', 'judge_mean', 'oracle_mean')})


def measure(responses: list[schema.Response], judged: dict[str, float],
            pairs: list[schema.Pair]) -> dict:
  """Candidates, mean judge scores by response id, pairs -> the numbers of audit.json.

  right, tied, wrong: shares of the pairs in which the oracle prefers the chosen response, neither,
  or the rejected one. judge_mean, oracle_mean: means over the judged candidates; if judge_mean
  alone rises over the iterations, that is reward hacking. within_half: share of judged candidates
  whose judge score is within half a point of the oracle's. characters: mean length of a candidate.
  Prompts that are not sandbox instructions count only in `candidates` and `characters`. A share or
  a mean of nothing is None. intervals: the 95 % intervals of both means, over the `prompts` that
  have a judged candidate.
  """
  known = [r for r in responses if world.parse(r.prompt)]
  grades = {r.id: sum(world.grade(r.prompt, r.response)) for r in known}
  by_prompt = {}
  for r in known:
    if r.id in judged:
      by_prompt.setdefault(r.prompt_id, []).append((judged[r.id], grades[r.id]))
  both = [pair for found in by_prompt.values() for pair in found]
  margins = [grades[p.chosen_id] - grades[p.rejected_id]
             for p in pairs if p.chosen_id in grades]
  return dict(
      candidates=len(responses), of_the_world=len(known), judged=len(both), pairs=len(pairs),
      right=_mean([m > 0 for m in margins]), tied=_mean([m == 0 for m in margins]),
      wrong=_mean([m < 0 for m in margins]),
      judge_mean=_mean([j for j, _ in both]), oracle_mean=_mean([o for _, o in both]),
      within_half=_mean([abs(j - o) <= 0.5 for j, o in both]),
      prompts=len(by_prompt), intervals=dict(
          judge_mean=_interval([[j for j, _ in found] for found in by_prompt.values()]),
          oracle_mean=_interval([[o for _, o in found] for found in by_prompt.values()])),
      characters=_mean([len(r.response) for r in responses], digits=2),
      oracle_histogram=scoring.histogram(list(grades.values())))


def _mean(values: list[float], digits: int = 4) -> float | None:
  return round(statistics.fmean(values), digits) if values else None


def _interval(groups: list[list[float]]) -> list[float] | None:
  """The values of each prompt -> the 95 % interval of their mean; None for fewer than two prompts.
  """
  found = estimates.mean(groups)
  return [round(found.low, 4), round(found.high, 4)] if found and found.low is not None else None


if __name__ == '__main__':
  cli.main(run)
