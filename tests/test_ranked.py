import copy
import doctest
import gzip
import json
import random
import re
import shutil
import subprocess

from conftest import run_main
import pytest
from test_seeds import check, raw, record, run, write

from srlm_jax import conversation, InputError, records, schema
from srlm_jax.data import ranked


def scored(name, *scores, **fields):
  return {'prompt': f'Prompt {name}?', 'replies': [
      {'text': f'Reply {i} to {name}', 'score': score} for i, score in enumerate(scores)]} | fields


def read(path):
  return [turn for _, turn in ranked.turns(records.read_any(path))]


def test_scores_become_ranks_and_equal_scores_share_one(tmp_path):
  assert doctest.testmod(ranked).failed == 0
  path = write(tmp_path / 'x.jsonl', [
      scored('a', 7, 9.5, 7.0, -1, id='a'), scored('b', 5), scored('c', 3, 3),
      scored('d', 8, 9, 9)])
  found = read(path)
  assert found[0].id == 'a'
  assert [[reply.rank for reply in turn.replies] for turn in found] == [
      [1, 0, 1, 3], [0], [0, 0], [2, 0, 0]]
  out = run(path, tmp_path / 'run', ift=0, test_prompts=0, valid_prompts=0, ranked_train=2,
            ranked_eval=0)
  assert check(out)['dropped']['prompts'] == {'more than requested': 2}  # b and c have no order
  [row] = [r for r in out['ranked.jsonl'] if r['id'] == 'a']
  assert list(row) == ['id', 'prompt', 'split', 'replies', 'source'] and row['source'] == 'ranked'
  assert [(reply['text'][6], reply['rank']) for reply in row['replies']] == [
      ('1', 0), ('0', 1), ('2', 1), ('3', 3)]
  assert all(list(reply) == ['id', 'text', 'rank'] for reply in row['replies'])
  assert [r['replies'][0]['text'] for r in out['ranked.jsonl'] if r is not row] == ['Reply 1 to d']


def test_ranks_and_scores_of_the_same_order_give_the_same_seeds(tmp_path):
  rng = random.Random(0)
  by_rank, by_score = [], []
  for i in range(40):
    scores = [rng.randrange(5) for _ in range(rng.randrange(1, 5))]
    row = record(str(i), *ranked.competition([-score for score in scores]))
    by_rank.append(row)
    row = copy.deepcopy(row)
    for reply, score in zip(row['replies'], scores, strict=True):
      del reply['rank']
      reply['score'] = score / 2
    by_score.append(row)
  check(run(write(tmp_path / 'a.jsonl', by_rank), tmp_path / 'a'))
  check(run(write(tmp_path / 'b.jsonl', by_score[::-1]), tmp_path / 'b'))
  assert raw(tmp_path / 'a') == raw(tmp_path / 'b')


def test_default_ids_depend_only_on_the_texts(tmp_path):
  rows = [scored('a', 1, 2), scored('a', 1, 2, 3), scored('b', 1, 2)]
  # Two models may give the same reply.
  rows[2]['replies'][1]['text'] = rows[2]['replies'][0]['text']
  names, again = ([turn.id for turn in read(write(tmp_path / f'{i}.jsonl', order))]
                  for i, order in enumerate((rows, rows[::-1])))
  assert len(set(names)) == 3 and names == again[::-1]
  assert all(len({reply.id for reply in turn.replies}) == len(turn.replies)
             for turn in read(tmp_path / '0.jsonl'))
  rows[0] |= {'id': None}  # the same as absent
  assert [turn.id for turn in read(write(tmp_path / '2.jsonl', rows))] == names
  out = run(tmp_path / '0.jsonl', tmp_path, ranked_train=0, ranked_eval=0)
  assert check(out)['dropped']['prompts'] == {'duplicate prompt': 1}


def bad(**fields):
  """A valid record whose second reply has other fields; None removes a field."""
  reply = {'text': 'Second', 'rank': 1} | fields
  return {'prompt': 'Bad?', 'replies': [{'text': 'First', 'rank': 0},
                                        {k: v for k, v in reply.items() if v is not None}]}


@pytest.mark.parametrize('row, word', [
    ('{"prompt": "cut', 'not a JSON object'), ('[]', 'a list, not a JSON object'),
    ({'replies': []}, '"prompt" must be a non-empty string but is absent'),
    ({'prompt': ' \n', 'replies': []}, r'"prompt" must be a non-empty string but is " \\n"'),
    ({'prompt': 5, 'replies': []}, '"prompt" must be a non-empty string but is 5'),
    ({'prompt': 'half \ud83d', 'replies': []}, 'an unpaired surrogate'),
    ({'prompt': 'x'}, '"replies" is absent'),
    ({'prompt': 'x', 'replies': 'y'}, '"replies" is "y"; give a list'),
    ({'prompt': 'x', 'replies': ['y']}, '"replies" is .* give a list'),
    (bad(text=None), '"text" must be a non-empty string but is absent'),
    (bad(text=''), '"text" must be a non-empty string but is ""'),
    (bad(text=7), '"text" must be a non-empty string but is 7'),
    (bad(rank=None), 'give every reply a "rank"'), (bad(score=1), 'not both'),
    (bad(rank=None, score=1), 'or every reply a "score"'),
    (bad(rank=0.5), r'ranks \[0, 0.5\] are not a valid ranking'),
    (bad(rank=2), 'not a valid ranking'), (bad(rank=-1), 'not a valid ranking'),
    (bad(rank='1'), 'not a valid ranking'), (bad(rank=True), 'not a valid ranking'),
    (record('x', 1, 2), 'not a valid ranking'),
    (record('x', 0, 1, 1, 2), r'\[0, 1, 1, 2\] are not a valid ranking; number the replies'),
    (scored('x', 1, None), '"score" must be a finite number but is absent'),
    (scored('x', 1, float('nan')), '"score" must be a finite number but is NaN'),
    (scored('x', float('inf'), 1), '"score" must be a finite number but is Infinity'),
    (scored('x', '4', 1), '"score" must be a finite number but is "4"'),
    (scored('x', True, 1), '"score" must be a finite number but is true'),
    (scored('x', 1, id=3), '"id" must be a non-empty string but is 3; write it as a string'),
    (bad(id=''), '"id" must be a non-empty string but is ""'),
    (record('good', 0), 'prompt good is a duplicate'),
    (record('x', 0, 1) | {'replies': [{'id': 'r', 'text': 'a', 'rank': 0},
                                      {'id': 'r', 'text': 'b', 'rank': 1}]},
     'prompt x has a duplicate reply'),
])
def test_an_invalid_line_is_an_error_and_nothing_is_written(tmp_path, row, word):
  path = tmp_path / 'x.jsonl'
  line = row if isinstance(row, str) else json.dumps(row)
  path.write_text(f'{json.dumps(record("good", 0, 1))}\n\n{line}\n')
  with pytest.raises(InputError, match=rf'x\.jsonl:3: .*{word}') as error:
    run(path, tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not [p for p in (tmp_path / 'run').rglob('*') if p.is_file()]


def test_the_program_reads_gzip_and_prints_errors_as_one_line(tmp_path):
  rows = [scored(str(i), i % 3, 1, 2) for i in range(30)]
  path = tmp_path / 'x.jsonl.gz'
  path.write_bytes(gzip.compress(''.join(json.dumps(row) + '\n' for row in rows).encode()))
  flags = ['--config=configs/sft.py:stories', '--config.data.source=ranked']
  code, said, wrong = run_main('data.seeds', *flags, f'--workdir={tmp_path}/run',
                               f'--config.data.path={path}')
  assert code == 0 and 'ranked: 30 prompts with 90 replies' in said, wrong
  assert (tmp_path / 'run' / 'data' / 'seeds' / 'done.json').exists()
  path = write(tmp_path / 'bad.jsonl', [bad(rank=5)])
  code, said, wrong = run_main('data.seeds', *flags, f'--workdir={tmp_path}/bad',
                               f'--config.data.path={path}')
  assert code == 1 and re.fullmatch(r'error: \S+bad\.jsonl:1: the ranks .*\n', wrong)


def test_the_jq_command_of_the_docstring_makes_the_format(tmp_path):
  if not shutil.which('jq'):
    pytest.skip('jq is not installed')
  rows = [{'instruction': 'Name a fruit.', 'completions': [
      {'model': 'a', 'response': 'Pear.', 'overall_score': 8.5},
      {'model': 'b', 'response': 'No.', 'overall_score': 1},
      {'model': 'c', 'response': 'Fig.', 'overall_score': None},
      {'model': 'd', 'response': 'Plum.'},
      {'model': 'e', 'response': ' ', 'overall_score': 7}]},
          {'instruction': 'Why?', 'completions': []}]
  command = re.search(r"jq -c '(.*)' ultrafeedback", ranked.__doc__, re.DOTALL)[1]
  done = subprocess.run(['jq', '-c', command, write(tmp_path / 'u.jsonl', rows)],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  (tmp_path / 'x.jsonl').write_text(done.stdout)
  fruit, why = read(tmp_path / 'x.jsonl')
  assert fruit.prompt == 'Name a fruit.' and why.replies == []
  assert [(reply.text, reply.rank) for reply in fruit.replies] == [('Pear.', 0), ('No.', 1)]


def test_conversations_of_several_turns_go_into_every_set(tmp_path):
  def talk(i, system=()):
    said = [*system, ('user', f'First {i}?'), ('assistant', f' Answer {i}.\n[user] no'),
            ('user', f'Then {i}?')]
    fields = scored(f'{i}', 1, 2, 2.5)
    del fields['prompt']
    return fields | {'messages': [dict(role=role, content=text) for role, text in said]}
  rows = [talk(i) for i in range(20)] + [talk(i, [('system', 'Be brief.')]) for i in range(20, 30)]
  out = run(write(tmp_path / 'x.jsonl', rows), tmp_path / 'run')
  assert check(out)['kept']['ift']
  for name, kind in (('ift.jsonl', schema.Demonstration), ('heldout.jsonl', schema.HeldOutPrompt),
                     ('ranked.jsonl', schema.RankedPrompt)):
    found = list(records.read(tmp_path / 'run' / 'data' / 'seeds' / name, kind))
    assert found
    for r in found:
      assert conversation.text(r.messages) == r.prompt and '[ user] no' in r.prompt
      assert r.messages[-2].content.startswith(' Answer') and len(r.messages) in (3, 4)


@pytest.mark.parametrize('fields, message', [
    (dict(messages='a'), 'Expected `?array'), (dict(messages=[]), 'the last message must be of'),
    (dict(messages=[dict(role='user')]), 'missing required field'),
    (dict(messages=[dict(role='tool', content='a')]), 'Invalid enum value'),
    (dict(messages=[dict(role='assistant', content='a')]), 'message 1 has the role assistant, not'),
    (dict(messages=[dict(role='user', content='a')], prompt='a'), 'it has a prompt and messages')])
def test_messages_that_are_no_conversation_are_an_error(tmp_path, fields, message):
  row = scored('a', 1, 2)
  del row['prompt']
  with pytest.raises(InputError, match=f'x.jsonl:1: .*{message}') as error:
    read(write(tmp_path / 'x.jsonl', [row | fields]))
  assert '\n' not in str(error.value)


def test_a_conversation_of_one_message_is_a_prompt(tmp_path):
  row = scored('a', 1, 2)
  text = row.pop('prompt')
  (turn,) = read(write(tmp_path / 'x.jsonl', [
      row | dict(messages=[dict(role='user', content=text)])]))
  assert (turn.prompt, turn.messages) == (text, ())
