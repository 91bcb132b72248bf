"""MT-Bench scores from FastChat's single-answer judgments: the three rows of PAPER table 2.

  python -m srlm_jax.eval.mt_bench --judgments=gpt-4_single.jsonl --questions=question.jsonl \\
    --out=FILE.json

Both input files come from FastChat's llm_judge. Its gen_model_answer.py samples the answers of a
Hugging Face model (see srlm_jax.checkpoint.convert), and its gen_judgment.py queries the judge. A
score of -1 marks a judgment without a score. These are counted and excluded from the means.
"""
import dataclasses

from absl import flags

from srlm_jax import cli, InputError, records

HARD = ('math', 'coding', 'reasoning')  # PAPER: "math, code & reasoning"
NO_SCORE = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """question.jsonl of FastChat."""
  question_id: int
  category: str
  turns: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgment:
  """*_single.jsonl of FastChat: the score of a model's answer in one turn, from 1."""
  question_id: int
  model: str
  turn: int
  score: float


def scores(judgments: list[Judgment], questions: dict[int, Question]) -> dict[str, dict]:
  """Judgments, {question id: question} -> {model: statistics}.

  overall, math_code_reasoning, other, turn_1, turn_2  mean scores from 1 to 10; None without scores
  scored, no_score  number of judgments with and without a score
  absent            number of question turns without a judgment
  """
  turns = sum(len(q.turns) for q in questions.values())
  result = {}
  for model in sorted({j.model for j in judgments}):
    own = [j for j in judgments if j.model == model]
    scored = [j for j in own if j.score != NO_SCORE]
    hard = [j for j in scored if questions[j.question_id].category in HARD]
    other = [j for j in scored if questions[j.question_id].category not in HARD]
    result[model] = dict(
        overall=_mean_score(scored), math_code_reasoning=_mean_score(hard),
        other=_mean_score(other),
        turn_1=_mean_score([j for j in scored if j.turn == 1]),
        turn_2=_mean_score([j for j in scored if j.turn == 2]),
        scored=len(scored), no_score=len(own) - len(scored), absent=turns - len(own))
  return result


def read_questions(path) -> dict[int, Question]:
  """FastChat's question.jsonl -> {question id: question}."""
  questions = {q.question_id: q for q in records.read(path, Question)}
  if not questions:
    raise InputError(f'{path} holds no questions; give FastChat\'s question.jsonl')
  return questions


def read_judgments(path, questions: dict[int, Question]) -> list[Judgment]:
  """FastChat's *_single.jsonl, checked against the questions."""
  judgments, seen = [], set()
  for j in records.read(path, Judgment):
    where = f'{path}: the judgment of question {j.question_id}, turn {j.turn}, model {j.model},'
    if j.question_id not in questions:
      raise InputError(f'{where} matches no question in --questions; give the questions that were '
                       f'judged')
    if not 1 <= j.turn <= len(questions[j.question_id].turns):
      raise InputError(f'{where} has a turn that the question does not have; give the questions '
                       f'that were judged')
    if not (j.score == NO_SCORE or 0 <= j.score <= 10):
      raise InputError(f'{where} has the score {j.score:g}, which is neither between 0 and 10 nor '
                       f'{NO_SCORE} (no score); correct it')
    key = j.model, j.question_id, j.turn
    if key in seen:
      raise InputError(f'{where} appears twice; delete one')
    seen.add(key)
    judgments.append(j)
  if not judgments:
    raise InputError(f'{path} holds no judgments; judge the answers first')
  return judgments


def text_table(result: dict[str, dict]) -> str:
  """One line per model."""
  width = max(len('model'), *map(len, result))
  headings = list(next(iter(result.values())))
  lines = ['  '.join(['model'.ljust(width), *headings])]
  for name, row in result.items():
    cells = [_cell(value).rjust(len(heading)) for heading, value in row.items()]
    lines.append('  '.join([name.ljust(width), *cells]))
  return '\n'.join(lines)


def _cell(value: float | int | None) -> str:
  if value is None:
    return '-'
  return f'{value:.2f}' if isinstance(value, float) else str(value)


def _mean_score(judgments: list[Judgment]) -> float | None:
  return sum(j.score for j in judgments) / len(judgments) if judgments else None


def define_flags():
  flags.DEFINE_string(
      'judgments', None, 'FastChat\'s model_judgment/*_single.jsonl.', required=True)
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
