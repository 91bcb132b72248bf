"""Scores a model's responses and its judgements with the oracle, the program that grades them."""
import array
from collections.abc import Callable, Iterable
import dataclasses
import statistics

import numpy as np

from srlm_jax import catalog, cli, config as configs, hosts, InputError, records, schema, stage
from srlm_jax.data import ranked as ranking
from srlm_jax.reward import scores as scoring
from srlm_jax.sandbox import world

POINTS = ('topic', 'answer', 'right', 'kind', 'clean')  # of the rubric, in its order
_SUMMARY = ('score', 'standard_error', 'greedy', 'judge_pairwise', 'judge_exact', 'ceiling')


def run(config, workdir):
  """MODEL/answers, answers_greedy and judge_eval -> MODEL/oracle/oracle.json and graded.jsonl.

  oracle.json has the numbers of `of_answers` and `of_judge`, and `greedy`, the mean score of the
  greedy responses, with its standard error over prompts. graded.jsonl has every sampled response
  with its score, 0 to 5.
  """
  spec = catalog.find('sandbox.oracle')
  config = spec.view(config)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  answers, greedy = 'answers/responses-*.jsonl', 'answers_greedy/responses-*.jsonl'
  file = 'judge_eval/judgements-*.jsonl'
  judged = scoring.Judged(s.read(file), config.eval.quorum, s.path(file))
  for name in (answers, greedy):
    if next(iter(s.read(name)), None) is None:
      raise InputError(f'{s.path(name)} has no records; delete {s.path(name).parent} and run its '
                       f'stage again')
  result = of_answers(s.read(answers))
  best = array.array('l', (sum(world.grade(a.prompt, a.response))
                           for a in s.read(greedy)))
  result |= dict(greedy=statistics.fmean(best), greedy_standard_error=scoring.standard_error(best))
  result |= of_judge(ranking.of_split(s, configs.ranked_split(config)),
                     lambda name: judged.of(name).mean)
  judged.finish(s.path(ranking.SEEDS))
  s.begin()
  if hosts.is_first_host():
    stage.write_json(s.folder / 'oracle.json', result)
    records.write(s.folder / 'graded.jsonl', map(_graded, s.read(answers)))
  s.finish(**{key: None if result[key] is None else round(result[key], 3) for key in _SUMMARY})


def _graded(answer: schema.Response) -> schema.GradedResponse:
  fields = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
  return schema.GradedResponse(**fields, score=float(sum(world.grade(answer.prompt,
                                                                     answer.response))))


def of_answers(answers: Iterable[schema.Response]) -> dict:
  """Responses -> the numbers of the responses.

  score: mean number of points (`world.grade`), with its standard error over prompts. points: for
  each point, the share of responses that earn it. characters: mean length. finished: share that
  ended with eos.
  """
  scores, points, characters, finished = array.array('l'), [0] * 5, 0, 0
  for answer in answers:
    earned = world.grade(answer.prompt, answer.response)
    scores.append(sum(earned))
    points = [total + point for total, point in zip(points, earned, strict=True)]
    characters += len(answer.response)
    finished += answer.finish == schema.EOS
  count = len(scores)
  return dict(
      score=statistics.fmean(scores), standard_error=scoring.standard_error(scores), prompts=count,
      points=[total / count for total in points], characters=characters / count,
      finished=finished / count, histogram=scoring.histogram(scores))


def of_judge(ranked: Iterable[schema.RankedPrompt],
             judged: Callable[[str], float | None]) -> dict:
  """Ranked prompts, and response id -> mean judge score: agreement of judge and oracle.

  `judged` is called in the order of the replies.

  judge_pairwise: over the `judge_pairs` pairs of scored replies with different grades, the share
  that the judge orders as the grades do; ties count as errors. judge_ties: the share of them with
  equal scores. judge_pairwise_all: over the `judge_pairs_all` pairs of all replies; a pair with an
  unscored reply is an error. judge_exact: over the
  `judge_replies` scored replies, the share whose rounded mean score equals the grade. ceiling:
  over all `ceiling_pairs` pairs, the share that the grades order as the human ranks do; a perfect
  judge reaches this pairwise accuracy, because the ranks are noisy. intervals: the 95 % interval of
  each, over prompts. Undefined values are None.

  judge_points: for each point of the rubric, `kept`: of the `earned` scored replies that earn it,
  the share to which the judge gives it; `caught`: of the `lost` replies that lose this point first,
  the share to which the judge does not give it. The judge gives a point if its rounded mean score
  is at least the point's number. judge_families: judge_pairwise and judge_exact by the family of
  the instruction, with their counts.
  """
  terms, sizes = array.array('d'), array.array('d')  # [prompts, measures]
  families = {family: np.zeros((2, 2)) for family in world.FAMILIES}
  for r in ranked:
    found = _of_prompt([(sum(world.grade(r.prompt, reply.text)), reply.rank,
                         judged(records.join(r.id, reply.id))) for reply in r.replies])
    terms.extend(map(sum, found))
    sizes.extend(map(len, found))
    families[world.require(r.prompt).family] += [[sum(x), len(x)] for x in found[:2]]
  sums, counts = (np.array(x).reshape(-1, 5 + 2 * len(POINTS)) for x in (terms, sizes))
  # (share, its count, its interval) of each measure
  pairs, exact, ceiling, every, ties, *points = (
      (_share(hits, total), int(total), interval) for hits, total, interval in zip(
          sums.sum(0), counts.sum(0), scoring.intervals(sums, counts), strict=True))
  return dict(
      judge_pairwise=pairs[0], judge_pairwise_all=every[0], judge_ties=ties[0],
      judge_exact=exact[0], ceiling=ceiling[0], judge_pairs=pairs[1], judge_pairs_all=every[1],
      judge_replies=exact[1], ceiling_pairs=ceiling[1],
      intervals=dict(judge_pairwise=pairs[2], judge_pairwise_all=every[2], judge_ties=ties[2],
                     judge_exact=exact[2], ceiling=ceiling[2]),
      judge_points=[
          dict(point=point, kept=kept[0], earned=kept[1], caught=caught[0], lost=caught[1],
               intervals=dict(kept=kept[2], caught=caught[2]))
          for point, kept, caught in zip(POINTS, points[::2], points[1::2], strict=True)],
      judge_families={family: dict(pairwise=_share(*pairs), pairs=int(pairs[1]),
                                   exact=_share(*exact), replies=int(exact[1]))
                      for family, (pairs, exact) in families.items()})


def _of_prompt(replies: list[tuple[int, int, float | None]]) -> list[list[bool]]:
  """(grade, rank, score) of each reply -> whether the judge is right, for each measure.

  The measures: pairs, exact scores, the ceiling, pairs of all replies, ties; then for each point
  kept and caught.
  """
  scored = [(grade, score) for grade, _, score in replies if score is not None]
  by_grade = scoring.orders([(-grade, score) for grade, score in scored])
  by_rank = scoring.orders([(rank, grade) for grade, rank, _ in replies])
  whole = [(grade, scoring.whole(score)) for grade, score in scored]
  found = [[d > 0 for d in by_grade], [grade == score for grade, score in whole],
           [d > 0 for d in by_rank]]
  unscored = len(scoring.orders([(-grade, 0.0) for grade, _, _ in replies])) - len(by_grade)
  found += [found[0] + [False] * unscored, [d == 0 for d in by_grade]]
  for point in range(1, len(POINTS) + 1):
    found += [[score >= point for grade, score in whole if grade >= point],
              [score < point for grade, score in whole if grade == point - 1]]
  return found


def _share(hits: float, total: float) -> float | None:
  return float(hits / total) if total else None


if __name__ == '__main__':
  cli.main(run)
