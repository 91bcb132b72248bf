"""The page shows the data of the files, for runs that stopped anywhere, and escapes model texts."""
import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import types
import typing

from hypothesis import given, settings, strategies
import pytest

from srlm_jax import catalog, InputError, records, schema, stage
from srlm_jax.report import charts, page, plots, results
from srlm_jax.report.estimates import Value

EVIL = '<script>alert("x")</script> & <img src=http://evil.example/x>'
JUDGE = {'judge.template': 'additive', 'judge.n': 2, 'judge.quorum': 1}
STOPPED = '3 pairs are left (7 all scores equal), fewer than one batch of 8'


def filled(kind, **given):
  """An object of `kind`, a dataclass; required fields that are not given are empty, 0 or None."""
  def empty(hint):
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    if choices or typing.get_origin(hint) is typing.Union:
      return choices[0] if choices else None
    return hint() if callable(hint) else None
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
                  rejected_score=1.0, chosen_finish='eos', rejected_finish='length',
                  chosen_id=f'p{i}/1', rejected_id=f'p{i}/0')
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


def page_of(workdir) -> str:
  return page.remake([workdir]).read_text()


def plain(html: str) -> str:
  """The words of a page's body, without tags."""
  body = html[html.index('<body>'):html.rindex('<script>')]
  return ' '.join(re.sub(r'<[^>]*>', ' ', body).split())


def test_the_page_shows_the_numbers_of_the_run_and_why_it_stopped(workdir):
  html = page_of(workdir)
  words = plain(html)
  assert f'The run stopped early: {STOPPED}.' in words
  assert 'size tiny, model sandbox' in words and 'm0, sft, m1, m2' in words
  assert ('Not known: m2 against sft: +0.00 [+0.00, +0.00] points in the oracle score, on 5 '
          'prompts; 5 prompts cannot decide') in words
  assert 'This run does not have: model m3; head to head by an outside judge' in words
  assert 'measure m0 sft m1 m2 oracle score 0 to 5, by oracle 2.00 [0.04, 3.96] 5 prompts' in words
  assert 'pairs ordered as people did share, by people 0.713 [0.680, 0.740] 971 pairs' in words
  assert '31 steps on 248 examples' in words
  assert 'attempts 1,234 1,234' in words and '21 seen before 3 held out' in words
  assert 'accepted prompts 10 = 0.8%' in words and 'pairs 3 = 30.0%' in words
  assert 'pairs per 1,000 prompts 300 300' in words
  assert 'chosen minus rejected: characters 1.25 1.25' in words
  assert '90 examples from 113 ranked replies' in words
  assert '17 downsampled: most frequent score' in words
  assert 'before 40 67 kept 40 50' in words
  assert 'pairs 12.5 s 12.5 s' in words and 'finished stages: 375 s' in words
  for alternative in ('reward margin: reward margin 0 at step 1, 0.3 at step 31',
                      'accuracy: accuracy 0.5 at step 1', 'loss: loss 0.6931 at step 1',
                      'held-out answers, score of the oracle: oracle 2 at m0, 2 at sft',
                      'win, tie and loss, by oracle: sft / m0 0 / 100 / 0 %',
                      'scores in the data of m3: judge 0: '):
    assert f'aria-label="{alternative}' in html


def test_the_page_says_which_checkpoint_was_selected_and_why(workdir):
  assert 'Later stages use' not in plain(page_of(workdir))
  done = workdir / 'm2' / 'model' / 'done.json'
  done.write_text(json.dumps(json.loads(done.read_text()) | dict(
      stopped='step 80 does not win against step 40')))
  (workdir / 'm2' / 'model' / 'selected.json').write_text('{"step": 40}')
  (workdir / 'm2' / 'stopping').mkdir()
  records.write(workdir / 'm2' / 'stopping' / 'wins.jsonl', [
      schema.StepWins(step=40, before=0, wins=85, ties=284, losses=31, left_out=0),
      schema.StepWins(step=80, before=40, wins=10, ties=300, losses=90, left_out=0)])
  html = page_of(workdir)
  assert ('Training ended early: step 80 does not win against step 40. Later stages use the '
          'checkpoint of step 40.') in plain(html)
  assert ('aria-label="checkpoints compared: win, tie and loss: step 40 / start 21 / 71 / 8 %; '
          'step 80 / 40 2 / 75 / 22 %"') in html
  (workdir / 'm2' / 'model' / 'selected.json').write_text('{"step": 0}')
  assert 'Later stages use the model that training started from.' in plain(page_of(workdir))


def test_results_of_an_outside_judge_stand_apart_and_beside_the_models(workdir):
  """The judge has the name of the sandbox's program, and the files another machine's paths."""
  for name in ('m1', 'm2'):
    folder = workdir / 'eval' / f'{name}_sft'
    folder.mkdir(parents=True)
    (folder / 'head_to_head.json').write_text(json.dumps(dataclasses.asdict(schema.HeadToHead(
        a=f'/far/{workdir.name}/{name}/answers', b='sft', count=400, wins=300, ties=0, losses=100,
        win_share=0.75, tie_share=0.0, loss_share=0.25, p_value=1e-9, win_rate=0.75,
        win_rate_low=0.7, win_rate_high=0.8, left_out=17, missing=4, characters_a=23.405,
        characters_b=22.8875, judge='oracle'))))
  html = page_of(workdir)
  words = plain(html)
  assert ('win rate against sft, head to head share, by outside judge oracle - - 0.750 '
          '[0.700, 0.800] 400 prompts 0.750') in words
  assert html.count('aria-label="win, tie and loss, by oracle: ') == 1
  label = re.search(r'aria-label="win, tie and loss, by outside judge oracle: ([^"]*)"', html)[1]
  assert label == 'm1 / sft 75 / 0 / 25 %; m2 / sft 75 / 0 / 25 %'
  assert 'aria-label="win rate against sft, head to head: outside judge oracle 0.75 at m1' in html
  assert '/far/' not in html and '0 0 17 4 23.4 / 22.9' in words


def test_control_characters_are_nowhere_on_the_page(workdir):
  folder = workdir / 'eval' / 'x'
  folder.mkdir(parents=True)
  (folder / 'head_to_head.json').write_text(json.dumps(dict(
      a='m2\x0b', b='sft', count=4, wins=2, ties=1, losses=1, win_share=0.5, tie_share=0.25,
      loss_share=0.25, p_value=1.0, judge='a\x00\x0bb')))
  (workdir / 'eval' / 'harness.json').write_text(json.dumps(dict(
      scores={'m2': {'task\x0b': 5.0}}, differences={}, missing={}, metrics={})))
  html = page_of(workdir)
  assert 'task\ufffd' in html and 'a\ufffd\ufffdb' in html
  assert not re.search('[\x00-\x08\x0b\x0c\x0e-\x1f]', html)


def test_counts_that_are_part_of_nothing_have_no_bar(workdir):
  write_stage(workdir / 'm1', 'judge')
  charts = {found[1]: found[0] for found in re.findall(
      r'(<svg[^>]*aria-label="(data of m\d):.*?</svg>)', page_of(workdir), re.S)}
  assert 'EFT examples' in charts['data of m1'] and '<rect' not in charts['data of m1']
  m2 = charts['data of m2']
  assert 'prompts wanted' in m2 and m2.count('class="track"') == m2.count('class="s2"') == 8


def test_a_model_has_one_colour_in_all_charts():
  found = schema.Distributions(
      points=tuple(schema.MapPoint(set=name) for name in ('ift', 'eft', 'heldout', 'm2')),
      nearest=(schema.Nearest(set='heldout', rouge_shares=(1.0,)),
               schema.Nearest(set='m2', rouge_shares=(1.0,))))
  assert charts.map_of(found).legend == (
      ('s0', 'ift'), ('s1', 'eft'), ('s5', 'heldout'), ('s2', 'm2'))
  assert charts.nearest_seeds(found).legend == (('s5', 'heldout'), ('s2', 'm2'))
  assert charts.style('m2') == 's2'


def test_the_tables_of_the_paper_are_labelled_as_another_model(workdir):
  words = plain(page_of(workdir))
  assert ('the paper, not this run: Llama-2-70B, judged against human ranks Agreement of the judge '
          'with human ranks') in words
  assert words.count('the paper, not this run: Llama-2-70B') == 8


def test_samples_have_all_candidates_and_all_judgements(workdir):
  html = page_of(workdir)
  found = re.findall(r'<details class="sample" data-models="data-of-m2"([^>]*)>(.*?)</details>',
                     html, re.S)
  assert len(found) == 10 and sum('data-pair' in attributes for attributes, _ in found) == 3
  pair = next(body for attributes, body in found if 'data-pair' in attributes)
  words = ' '.join(re.sub(r'<[^>]*>', ' ', pair).split())
  assert 'candidate 1 rejected' in words and 'candidate 2 chosen' in words
  assert [words.count(f'judgement {n}:') for n in (1, 2, 3)] == [2, 2, 0]
  held_out, = re.findall(r'<details class="sample" data-models="held-out[^>]*>(?:(?!</details>).)*?'
                         r'Held-out prompt 1.*?</details>', html, re.S)
  for name in ('m0', 'sft', 'm1', 'm2'):
    assert f'<b>{name}</b>' in held_out and f'{name} answers 1' in held_out
  assert held_out.count('oracle 1<') == 4


def test_model_text_is_escaped_and_the_page_needs_no_other_file(workdir):
  html = page_of(workdir)
  assert html.count('<script') == 1 and '&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;' in html
  assert not re.findall(r'<[^>]*\b(?:src|style|on\w+)\s*=', html) and 'url(' not in html
  assert set(re.findall(r'<[^>]*\bhref\s*=\s*"(.)', html)) == {'#'}
  assert html == page_of(workdir)  # deterministic


def test_the_policy_has_the_hashes_of_the_style_sheet_and_the_script(workdir):
  html = page_of(workdir)
  policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
  assert policy.startswith('default-src &#39;none&#39;; style-src') and 'unsafe' not in policy
  for tag in ('style', 'script'):
    text = re.search(f'<{tag}>(.*?)</{tag}>', html, re.S)[1]
    expected = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert f'{tag}-src &#39;sha256-{expected}&#39;' in policy.replace('&#43;', '+')


@pytest.mark.parametrize('missing', [*catalog.NAMES, 'done.json', 'results.json', 'metrics.jsonl'])
def test_any_stage_or_summary_may_be_missing(workdir, missing):
  for path in sorted(workdir.rglob(missing)):
    if path.name == 'model':  # a converted model has no manifest
      path = path / 'manifest.json'
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert '</html>' in page_of(workdir)


def test_an_unfinished_stage_is_counted_without_its_incomplete_last_line(workdir):
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
  assert 'Not finished: m3/prompts.' in words
  assert 'prompts wanted 10 4,000 attempts 1,234 2 accepted prompts 10 1' in words
  assert '1 cut off by length' in words


def test_the_loop_writes_the_same_page_as_the_program(workdir):
  path = page.write(workdir, results.of_models(workdir), STOPPED)
  assert path == workdir / 'report.html' and path.read_text() == page_of(workdir)


def test_a_stale_reason_to_stop_is_not_shown(workdir):
  model(workdir, 'm3', 'dpo')
  assert STOPPED not in page_of(workdir)


def test_warnings_stand_beside_the_verdict(workdir):
  assert 'Warnings' not in plain(page_of(workdir))
  path = workdir / 'm2' / 'model' / 'done.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | dict(dropped={'too long': 300})))
  path, = (workdir / 'm2' / 'judge').glob('judgements-*')
  records.write(path, [judgement(f'p{i}/0', reason='unreadable') for i in range(10)])
  words = plain(page_of(workdir))
  first = words[words.index('Can I believe it?'):words.index('Every step')]
  for text in ('m2/judge: 0 of 10 judgements have a score (the others: 10 unreadable)',
               'm2/model: trained on 248 examples; dropped 300 too long'):
    assert text in first


def test_a_folder_without_a_model_is_an_error_of_one_sentence(tmp_path):
  command = [sys.executable, '-m', 'srlm_jax.report', f'--workdir={tmp_path}']
  made = subprocess.run(command, capture_output=True, text=True)
  assert made.returncode == 1
  assert made.stderr == (f'error: {tmp_path} contains no model; make one with the loop: '
                         'python -m srlm_jax.loop --help\n')
  assert not list(tmp_path.iterdir())
  with pytest.raises(InputError):
    page.remake([tmp_path / 'absent'])


def test_a_missing_stage_gives_no_warning(workdir):
  """M1 has judgements of ranked replies but no responses."""
  judgements = [judgement(f'r{i}', score=float(i)) for i in range(5)]
  folder = write_stage(workdir / 'm1', 'judge', SCALE, **JUDGE)
  records.write(folder / 'judgements-00000-of-00001.jsonl', judgements)
  assert 'Warnings' not in plain(page_of(workdir))


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
def test_a_damaged_record_is_named_by_file_and_line_in_the_error(workdir, name):
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
      page.remake([workdir])
  path.write_text(whole + '{"id": "cut by a ki')
  assert '</html>' in page_of(workdir)
  path.unlink()
  path.mkdir()
  with pytest.raises(InputError, match=f'{file} is a folder'):
    page.remake([workdir])


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
    ('m2/agreement/agreement.json', lambda r: dict(r, ties='x'),
     'Expected int | float | null, got str for "ties"'),
    ('m2/agreement/agreement.json', lambda r: dict(r, intervals=3),
     'Expected object, got int for "intervals"'),
    ('m2/agreement/agreement.json', lambda r: dict(r, intervals=dict(ties=[1, []])),
     'Expected float, got array for "intervals[...][1]"')])
def test_a_damaged_summary_is_named_in_the_error(workdir, file, change, message):
  path = workdir / file
  if isinstance(change, str):
    path.write_bytes(change.encode('latin-1'))
  else:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
  with pytest.raises(InputError, match=re.escape(file) + ': .*' + re.escape(message)):
    page.remake([workdir])


def test_a_page_that_cannot_be_written_is_an_error(workdir):
  (workdir / 'report.html').mkdir()
  with pytest.raises(InputError, match='report.html is a folder'):
    page.remake([workdir])
  assert not list(workdir.glob('*.partial'))


def test_runs_side_by_side_need_a_file_to_write(workdir, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(workdir, other, ignore=shutil.ignore_patterns('other'))
  with pytest.raises(InputError, match='several workdirs need --out=FILE.html'):
    page.remake([workdir, other])
  path = page.remake([workdir, other], tmp_path / 'both.html')
  words = plain(path.read_text())
  assert f'2 runs side by side: {workdir.name}, other.' in words
  assert f'other - {workdir.name} m2 oracle score 0 to 5, by oracle 2.00 2.00 +0.00' in words
  assert not (workdir / 'report.html').exists()


def test_the_judge_is_drawn_over_the_answers_from_m1_on():
  def run(name, **models):
    return types.SimpleNamespace(name=name, values={
        model: dict(oracle=Value(value=x), oracle_pairwise_all=Value(value=y))
        for model, (x, y) in models.items()})
  runs = [run('loop', sft=(1.0, 0.1), m1=(3.0, 0.7), m2=(3.5, 0.8), m3=(4.0, 0.75)),
          run('short', m1=(3.0, 0.7))]
  chart = charts.judges_and_answers(runs)
  assert chart.legend == (('s0', 'loop'),)
  assert 'loop m1 0.7 at 3, m2 0.8 at 3.5, m3 0.75 at 4' in chart.description
  assert [chart.svg.count(f'>{m}</text>') for m in ('sft', 'm1', 'm2', 'm3')] == [0, 1, 1, 1]
  points = re.search('points="(.*?)"', chart.svg)[1].split()
  (x1, y1), (x2, y2), (x3, y3) = (map(float, point.split(',')) for point in points)
  assert x1 < x2 < x3 and y2 < y3 < y1  # upwards on a page is less
  assert charts.judges_and_answers(runs[1:]) is None


def test_a_study_is_shown_as_one(workdir, tmp_path):
  study = tmp_path / 'study'
  for seed in (0, 1):
    shutil.copytree(workdir, study / f'loop-{seed}', ignore=shutil.ignore_patterns('study'))
  words = plain(page.remake([study]).read_text())
  assert 'Seeds 0, 1' in words
  assert 'oracle score 0 to 5, by oracle 2.00 [2.00, 2.00] 2 seeds' in words


NUMBERS = strategies.floats(-1e9, 1e9).map(lambda x: round(x, 6))


@settings(max_examples=50, deadline=None)
@given(NUMBERS, NUMBERS)
def test_ticks_enclose_their_range_and_are_few(a, b):
  low, high = sorted((a, b))
  found = plots.ticks(low, high)
  margin = 1e-6 * (found[1] - found[0])
  assert found[0] <= low + margin and high - margin <= found[-1] and 3 <= len(found) <= 7
  assert found == sorted(set(found))


def test_a_chart_shows_each_value_at_its_place_on_the_axis():
  points = [plots.Point(x, y, y - 1, y + 1) for x, y in ((0, 2.0), (1, 4.0), (2, 8.0))]
  chart = plots.lines('gains', {'a': points, EVIL: points[:2]}, names=('sft', EVIL, 'm2'))
  assert '<script' not in chart.svg and chart.legend == (('s0', 'a'), ('s1', EVIL))
  texts = dict(re.findall(r'<text class="tick"[^>]* y="([-\d.]+)"[^>]*>([-\d.]+)</text>',
                          chart.svg))
  by_value = {float(value): float(y) - 4 for y, value in texts.items()}
  low, high = by_value[0], by_value[10]
  dots = [float(y) for y in re.findall(r'<circle class="s0"[^>]* cy="([-\d.]+)"', chart.svg)]
  assert dots == pytest.approx([low + y / 10 * (high - low) for y in (2, 4, 8)], abs=0.02)
  assert chart.description.startswith('gains: a 2 at sft, 4 at ')


def test_stacked_bars_have_lengths_in_proportion():
  chart = plots.rows('wins', [plots.Row('m2', [0.5, 0.3, 0.2], '50 / 30 / 20 %')],
                     series=('win', 'tie', 'loss'), styles=('win', 'tie', 'loss'), whole=1)
  widths = {name: float(width) for name, width in re.findall(
      r'<rect class="(\w+)"[^>]* width="([\d.]+)"', chart.svg)}
  assert [widths[name] / widths['track'] for name in ('win', 'tie', 'loss')] == pytest.approx(
      [0.5, 0.3, 0.2], abs=0.001)
