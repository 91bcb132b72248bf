"""Grades a model's answers to the held-out prompts by the program that knows the rubric."""
from srlm_jax import stage
from srlm_jax.data import records, scores as scoring
from srlm_jax.sandbox import world


def run(config, workdir):
  """MODEL/answers -> MODEL/oracle/oracle.json: mean score of 5, each point's share, length, histogram."""
  folder = stage.model_folder(workdir, config.name).parent / 'answers'
  s = stage.Stage(config, workdir, 'oracle', (), sorted(folder.glob('responses-*.jsonl')))
  if s.done:
    return
  answers = list(records.read_shards(folder, 'responses', 'prompt', 'response', 'finish'))
  s.begin()
  points = [world.grade(a['prompt'], a['response']) for a in answers]
  scores = [sum(p) for p in points]
  mean, count = sum(scores) / len(scores), len(scores)
  deviation = (sum((x - mean) ** 2 for x in scores) / max(count - 1, 1)) ** 0.5
  result = dict(score=mean, standard_error=deviation / count ** 0.5, prompts=count,
                points=[sum(p[i] for p in points) / count for i in range(5)],
                characters=sum(len(a['response']) for a in answers) / count,
                finished=sum(a['finish'] == 'eos' for a in answers) / count, histogram=scoring.histogram(scores))
  if stage.is_first_host():
    stage.write_json(s.folder / 'oracle.json', result)
    records.write(s.folder / 'graded.jsonl', (dict(a, score=x) for a, x in zip(answers, scores, strict=True)))
  s.finish(score=round(mean, 3), standard_error=round(result['standard_error'], 3))


if __name__ == '__main__':
  stage.main(run)
