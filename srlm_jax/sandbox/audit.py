"""Compares one iteration's judgements, preference pairs and pairs of judgements with the oracle.

  python -m srlm_jax.sandbox.audit --config=iter2:tiny --workdir=RUN
  python -m srlm_jax.sandbox.audit --config=iter2:tiny --workdir=RUN --on=judge_pairs

The oracle is the program that grades sandbox responses (`world.grade`).
"""
import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
import itertools
import operator
import statistics

from srlm_jax import catalog, cli, hosts, records, schema, stage
from srlm_jax.report import estimates
from srlm_jax.reward import scores as scoring
from srlm_jax.sandbox import world

SWAPPED = 'swap/swapped.jsonl'


def run(config, workdir, on: str = ''):
  """MODEL/respond, MODEL/judge and MODEL/pairs -> MODEL/audit/audit.json.

  With on='judge_pairs': MODEL/respond and the pairs of judgements that `train.data`
  names -> MODEL/audit_judge_pairs/audit_judge_pairs.json.
  """
  spec = catalog.find('sandbox.audit', on)
  config = spec.view(config)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  found = _judge_pairs(s, config) if on else _round(s, config)
  s.begin()
  if hosts.is_first_host():
    stage.write_json(s.folder / spec.writes[0], found)
  s.finish(**{key: found[key] for key in (
      ('nearer', 'farther') if on else ('right', 'tied', 'wrong', 'judge_mean', 'oracle_mean'))})


def _judge_pairs(s: stage.Stage, config) -> dict:
  files = s.spec.conditional(config)
  responses = ['respond/responses-*.jsonl', *(file for file in files if file == SWAPPED)]
  pairs = [file for file in files if file != SWAPPED]
  return judge_pairs(*(itertools.chain.from_iterable(map(s.read, group))
                       for group in (responses, pairs)))


def _round(s: stage.Stage, config) -> dict:
  responses = 'respond/responses-*.jsonl'
  judged = scoring.Judged(s.read('judge/judgements-*.jsonl'), config.judge.quorum,
                          s.path('judge/judgements-*.jsonl'))
  pairs = records.Matched(s.read('pairs/pairs.jsonl'), operator.attrgetter('id'),
                          s.path('pairs/pairs.jsonl'))
  found = measure(s.read(responses), lambda name: judged.of(name).mean, pairs.of)
  for file in (judged, pairs):
    file.finish(s.path(responses))
  return found


def measure(responses: Iterable[schema.Response], score: Callable[[str], float | None],
            pairs: Callable[[str], Iterable[schema.Pair]]) -> dict:
  """Candidates, those of a prompt one after the other -> the numbers of audit.json.

  score: response id -> its mean judge score, if it has one; pairs: prompt id -> its pairs. Both are
  called in the order of the candidates.

  right, tied, wrong: shares of the pairs in which the oracle prefers the chosen response, neither,
  or the rejected one. judge_mean, oracle_mean: means over the judged candidates; if judge_mean
  alone rises over the iterations, that is reward hacking. within_half: share of judged candidates
  whose judge score is within half a point of the oracle's. characters: mean length of a candidate.
  Prompts that are not sandbox instructions count only in `candidates`, `characters` and `pairs`. A
  share or a mean of nothing is None. intervals: the 95 % intervals of both means, over the
  `prompts` that have a judged candidate.
  """
  characters, margins, histogram, made = scoring.Mean(), Counter(), Counter(), 0
  judge, oracle, sizes = array.array('d'), array.array('d'), array.array('l')  # of the judged ones
  for group in scoring.by_prompt(responses):
    grades, before = {}, len(judge)
    for r in group:
      characters.add(len(r.response))
      mean = score(r.id)
      if not world.parse(r.prompt):
        continue
      grades[r.id] = sum(world.grade(r.prompt, r.response))
      if mean is not None:
        judge.append(mean)
        oracle.append(grades[r.id])
    histogram.update(grades.values())
    if len(judge) > before:
      sizes.append(len(judge) - before)
    for pair in pairs(group[0].prompt_id):
      made += 1
      if pair.chosen_id in grades and pair.rejected_id in grades:
        margins[grades[pair.chosen_id] - grades[pair.rejected_id]] += 1
  judge_mean, oracle_mean = (_mean(values) for values in (judge, oracle))
  return dict(
      candidates=characters.count, of_the_world=histogram.total(), judged=len(judge), pairs=made,
      right=_share(margins, lambda m: m > 0), tied=_share(margins, lambda m: m == 0),
      wrong=_share(margins, lambda m: m < 0), judge_mean=judge_mean, oracle_mean=oracle_mean,
      within_half=_mean([abs(j - o) <= 0.5 for j, o in zip(judge, oracle, strict=True)]),
      prompts=len(sizes), intervals=dict(judge_mean=_interval(judge, sizes),
                                         oracle_mean=_interval(oracle, sizes)),
      characters=characters.rounded(2), oracle_histogram=scoring.histogram(histogram))


def judge_pairs(responses: Iterable[schema.Response], pairs: Iterable[schema.JudgePair]) -> dict:
  """Judged responses and pairs of their judgements -> the numbers of audit_judge_pairs.json.

  judge_pairs: their number. nearer, as_near, farther: the shares in which the score of the chosen
  judgement is nearer to the oracle's than the rejected one's, as near, or farther from it. A
  response to a prompt that is no sandbox instruction counts only in judge_pairs.
  """
  scores, gained = {}, Counter()
  for pair in pairs:
    response_id, _, _ = pair.chosen_id.rpartition('/')
    scores.setdefault(response_id, []).append((pair.chosen_score, pair.rejected_score))
  for r in responses:
    for chosen, rejected in scores.get(r.id, ()):
      if world.parse(r.prompt):
        grade = sum(world.grade(r.prompt, r.response))
        gained[abs(rejected - grade) - abs(chosen - grade)] += 1
  return dict(judge_pairs=sum(map(len, scores.values())), nearer=_share(gained, lambda x: x > 0),
              as_near=_share(gained, lambda x: x == 0), farther=_share(gained, lambda x: x < 0))


def _share(counts: Counter, holds: Callable[[float], bool]) -> float | None:
  total = counts.total()
  return round(sum(n for x, n in counts.items() if holds(x)) / total, 4) if total else None


def _mean(values: Sequence[float]) -> float | None:
  return round(statistics.fmean(values), 4) if values else None


def _interval(values: Sequence[float], sizes: Iterable[int]) -> list[float] | None:
  """Values, so many of each prompt -> the 95 % interval of their mean; None for fewer than two
  prompts."""
  rest = iter(values)
  found = estimates.mean(itertools.islice(rest, size) for size in sizes)
  return [round(found.low, 4), round(found.high, 4)] if found and found.low is not None else None


if __name__ == '__main__':
  cli.main(run, on=('', 'What is compared: judge_pairs, or by default judgements and pairs.'))
