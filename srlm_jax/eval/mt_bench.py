"""MT-Bench scores from the judgments of FastChat's single-answer mode: the three rows of PAPER table 2.

  python -m srlm_jax.eval.mt_bench --judgments=gpt-4_single.jsonl --questions=question.jsonl --out=FILE.json

Both files are those of FastChat's llm_judge: its gen_model_answer.py asks the model (a Hugging Face folder,
see srlm_jax.checkpoint.convert), its gen_judgment.py asks the judge. A score of -1 is a reply without a score: it
is counted and enters no mean.
"""
from absl import flags

from srlm_jax import cli, InputError, records

HARD = ('math', 'coding', 'reasoning')  # PAPER: "math, code & reasoning"
NO_SCORE = -1


def scores(judgments: list[dict], questions: dict[int, dict]) -> dict[str, dict]:
  """Judgments and questions by id -> for each model its means; None where nothing was scored.

  overall, math_code_reasoning, other, turn_1, turn_2: means of scores of 1 to 10; scored, no_score: judgments
  with a score and without; absent: turns of the questions that were not judged.
  """
  turns = sum(len(q['turns']) for q in questions.values())
  result = {}
  for model in sorted({j['model'] for j in judgments}):
    own = [j for j in judgments if j['model'] == model]
    good = [j for j in own if j['score'] != NO_SCORE]
    hard = [questions[j['question_id']]['category'] in HARD for j in good]
    result[model] = dict(
        overall=_mean(j['score'] for j in good),
        math_code_reasoning=_mean(j['score'] for j, h in zip(good, hard, strict=True) if h),
        other=_mean(j['score'] for j, h in zip(good, hard, strict=True) if not h),
        turn_1=_mean(j['score'] for j in good if j['turn'] == 1),
        turn_2=_mean(j['score'] for j in good if j['turn'] == 2),
        scored=len(good), no_score=len(own) - len(good), absent=turns - len(own))
  return result


def read_questions(path) -> dict[int, dict]:
  """FastChat's question.jsonl by question id."""
  questions = {}
  for q in records.read(path, 'question_id', 'category', 'turns'):
    kinds = dict(question_id=int, category=str, turns=list)
    for name, kind in kinds.items():
      if not isinstance(q[name], kind):
        raise InputError(f'{path}: a question has {name} = {q[name]!r}; give FastChat\'s question.jsonl')
    questions[q['question_id']] = q
  if not questions:
    raise InputError(f'{path} holds no question; give FastChat\'s question.jsonl')
  return questions


def read_judgments(path, questions: dict[int, dict]) -> list[dict]:
  """FastChat's *_single.jsonl, checked against the questions."""
  judgments, seen = [], set()
  for j in records.read(path, 'question_id', 'model', 'turn', 'score'):
    where = f'{path}: the judgment of question {j["question_id"]}, turn {j["turn"]}, model {j["model"]},'
    if not isinstance(j['question_id'], int) or j['question_id'] not in questions:
      raise InputError(f'{where} is of no question in --questions; give the questions that were judged')
    if not isinstance(j['turn'], int) or not 1 <= j['turn'] <= len(questions[j['question_id']]['turns']):
      raise InputError(f'{where} is of a turn that the question does not have')
    if not isinstance(j['model'], str):
      raise InputError(f'{where} has a model that is no string')
    s = j['score']
    if isinstance(s, bool) or not isinstance(s, int | float) or not (s == NO_SCORE or 0 <= s <= 10):
      raise InputError(f'{where} has the score {s!r}, which is neither from 0 to 10 nor {NO_SCORE} for none')
    if (j['model'], j['question_id'], j['turn']) in seen:
      raise InputError(f'{where} is there twice; delete one')
    seen.add((j['model'], j['question_id'], j['turn']))
    judgments.append(j)
  if not judgments:
    raise InputError(f'{path} holds no judgment; judge the answers first')
  return judgments


def text_table(result: dict[str, dict]) -> str:
  """A line a model."""
  width = max(len('model'), *map(len, result))
  headings = list(next(iter(result.values())))
  lines = ['  '.join(['model'.ljust(width), *headings])]
  for name, row in result.items():
    cells = ['-' if v is None else f'{v:.2f}' if isinstance(v, float) else str(v) for v in row.values()]
    cells = [cell.rjust(len(h)) for cell, h in zip(cells, headings, strict=True)]
    lines.append('  '.join([name.ljust(width), *cells]))
  return '\n'.join(lines)


def _mean(values) -> float | None:
  values = list(values)
  return sum(values) / len(values) if values else None


def define_flags():
  flags.DEFINE_string('judgments', None, 'FastChat\'s model_judgment/*_single.jsonl.', required=True)
  flags.DEFINE_string('questions', None, 'FastChat\'s question.jsonl.', required=True)
  flags.DEFINE_string('out', None, 'JSON file to write.', required=True)


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  questions = read_questions(f.questions)
  result = scores(read_judgments(f.judgments, questions), questions)
  records.write(f.out, [result])
  print(f'{text_table(result)}\n{f.out}: {len(result)} models')


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
