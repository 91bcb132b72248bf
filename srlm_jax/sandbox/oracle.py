"""What the program that knows the rubric says of a model: of its answers, and of its judgements."""
import statistics

import numpy as np

from srlm_jax import catalog, cli, config as configs, hosts, records, stage
from srlm_jax.reward import scores as scoring
from srlm_jax.sandbox import world


def run(config, workdir):
  """MODEL/answers, answers_greedy and judge_eval -> MODEL/oracle/oracle.json: the mean score of 5 of the answers to
  held-out prompts, each point's share, length, histogram, and `judge`, as `of_judge` says; and graded.jsonl, every
  sampled answer with its score."""
  spec = catalog.find('sandbox.oracle')
  config = spec.view(config)
  folder = spec.folder(workdir, config).parent
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  answers, greedy = (list(records.read_shards(folder / name, 'responses', 'prompt', 'response', 'finish'))
                     for name in ('answers', 'answers_greedy'))
  judged = scoring.by_response(records.read_shards(folder / 'judge_eval', 'judgements', 'response_id', 'score'),
                               config.eval.quorum)
  s.begin()
  points = [world.grade(a['prompt'], a['response']) for a in answers]
  scores = [sum(p) for p in points]
  count = len(scores)
  result = dict(score=statistics.fmean(scores), standard_error=scoring.standard_error(scores), prompts=count,
                greedy=statistics.fmean(sum(world.grade(a['prompt'], a['response'])) for a in greedy),
                points=[sum(p[i] for p in points) / count for i in range(5)],
                characters=sum(len(a['response']) for a in answers) / count,
                finished=sum(a['finish'] == 'eos' for a in answers) / count, histogram=scoring.histogram(scores))
  split = configs.ranked_split(config)
  result |= of_judge([r for r in records.read(s.inputs[0], 'id', 'prompt', 'split', 'replies') if r['split'] == split],
                     {name: score.mean for name, score in judged.items()})
  if hosts.is_first_host():
    stage.write_json(s.folder / 'oracle.json', result)
    records.write(s.folder / 'graded.jsonl', (dict(a, score=x) for a, x in zip(answers, scores, strict=True)))
  s.finish(**{key: value if value is None else round(value, 3)
              for key in ('score', 'standard_error', 'greedy', 'judge_pairwise', 'judge_exact', 'ceiling')
              for value in (result[key],)})


def of_judge(ranked: list[dict], judged: dict[str, float | None]) -> dict:
  """Ranked prompts and the mean score of each reply by its response id -> how well the judge agrees with the program.

  judge_pairwise: of the `judge_pairs` pairs of scored replies with different grades, the share that the scores order
  as the grades do (ties are errors); judge_exact: of the `judge_replies` scored replies, the share whose mean score,
  rounded, is the grade. ceiling: the share of all `ceiling_pairs` pairs that the grades order as people rank them:
  what a judge that never errs reaches against these noisy ranks. None where undefined. intervals: 95 %, over prompts.
  """
  sums, counts = [], []
  for r in ranked:
    replies = [(sum(world.grade(r['prompt'], reply['text'])), reply['rank'],
                judged.get(records.join(r['id'], reply['id']))) for reply in r['replies']]
    scored = [(grade, score) for grade, _, score in replies if score is not None]
    by_grade = scoring.orders([(-grade, score) for grade, score in scored])
    by_rank = scoring.orders([(rank, grade) for grade, rank, _ in replies])
    exact = [scoring.whole(score) == grade for grade, score in scored]
    sums.append([sum(d > 0 for d in by_grade), sum(exact), sum(d > 0 for d in by_rank)])
    counts.append([len(by_grade), len(exact), len(by_rank)])
  sums, counts = (np.array(rows, float).reshape(-1, 3) for rows in (sums, counts))
  names = ('judge_pairwise', 'judge_exact', 'ceiling')
  found = {name: float(above / below) if below else None
           for name, above, below in zip(names, sums.sum(0), counts.sum(0), strict=True)}
  sizes = dict(zip(('judge_pairs', 'judge_replies', 'ceiling_pairs'), counts.sum(0).astype(int).tolist(), strict=True))
  return dict(found, **sizes, intervals=dict(zip(names, scoring.intervals(sums, counts), strict=True)))


if __name__ == '__main__':
  cli.main(run)
