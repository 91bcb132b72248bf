"""Head-to-head comparison of two models by an external judge, in both answer orders (PAPER 3.1).

Both models must have answered the same held-out prompts.

  python -m srlm_jax.eval.head_to_head --a=runs/x/m2/answers --b=runs/x/m1/answers \\
    --out=runs/x/eval/m2_m1 --judge=https://HOST/v1 --judge_model=NAME --judge_key_env=VARIABLE

asks the judge (`srlm_jax.eval.endpoint`) and writes head_to_head.json. Without --judge it writes
requests.jsonl. Send each `text` to a judge and save its replies as lines of {"id", "text"}; then
--verdicts=FILE.jsonl reads them. Answers graded by a program need no judge:

  python -m srlm_jax.eval.head_to_head --a=runs/x/m2/oracle --b=runs/x/m1/oracle --out=DIR --graded
"""
from collections.abc import Container, Iterable, Iterator, Mapping
import dataclasses
import itertools
import re

from absl import flags
from etils import epath
import numpy as np
from scipy import stats

from srlm_jax import cli, conversation, InputError, lock, records, schema, stage
from srlm_jax.eval import endpoint
from srlm_jax.reward import judges, scores as scoring

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
_VERDICTS = {'a': 'A', 'b': 'B', 'c': 'tie', 'tie': 'tie'}
# A line that starts with "Winner:", inside any markdown; and a verdict in double brackets anywhere,
# as in FastChat. All take linear time.
_WINNER = re.compile(r'[\s>#*_"\'`]*winner[\s*_]*:(.*)', re.IGNORECASE)
_BRACKETS = re.compile(r'\[\[(A|B|C|tie)\]\]', re.IGNORECASE)
_MARKDOWN = re.compile(r'[\s*_"\'`\[\]]+')
# What follows "Winner:". After a bare A, which may be an article, only some words can follow.
_NAMED = re.compile(r'\(?(?:(?:answer|assistant) ([abc])\b|(?:a )?(tie)\b|'
                    r'([abc])(?=$| ?[.,:;()–—-]| (?:is|because|since|as)\b))(.*)', re.IGNORECASE)
_ANOTHER = re.compile(r'\b(?:A|B|C|[Tt]ie)\b')


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeRequest:
  """requests.jsonl: a prompt for the judge; `order` is ab or ba."""
  id: str
  prompt_id: str
  order: str
  text: str

  @property
  def messages(self) -> conversation.Messages:
    """What is sent to a judge."""
    return (conversation.Message('user', self.text),)

  @property
  def index(self) -> int:
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeReply:
  """The judge's reply to the request with the same id."""
  id: str
  text: str


class Both:
  """The pairs of answers of two models to the same prompts; only one pair is in memory.

  Every iteration reads the files again. count: the number of pairs.
  """

  def __init__(self, a, b, is_graded: bool = False, limit: int = 0):
    """`a`, `b`: folders MODEL/answers or, graded, MODEL/oracle; limit: first pairs only, 0: all.

    Raises InputError unless both have one answer to each prompt, in the same order.
    """
    self._folders, self._is_graded, self._limit = (a, b), is_graded, limit or None
    for folder in (a, b):
      stage.check_records(folder)
    every = sum(1 for _ in self._checked())
    self.count = min(every, limit or every)

  def __iter__(self) -> Iterator[tuple[schema.Response, schema.Response]]:
    return itertools.islice(self._checked(), self._limit)

  def _checked(self):
    a, b = self._folders
    for x, y in itertools.zip_longest(*(read_answers(f, self._is_graded) for f in (a, b))):
      if not x or not y or (x.prompt_id, x.prompt) != (y.prompt_id, y.prompt):
        raise InputError(f'{a} and {b} answer different prompts, or in another order (first '
                         f'difference: {(x or y).prompt_id}); compare models of the same run')
      yield x, y


def read_answers(folder, is_graded: bool = False) -> Iterator[schema.Response]:
  """The answers in MODEL/answers or, graded, the `schema.GradedResponse` in MODEL/oracle.

  Raises InputError for two answers to a prompt, and without any.
  """
  seen = set()  # hashes, which take less memory than the ids
  for answer in (records.read(epath.Path(folder) / 'graded.jsonl', schema.GradedResponse)
                 if is_graded else records.read_shards(folder, 'responses', schema.Response)):
    if hash(answer.prompt_id) in seen:
      raise InputError(f'{folder} holds two answers to prompt {answer.prompt_id}; keep one per '
                       f'prompt')
    seen.add(hash(answer.prompt_id))
    yield answer
  if not seen:
    raise InputError(f'{folder} holds no answers; answer the held-out prompts first')


def requests(both: Iterable[tuple[schema.Response, schema.Response]]) -> Iterator[JudgeRequest]:
  """Pairs of answers to the same prompt -> two judge requests per prompt, one per order.

  The request id contains a hash of the text, so that a reply cannot be matched to other answers.
  """
  for a, b in both:
    for order, shown in (('ab', (a, b)), ('ba', (b, a))):
      text = render(a.prompt, *(x.response for x in shown))
      name = f'{a.prompt_id}/{order}/{records.digest(text)}'
      yield JudgeRequest(id=name, prompt_id=a.prompt_id, order=order, text=text)


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

  A verdict is [[X]] anywhere, where X is A, B, tie or C (a tie); or a line `Winner: X`, also with
  `Answer A`, which may give a reason but name no other answer. The last one counts, and a last line
  `Winner:` without a valid one leaves none. Takes time linear in the length.

  >>> parse('A is clearer. Winner: B would be wrong.\\n**Winner: A**')
  'A'
  >>> parse('[[A]] is tempting, but the verdict is [[C]].'), parse('Winner: Answer B')
  ('tie', 'B')
  """
  verdict = None
  for line in text.splitlines():
    if found := _BRACKETS.findall(line):
      verdict = _VERDICTS[found[-1].lower()]
    elif match := _WINNER.match(line):
      verdict = _named(_MARKDOWN.sub(' ', match[1]).strip())
  return verdict


def _named(words: str) -> str | None:
  """What follows "Winner:" -> the verdict that it names, if it names one."""
  match = _NAMED.match(words)
  if not match or _ANOTHER.search(match[4]):
    return None
  return _VERDICTS[(match[1] or match[2] or match[3]).lower()]


def outcome(first: str, second: str) -> str:
  """The verdicts of both orders -> 'win', 'tie' or 'loss' of model a.

  first: the verdict with model a shown first. second: the verdict with model b shown first.

  >>> outcome('A', 'B'), outcome('A', 'A'), outcome('B', 'A')
  ('win', 'tie', 'loss')
  """
  return {('A', 'B'): 'win', ('B', 'A'): 'loss'}.get((first, second), 'tie')


def compare(verdicts: dict[str, tuple[str | None, str | None]]) -> dict:
  """{prompt id: both verdicts} -> `tally`, and the counts of the verdicts.

  left_out: prompts with a verdict that is None. inconsistent: prompts whose two verdicts disagree,
  which count as ties. first_wins, second_wins: verdicts for the answer shown first and second;
  they differ if the judge favors a position.

  >>> compare(dict(p=('A', 'A'), q=('A', 'B')))['first_wins']
  3
  """
  whole = [both for both in verdicts.values() if None not in both]
  outcomes = [outcome(*both) for both in whole]
  shown = [verdict for both in whole for verdict in both]
  swapped = dict(A='B', B='A', tie='tie')
  return dict(tally(outcomes), left_out=len(verdicts) - len(whole),
              inconsistent=sum(second != swapped[first] for first, second in whole),
              first_wins=shown.count('A'), second_wins=shown.count('B'))


def compare_scores(scores: Iterable[tuple[float, float]]) -> dict:
  """The scores of both models for each prompt -> `tally`. The higher score wins.

  >>> compare_scores([(3, 2), (1, 1)])['win_share']
  0.5
  """
  return tally('win' if a > b else 'loss' if a < b else 'tie' for a, b in scores)


def tally(outcomes: Iterable[str]) -> dict:
  """Outcomes of model a, one per prompt -> counts, shares, win rate and p_value.

  Shares are None without any outcome. In win_rate ties count half; its 95 % interval is a bootstrap
  over prompts. p_value is the two-sided sign test of wins against losses; None if there are
  neither.
  """
  outcomes = list(outcomes)
  count = len(outcomes)
  win, tie, loss = (outcomes.count(x) for x in ('win', 'tie', 'loss'))
  win_share, tie_share, loss_share = (n / count if count else None for n in (win, tie, loss))
  p_value = float(stats.binomtest(win, win + loss).pvalue) if win + loss else None
  points = np.array([dict(win=1.0, tie=0.5, loss=0.0)[x] for x in outcomes]).reshape(-1, 1)
  interval, = scoring.intervals(points, np.ones_like(points))
  low, high = interval or (None, None)
  return dict(count=count, wins=win, ties=tie, losses=loss, win_share=win_share,
              tie_share=tie_share, loss_share=loss_share, p_value=p_value,
              win_rate=float(points.mean()) if count else None, win_rate_low=low,
              win_rate_high=high)


def ask(client: endpoint.Client, asked: Iterable[JudgeRequest], total: int) -> dict[
    str, str | None]:
  """Asks the judge -> {request id: verdict, see `parse`}; None for a reply that was cut.

  total: the number of requests.
  """
  return {name: None if answer.finish == schema.CUT else parse(answer.text)
          for name, answer in client.answers(asked, total)}


def verdicts(asked: Iterable[JudgeRequest], found: Mapping[str, str | None]) -> dict[
    str, tuple[str | None, str | None]]:
  """The requests of `requests`, {request id: verdict} -> {prompt id: both verdicts}.

  A verdict is None if its reply is missing or states none.
  """
  by_prompt = {}
  for request in asked:  # the order ab comes before ba
    verdict = found.get(request.id)
    by_prompt[request.prompt_id] = (*by_prompt.get(request.prompt_id, ()), verdict)
  return by_prompt


def read_replies(path, asked: Iterable[JudgeRequest]) -> dict[str, str | None]:
  """A file of replies to the requests -> {request id: verdict}; refuses other replies."""
  found, known = {}, {r.id for r in asked}
  for reply in records.read(path, JudgeReply):
    if reply.id not in known:
      raise InputError(f'{path}: reply {reply.id!r} matches no request for these answers; '
                       f'give the --a and --b of its requests.jsonl, or send the new requests')
    if reply.id in found:
      raise InputError(f'{path}: two replies have the id {reply.id}; delete one')
    found[reply.id] = parse(reply.text)
  return found


def define_flags():
  flags.DEFINE_string(
      'a', None, 'MODEL/answers of the model whose wins are counted.', required=True)
  flags.DEFINE_string('b', None, 'MODEL/answers of the model it is compared with.', required=True)
  flags.DEFINE_string(
      'out', None, 'Folder for requests.jsonl and head_to_head.json.', required=True)
  flags.DEFINE_string('verdicts', '', 'The judge\'s replies: lines with id and text.')
  flags.DEFINE_bool('graded', False, '--a and --b are MODEL/oracle folders: the higher score wins.')
  flags.DEFINE_integer('limit', 0, 'Compares the first N prompts only; 0: all.', lower_bound=0)
  endpoint.define_flags()


def main(argv):
  cli.refuse_arguments(argv)
  f, judge = flags.FLAGS, endpoint.from_flags()
  if bool(f.graded) + bool(f.verdicts) + bool(judge.url) > 1:
    raise InputError('--graded, --verdicts and --judge exclude each other; give only one of them')
  both, out = Both(f.a, f.b, f.graded, f.limit), epath.Path(f.out)
  path = out / 'head_to_head.json'
  if not (f.graded or f.verdicts or judge.url):
    count = records.write(out / 'requests.jsonl', requests(both))
    print(f'{out / "requests.jsonl"}: {count} requests; send each text to the judge, '
          f'then give --verdicts; or give --judge')
    return
  _refuse_fewer(path, both.count)
  if f.graded:
    result, compared = compare_scores((a.score, b.score) for a, b in both), None
  else:
    result, compared = _judged(f, judge, both, out)
  result |= _mean_lengths(both, compared)  # reported because judges prefer long answers
  found = schema.HeadToHead(a=str(f.a), b=str(f.b), **result)
  stage.write_json(path, dataclasses.asdict(found))
  print(f'{path}: ' + ', '.join(
      f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}'
      for k, v in dataclasses.asdict(found).items()))


def _refuse_fewer(path, count: int):
  """Raises InputError if `path` has the result of more prompts than `count`."""
  if path.exists():
    before = records.read_object(path, schema.HeadToHead, 'correct or delete it')
    if (every := before.count + before.left_out) > count:
      raise InputError(f'{path} compares {every:,} prompts, and would be replaced by a comparison '
                       f'of {count:,}; give another --out, or delete it')


def _judged(f, judge, both: Both, out) -> tuple[dict, set[str]]:
  """The verdicts of the judge, or of its file -> fields of HeadToHead, prompts with an outcome."""
  by, total = {}, 2 * both.count
  if judge.url:
    with (lock.held_output(out, '--out'),
          endpoint.open(judge, out, title='head to head') as client):
      replies = ask(client, requests(both), total)
      by = dict(judge=client.name, cost=client.cost)
  else:
    replies = read_replies(f.verdicts, requests(both))
  found = verdicts(requests(both), replies)
  without = sum(verdict is None for verdict in replies.values())
  result = dict(compare(found), unparsed=without, missing=total - len(replies), **by)
  return result, {name for name, pair in found.items() if None not in pair}


def _mean_lengths(both: Both, compared: Container[str] | None) -> dict[str, float | None]:
  """The mean characters of the answers to some prompts; None for all."""
  count, totals = 0, [0, 0]
  for pair in both:
    if compared is None or pair[0].prompt_id in compared:
      count += 1
      totals = [total + len(answer.response) for total, answer in zip(totals, pair, strict=True)]
  return {f'characters_{name}': total / count if count else None
          for name, total in zip('ab', totals, strict=True)}


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
