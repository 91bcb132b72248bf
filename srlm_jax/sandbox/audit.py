"""What the oracle thinks of a round: of the sampler's candidates, of its judgements, and of the pairs made of them."""
import statistics

from srlm_jax import catalog, cli, hosts, records, stage
from srlm_jax.reward import scores as scoring
from srlm_jax.sandbox import world


def run(config, workdir):
  """MODEL/respond, judge and pairs -> MODEL/audit/audit.json; prompts that are not of the world are left out."""
  spec = catalog.find('sandbox.audit')
  config = spec.view(config)
  folder = spec.folder(workdir, config).parent
  pairs = folder / 'pairs' / 'pairs.jsonl'
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  responses = list(records.read_shards(folder / 'respond', 'responses', 'id', 'prompt', 'response'))
  judged = scoring.by_response(records.read_shards(folder / 'judge', 'judgements', 'response_id', 'score'),
                               config.judge.quorum)
  s.begin()
  found = measure(responses, {name: x.mean for name, x in judged.items() if x.mean is not None},
                  list(records.read(pairs)) if pairs.exists() else [])
  if hosts.is_first_host():
    stage.write_json(s.folder / 'audit.json', found)
  s.finish(**{key: found[key] for key in ('right', 'tied', 'wrong', 'judge_mean', 'oracle_mean')})


def measure(responses: list[dict], judged: dict[str, float], pairs: list[dict]) -> dict:
  """Shares of pairs in which the oracle, too, prefers the chosen (right), neither (tied) or the rejected (wrong); the
  means of judge and oracle over the candidates that were judged: where the first alone rises, the judge is deceived."""
  known = [r for r in responses if world.parse(r['prompt'])]
  grades = {r['id']: sum(world.grade(r['prompt'], r['response'])) for r in known}
  both = [(judged[name], grade) for name, grade in grades.items() if name in judged]
  margins = [grades[p['chosen_id']] - grades[p['rejected_id']] for p in pairs if p['chosen_id'] in grades]

  def share(holds):
    return round(statistics.fmean(map(holds, margins)), 4) if margins else None
  return dict(
      candidates=len(responses), of_the_world=len(known), judged=len(both), pairs=len(pairs),
      right=share(lambda m: m > 0), tied=share(lambda m: m == 0), wrong=share(lambda m: m < 0),
      judge_mean=round(statistics.fmean(j for j, _ in both), 4) if both else None,
      oracle_mean=round(statistics.fmean(o for _, o in both), 4) if both else None,
      within_half=round(statistics.fmean(abs(j - o) <= 0.5 for j, o in both), 4) if both else None,
      characters=round(statistics.fmean(len(r['response']) for r in responses), 2) if responses else None,
      oracle_histogram=scoring.histogram(list(grades.values())))


if __name__ == '__main__':
  cli.main(run)
