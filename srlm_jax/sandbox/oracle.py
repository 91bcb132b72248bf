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
  that the judge orders as the grades do; ties count as errors. judge_exact: over the
  `judge_replies` scored replies, the share whose rounded mean score equals the grade. ceiling:
  over all `ceiling_pairs` pairs, the share that the grades order as the human ranks do; a perfect
  judge reaches this pairwise accuracy, because the ranks are noisy. intervals: the 95 % interval of
  each, over prompts. Undefined values are None.
  """
  terms = array.array('d')  # [prompts, sums and counts, measures]
  for r in ranked:
    replies = [(sum(world.grade(r.prompt, reply.text)), reply.rank,
                judged(records.join(r.id, reply.id))) for reply in r.replies]
    scored = [(grade, score) for grade, _, score in replies if score is not None]
    by_grade = scoring.orders([(-grade, score) for grade, score in scored])
    by_rank = scoring.orders([(rank, grade) for grade, rank, _ in replies])
    exact = [scoring.whole(score) == grade for grade, score in scored]
    terms.extend([sum(d > 0 for d in by_grade), sum(exact), sum(d > 0 for d in by_rank),
                  len(by_grade), len(exact), len(by_rank)])
  terms = np.array(terms).reshape(-1, 2, 3)
  sums, counts = (np.ascontiguousarray(terms[:, i]) for i in range(2))
  names = ('judge_pairwise', 'judge_exact', 'ceiling')
  shares = {name: float(hits / total) if total else None
            for name, hits, total in zip(names, sums.sum(0), counts.sum(0), strict=True)}
  sizes = dict(zip(('judge_pairs', 'judge_replies', 'ceiling_pairs'),
                   counts.sum(0).astype(int).tolist(), strict=True))
  intervals = dict(zip(names, scoring.intervals(sums, counts), strict=True))
  return dict(shares, **sizes, intervals=intervals)


if __name__ == '__main__':
  cli.main(run)
