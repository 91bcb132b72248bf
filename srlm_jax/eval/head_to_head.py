"""Head-to-head comparison of two models by an external judge, in both answer orders (PAPER 3.1).

Both models must have answered the same held-out prompts.

  python -m srlm_jax.eval.head_to_head --a=runs/x/m2/answers --b=runs/x/m1/answers --out=DIR

writes DIR/requests.jsonl. Send each `text` to the judge and save its replies as lines of
{"id", "text"}.

  python -m srlm_jax.eval.head_to_head --a=... --b=... --out=DIR --verdicts=FILE.jsonl

reads the replies and writes DIR/head_to_head.json. Answers graded by a program need no judge:

  python -m srlm_jax.eval.head_to_head --a=runs/x/m2/oracle --b=runs/x/m1/oracle --out=DIR --graded
"""
from collections.abc import Iterable
import dataclasses
import re

from absl import flags
from etils import epath
from scipy import stats

from srlm_jax import cli, InputError, records, schema, stage
from srlm_jax.reward import judges

PROMPT = """\
Two assistants answered the same prompt. Decide which answer serves its user better: relevance, \
correctness, completeness, clarity. The order of the answers says nothing about them, and longer \
is not better in itself.

<prompt>
{prompt}
</prompt>

<answer_a>
{a}
</answer_a>

<answer_b>
{b}
</answer_b>

Give your reasons in a few sentences. Then end with one line that is exactly "Winner: A", \
"Winner: B" or "Winner: tie".
"""
_WINNER = re.compile(r'[\s>#*_"\'`]*winner[\s*_]*:(.*)', re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeRequest:
  """requests.jsonl: a prompt for the judge; `order` is ab or ba."""
  id: str
  prompt_id: str
  order: str
  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeReply:
  """The judge's reply to the request with the same id."""
  id: str
  text: str


def requests(a: dict[str, schema.Response], b: dict[str, schema.Response]) -> list[JudgeRequest]:
  """{prompt id: answer} of both models -> two judge requests per prompt, one per order.

  The request id contains a hash of the text, so that a reply cannot be matched to other answers.
  """
  made = []
  for prompt_id, answer in a.items():
    for order, shown in (('ab', (answer, b[prompt_id])), ('ba', (b[prompt_id], answer))):
      text = render(answer.prompt, *(x.response for x in shown))
      name = f'{prompt_id}/{order}/{records.digest(text)}'
      made.append(JudgeRequest(id=name, prompt_id=prompt_id, order=order, text=text))
  return made


def render(prompt: str, a: str, b: str) -> str:
  """A prompt and two answers -> the judge's prompt.

  No text can close a tag, fill another slot or end the chat turn (`judges.neutralise`).
  """
  names = judges.tags(PROMPT)
  texts = dict(prompt=prompt, a=a, b=b)
  slots = {name: judges.neutralise(text, names) for name, text in texts.items()}
  return re.sub(r'\{(prompt|a|b)\}', lambda m: slots[m[1]], PROMPT)


def parse(text: str) -> str | None:
  """A reply of the judge -> 'A', 'B' or 'tie', or None if it states no verdict.

  The verdict is the last line that starts with "Winner:". Takes time linear in the length.

  >>> parse('A is clearer. Winner: B would be wrong.\\n**Winner: A**')
  'A'
  """
  found = [m[1] for line in text.splitlines() if (m := _WINNER.match(line))]
  word = found[-1].strip(' \t\r*_"\'`.').lower() if found else ''
  return dict(a='A', b='B', tie='tie').get(word)


def outcome(first: str, second: str) -> str:
  """The verdicts of both orders -> 'win', 'tie' or 'loss' of model a.

  first: the verdict with model a shown first. second: the verdict with model b shown first.

  >>> outcome('A', 'B'), outcome('A', 'A'), outcome('B', 'A')
  ('win', 'tie', 'loss')
  """
  return {('A', 'B'): 'win', ('B', 'A'): 'loss'}.get((first, second), 'tie')


def compare(verdicts: dict[str, tuple[str | None, str | None]]) -> dict:
  """{prompt id: both verdicts} -> `tally`, and the number of prompts left out.

  A prompt is left out if a verdict is None.
  """
  outcomes = [outcome(*both) for both in verdicts.values() if None not in both]
  return dict(tally(outcomes), left_out=len(verdicts) - len(outcomes))


def compare_scores(a: dict[str, float], b: dict[str, float]) -> dict:
  """{prompt id: score} of both models -> `tally`. The higher score wins.

  >>> compare_scores(dict(p=3, q=1), dict(p=2, q=1))['win_share']
  0.5
  """
  return tally('win' if a[name] > b[name] else 'loss' if a[name] < b[name] else 'tie' for name in a)


def tally(outcomes: Iterable[str]) -> dict:
  """Outcomes of model a -> counts, shares and p_value. Shares are None without any outcome.

  p_value is the two-sided sign test of wins against losses; None if there are neither.
  """
  outcomes = list(outcomes)
  count = len(outcomes)
  win, tie, loss = (outcomes.count(x) for x in ('win', 'tie', 'loss'))
  win_share, tie_share, loss_share = (n / count if count else None for n in (win, tie, loss))
  p_value = float(stats.binomtest(win, win + loss).pvalue) if win + loss else None
  return dict(count=count, wins=win, ties=tie, losses=loss, win_share=win_share,
              tie_share=tie_share, loss_share=loss_share, p_value=p_value)


def read_answers(folder) -> dict[str, schema.Response]:
  """MODEL/answers -> {prompt id: answer}."""
  stage.check_records(folder)
  return _by_prompt(folder, records.read_shards(folder, 'responses', schema.Response))


def read_graded(folder) -> dict[str, schema.GradedResponse]:
  """MODEL/oracle -> {prompt id: answer with a score}."""
  stage.check_records(folder)
  path = epath.Path(folder) / 'graded.jsonl'
  return _by_prompt(folder, records.read(path, schema.GradedResponse))


def read_verdicts(path, asked: list[JudgeRequest]) -> tuple[dict, dict]:
  """A file of replies to the requests -> ({prompt id: both verdicts}, counts).

  The counts are those of unparsed and missing verdicts. Both kinds of verdict are None.
  """
  texts, known = {}, {r.id for r in asked}
  for reply in records.read(path, JudgeReply):
    if reply.id not in known:
      raise InputError(f'{path}: reply {reply.id!r} matches no request for these answers; '
                       f'give the --a and --b of its requests.jsonl, or send the new requests')
    if reply.id in texts:
      raise InputError(f'{path}: two replies have the id {reply.id}; delete one')
    texts[reply.id] = reply.text
  verdicts = {}
  for request in asked:  # the order ab comes before ba
    verdict = parse(texts[request.id]) if request.id in texts else None
    verdicts[request.prompt_id] = (*verdicts.get(request.prompt_id, ()), verdict)
  without = sum(verdict is None for both in verdicts.values() for verdict in both)
  missing = len(known) - len(texts)
  return verdicts, dict(unparsed=without - missing, missing=missing)


def _by_prompt(folder, answers: Iterable[schema.Response]) -> dict:
  found = {}
  for answer in answers:
    if answer.prompt_id in found:
      raise InputError(f'{folder} holds two answers to prompt {answer.prompt_id}; keep one per '
                       f'prompt')
    found[answer.prompt_id] = answer
  if not found:
    raise InputError(f'{folder} holds no answers; answer the held-out prompts first')
  return found


def _check_same_prompts(a: dict, b: dict, folder_a, folder_b):
  """Raises InputError unless both models answered the same prompts."""
  for prompt_id in sorted({*a, *b}):
    if prompt_id not in a or prompt_id not in b or a[prompt_id].prompt != b[prompt_id].prompt:
      raise InputError(f'{folder_a} and {folder_b} answer different prompts (first difference: '
                       f'{prompt_id}); compare models of the same run')


def define_flags():
  flags.DEFINE_string(
      'a', None, 'MODEL/answers of the model whose wins are counted.', required=True)
  flags.DEFINE_string('b', None, 'MODEL/answers of the model it is compared with.', required=True)
  flags.DEFINE_string(
      'out', None, 'Folder for requests.jsonl and head_to_head.json.', required=True)
  flags.DEFINE_string('verdicts', '', 'The judge\'s replies: lines with id and text.')
  flags.DEFINE_bool('graded', False, '--a and --b are MODEL/oracle folders: the higher score wins.')


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  if f.graded and f.verdicts:
    raise InputError('--graded needs no --verdicts; give only one of them')
  read = read_graded if f.graded else read_answers
  a, b = read(f.a), read(f.b)
  _check_same_prompts(a, b, f.a, f.b)
  out = epath.Path(f.out)
  if f.graded:
    result = compare_scores(*({name: answer.score for name, answer in x.items()} for x in (a, b)))
  elif f.verdicts:
    verdicts, failures = read_verdicts(f.verdicts, requests(a, b))
    result = dict(compare(verdicts), **failures)
    a, b = ({name: x[name] for name, both in verdicts.items() if None not in both} for x in (a, b))
  else:
    count = records.write(out / 'requests.jsonl', requests(a, b))
    print(f'{out / "requests.jsonl"}: {count} requests; send each text to the judge, '
          f'then give --verdicts')
    return
  for name, answers in dict(a=a, b=b).items():  # reported because judges prefer long answers
    total = sum(len(x.response) for x in answers.values())
    result[f'characters_{name}'] = total / len(answers) if answers else None
  records.write(out / 'head_to_head.json', [dict(a=str(f.a), b=str(f.b), **result)])
  print(f'{out / "head_to_head.json"}: ' + ', '.join(
      f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in result.items()))


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
