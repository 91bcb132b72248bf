import gzip
import json

from conftest import real_data
import pytest
import samples

from srlm_jax import InputError
from srlm_jax.conversation import Message
from srlm_jax.data import prompt_files

MT_BENCH = [
    dict(question_id=81, category='writing', turns=['Name a fruit.', 'Why?'], reference=['a']),
    dict(question_id=111, category='math', turns=['1 + 1?']),
    dict(question_id=141, category='stem', turns=['What is heat?', 'Why?']),
    dict(question_id=161, category='law', turns=['What is a law?']),
    dict(question_id=82, category='writing', turns=['Name a tree.'], required_temperature=0.3)]


def write(path, text: str):
  path.write_text(text)
  return prompt_files.read(path)


def lines(*rows) -> str:
  return ''.join(json.dumps(row) + '\n' for row in rows)


def test_files_of_mt_bench(tmp_path):
  found = write(tmp_path / 'question.jsonl', lines(*MT_BENCH))
  assert [(q.id, q.prompt, q.second, q.temperature) for q in found] == [
      ('81', 'Name a fruit.', 'Why?', 0.7), ('111', '1 + 1?', '', 0.0),
      ('141', 'What is heat?', 'Why?', 0.1), ('161', 'What is a law?', '', 0.7),
      ('82', 'Name a tree.', '', 0.3)]
  second = found[0].then('Pear.')
  assert second.id == '81/turn_2' and second.temperature == 0.7 and not second.second
  assert second.messages == (Message('user', 'Name a fruit.'), Message('assistant', 'Pear.'),
                             Message('user', 'Why?'))
  assert second.prompt == '[user]\nName a fruit.\n\n[assistant]\nPear.\n\n[user]\nWhy?'
  first = [samples.response(f'{q.id}/0', response=f'first {q.id}') for q in found]
  answers = [samples.response(f'{name}/turn_2/0', response=f'second {name}') for name in (81, 141)]
  made = list(prompt_files.model_answers(found, first, answers, 'm2'))
  assert [(a['question_id'], a['choices']) for a in made] == [
      (81, [dict(index=0, turns=['first 81', 'second 81'])]),
      (111, [dict(index=0, turns=['first 111'])]),
      (141, [dict(index=0, turns=['first 141', 'second 141'])]),
      (161, [dict(index=0, turns=['first 161'])]), (82, [dict(index=0, turns=['first 82'])])]
  assert {a['model_id'] for a in made} == {'m2'} and len({a['answer_id'] for a in made}) == 5


def test_files_of_alpaca_eval_keep_their_fields(tmp_path):
  rows = [dict(instruction=f'Name {i}.', output='theirs', generator='base', dataset='helpful_base',
               datasplit='eval') for i in range(2)]
  found = write(tmp_path / 'alpaca_eval.json', json.dumps(rows))
  assert [(q.id, q.prompt, q.temperature) for q in found] == [
      ('0', 'Name 0.', None), ('1', 'Name 1.', None)]
  answers = [samples.response(f'{i}/0', response=f'ours {i}') for i in range(2)]
  assert prompt_files.model_outputs(found, answers, 'm2') == [
      row | dict(output=f'ours {i}', generator='m2') for i, row in enumerate(rows)]


def test_plain_files(tmp_path):
  found = write(tmp_path / 'a.txt', 'Name a fruit.\n\n  Name a tree.\r\n')
  assert [(q.id, q.prompt) for q in found] == [('0', 'Name a fruit.'), ('1', '  Name a tree.')]
  found = write(tmp_path / 'b.txt', 'One\u2028line\x0cof\x85text.\n')
  assert [q.prompt for q in found] == ['One\u2028line\x0cof\x85text.']
  talk = [dict(role='user', content='Hi'), dict(role='assistant', content='Yes?'),
          dict(role='user', content='Why?')]
  rows = [dict(id='h1', prompt='Name a fruit.', split='test'), dict(
      prompt='[user]\nHi\n\n[assistant]\nYes?\n\n[user]\nWhy?', messages=talk)]
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines(*rows).encode()))
  found = prompt_files.read(tmp_path / 'a.jsonl.gz')
  assert [(q.id, len(q.messages)) for q in found] == [('h1', 0), ('1', 3)]
  answers = [samples.response(f'{q.id}/0', response='Pear.') for q in found]
  assert prompt_files.model_outputs(found, answers, 'm2') == [
      dict(instruction='Name a fruit.', id='h1', split='test', output='Pear.', generator='m2'),
      dict(instruction=rows[1]['prompt'], output='Pear.', generator='m2')]


@pytest.mark.parametrize('name, text, message', [
    ('a.csv', 'x', 'a.csv: the kind of file is unknown; give a .json file of AlpacaEval'),
    ('a.txt', ' \n', 'a.txt has no prompts; give'),
    ('a.json', '{}', 'a.json is not a list of objects; give'),
    ('a.json', '[1]', 'a.json is not a list of objects; give'),
    ('a.json', '[', 'a.json: not JSON'),
    ('a.json', '[]', 'a.json has no prompts'),
    ('a.jsonl', lines(dict(text='x')), 'a.jsonl:1: no "instruction", "turns" or "prompt"; give'),
    ('a.jsonl', lines(dict(prompt='x'), dict(text='x')),
     'a.jsonl:2: Object missing required field prompt; correct it'),
    ('a.jsonl', lines(dict(prompt='x'), dict(turns=['x'])),
     'a.jsonl:2: has "turns", which the first prompt has not; delete it'),
    ('a.jsonl', lines(dict(prompt='x'), dict(prompt='y', instruction='y')),
     'a.jsonl:2: has "instruction", which the first prompt has not; delete it'),
    ('a.jsonl', lines(dict(prompt=' ')), 'a.jsonl:1: a prompt is blank; delete it'),
    ('a.jsonl', lines(dict(question_id=1, turns=['x', ''])), 'a.jsonl:1: a prompt is blank'),
    ('a.jsonl', lines(dict(prompt='x', id='a'), dict(prompt='y', id='a')),
     'a.jsonl:2: the same id a as .*a.jsonl:1; delete one'),
    ('a.json', json.dumps([dict(instruction='x'), dict(instruction='x')]),
     'a.json: entry 1: the same instruction as .*entry 0; delete one'),
    ('a.jsonl', lines(dict(prompt='\ud800')), 'a.jsonl:1: .* an unpaired surrogate'),
    ('a.jsonl', lines(dict(question_id=1, turns=['x'] * 3)),
     'a.jsonl:1: it has 3 turns, and must have 1 or 2; correct it'),
    ('a.jsonl', lines(dict(question_id=1, turns=[dict(content='x')])),
     r'a.jsonl:1: Expected str, got object for "turns\[0\]"'),
    ('a.jsonl', lines(dict(question_id=1, turns=['x'], required_temperature=-1)),
     'a.jsonl:1: required_temperature must be 0 to 100; correct it'),
    ('a.jsonl', lines(dict(prompt='x', messages=[dict(role='user', content='y')] * 2)),
     'message 2 has the role user, not assistant')])
def test_other_files_are_refused(tmp_path, name, text, message):
  with pytest.raises(InputError, match=message):
    write(tmp_path / name, text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\xff')
  (tmp_path / 'a.jsonl').mkdir()
  for name, message in [('a.txt', 'not UTF-8'), ('a.jsonl', 'is a folder; give'),
                        ('b.jsonl', 'b.jsonl does not exist; give a .json file of AlpacaEval')]:
    with pytest.raises(InputError, match=message):
      prompt_files.read(tmp_path / name)


def test_the_file_of_mt_bench_itself():
  path = real_data('prompts/mt_bench_questions.jsonl')
  found = prompt_files.read(path)
  assert len(found) == 80 and all(q.second for q in found)
  count = {t: sum(q.temperature == t for q in found) for t in (0.0, 0.1, 0.7)}
  assert count == {0.0: 40, 0.1: 20, 0.7: 20}
