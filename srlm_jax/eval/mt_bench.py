"""MT-Bench: grades answers with a judge, and computes the three rows of PAPER table 2.

  python -m srlm_jax.eval.mt_bench --judgments=gpt-4_single.jsonl --questions=question.jsonl \\
    --out=FILE.json

reads FastChat's single-answer judgments. A score of -1 marks a judgment without a score. These, and
scores that are not between 0 and 10, are counted and excluded from the means. With answers in
FastChat's format, a judge (`srlm_jax.eval.endpoint`) makes the judgments first:

  python -m srlm_jax.eval.mt_bench --answers=model_answer/m2.jsonl --judge=https://HOST/v1 \\
    --judge_model=NAME --judge_key_env=VARIABLE --judge_prompts=judge_prompts.jsonl \\
    --references=reference_answer/gpt-4.jsonl --judgments=model_judgment/NAME_single.jsonl \\
    --questions=question.jsonl --out=FILE.json

--judge_prompts and --references are FastChat's; without --judge_prompts the wording is ours
(`PROMPT`). Other lines in --judgments stay, and FastChat's show_result.py reads the file.
"""
from collections.abc import Container, Iterator
import dataclasses
import re
import string
import time

from absl import flags
from etils import epath

from srlm_jax import cli, conversation, InputError, lock, records, schema
from srlm_jax.data import prompt_files
from srlm_jax.eval import endpoint
from srlm_jax.reward import judges

HARD = ('math', 'coding', 'reasoning')  # PAPER: "math, code & reasoning"
NO_SCORE = -1
# Categories that FastChat grades beside a reference answer, and the names of its prompts:
# (with a reference, second turn) -> name.
WITH_REFERENCE = ('math', 'reasoning', 'coding', 'arena-hard-200')
FASTCHAT = {(False, False): 'single-v1', (True, False): 'single-math-v1',
            (False, True): 'single-v1-multi-turn', (True, True): 'single-math-v1-multi-turn'}
FASTCHAT_MAX_TOKENS = 2048  # fastchat/llm_judge/common.py: run_judge_single
OURS = 'srlm-single'
PROMPT = """\
Rate the {graded} of an assistant to its user: relevance, correctness, depth, clarity. Longer \
is not better in itself.{compare}

{turns}Give your reasons in a few sentences. Then end with one line that is exactly \
"Rating: [[N]]", where N is from 1 (useless) to 10 (excellent).
"""
_TAGS = {f'{name}{turn}' for name in ('question', 'answer', 'reference')
         for turn in ('', '_1', '_2')}
_RATING = re.compile(r'\[\[(\d{1,15}(?:\.\d{0,15})?)\]\]')
_ONE_BRACKET = re.compile(r'\[(\d{1,15}(?:\.\d{0,15})?)\]')
Questions = dict[int | str, prompt_files.Turns]  # by question id
Texts = dict[int | str, tuple[str, ...]]         # one per turn, by question id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgment:
  """*_single.jsonl of FastChat: the score of a model's answer in one turn, from 1."""
  question_id: int | str
  model: str
  turn: int
  score: float
  judge: tuple[str, ...] = ()  # its name, and that of the prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """One of the answers to a question: a text per turn."""
  turns: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """model_answer/MODEL.jsonl of FastChat, of which the first choice is graded."""
  question_id: int | str
  choices: tuple[Choice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgePrompt:
  """judge_prompts.jsonl of FastChat."""
  name: str
  prompt_template: str
  system_prompt: str = ''
  output_format: str = ''


@dataclasses.dataclass(frozen=True)
class Grading:
  """A request for the grade of one turn."""
  id: str
  question_id: int | str
  model: str
  turn: int
  prompt_name: str
  messages: conversation.Messages
  index: int = 0


def scores(judgments: list[Judgment], questions: Questions) -> dict[
    str, schema.MtBench]:
  """Judgments, {question id: question} -> {model: mean scores and counts}."""
  turns = sum(len(q.turns) for q in questions.values())
  result = {}
  for model in sorted({j.model for j in judgments}):
    own = [j for j in judgments if j.model == model]
    scored = [j for j in own if 0 <= j.score <= 10]  # a judge may write any number
    hard = [j for j in scored if questions[j.question_id].category in HARD]
    other = [j for j in scored if questions[j.question_id].category not in HARD]
    result[model] = schema.MtBench(
        overall=_mean_score(scored), math_code_reasoning=_mean_score(hard),
        other=_mean_score(other),
        turn_1=_mean_score([j for j in scored if j.turn == 1]),
        turn_2=_mean_score([j for j in scored if j.turn == 2]),
        scored=len(scored), no_score=len(own) - len(scored), absent=turns - len(own),
        judge=','.join(sorted({j.judge[0] for j in own if j.judge})))
  return result


def read_questions(path) -> Questions:
  """FastChat's question.jsonl -> {question id: question}."""
  questions = {q.question_id: q for q in records.read(path, prompt_files.Turns)}
  if not questions:
    raise InputError(f'{path} holds no questions; give FastChat\'s question.jsonl')
  return questions


def read_judgments(path, questions: Questions) -> list[Judgment]:
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
    key = j.model, j.question_id, j.turn
    if key in seen:
      raise InputError(f'{where} appears twice; delete one')
    seen.add(key)
    judgments.append(j)
  if not judgments:
    raise InputError(f'{path} holds no judgments; judge the answers first')
  return judgments


def read_answers(path, questions: Questions) -> Texts:
  """FastChat's model_answer/MODEL.jsonl -> {question id: the answer of each turn}.

  Raises InputError if it lacks a question, or a turn of one.
  """
  found = {}
  for answer in records.read(path, Answer):
    if answer.question_id in found:
      raise InputError(f'{path} answers question {answer.question_id} twice; delete one answer')
    found[answer.question_id] = answer.choices[0].turns if answer.choices else ()
  for name, question in questions.items():
    if len(found.get(name, ())) < len(question.turns):
      raise InputError(f'{path} answers {len(found.get(name, ()))} of the {len(question.turns)} '
                       f'turns of question {name}; answer all of them first')
  return found


def read_prompts(path) -> dict[str, JudgePrompt]:
  """FastChat's judge_prompts.jsonl -> {name: prompt}, those that grade single answers."""
  found = {prompt.name: prompt for prompt in records.read(path, JudgePrompt)}
  for name in FASTCHAT.values():
    if name not in found or found[name].output_format != '[[rating]]':
      raise InputError(f'{path} has no prompt {name} with the output format [[rating]]; give '
                       f'FastChat\'s judge_prompts.jsonl')
  return found


def gradings(model: str, answers: Texts, questions: Questions, references: Texts,
             prompts: dict[str, JudgePrompt]) -> Iterator[Grading]:
  """Yields what the judge is asked about a model: each turn of each question.

  references: {question id: answers}. prompts: FastChat's; {} for ours.
  """
  for name, question in questions.items():
    for turn in range(1, min(len(question.turns), 2) + 1):
      reference = references.get(name, ()) if question.category in WITH_REFERENCE else ()
      if prompts:
        prompt, messages = _fastchat(prompts, question, answers[name], reference, turn)
      else:
        prompt = OURS if turn == 1 else f'{OURS}-multi-turn'
        text = render(question.turns[:turn], answers[name][:turn], reference[:turn])
        messages = (conversation.Message('user', text),)
      yield Grading(f'{model}/{name}/{turn}', name, model, turn, prompt, messages)


def _fastchat(prompts, question: prompt_files.Turns, answers, reference, turn: int) -> tuple[
    str, conversation.Messages]:
  """The name of FastChat's prompt and its messages."""
  needs_reference = question.category in WITH_REFERENCE
  if needs_reference and len(reference) < turn:
    raise InputError(f'question {question.question_id} ({question.category}) is graded beside a '
                     f'reference answer, and there is none for turn {turn}; give --references, '
                     f'FastChat\'s reference_answer/gpt-4.jsonl')
  prompt = prompts[FASTCHAT[needs_reference, turn == 2]]
  texts = dict(question=question.turns[0], answer=answers[0])
  for i in range(turn):
    texts |= {f'question_{i + 1}': question.turns[i], f'answer_{i + 1}': answers[i]}
    if needs_reference:
      texts[f'ref_answer_{i + 1}'] = reference[i]
  text = ''
  try:
    for before, slot, form, conversion in string.Formatter().parse(prompt.prompt_template):
      if form or conversion:  # a width may be any number
        raise ValueError(f'the slot {{{slot}}} has a format')
      text += before + ('' if slot is None else texts[slot])
  except (KeyError, ValueError) as error:
    raise InputError(f'the prompt {prompt.name} of --judge_prompts cannot be filled ({error}); '
                     f'correct its slots') from error
  system = [conversation.Message('system', prompt.system_prompt)] if prompt.system_prompt else []
  return prompt.name, (*system, conversation.Message('user', text))


def render(questions: tuple[str, ...], answers: tuple[str, ...],
           references: tuple[str, ...]) -> str:
  """One or two turns -> our prompt, which asks for a grade of the last answer.

  No text can close a tag or end the chat turn (`judges.neutralise`).
  """
  is_single, turns = len(questions) == 1, ''
  for i, texts in enumerate(zip(questions, answers, strict=True), 1):
    end = '' if is_single else f'_{i}'
    parts = dict(zip(('question', 'answer'), texts, strict=True))
    if len(references) >= i:
      parts = dict(question=texts[0], reference=references[i - 1], answer=texts[1])
    for name, text in parts.items():
      turns += f'<{name}{end}>\n{judges.neutralise(text, _TAGS)}\n</{name}{end}>\n\n'
  compare = ' Compare it with the reference, which is right.' if references else ''
  graded = 'answer' if is_single else 'second answer'
  return PROMPT.format(graded=graded, compare=compare, turns=turns)


def rating(text: str) -> float:
  """A judgment -> its rating, or NO_SCORE. As in FastChat, the first [[N]], else [N], of any size.

  >>> rating('Poor. Rating: [[2]]'), rating('Rating: 7'), rating('[[70]]'), rating('[7.5]')
  (2, -1, 70, 7.5)
  """
  found = _RATING.search(text) or _ONE_BRACKET.search(text)
  if not found:
    return NO_SCORE
  return float(found[1]) if '.' in found[1] else int(found[1])


def grade(judge: endpoint.Client, asked: list[Grading]) -> list[dict]:
  """Asks the judge -> lines of FastChat's *_single.jsonl."""
  texts = dict(judge.ask(asked, len(asked)))
  return [dict(question_id=g.question_id, model=g.model, judge=[judge.name, g.prompt_name],
               user_prompt=g.messages[-1].content, judgment=texts[g.id], score=rating(texts[g.id]),
               turn=g.turn, tstamp=time.time()) for g in asked]


def text_table(result: dict[str, schema.MtBench]) -> str:
  """One line per model."""
  width = max(len('model'), *map(len, result))
  headings = [field.name for field in dataclasses.fields(schema.MtBench)]
  lines = ['  '.join(['model'.ljust(width), *headings])]
  for name, row in result.items():
    cells = [_cell(getattr(row, heading)).rjust(len(heading)) for heading in headings]
    lines.append('  '.join([name.ljust(width), *cells]))
  return '\n'.join(lines)


def _cell(value: float | int | str | None) -> str:
  if value is None:
    return '-'
  return f'{value:.2f}' if isinstance(value, float) else str(value)


def _mean_score(judgments: list[Judgment]) -> float | None:
  return sum(j.score for j in judgments) / len(judgments) if judgments else None


def define_flags():
  flags.DEFINE_string(
      'judgments', None, 'FastChat\'s model_judgment/*_single.jsonl; with --answers, the file to '
      'write.', required=True)
  flags.DEFINE_string('questions', None, 'FastChat\'s question.jsonl.', required=True)
  flags.DEFINE_string('out', None, 'JSON file to write.', required=True)
  flags.DEFINE_multi_string('answers', [], 'FastChat\'s model_answer/MODEL.jsonl, to be graded by '
                            '--judge; may be repeated.')
  flags.DEFINE_string('references', '', 'FastChat\'s reference_answer/gpt-4.jsonl.')
  flags.DEFINE_string('judge_prompts', '', 'FastChat\'s judge_prompts.jsonl; empty: our wording.')
  flags.DEFINE_integer('limit', 0, 'Grades the first N questions only; 0: all.', lower_bound=0)
  endpoint.define_flags()


def main(argv):
  cli.refuse_arguments(argv)
  f, judge = flags.FLAGS, endpoint.from_flags()
  questions = read_questions(f.questions)
  if bool(f.answers) != bool(judge.url):
    raise InputError('--answers and --judge belong together: the answers are graded by the judge; '
                     'give both, or only --judgments')
  if f.judge_prompts and not f['judge_max_tokens'].present:
    judge.max_tokens = FASTCHAT_MAX_TOKENS
  if f.answers:
    judge_answers(f.answers, judge, dict(list(questions.items())[:f.limit or None]), f.judgments,
                  f.judge_prompts, f.references)
  result = scores(read_judgments(f.judgments, questions), questions)
  records.write(f.out, [{name: dataclasses.asdict(row) for name, row in result.items()}])
  print(f'{text_table(result)}\n{f.out}: {len(result)} models')


def judge_answers(files, judge, questions: Questions, path, judge_prompts='', references=''):
  """Grades the models of FastChat's answer files and writes `path`, in which other lines stay.

  judge: the section `endpoint`. judge_prompts, references: FastChat's files, or ''. Raises
  InputError if `path` has judgments of these models by another judge or in another wording.
  """
  prompts = read_prompts(judge_prompts) if judge_prompts else {}
  right = {a.question_id: a.choices[0].turns for a in records.read(references, Answer)
           if a.choices} if references else {}
  models = {epath.Path(file).stem: read_answers(file, questions) for file in files}
  asked = [grading for model, answers in models.items()
           for grading in gradings(model, answers, questions, right, prompts)]
  path = epath.Path(path)
  with (lock.held_output(path.parent, 'folder for --judgments'),
        endpoint.open(judge, path.parent, title='MT-Bench') as client):
    before = [line for _, line in records.read_any(path)] if path.exists() else []
    if before:
      _refuse_others(path, models, client.name, is_ours=not prompts)
    made = grade(client, asked)
    new = {_key(line) for line in made}
    records.write(path, [*(line for line in before if _key(line) not in new), *made])


def _refuse_others(path, models: Container[str], judge: str, is_ours: bool):
  """Raises InputError if a file has judgments of these models by another judge or in other words.

  `is_ours`: whether the wording is ours.
  """
  wording = 'our' if is_ours else 'FastChat\'s'
  for j in records.read(path, Judgment):
    name, prompt = (*j.judge, '', '')[:2]
    if j.model in models and (name, prompt.startswith(OURS)) != (judge, is_ours):
      raise InputError(f'{path} has judgments of {j.model} by {name or "an unknown judge"} with '
                       f'the prompt {prompt!r}, and those of this command would be by {judge} with '
                       f'{wording} prompts; give another --judgments')


def _key(line: dict) -> tuple:
  return line['model'], line['question_id'], line['turn']


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
