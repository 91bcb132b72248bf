"""The page shows the data of the files, for runs that stopped anywhere, and escapes model texts."""
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import typing

import pytest

from srlm_jax import catalog, InputError, records, schema, stage
from srlm_jax.report import page, plots, results, summaries

EVIL = '<script>alert("x")</script> & <img src=http://evil.example/x>'
JUDGE = {'judge.template': 'additive', 'judge.n': 2, 'judge.quorum': 1}
STOPPED = '3 pairs are left (7 all scores equal), fewer than one batch of 8'


def filled(kind, **given):
  """An object of `kind`, a dataclass; required fields that are not given are empty, 0 or None."""
  def empty(hint):
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    return choices[0] if choices else hint() if callable(hint) else None
  values = {field.name: empty(field.type) for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING}
  return kind(**values | given)


def response(prompt_id, n=0, **given):
  return filled(schema.Response, id=f'{prompt_id}/{n}', prompt_id=prompt_id, index=n,
                **dict(finish='eos') | given)


def judgement(response_id, j=0, **given):
  return filled(schema.Judgement, id=f'{response_id}/{j}', response_id=response_id, index=j,
                finish='eos', **given)


def training(**given):
  return dataclasses.asdict(filled(schema.TrainingSummary, **given))


SCALE = dataclasses.asdict(filled(schema.JudgeSummary, lowest=0.0, highest=5.0))


def write_stage(folder, name, done=None, **config):
  """Writes the manifest of a stage, and its done.json if `done` is given; returns the folder."""
  (folder / name).mkdir(parents=True)
  (folder / name / 'manifest.json').write_text(json.dumps(
      dict(format=stage.FORMAT, stage=name, config=dict(config, seed=0))))
  if done is not None:
    (folder / name / 'done.json').write_text(json.dumps(dict(done, seconds=12.5)))
  return folder / name


def model(workdir, name, loss='sft'):
  """Writes a trained model: its curves, judgements of the evaluation set and responses."""
  steps = [dict(step=10 * i, loss=0.6931 / (i + 1), tokens_per_second=100.0) for i in range(4)]
  if loss == 'dpo':
    steps = [dict(s, margin=0.1 * i, accuracy=0.5 + 0.1 * i) for i, s in enumerate(steps)]
  folder = write_stage(workdir / name, 'model', training(steps=31, loss=0.17, examples=248),
                       model='sandbox')
  (folder / 'config.json').write_text('{}')
  records.write(folder / 'metrics.jsonl', steps)
  agreement = dict(pairwise_accuracy=0.713, pairs=971, ties=0.1, exact_match=0.25, spearman=0.5,
                   parse_rate=0.96, intervals=dict(pairwise_accuracy=[0.68, 0.74]))
  folder = write_stage(workdir / name, 'agreement', agreement)
  (folder / 'agreement.json').write_text(json.dumps(agreement))
  judgements = [judgement(f'{i}', score=float(i % 6)) for i in range(24)]
  judgements.append(judgement('24', reason='no score'))
  folder = write_stage(workdir / name, 'judge_eval', SCALE)
  records.write(folder / 'judgements-00000-of-00001.jsonl', judgements)
  answers = [response(f'h{i}', prompt=f'Held-out prompt {i} {EVIL}',
                      response=f'{name} answers {i} {EVIL}') for i in range(5)]
  folder = write_stage(workdir / name, 'answers', {})
  records.write(folder / 'responses-00000-of-00001.jsonl', answers)
  oracle = dict(score=3.217, standard_error=0.125, characters=61.5)
  folder = write_stage(workdir / name, 'oracle', {})
  (folder / 'oracle.json').write_text(json.dumps(oracle))
  records.write(folder / 'graded.jsonl', [
      schema.GradedResponse(**dataclasses.asdict(a), score=i) for i, a in enumerate(answers)])


def data(workdir, name):
  """Writes the data of a DPO model: prompts, candidates, judgements and pairs."""
  folder = workdir / name
  done = filled(schema.PromptsSummary, prompts=10, wanted=10, attempts=1234,
                dropped={'seen before': 21, 'held out': 3})
  write_stage(folder, 'prompts', dataclasses.asdict(done), **{'prompts.count': 10})
  responses = [response(f'p{i}', n, prompt=f'Written prompt {i} {EVIL}',
                        response=f'candidate {n} {EVIL}')
               for i in range(10) for n in range(2)]
  records.write(write_stage(folder, 'respond', {}) / 'responses-00000-of-00001.jsonl', responses)
  judgements = [judgement(r.id, j, text=f'Judged {EVIL}', score=float((k + j) % 6))
                for k, r in enumerate(responses) for j in range(2)]
  records.write(write_stage(folder, 'judge', SCALE, **JUDGE) / 'judgements-00000-of-00001.jsonl',
                judgements)
  pairs = [filled(schema.Pair, id=f'p{i}', prompt=f'Paired prompt {i}',
                  chosen=f'the better {EVIL}', rejected=f'the worse {EVIL}', chosen_score=4.5,
                  rejected_score=1.0, chosen_finish='eos', rejected_finish='length')
           for i in range(3)]
  done = filled(schema.PairsSummary, pairs=3, prompts=10, pairs_per_1000_prompts=300.0, margin=3.5,
                dropped={'all scores equal': 7}, chosen_minus_rejected_characters=1.25)
  folder = write_stage(folder, 'pairs', dataclasses.asdict(done), **JUDGE)
  records.write(folder / 'pairs.jsonl', pairs)


@pytest.fixture
def workdir(tmp_path):
  """A run with the models m0 to m2 and the data of m3."""
  write_stage(tmp_path / 'data', 'seeds', dict(ift=60))
  for name in ('m0', 'sft', 'm1'):
    model(tmp_path, name)
  write_stage(tmp_path / 'm1', 'eft', dataclasses.asdict(filled(
      schema.EftSummary, examples=90, replies=113,
      dropped={'scores against the ranks': 6, 'downsampled: most frequent score': 17},
      scores_before={'0': 40, '4': 67}, scores={'0': 40, '4': 50})))
  data(tmp_path, 'm2')
  model(tmp_path, 'm2', 'dpo')
  data(tmp_path, 'm3')
  rows = results.of_models(tmp_path)
  (tmp_path / 'results.json').write_text(
      json.dumps(dict(size='tiny', models=rows, stopped=STOPPED)))
  return tmp_path


@pytest.fixture
def no_plots(monkeypatch):
  """Skips drawing: a plot takes a tenth of a second, and most tests check text."""
  for name in ('curve', 'bars'):
    monkeypatch.setattr(plots, name, lambda *_: 'data:,')


def page_of(workdir) -> str:
  return page.remake(workdir).read_text()


def plain(html: str) -> str:
  """The words of a page, without tags."""
  return ' '.join(re.sub(r'<[^>]*>', ' ', html).split())


def test_the_page_shows_the_numbers_of_the_run_and_why_it_stopped(workdir, no_plots):
  html = page_of(workdir)
  words = plain(html)
  assert f'm3 was not trained: {STOPPED}.' in words
  assert 'size tiny, model sandbox' in words and 'm0, sft, m1, m2' in words
  for line in results.text_table(results.of_models(workdir), ()).splitlines():
    assert ' '.join(line.split()) in words
  assert '31 steps on 248 examples' in words and '0.713 [0.680, 0.740] 971' in words
  assert 'attempts 1,234 1,234' in words and '21 seen before 3 held out' in words
  assert 'pairs per 1,000 prompts 300.0 300.0' in words
  assert 'chosen minus rejected: characters 1.25 1.25' in words
  assert '90 examples from 113 ranked replies' in words
  assert '17 downsampled: most frequent score' in words
  assert 'before 40 67 kept 40 50' in words
  assert 'pairs 12.5 12.5' in words and 'finished stages: 375 s' in words
  for alt in ('margin of m2: 0 at step 1, 0.3 at step 31', 'accuracy of m2: 0.5 at',
              'loss of m0: 0.6931 at', "oracle score: {&#39;m0&#39;: 3.217", 'characters: {',
              'scores for m3: {'):
    assert f'alt="{alt}' in html
  assert 'class="warnings"' not in html


def test_samples_are_shown_side_by_side(workdir, no_plots):
  words = plain(page_of(workdir))
  first = words[words.index('Prompt 2'):words.index('Prompt 3')]
  assert [first.count(f'{name}, oracle 1 of 5') for name in ('m0', 'sft', 'm1', 'm2')] == [1] * 4
  for text in ('Judgement 2: 1', 'Written prompt 0', 'chosen, 4.5', 'rejected, 1, cut',
               'Paired prompt 1'):
    assert text in words


def test_model_text_is_escaped_and_the_page_needs_no_other_file(workdir):
  html = page_of(workdir)
  assert '<script' not in html and '&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;' in html
  sources = re.findall(r'<[^>]*\b(?:src|href)\s*=\s*"?([^">]*)', html)
  assert sources and all(source.startswith('data:image/svg+xml;base64,') for source in sources)
  assert html == page_of(workdir)  # deterministic


@pytest.mark.parametrize('missing', [*catalog.NAMES, 'done.json', 'results.json', 'metrics.jsonl'])
def test_any_stage_or_summary_may_be_missing(workdir, no_plots, missing):
  for path in sorted(workdir.rglob(missing)):
    if path.name == 'model':  # a converted model has no manifest
      path = path / 'manifest.json'
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert '</html>' in page_of(workdir)


def test_an_unfinished_stage_is_counted_without_its_incomplete_last_line(workdir, no_plots):
  for name in ('respond', 'judge', 'pairs'):
    shutil.rmtree(workdir / 'm3' / name)
  folder = workdir / 'm3' / 'prompts'
  (folder / 'done.json').unlink()
  (folder / 'manifest.json').write_text(json.dumps(
      dict(format=stage.FORMAT, config={'seed': 0, 'prompts.count': 4000})))
  lines = [filled(schema.Attempt, id=f'{i}', reason=why)
           for i, why in enumerate(['', 'cut off by length'])]
  (folder / 'attempts.jsonl').write_text(''.join(map(records.dump, lines)) + '{"id": "2", "te')
  words = plain(page_of(workdir))
  assert 'Started but not finished: m3/prompts.' in words
  assert 'prompts wanted 10 4,000 attempts 1,234 2 prompts accepted 10 1' in words
  assert '1 cut off by length' in words


def test_a_stale_reason_to_stop_is_not_shown(workdir, no_plots):
  model(workdir, 'm3', 'dpo')
  assert 'not trained' not in page_of(workdir)


def test_known_failures_give_warnings():
  scores = [4.0] * 8 + [1.0] + [None] * 2
  judgements = [judgement(f'{i // 2}/{i % 2}', score=score, reason='' if score else 'unreadable')
                for i, score in enumerate(scores)]
  responses = [response(str(i // 2), i % 2, finish=reason, response=str(i))
               for i, reason in enumerate(['length'] * 3 + ['eos'] * 2)]

  def pair(length):
    return filled(schema.Pair, chosen='x' * length, rejected='y' * 20)
  iteration = page.Iteration(
      model='m2', judgements=judgements, quorum=1, responses=responses, pairs=[pair(31)],
      pairs_summary=filled(schema.PairsSummary, prompts=1))
  made = filled(schema.TrainingSummary, examples=9, dropped={'longer than 512 tokens': 10})
  run = page.Run(iterations=[iteration],
                 stages={('m2', 'model'): summaries.Started(summaries.Config(), 1.0, made)})
  found = '\n'.join(page.warnings(run))
  for text in ('m2/judge: 9 of 11 judgements have a score (the others: 2 unreadable), '
               'fewer than 90%',
               'm2/judge: 89% of the scores are 4',
               'm2/respond: 3 responses are cut at the length limit, 2 are finished',
               'm2/pairs: chosen responses have 31 characters on average, rejected ones 20',
               'm2/model: trained on 9 examples; dropped 10 longer than 512 tokens'):
    assert text in found
  iteration.judgements = judgements[4:9] + judgements[8:9] * 3
  iteration.pairs = [pair(30)]
  iteration.responses = [response('p', response='x')]
  run.stages = {}
  assert page.warnings(run) == []


def test_a_folder_without_a_model_is_an_error_of_one_sentence(tmp_path):
  command = [sys.executable, '-m', 'srlm_jax.report', f'--workdir={tmp_path}']
  made = subprocess.run(command, capture_output=True, text=True)
  assert made.returncode == 1
  assert made.stderr == (f'error: {tmp_path} contains no model; make one with the loop: '
                         'python -m srlm_jax.loop --help\n')
  assert not list(tmp_path.iterdir())
  with pytest.raises(InputError):
    page.remake(tmp_path / 'absent')


def test_a_missing_stage_gives_no_warning(workdir, no_plots):
  """M1 has judgements of ranked replies but no responses."""
  judgements = [judgement(f'r{i}', score=float(i)) for i in range(5)]
  folder = write_stage(workdir / 'm1', 'judge', SCALE, **JUDGE)
  records.write(folder / 'judgements-00000-of-00001.jsonl', judgements)
  assert 'class="warnings"' not in page_of(workdir)


LINES = dict(  # a file of records, and fields that the page needs
    curves=('m2/model/metrics.jsonl', 'step', 'loss'),
    judged=('m2/judge_eval/judgements-00000-of-00001.jsonl', 'score'),
    judgements=('m2/judge/judgements-00000-of-00001.jsonl', 'response_id', 'score', 'text'),
    responses=('m2/respond/responses-00000-of-00001.jsonl', 'id', 'prompt_id', 'response'),
    answers=('m2/answers/responses-00000-of-00001.jsonl', 'prompt_id', 'prompt', 'response'),
    pairs=('m2/pairs/pairs.jsonl', 'chosen', 'chosen_score'))


def damage(path, number, change):
  """Replaces line `number` of a file by `change`, a line or a function of the record."""
  lines = path.read_text().splitlines(keepends=True)
  line = lines[number - 1]
  if not isinstance(change, str):
    change = json.dumps(change(json.loads(line))) + '\n'
  lines[number - 1] = change
  path.write_text(''.join(lines))


def without(field):
  return lambda record: {k: v for k, v in record.items() if k != field}


@pytest.mark.parametrize('name', LINES)
def test_a_damaged_record_is_named_by_file_and_line_in_the_error(workdir, no_plots, name):
  file, *fields = LINES[name]
  path = workdir / file
  whole = path.read_text()
  changes = [('{"id": "x", \n', 'not a JSON object'),
             ('[1]\n', 'Expected object, got array')]
  changes += [(without(field), f'Object missing required field {field};')
              for field in fields if field != 'loss']
  numbers = [field for field in fields if field in ('step', 'loss', 'score', 'chosen_score')]
  changes += [(lambda r, f=field: dict(r, **{f: '3'}), f'Expected .*, got str for "{field}"')
              for field in numbers]
  changes += [(lambda r, f=field: dict(r, **{f: float('nan')}), 'it contains NaN')
              for field in numbers]
  for change, message in changes:
    path.write_text(whole)
    damage(path, 2, change)
    with pytest.raises(InputError, match=f'{file}:2: .*{message}'):
      page.remake(workdir)
  path.write_text(whole + '{"id": "cut by a ki')
  assert '</html>' in page_of(workdir)
  path.unlink()
  path.mkdir()
  with pytest.raises(InputError, match=f'{file} is a folder'):
    page.remake(workdir)


@pytest.mark.parametrize('file, change, message', [
    ('results.json', '{"models": ', 'not a JSON object'),
    ('results.json', '[]', 'Expected object, got array'),
    ('results.json', '{"models": [3]}', 'Expected object, got int for "models[0]"'),
    ('results.json', '{"models": [{}]}', 'Object missing required field model for "models[0]"'),
    ('results.json', '{"models": [], "stopped": 3}', 'Expected str, got int for "stopped"'),
    ('results.json', '\xff', 'not a JSON object'),
    ('m2/pairs/done.json', '', 'not a JSON object'),
    ('m2/pairs/done.json', '3', 'Expected object, got int'),
    ('m2/pairs/done.json', without('prompts'), 'Object missing required field prompts;'),
    ('m2/pairs/done.json', without('dropped'), 'Object missing required field dropped;'),
    ('m2/prompts/done.json', without('attempts'), 'Object missing required field attempts;'),
    ('m2/prompts/done.json', lambda r: dict(r, dropped=3),
     'Expected object, got int for "dropped"'),
    ('m2/judge/done.json', lambda r: dict(r, highest='5'),
     'Expected float, got str for "highest"'),
    ('m2/model/done.json', lambda r: dict(r, dropped=dict(x='y')),
     'Expected int, got str for "dropped[...]"'),
    ('m2/model/done.json', lambda r: dict(r, seconds=float('nan')), 'it contains NaN'),
    ('m2/answers/done.json', lambda r: dict(r, seconds=None),
     'Expected float, got null for "seconds"'),
    ('m2/pairs/done.json', lambda r: dict(r, margin='x'),
     'Expected float | null, got str for "margin"'),
    ('m1/eft/done.json', without('scores'), 'Object missing required field scores;'),
    ('m2/model/manifest.json', '{', 'not a JSON object'),
    ('m2/model/manifest.json', '{"format": 3}', 'Object missing required field config;'),
    ('m2/model/manifest.json', '{"config": {}}', 'written by another version of srlm_jax'),
    ('m2/judge/manifest.json', '{"format": 3, "config": {"judge.n": "2"}}',
     'Expected int | null, got str for "config.judge.n"'),
    ('m2/oracle/oracle.json', lambda r: dict(r, score='3'),
     'Expected int | float | null, got str for "score"'),
    ('m2/oracle/oracle.json', without('standard_error'),
     'Object missing required field standard_error;'),
    ('m2/agreement/agreement.json', lambda r: dict(r, ties='x'),
     'Expected int | float | null, got str for "ties"'),
    ('m2/agreement/agreement.json', lambda r: dict(r, intervals=3),
     'Expected object, got int for "intervals"'),
    ('m2/agreement/agreement.json', lambda r: dict(r, intervals=dict(ties=[1, []])),
     'Expected float, got array for "intervals[...][1]"')])
def test_a_damaged_summary_is_named_in_the_error(workdir, no_plots, file, change, message):
  path = workdir / file
  if isinstance(change, str):
    path.write_bytes(change.encode('latin-1'))
  else:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
  with pytest.raises(InputError, match=re.escape(file) + ': .*' + re.escape(message)):
    page.remake(workdir)


def test_a_page_that_cannot_be_written_is_an_error(workdir, no_plots):
  (workdir / 'report.html').mkdir()
  with pytest.raises(InputError, match='report.html is a folder'):
    page.remake(workdir)
  assert not list(workdir.glob('*.partial'))
