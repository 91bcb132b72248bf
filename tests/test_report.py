"""The page holds what the files hold, wherever the run stopped, and no text of a model becomes markup."""
import json
import re
import shutil
import subprocess
import sys

import pytest

from srlm_jax import catalog, InputError, records, stage
from srlm_jax.report import page, results

EVIL = '<script>alert("x")</script> & <img src=http://evil.example/x>'
JUDGE = {'judge.template': 'additive', 'judge.n': 2, 'judge.quorum': 1}
SCALE = dict(lowest=0.0, highest=5.0)
STOPPED = '3 pairs are left (7 all scores equal), fewer than one batch of 8'


def begun(folder, name, done=None, **config):
  """The manifest of a stage that has begun and, if it is finished, what it says of itself."""
  (folder / name).mkdir(parents=True)
  (folder / name / 'manifest.json').write_text(json.dumps(
      dict(format=stage.FORMAT, stage=name, config=dict(config, seed=0))))
  if done is not None:
    (folder / name / 'done.json').write_text(json.dumps(dict(done, seconds=12.5)))
  return folder / name


def model(workdir, name, loss='sft'):
  """A trained model with its curves, its judgements of the evaluation set and its answers."""
  steps = [dict(step=10 * i, loss=0.6931 / (i + 1), tokens_per_second=100.0) for i in range(4)]
  if loss == 'dpo':
    steps = [dict(s, margin=0.1 * i, accuracy=0.5 + 0.1 * i) for i, s in enumerate(steps)]
  done = dict(steps=31, loss=0.17, examples=248, dropped={})
  folder = begun(workdir / name, 'model', done, model='sandbox')
  (folder / 'config.json').write_text('{}')
  records.write(folder / 'metrics.jsonl', steps)
  agreement = dict(pairwise_accuracy=0.713, pairs=971, intervals=dict(pairwise_accuracy=[0.68, 0.74]),
                   ties=0.1, exact_match=0.25, spearman=0.5, parse_rate=0.96)
  (begun(workdir / name, 'agreement', agreement) / 'agreement.json').write_text(json.dumps(agreement))
  judgements = [dict(id=f'{i}', j=0, score=float(i % 6), reason='') for i in range(24)]
  judgements.append(dict(id='24', j=0, score=None, reason='no score'))
  records.write(begun(workdir / name, 'judge_eval', {}) / 'judgements-00000-of-00001.jsonl', judgements)
  answers = [dict(id=f'h{i}/0', prompt_id=f'h{i}', prompt=f'Held-out prompt {i} {EVIL}', finish='eos',
                  response=f'{name} answers {i} {EVIL}') for i in range(5)]
  records.write(begun(workdir / name, 'answers', {}) / 'responses-00000-of-00001.jsonl', answers)
  oracle = dict(score=3.217, standard_error=0.125, characters=61.5)
  folder = begun(workdir / name, 'oracle', {})
  (folder / 'oracle.json').write_text(json.dumps(oracle))
  records.write(folder / 'graded.jsonl', [dict(a, score=i) for i, a in enumerate(answers)])


def data(workdir, name):
  """What a DPO model was made from: prompts, candidates, judgements and pairs."""
  folder = workdir / name
  done = dict(prompts=10, wanted=10, attempts=1234, dropped={'seen before': 21, 'held out': 3})
  begun(folder, 'prompts', done, **{'prompts.count': 10})
  responses = [dict(id=f'p{i}/{n}', prompt_id=f'p{i}', prompt=f'Written prompt {i} {EVIL}', finish='eos',
                    response=f'candidate {n} {EVIL}') for i in range(10) for n in range(2)]
  records.write(begun(folder, 'respond', {}) / 'responses-00000-of-00001.jsonl', responses)
  judgements = [dict(id=f'{r["id"]}/{j}', response_id=r['id'], j=j, text=f'Judged {EVIL}',
                     score=float((k + j) % 6), reason='', finish='eos')
                for k, r in enumerate(responses) for j in range(2)]
  records.write(begun(folder, 'judge', SCALE, **JUDGE) / 'judgements-00000-of-00001.jsonl', judgements)
  pairs = [dict(id=f'p{i}', prompt=f'Paired prompt {i}', chosen=f'the better {EVIL}',
                rejected=f'the worse {EVIL}', chosen_score=4.5, rejected_score=1.0, chosen_finish='eos',
                rejected_finish='length') for i in range(3)]
  done = dict(pairs=3, prompts=10, pairs_per_1000_prompts=300.0, dropped={'all scores equal': 7}, margin=3.5,
              chosen_minus_rejected_characters=1.25)
  records.write(begun(folder, 'pairs', done, **JUDGE) / 'pairs.jsonl', pairs)


@pytest.fixture
def workdir(tmp_path):
  """A run that made m0 to m2, and m3's data without training on it."""
  begun(tmp_path / 'data', 'seeds', dict(ift=60))
  for name in ('m0', 'sft', 'm1'):
    model(tmp_path, name)
  begun(tmp_path / 'm1', 'eft', dict(
      examples=90, replies=113, dropped={'against the order of people': 6, 'of the commonest score': 17},
      scores_before={'0': 40, '4': 67}, scores={'0': 40, '4': 50}))
  data(tmp_path, 'm2')
  model(tmp_path, 'm2', 'dpo')
  data(tmp_path, 'm3')
  rows = results.of_models(tmp_path)
  (tmp_path / 'results.json').write_text(json.dumps(dict(size='tiny', models=rows, stopped=STOPPED)))
  return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
  """A plot takes a tenth of a second, and most tests look at words."""
  for name in ('_curve', '_bars'):
    monkeypatch.setattr(page, name, lambda *_: 'data:,')


def page_of(workdir) -> str:
  return page.remake(workdir).read_text()


def plain(page: str) -> str:
  """The page's words, without its tags."""
  return ' '.join(re.sub(r'<[^>]*>', ' ', page).split())


def test_the_page_holds_the_numbers_of_the_run_and_says_where_it_stopped(workdir, undrawn):
  page = page_of(workdir)
  words = plain(page)
  assert f'm3 was not trained: {STOPPED}.' in words
  assert 'size tiny, model sandbox' in words and 'm0, sft, m1, m2' in words
  for line in results.text_table(results.of_models(workdir), ()).splitlines():
    assert ' '.join(line.split()) in words
  assert '31 steps on 248 examples' in words and '0.713 [0.680, 0.740] 971' in words
  assert 'attempts 1,234 1,234' in words and '21 seen before 3 held out' in words
  assert 'pairs per 1,000 prompts 300.0 300.0' in words
  assert 'chosen minus rejected: characters 1.25 1.25' in words
  assert '90 examples from 113 ranked replies' in words and '17 of the commonest score' in words
  assert 'before 40 67 kept 40 50' in words
  assert 'pairs 12.5 12.5' in words and 'Together 375 s' in words
  for alt in ('margin of m2: 0 at step 1, 0.3 at step 31', 'accuracy of m2: 0.5 at', 'loss of m0: 0.6931 at',
              "oracle score: {&#39;m0&#39;: 3.217", 'characters: {', 'scores for m3: {'):
    assert f'alt="{alt}' in page
  assert 'class="warnings"' not in page


def test_samples_stand_side_by_side(workdir, undrawn):
  words = plain(page_of(workdir))
  first = words[words.index('Prompt 2'):words.index('Prompt 3')]
  assert [first.count(f'{name}, oracle 1 of 5') for name in ('m0', 'sft', 'm1', 'm2')] == [1] * 4
  for text in ('Judgement 2: 1', 'Written prompt 0', 'chosen, 4.5', 'rejected, 1, cut', 'Paired prompt 1'):
    assert text in words


def test_model_text_is_escaped_and_the_page_needs_no_other_file(workdir):
  page = page_of(workdir)
  assert '<script' not in page and '&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;' in page
  sources = re.findall(r'<[^>]*\b(?:src|href)\s*=\s*"?([^">]*)', page)
  assert sources and all(source.startswith('data:image/svg+xml;base64,') for source in sources)
  assert page == page_of(workdir)  # the same files, the same page


@pytest.mark.parametrize('missing', [*catalog.NAMES, 'done.json', 'results.json', 'metrics.jsonl'])
def test_a_run_may_have_stopped_anywhere(workdir, undrawn, missing):
  for path in sorted(workdir.rglob(missing)):
    if path.name == 'model':  # a converted model has no more than this
      path = path / 'manifest.json'
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert '</html>' in page_of(workdir)


def test_what_a_killed_stage_wrote_is_counted_without_its_last_line(workdir, undrawn):
  for name in ('respond', 'judge', 'pairs'):
    shutil.rmtree(workdir / 'm3' / name)
  folder = workdir / 'm3' / 'prompts'
  (folder / 'done.json').unlink()
  (folder / 'manifest.json').write_text(json.dumps(
      dict(format=stage.FORMAT, config={'seed': 0, 'prompts.count': 4000})))
  lines = [dict(id='0', text='x', dropped=''), dict(id='1', text='x', dropped='cut off by length')]
  (folder / 'attempts.jsonl').write_text(''.join(map(records.dump, lines)) + '{"id": "2", "te')
  words = plain(page_of(workdir))
  assert 'Begun and not finished: m3/prompts.' in words
  assert 'prompts wanted 10 4,000 attempts 1,234 2 prompts accepted 10 1' in words
  assert '1 cut off by length' in words


def test_old_reasons_to_stop_are_not_repeated(workdir, undrawn):
  model(workdir, 'm3', 'dpo')
  assert 'not trained' not in page_of(workdir)


def test_known_failures_are_said_in_words():
  scores = [4.0] * 8 + [1.0] + [None] * 2
  judgements = [dict(score=score, reason='' if score else 'unreadable') for score in scores]
  judgements = [dict(j, response_id=f'{i // 2}/{i % 2}') for i, j in enumerate(judgements)]
  iteration = dict(model='m2', judgements=judgements, quorum=1, made=dict(prompts=1),
                   pairs=[dict(chosen='x' * 31, rejected='y' * 20)],
                   responses=[dict(id=f'{i // 2}/{i % 2}', finish=how, prompt_id=str(i // 2), response=str(i))
                              for i, how in enumerate(
                       ['length'] * 3 + ['eos'] * 2)])
  run = dict(iterations=[iteration], judged_eval={}, answers={},
              stages={('m2', 'model'): ({}, dict(examples=9, dropped={'longer than 512 tokens': 10}))})
  found = '\n'.join(page.warnings(run))
  for text in ('m2/judge: 9 of 11 judgements have a score (the others: 2 unreadable), fewer than 90%',
               'm2/judge: 89% of the scores are 4',
               'm2/respond: 3 responses are cut at the length limit, 2 are finished',
               'm2/pairs: a chosen response has 31 characters, a rejected one 20',
               'm2/model: trained on 9 examples; dropped 10 longer than 512 tokens'):
    assert text in found
  iteration.update(judgements=judgements[4:9] + judgements[8:9] * 3,
                   pairs=[dict(chosen='x' * 30, rejected='y' * 20)],
                   responses=[dict(id='p/0', finish='eos', prompt_id='p', response='x')])
  run['stages'] = {}
  assert page.warnings(run) == []


def test_a_folder_without_a_model_is_refused_in_one_sentence(tmp_path):
  command = [sys.executable, '-m', 'srlm_jax.report', f'--workdir={tmp_path}']
  made = subprocess.run(command, capture_output=True, text=True)
  assert made.returncode == 1
  assert made.stderr == (f'error: {tmp_path} holds no model; the loop makes them: '
                         'python -m srlm_jax.loop --help\n')
  assert not list(tmp_path.iterdir())
  with pytest.raises(InputError):
    page.remake(tmp_path / 'absent')


def test_a_stage_that_does_not_exist_is_not_warned_about(workdir, undrawn):
  """M1 has judgements of ranked replies, and no responses of its own."""
  judgements = [dict(id=f'{i}', response_id=f'r{i}', j=0, text='', score=float(i), reason='',
                     finish='eos') for i in range(5)]
  folder = begun(workdir / 'm1', 'judge', SCALE, **JUDGE)
  records.write(folder / 'judgements-00000-of-00001.jsonl', judgements)
  assert 'class="warnings"' not in page_of(workdir)


LINES = dict(  # a file of records and, of a record, what the page needs
    curves=('m2/model/metrics.jsonl', 'step', 'loss'),
    judged=('m2/judge_eval/judgements-00000-of-00001.jsonl', 'score'),
    judgements=('m2/judge/judgements-00000-of-00001.jsonl', 'response_id', 'score', 'text'),
    responses=('m2/respond/responses-00000-of-00001.jsonl', 'id', 'prompt_id', 'response'),
    answers=('m2/answers/responses-00000-of-00001.jsonl', 'prompt_id', 'prompt', 'response'),
    pairs=('m2/pairs/pairs.jsonl', 'chosen', 'chosen_score'))


def damage(path, number, change):
  """Puts another line, or the record with a change, into line `number` of a file."""
  lines = path.read_text().splitlines(keepends=True)
  line = lines[number - 1]
  lines[number - 1] = change if isinstance(change, str) else json.dumps(change(json.loads(line))) + '\n'
  path.write_text(''.join(lines))


def without(field):
  return lambda record: {k: v for k, v in record.items() if k != field}


@pytest.mark.parametrize('name', LINES)
def test_a_damaged_record_is_named_by_file_and_line(workdir, undrawn, name):
  file, *fields = LINES[name]
  path = workdir / file
  whole = path.read_text()
  changes = [('{"id": "x", \n', 'not a JSON object'),
             ('[1]\n', 'a list where a JSON object belongs')]
  changes += [(without(field), f'no field "{field}"') for field in fields if field != 'loss']
  numbers = [field for field in fields if field in ('step', 'loss', 'score', 'chosen_score')]
  changes += [(lambda r, f=field, v=value: dict(r, **{f: v}), f'"{field}" is .* no number')
              for field in numbers for value in ('3', float('nan'))]
  for change, message in changes:
    path.write_text(whole)
    damage(path, 2, change)
    with pytest.raises(InputError, match=f'{file}:2: {message}'):
      page.remake(workdir)
  path.write_text(whole + '{"id": "cut by a ki')
  assert '</html>' in page_of(workdir)
  path.unlink()
  path.mkdir()
  with pytest.raises(InputError, match=f'{file} is a folder'):
    page.remake(workdir)


@pytest.mark.parametrize('file, change, message', [
    ('results.json', '{"models": ', 'not JSON'),
    ('results.json', '[]', 'a list where a JSON object belongs'),
    ('results.json', '{"models": [3]}', '"models" is '),
    ('results.json', '{"models": [], "stopped": 3}', '"stopped" is 3'),
    ('results.json', '\xff', 'not JSON'),
    ('m2/pairs/done.json', '', 'not JSON'),
    ('m2/pairs/done.json', '3', 'a int where a JSON object belongs'),
    ('m2/pairs/done.json', without('prompts'), 'no "prompts"'),
    ('m2/pairs/done.json', without('dropped'), 'no "dropped"'),
    ('m2/prompts/done.json', without('attempts'), 'no "attempts"'),
    ('m2/prompts/done.json', lambda r: dict(r, dropped=3), '"dropped" is 3'),
    ('m2/judge/done.json', lambda r: dict(r, highest='5'), '"highest" is "5"'),
    ('m2/model/done.json', lambda r: dict(r, dropped=dict(x='y')), '"dropped" is {"x": "y"}'),
    ('m2/model/done.json', lambda r: dict(r, seconds=float('nan')), '"seconds" is NaN'),
    ('m2/answers/done.json', lambda r: dict(r, seconds=None), 'no "seconds"'),
    ('m2/pairs/done.json', lambda r: dict(r, margin='x'), '"margin" is "x"'),
    ('m1/eft/done.json', without('scores'), 'no "scores"'),
    ('m2/model/manifest.json', '{', 'not JSON'), ('m2/model/manifest.json', '{"format": 3}', 'no "config"'),
    ('m2/model/manifest.json', '{"config": {}}', 'written by another version of srlm_jax'),
    ('m2/judge/manifest.json', '{"format": 3, "config": {"judge.n": "2"}}', '"config.judge.n" is "2"'),
    ('m2/oracle/oracle.json', lambda r: dict(r, score='3'), '"score" is "3"'),
    ('m2/oracle/oracle.json', without('standard_error'), 'no "standard_error"'),
    ('m2/agreement/agreement.json', lambda r: dict(r, ties='x'), '"ties" is "x"'),
    ('m2/agreement/agreement.json', lambda r: dict(r, intervals=3), '"intervals" is 3'),
    ('m2/agreement/agreement.json', lambda r: dict(r, intervals=dict(ties=[1, []])), '"intervals" is {"ties"')])
def test_a_damaged_summary_is_named(workdir, undrawn, file, change, message):
  path = workdir / file
  if isinstance(change, str):
    path.write_bytes(change.encode('latin-1'))
  else:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
  with pytest.raises(InputError, match=re.escape(file) + ': ' + re.escape(message)):
    page.remake(workdir)


def test_a_page_that_cannot_be_written_is_one_sentence(workdir, undrawn):
  (workdir / 'report.html').mkdir()
  with pytest.raises(InputError, match='report.html is a folder'):
    page.remake(workdir)
  assert not list(workdir.glob('*.partial'))
