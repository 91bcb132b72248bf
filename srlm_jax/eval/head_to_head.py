"""Two models' answers to the same held-out prompts, compared by an outside judge in both orders (PAPER 3.1).

  python -m srlm_jax.eval.head_to_head --a=runs/x/m2/answers --b=runs/x/m1/answers --out=DIR
writes DIR/requests.jsonl; send each `text` to the judge, and keep its replies as lines of {"id", "text"};
  python -m srlm_jax.eval.head_to_head --a=... --b=... --out=DIR --verdicts=FILE.jsonl
reads them and writes DIR/head_to_head.json. Answers that a program graded need no judge:
  python -m srlm_jax.eval.head_to_head --a=runs/x/m2/oracle --b=runs/x/m1/oracle --out=DIR --graded
"""
import re

from absl import flags
from etils import epath
from scipy import stats

from srlm_jax import cli, InputError, records
from srlm_jax.reward import judges

PROMPT = """\
Two assistants answered the same prompt. Decide which answer serves its user better: relevance, correctness, \
completeness, clarity. The order of the answers says nothing about them, and longer is not better in itself.

<prompt>
{prompt}
</prompt>

<answer_a>
{a}
</answer_a>

<answer_b>
{b}
</answer_b>

Give your reasons in a few sentences. Then end with one line that is exactly "Winner: A", "Winner: B" or \
"Winner: tie".
"""
_WINNER = re.compile(r'[\s>#*_"\'`]*winner[\s*_]*:(.*)', re.IGNORECASE)


def requests(a: dict[str, dict], b: dict[str, dict]) -> list[dict]:
  """Answers by prompt id -> two requests a prompt; the hash in an id ties a reply to these very answers."""
  made = []
  for name, first in a.items():
    for order, shown in (('ab', (first, b[name])), ('ba', (b[name], first))):
      text = render(first['prompt'], *(answer['response'] for answer in shown))
      made.append(dict(id=f'{name}/{order}/{records.digest(text)}', prompt_id=name, order=order, text=text))
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
  """A reply -> the verdict of the last line that begins with "Winner:": 'A', 'B', 'tie', or None.

  None if there is no such line or it says something else. Linear in the length of the reply.

  >>> parse('A is clearer. Winner: B would be wrong.\\n**Winner: A**')
  'A'
  """
  found = [m[1] for line in text.splitlines() if (m := _WINNER.match(line))]
  word = found[-1].strip(' \t\r*_"\'`.').lower() if found else ''
  return dict(a='A', b='B', tie='tie').get(word)


def outcome(first: str, second: str) -> str:
  """The verdicts with model a shown first, then with b shown first -> 'win', 'tie' or 'loss' of a.

  >>> outcome('A', 'B'), outcome('A', 'A'), outcome('B', 'A')
  ('win', 'tie', 'loss')
  """
  return {('A', 'B'): 'win', ('B', 'A'): 'loss'}.get((first, second), 'tie')


def compare(verdicts: dict[str, tuple[str | None, str | None]]) -> dict:
  """Both verdicts of every prompt -> counts, shares and sign test; a prompt without both is left out."""
  outcomes = {name: outcome(*both) for name, both in verdicts.items() if None not in both}
  return dict(tally(outcomes.values()), left_out=len(verdicts) - len(outcomes))


def compare_scores(a: dict[str, float], b: dict[str, float]) -> dict:
  """Scores by prompt -> counts, shares and sign test; the higher score wins.

  >>> compare_scores(dict(p=3, q=1), dict(p=2, q=1))['win_share']
  0.5
  """
  return tally('win' if a[name] > b[name] else 'loss' if a[name] < b[name] else 'tie' for name in a)


def tally(outcomes) -> dict:
  """Outcomes of a -> counts and shares; p_value: two-sided sign test of wins against losses; or None."""
  outcomes = list(outcomes)
  count = len(outcomes)
  win, tie, loss = (outcomes.count(x) for x in ('win', 'tie', 'loss'))
  shares = [n / count if count else None for n in (win, tie, loss)]
  p = float(stats.binomtest(win, win + loss).pvalue) if win + loss else None
  return dict(count=count, wins=win, ties=tie, losses=loss, win_share=shares[0], tie_share=shares[1],
              loss_share=shares[2], p_value=p)


def read_answers(folder) -> dict[str, dict]:
  """MODEL/answers by prompt id."""
  return _by_prompt(folder, records.read_shards(folder, 'responses', 'prompt_id', 'prompt', 'response'))


def read_graded(folder) -> dict[str, dict]:
  """MODEL/oracle by prompt id, each with a score."""
  path = epath.Path(folder) / 'graded.jsonl'
  found = _by_prompt(folder, records.read(path, 'prompt_id', 'prompt', 'response', 'score'))
  for name, answer in found.items():
    if isinstance(answer['score'], bool) or not isinstance(answer['score'], int | float):
      raise InputError(f'{path}: prompt {name} has the score {answer["score"]!r}, which is no number; '
                       f'grade it again')
  return found


def read_verdicts(path, asked: list[dict]) -> tuple[dict, dict]:
  """Replies to requests -> ({prompt id: both verdicts}, counts of verdicts that are unparsed and missing)."""
  texts, known = {}, {r['id'] for r in asked}
  for reply in records.read(path, 'id', 'text'):
    if reply['id'] not in known:
      raise InputError(f'{path}: reply {reply["id"]!r} answers no request made from these answers; '
                       f'give the --a and --b of its requests.jsonl, or send the new requests')
    if reply['id'] in texts:
      raise InputError(f'{path}: two replies have the id {reply["id"]}; delete one')
    texts[reply['id']] = reply['text']
  verdicts = {}
  for request in asked:  # ab before ba
    verdict = parse(texts[request['id']]) if request['id'] in texts else None
    verdicts[request['prompt_id']] = (*verdicts.get(request['prompt_id'], ()), verdict)
  unread = sum(v is None for both in verdicts.values() for v in both)
  missing = len(known) - len(texts)
  return verdicts, dict(unparsed=unread - missing, missing=missing)


def _by_prompt(folder, answers) -> dict[str, dict]:
  found = {}
  for answer in answers:
    name = answer['prompt_id']
    if name in found:
      raise InputError(f'{folder} holds two answers to prompt {name}; head to head takes one')
    found[name] = answer
  if not found:
    raise InputError(f'{folder} holds no answer; answer the held-out prompts first')
  return found


def _same_prompts(a: dict, b: dict, folder_a, folder_b):
  texts = [{name: answer['prompt'] for name, answer in x.items()} for x in (a, b)]
  name = next((n for n in sorted({*a, *b}) if texts[0].get(n) != texts[1].get(n)), None)
  if name is not None:
    raise InputError(f'{folder_a} and {folder_b} answer different prompts (the first is {name}); '
                     f'compare models of one run')


def define_flags():
  flags.DEFINE_string('a', None, 'MODEL/answers of the model whose wins are counted.', required=True)
  flags.DEFINE_string('b', None, 'MODEL/answers of the model it is compared with.', required=True)
  flags.DEFINE_string('out', None, 'Folder for requests.jsonl and head_to_head.json.', required=True)
  flags.DEFINE_string('verdicts', '', 'The judge\'s replies: lines with id and text.')
  flags.DEFINE_bool('graded', False, '--a and --b are MODEL/oracle folders: the higher score wins.')


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  if f.graded and f.verdicts:
    raise InputError('--graded needs no --verdicts; give one of them')
  a, b = ((read_graded if f.graded else read_answers)(folder) for folder in (f.a, f.b))
  _same_prompts(a, b, f.a, f.b)
  out = epath.Path(f.out)
  if f.graded:
    result = compare_scores(*({name: answer['score'] for name, answer in x.items()} for x in (a, b)))
  elif f.verdicts:
    verdicts, unread = read_verdicts(f.verdicts, requests(a, b))
    result = dict(compare(verdicts), **unread)
    a, b = ({name: x[name] for name, both in verdicts.items() if None not in both} for x in (a, b))
  else:
    count = records.write(out / 'requests.jsonl', requests(a, b))
    print(f'{out / "requests.jsonl"}: {count} requests; send each text to the judge, then give --verdicts')
    return
  for name, answers in dict(a=a, b=b).items():  # beside every win rate: judges like length
    result[f'characters_{name}'] = sum(len(x['response']) for x in answers.values()) / len(a) if a else None
  records.write(out / 'head_to_head.json', [dict(a=str(f.a), b=str(f.b), **result)])
  print(f'{out / "head_to_head.json"}: ' + ', '.join(
      f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in result.items()))


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
