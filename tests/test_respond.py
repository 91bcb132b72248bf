"""Answers to the prompts of a file."""
import json
import shutil

from conftest import full_logits, init, make_mesh
import jax
import jax.numpy as jnp
import pytest

from srlm_jax import catalog, config as configs, InputError, records, schema
from srlm_jax.checkpoint import store
from srlm_jax.conversation import Message
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.models import llama
from srlm_jax.models.config import PRESETS
from srlm_jax.sample import respond

QUESTIONS = [dict(question_id=81, category='writing', turns=['Name a fruit.', 'Name a fig.']),
             dict(question_id=111, category='math', turns=['Name a plum.', 'Name a pear.']),
             dict(question_id=82, category='writing', turns=['User.'], required_temperature=0),
             dict(question_id=83, category='coding', turns=['Score.', 'Name.'])]
SHAPE = PRESETS['tiny-test']


@pytest.fixture(scope='module')
def made(tokenizer_folder, tmp_path_factory):
  """(config, workdir, prompt file, parameters, tokenizer) of a random model, which has answered."""
  workdir = tmp_path_factory.mktemp('run')
  folder = workdir / 'm2' / 'model'
  store.write_model_files(SHAPE, tokenizer_folder, folder)
  with jax.set_mesh(make_mesh(1, 1, 1)):
    params = jax.tree.map(lambda x: x * 4, init(SHAPE))  # far from uniform
    saver = store.manager(folder, 1)
    store.save(saver, 0, params)
    saver.close()
  path = workdir / 'question.jsonl'
  records.write(path, QUESTIONS)
  config = configs.get('m2', 'tiny').copy_and_resolve_references().unlock()
  config.update(chat='plain', model='tiny-test')
  # As in test_engine, whose programs are then compiled once for both.
  config.sample.update(slots=4, size=128, steps=5)
  config.eval.update(temperature=0.8, top_p=0.9, top_k=40)
  config.respond.max_tokens = 12
  respond.run(config, workdir, prompts=str(path))
  return config, workdir, path, params, tokenizers.load(folder)


def contents(folder) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*')
          if p.is_file() and p.name not in ('manifest.json', 'done.json')
          and 'tensorboard' not in p.parts}


def greedy(params, tokenizer, messages) -> str:
  """The most likely token of the full forward pass, again and again."""
  ids = templates.encode_prompt('plain', messages, tokenizer)
  row = list(ids)
  while len(row) < len(ids) + 12 and not {row[-1]} & {*tokenizer.eos_ids}:
    logits = full_logits(llama.Llama(SHAPE), params, jnp.asarray([row + [0] * (64 - len(row))]))
    row.append(int(logits[0, len(row) - 1].argmax()))
  return tokenizer.decode(row[len(ids):]).strip()


def test_turn_2_sees_the_answer_of_turn_1_and_categories_have_their_temperature(made, mesh):
  _, workdir, _, params, tokenizer = made
  folder = workdir / 'm2' / 'answers_to_question'
  with (folder / 'model_answer' / 'm2.jsonl').open() as file:
    answers = {row['question_id']: row['choices'][0]['turns'] for row in map(json.loads, file)}
  assert [len(turns) for turns in answers.values()] == [2, 2, 1, 2]
  for question in QUESTIONS:
    given = answers[question['question_id']]
    said = [Message('user', question['turns'][0])]
    expected = [greedy(params, tokenizer, said)]
    if len(given) == 2:
      said += [Message('assistant', given[0]), Message('user', question['turns'][1])]
      expected.append(greedy(params, tokenizer, said))
    is_greedy = question['question_id'] != 81  # writing, without a temperature of its own
    assert (given == expected) == is_greedy, question
  second = list(records.read_shards(folder, 'responses_2', schema.Response))
  assert [r.prompt_id for r in second] == ['81/turn_2', '111/turn_2', '83/turn_2']
  assert second[0].messages[1].content == answers[81][0] and second[0].response == answers[81][1]
  done = json.loads((folder / 'done.json').read_text())
  assert done['responses'] == 7 and len(done['files']) == 2


def test_a_killed_stage_ends_with_the_same_bytes(made, tmp_path):
  config, workdir, path, *_ = made
  run = shutil.copytree(workdir, tmp_path / 'run')
  folder = run / 'm2' / 'answers_to_question'
  whole = contents(folder)
  first, second = (records.shard_name(stem, 0, 1) for stem in ('responses', 'responses_2'))
  for name, parts in ((first, 0.6), (second, 0.5), (second, 1.0)):  # killed while it wrote `name`
    shutil.rmtree(folder / 'model_answer')
    (folder / 'done.json').unlink()
    if name == first:
      (folder / second).unlink()
    data = whole[name]
    (folder / name).write_bytes(data[:int(len(data) * parts)])
    respond.run(config, run, prompts=str(path))
    assert contents(folder) == whole
  path = shutil.copy(path, tmp_path)
  respond.run(config, run, prompts=path)  # already done
  (tmp_path / 'question.jsonl').write_text(json.dumps(QUESTIONS[0]))
  with pytest.raises(InputError, match='made with another inputs.question.jsonl'):
    respond.run(config, run, prompts=path)


def test_files_of_alpaca_eval(made, tmp_path, capfd):
  config, workdir, *_ = made
  rows = [dict(instruction='Name a fruit.', output='theirs', generator='base', dataset='koala'),
          dict(instruction='Name a plum. ' * 20, dataset='vicuna')]
  (tmp_path / 'alpaca.eval.json').write_text(json.dumps(rows))
  respond.run(config, workdir, prompts=str(tmp_path / 'alpaca.eval.json'))
  folder = workdir / 'm2' / 'answers_to_alpaca.eval'
  found = json.loads((folder / 'model_outputs.json').read_text())
  responses = list(records.read_shards(folder, 'responses', schema.Response))
  assert found == [row | dict(output=r.response, generator='m2')
                   for row, r in zip(rows, responses, strict=True)]
  assert responses[0].response and responses[1].finish == 'too_long'
  assert 'responses 2, finished' in capfd.readouterr().out
  (folder / 'model_outputs.json').write_text('[]')
  with pytest.raises(InputError, match='model_outputs.json has changed since its stage finished'):
    respond.run(config, workdir, prompts=str(tmp_path / 'alpaca.eval.json'))


def test_a_file_and_a_kind_of_prompts_are_refused():
  with pytest.raises(InputError, match='--on=greedy and --prompts=a.txt: give one of them'):
    respond.run(configs.get('m2', 'tiny'), '.', on='greedy', prompts='a.txt')


def test_the_folder_is_of_no_other_stage():
  assert catalog.answers_to('greedy').name not in catalog.NAMES
