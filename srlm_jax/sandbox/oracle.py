"""Grades a model's answers to the held-out prompts by the program that knows the rubric."""
import statistics

from srlm_jax import stage
from srlm_jax.data import records, scores as scoring
from srlm_jax.sandbox import world


def run(config, workdir):
  """MODEL/answers and answers_greedy -> MODEL/oracle/oracle.json: mean score of 5, each point's share, length,
  histogram; and graded.jsonl, every sampled answer with its score."""
  folder = stage.model_folder(workdir, config.name).parent
  sources = {name: records.shards(folder / name, 'responses') for name in ('answers', 'answers_greedy')}
  s = stage.Stage(config, workdir, 'oracle', (), [path for paths in sources.values() for path in paths])
  if s.done:
    return
  answers, greedy = (list(records.read_shards(folder / name, 'responses', 'prompt', 'response', 'finish'))
                     for name in sources)
  s.begin()
  points = [world.grade(a['prompt'], a['response']) for a in answers]
  scores = [sum(p) for p in points]
  count = len(scores)
  result = dict(score=statistics.fmean(scores), standard_error=scoring.standard_error(scores), prompts=count,
                greedy=statistics.fmean(sum(world.grade(a['prompt'], a['response'])) for a in greedy),
                points=[sum(p[i] for p in points) / count for i in range(5)],
                characters=sum(len(a['response']) for a in answers) / count,
                finished=sum(a['finish'] == 'eos' for a in answers) / count, histogram=scoring.histogram(scores))
  if stage.is_first_host():
    stage.write_json(s.folder / 'oracle.json', result)
    records.write(s.folder / 'graded.jsonl', (dict(a, score=x) for a, x in zip(answers, scores, strict=True)))
  s.finish(score=round(result['score'], 3), standard_error=round(result['standard_error'], 3),
           greedy=round(result['greedy'], 3))


if __name__ == '__main__':
  stage.main(run)
