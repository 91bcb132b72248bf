"""Prompt files of users, and the answers to them in the formats of alpaca_eval and FastChat.

A file is one of these:

AlpacaEval  .json, a list of objects with `instruction`
MT-Bench    FastChat's question.jsonl: `question_id`, `category`, `turns`
plain       .txt with one prompt per line, or JSON lines with `prompt`
"""
from collections.abc import Iterator, Sequence
import dataclasses

from etils import epath
import msgspec

from srlm_jax import conversation, InputError, records, schema
from srlm_jax.conversation import Messages

# FastChat, fastchat/llm_judge/common.py: temperature_config; and gen_model_answer.py for the rest.
FASTCHAT_TEMPERATURES = dict(
    writing=0.7, roleplay=0.7, extraction=0.0, math=0.0, coding=0.0, reasoning=0.0, stem=0.1,
    humanities=0.1) | {'arena-hard-200': 0.0}
FASTCHAT_TEMPERATURE = 0.7
_ADVICE = ('give a .json file of AlpacaEval (objects with "instruction"), a .jsonl file of '
           'MT-Bench ("turns") or with "prompt", or a .txt file with one prompt per line')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A prompt of a file, in its first turn."""
  id: str
  prompt: str
  fields: dict                      # of the file
  messages: Messages = ()           # as in the records of `schema`
  second: str = ''                  # what the user says in turn 2
  temperature: float | None = None  # None: the file does not decide it

  def then(self, answer: str) -> 'Question':
    """Turn 2, after the model's answer to turn 1."""
    messages = conversation.in_turns([self.prompt, answer, self.second])
    return dataclasses.replace(self, id=f'{self.id}/turn_2', prompt=conversation.text(messages),
                               messages=messages, second='')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Instruction:
  instruction: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns:
  """FastChat's question.jsonl."""
  question_id: int | str
  turns: tuple[str, ...]
  category: str = ''
  required_temperature: float | None = None

  def __post_init__(self):
    if not 1 <= len(self.turns) <= 2:
      raise ValueError(f'it has {len(self.turns)} turns, and must have 1 or 2')
    if not 0 <= (self.required_temperature or 0) <= 100:
      raise ValueError('required_temperature must be 0 to 100')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plain:
  prompt: str
  id: str = ''
  messages: Messages = ()

  def __post_init__(self):
    conversation.check_record(self.prompt, self.messages)


_KINDS = dict(instruction=_Instruction, turns=Turns, prompt=_Plain)


def read(path) -> list[Question]:
  """The prompts of a file, all of one kind. Raises InputError for anything else."""
  path = epath.Path(path)
  if not path.exists():
    raise InputError(f'{path} does not exist; {_ADVICE}')
  rows = list(_rows(path))
  if not rows:
    raise InputError(f'{path} has no prompts; {_ADVICE}')
  key = _kind(rows[0][1])
  if not key:
    raise InputError(f'{rows[0][0]}: no "instruction", "turns" or "prompt"; {_ADVICE}')
  questions, seen = [], {}
  for i, (where, row) in enumerate(rows):
    if _kind(row) not in (key, ''):
      raise InputError(f'{where}: has "{_kind(row)}", which the first prompt has not; delete it '
                       f'or give prompts of one kind')
    try:
      question = _question(msgspec.convert(row, _KINDS[key]), str(i), row)
    except msgspec.ValidationError as error:
      raise InputError(f'{where}: {records.sentence(error)}; correct it') from error
    said = [m.content for m in conversation.of(question)[-1:]]
    if not all(text.strip() for text in [*said, *row.get('turns', ())]):
      raise InputError(f'{where}: a prompt is blank; delete it')
    # alpaca_eval identifies answers by their instruction.
    name = question.prompt if key == 'instruction' else question.id
    if name in seen:
      what = 'instruction' if key == 'instruction' else f'id {name}'
      raise InputError(f'{where}: the same {what} as {seen[name]}; delete one')
    seen[name] = where
    questions.append(question)
  return questions


def _kind(row: dict) -> str:
  """The field that tells what kind of prompt it is; '' if it has none of them."""
  return next((key for key in _KINDS if key in row), '')


def _question(found: _Instruction | Turns | _Plain, index: str, row: dict) -> Question:
  match found:
    case _Instruction():
      return Question(id=index, prompt=found.instruction, fields=row)
    case Turns():
      temperature = found.required_temperature
      if temperature is None:
        temperature = FASTCHAT_TEMPERATURES.get(found.category, FASTCHAT_TEMPERATURE)
      return Question(id=str(found.question_id), prompt=found.turns[0], fields=row,
                      second=''.join(found.turns[1:]), temperature=temperature)
    case _Plain():
      rest = {name: value for name, value in row.items() if name not in ('prompt', 'messages')}
      return Question(id=found.id or index, prompt=found.prompt, messages=found.messages,
                      fields=dict(instruction=found.prompt, **rest))


def _rows(path) -> Iterator[tuple[str, dict]]:
  """Yields (place in the file, object) of every prompt."""
  if path.name.endswith(('.jsonl', '.jsonl.gz')):
    yield from records.read_any(path)
  elif path.suffix == '.txt':
    with records.reading(path, _ADVICE):
      data = path.read_bytes()
    try:
      lines = data.decode().split('\n')  # str.splitlines also splits at \u2028 and \f
    except UnicodeDecodeError as error:
      raise InputError(f'{path} is not UTF-8 text ({error}); {_ADVICE}') from error
    yield from ((f'{path}:{i}', dict(prompt=line.removesuffix('\r')))
                for i, line in enumerate(lines, 1) if line.strip())
  elif path.suffix == '.json':
    found = records.read_json(path, _ADVICE)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
      raise InputError(f'{path} is not a list of objects; {_ADVICE}')
    yield from ((f'{path}: entry {i}', row) for i, row in enumerate(found))
  else:
    raise InputError(f'{path}: the kind of file is unknown; {_ADVICE}')


def is_fastchat(questions: Sequence[Question]) -> bool:
  """Whether they are MT-Bench's, or of another file in its format."""
  return next(key for key in _KINDS if key in questions[0].fields) == 'turns'


def model_outputs(questions: Sequence[Question], answers: Sequence[schema.Response],
                  model: str) -> list[dict]:
  """Questions and the answer to each -> alpaca_eval's model outputs, with the file's other fields.
  """
  return [{**q.fields, 'output': a.response, 'generator': model}
          for q, a in zip(questions, answers, strict=True)]


def model_answers(questions: Sequence[Question], first: Sequence[schema.Response],
                  second: Sequence[schema.Response], model: str) -> Iterator[dict]:
  """Questions, the answer to each in turn 1, the answers in turn 2 -> FastChat's model answers.

  There is no time stamp, so that equal runs write equal files.
  """
  left = iter(second)
  for q, a in zip(questions, first, strict=True):
    turns = [a.response, *([next(left).response] if q.second else ())]
    yield dict(question_id=q.fields['question_id'], answer_id=records.digest(model, q.id, *turns),
               model_id=model, choices=[dict(index=0, turns=turns)])
