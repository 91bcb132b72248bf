"""The real mains, each in a process of its own as a user runs them, at sizes of seconds."""
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

from conftest import CHANGES, config_flags, DATA, main, on, OTHERS, ROOT
import numpy as np
import pytest

from srlm_jax import catalog, ablations, InputError, loop, metrics, model_files, records
from srlm_jax.reward import pairs
from srlm_jax.sandbox import __main__ as sandbox


def table(printed):
  """The table of a loop's output: {model: {column: text}}."""
  lines = printed.splitlines()
  start = next(i for i, line in enumerate(lines) if line.split()[:1] == ['model'])
  heads = re.split(r'\s{2,}', lines[start].strip())
  rows = [re.split(r'\s{2,}', line.strip()) for line in itertools.takewhile(
      lambda line: line.split()[:1] and line.split()[0] in ('m0', 'sft', 'm1', 'm2', 'm3'), lines[start + 1:])]
  return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def test_the_loop_trains_every_model_and_ends_with_their_table(demo):
  workdir, printed = demo
  rows = table(printed)
  assert list(rows) == ['sft', 'm1', 'm2', 'm3'], printed  # M0 is not evaluated
  kept = {row['model']: row for row in json.loads((workdir / 'results.json').read_text())['models']}
  for model in ('sft', 'm1', 'm2', 'm3'):
    assert float(rows[model]['oracle 0-5']) == pytest.approx(kept[model]['oracle 0-5'], abs=0.006)
    assert 0 < kept[model]['oracle 0-5'] <= 5
  assert (workdir / 'report.html').stat().st_size > 10_000
  hashes = [model_files.recorded_hash(workdir / m / 'model') for m in ('m0', *rows)]
  assert len(set(hashes)) == 5, 'a model did not change'


def test_every_stage_ran_the_parameters_that_it_should(demo):
  """The failure elsewhere: the base model answered and judged in every iteration."""
  workdir, _ = demo
  params = {m: model_files.recorded_hash(workdir / m / 'model') for m in ('m0', 'sft', 'm1', 'm2', 'm3')}
  assert params['m0'] == json.loads((sandbox.M0 / 'done.json').read_text())['params']  # of its training
  for folder, model in (('m1/judge', 'sft'), ('m1/model', 'm0'), ('sft/judge_eval', 'sft'), ('m1/answers', 'm1'),
                        ('m2/prompts', 'm0'), ('m2/respond', 'm1'), ('m2/judge', 'm1'), ('m2/model', 'm1'),
                        ('m3/respond', 'm2'), ('m3/judge', 'm2'), ('m3/model', 'm2'), ('m3/judge_eval', 'm3')):
    assert json.loads((workdir / folder / 'manifest.json').read_text())['params'] == params[model], folder


def test_no_prompt_is_written_in_two_rounds(demo, tmp_path):
  written = {m: [r['prompt'] for r in records.read(demo[0] / m / 'prompts' / 'prompts.jsonl')] for m in ('m2', 'm3')}
  assert not set(written['m2']) & set(written['m3']) and all(len(p) == 48 for p in written.values())
  inputs = json.loads((demo[0] / 'm3' / 'prompts' / 'manifest.json').read_text())['inputs']
  assert 'm2/prompts/prompts.jsonl' in inputs
  for part in ('data', 'm0', 'm2'):
    shutil.copytree(demo[0] / part, tmp_path / part)
  for name in ('manifest.json', 'done.json'):  # as if the user had made these files
    (tmp_path / 'm2' / 'prompts' / name).unlink()
  first, = itertools.islice(records.read(demo[0] / 'm3' / 'prompts' / 'prompts.jsonl'), 1)
  with (tmp_path / 'm2' / 'prompts' / 'prompts.jsonl').open('a') as f:  # as if M2's round had written it
    f.write(records.dump(first))
  main('sample.prompts', '--config=configs/iter3.py:tiny', f'--workdir={tmp_path}', *config_flags('m3'))
  fates = {a['text'].strip(): a['dropped'] for a in records.read(tmp_path / 'm3' / 'prompts' / 'attempts.jsonl')}
  assert fates[first['prompt']] == 'seen before'


def test_dpo_starts_at_ln_2_and_metrics_are_in_both_places(demo):
  for model in ('m2', 'm3'):
    lines = list(map(json.loads, (demo[0] / model / 'model' / 'metrics.jsonl').read_text().splitlines()))
    # policy and reference are equal, but the compiler may add up their log-probs in another order
    assert lines[0]['step'] == 0 and lines[0]['margin'] == pytest.approx(0, abs=1e-6)
    assert lines[0]['loss'] == pytest.approx(np.log(2), abs=1e-6)
    assert list((demo[0] / model / 'model' / 'tensorboard').glob('events*'))


def test_the_files_hold_what_the_paper_says(demo):
  workdir, _ = demo
  prompts = list(records.read(workdir / 'm2' / 'prompts' / 'prompts.jsonl', 'id', 'prompt'))
  responses = list(records.read_shards(workdir / 'm2' / 'respond', 'responses', 'prompt_id', 'n', 'response', 'finish'))
  judgements = list(records.read_shards(workdir / 'm2' / 'judge', 'judgements', 'response_id', 'j', 'text', 'score'))
  pairs = list(records.read(workdir / 'm2' / 'pairs' / 'pairs.jsonl', 'chosen', 'rejected'))
  assert len(responses) == 4 * len(prompts) and len(judgements) == 3 * len(responses)
  assert len({r['id'] for r in responses}) == len(responses) and len({j['id'] for j in judgements}) == len(judgements)
  assert 0 < len(pairs) <= len(prompts) and all(p['chosen_score'] > p['rejected_score'] for p in pairs)
  held = {r['prompt'] for r in records.read(workdir / 'data' / 'seeds' / 'heldout.jsonl')}
  assert not held & {p['prompt'] for p in prompts}


def test_a_finished_loop_does_nothing_and_says_so(demo):
  workdir, printed = demo
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*.jsonl')}
  again = main('loop', '--size=tiny', f'--workdir={workdir}', *(f'--set={c}' for c in CHANGES))
  assert 'nothing to do' in again and table(again) == table(printed)
  assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob('*.jsonl')}


def test_another_config_in_the_same_workdir_is_refused(demo):
  changes = (*CHANGES, 'respond.n=5')
  said = main('loop', '--size=tiny', f'--workdir={demo[0]}', *(f'--set={c}' for c in changes), code=1)
  assert 'respond.n (4, now 5)' in said


STAGES = dict(  # the file that grows record by record
    prompts='attempts.jsonl', respond='responses-00000-of-00001.jsonl',
    judge='judgements-00000-of-00001.jsonl')


@pytest.mark.parametrize('stage', STAGES)
def test_a_killed_stage_does_only_what_is_missing_and_ends_byte_identical(demo, tmp_path, stage):
  module, name = f'sample.{stage}', STAGES[stage]
  shutil.copytree(demo[0], tmp_path / 'run')
  folder = tmp_path / 'run' / 'm2' / stage
  whole = {p.name: p.read_bytes() for p in folder.glob('*.jsonl')}
  (folder / 'done.json').unlink()
  (folder / name).write_bytes(whole[name][:len(whole[name]) * 2 // 3])  # in the middle of a line, and of a batch
  (folder / 'prompts.jsonl').unlink(missing_ok=True)
  main(module, '--config=configs/iter2.py:tiny', f'--workdir={tmp_path / "run"}', *config_flags('m2'))
  assert {p.name: p.read_bytes() for p in folder.glob('*.jsonl')} == whole
  assert json.loads((folder / 'done.json').read_text())['seconds'] > 0


def test_the_older_model_judges_the_same_candidates_and_writes_its_own(others):
  params = {m: json.loads((others / m / 'model' / 'done.json').read_text())['params'] for m in ('sft', 'm1')}
  for stage, model in (('judge_again', 'sft'), ('respond_older', 'sft'), ('judge_older', 'm1'), ('meta_judge', 'm1')):
    assert json.loads((others / 'm2' / stage / 'manifest.json').read_text())['params'] == params[model]
  def ids(stage, stem, key):
    return {r[key] for r in records.read_shards(others / 'm2' / stage, stem)}
  assert ids('judge_again', 'judgements', 'response_id') == ids('respond', 'responses', 'id')
  assert ids('judge_older', 'judgements', 'response_id') == ids('respond_older', 'responses', 'id')
  assert not ids('respond_older', 'responses', 'id') & ids('respond', 'responses', 'id')


def test_the_implicit_reward_is_of_the_sampler_s_own_log_probs(others):
  sampled = {r['id']: r for r in records.read_shards(others / 'm2' / 'respond', 'responses')}
  rewards = list(records.read_shards(others / 'm2' / 'implicit', 'rewards'))
  assert [r['id'] for r in rewards] == list(sampled)
  same = [abs(r['logp'] - sampled[r['id']]['logp']) < 0.01 for r in rewards if r['logp'] is not None]
  assert len(same) > 0.9 * len(rewards) and sum(same) > 0.9 * len(same)  # not where other pieces spell the same text
  assert all(r['reward'] == round(r['logp'] - r['older_logp'], 4) for r in rewards if r['reward'] is not None)
  assert np.std([r['reward'] for r in rewards if r['reward'] is not None]) > 0.1


def test_the_meta_judge_compares_in_both_orders_and_keeps_every_text(others):
  compared = list(records.read_shards(others / 'm2' / 'meta_judge', 'comparisons'))
  pairs = {(c['first'], c['second']) for c in compared}
  assert pairs and pairs == {(b, a) for a, b in pairs} and all(a != b for a, b in pairs)
  assert all((c['winner'] is None) == bool(c['reason']) and isinstance(c['text'], str) for c in compared)
  done = json.loads((others / 'm2' / 'meta_judge' / 'done.json').read_text())
  assert done['comparisons'] == len(compared) and done['judge_pairs'] == sum(
      1 for _ in records.read(others / 'm2' / 'meta_judge' / 'judge_pairs.jsonl'))


@pytest.mark.parametrize('strategy', ['consistency', 'agreement', 'temporal', 'length_controlled', 'positives_only'])
def test_every_strategy_makes_its_pairs(others, tmp_path, strategy):
  shutil.copytree(others / 'm2', tmp_path / 'm2', ignore=shutil.ignore_patterns('pairs', 'model', 'health'))
  config = loop.load_config('m2', 'tiny', '', '', [*CHANGES, f'pairs.strategy={strategy}', 'pairs.positive=4'])
  pairs.run(config, tmp_path)
  done = json.loads((tmp_path / 'm2' / 'pairs' / 'done.json').read_text())
  made = done['positives' if strategy == 'positives_only' else 'pairs']
  assert 0 < made and done['strategy'] == strategy and made + sum(done['dropped'].values()) >= done['prompts']


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_a_stage_killed_by_the_system_again_and_again_ends_byte_identical(demo, tmp_path, stage):
  module, name = f'sample.{stage}', STAGES[stage]
  shutil.copytree(demo[0], tmp_path / 'run')
  folder = tmp_path / 'run' / 'm2' / stage
  whole = {p.name: p.read_bytes() for p in folder.glob('*.jsonl')}
  shutil.rmtree(folder)
  command = [sys.executable, '-m', f'srlm_jax.{module}', '--config=configs/iter2.py:tiny',
             f'--workdir={tmp_path / "run"}', *config_flags('m2')]
  def size():
    return (folder / name).stat().st_size if (folder / name).exists() else 0
  kills, ended = 0, None
  while ended is None:
    before = size()
    process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=''),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and size() <= before:  # until it has written something
      time.sleep(0.01)
    ended = process.poll()
    process.kill()
    process.wait()
    kills += ended is None
  assert ended == 0 and kills and {p.name: p.read_bytes() for p in folder.glob('*.jsonl')} == whole


@pytest.mark.slow
@pytest.mark.parametrize('stage', OTHERS)
def test_these_too_end_byte_identical_when_killed(others, tmp_path, stage):
  spec = OTHERS[stage]
  stems = [w.removesuffix(catalog.SHARDS) for w in spec.writes if w.endswith(catalog.SHARDS)]
  stems = [stem for stem in stems if stem != 'rewards']  # written whole
  shutil.copytree(others, tmp_path / 'run')
  folder = tmp_path / 'run' / 'm2' / stage
  whole = {p.name: p.read_bytes() for p in folder.glob('*.jsonl')}
  for name in whole:
    if name.startswith(stems[-1]):
      (folder / name).write_bytes(whole[name][:len(whole[name]) * 2 // 3])
    elif not name.startswith(tuple(stems)):
      (folder / name).unlink()
  (folder / 'done.json').unlink()
  main(spec.program, '--config=iter2:tiny', f'--workdir={tmp_path / "run"}', *on(spec),
       *config_flags('m2'))
  assert {p.name: p.read_bytes() for p in folder.glob('*.jsonl')} == whole


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    *([f'--ablation={name}'] for name in ablations.ABLATIONS),
    ['--set=m2,m3:train.data=pairs,judge_pairs'], ['--set=m2,m3:pairs.strategy=consistency']], ids=' '.join)
def test_the_loop_runs_every_ablation_and_the_meta_judge(demo, tmp_path, flags):
  for part in ('data', 'm0') + ('sft',) * ('multiple' not in flags[0]):  # its baseline judges by letters
    shutil.copytree(demo[0] / part, tmp_path / part)
  said = main('loop', '--size=tiny', f'--workdir={tmp_path}', *(f'--set={c}' for c in CHANGES), *flags)
  assert 'm1' in table(said) and ('m3' in table(said) or 'was not trained' in said), said
  for model in ('m2', 'm3'):
    if model in table(said):
      assert (tmp_path / model / 'health' / 'health.json').exists()


@pytest.mark.slow
def test_two_hosts_write_the_records_of_one(others, tmp_path):
  shutil.copytree(others, tmp_path / 'run')
  for stage, stem in (('prompts', 'prompts'), ('respond', 'responses'), ('judge', 'judgements'),
                      ('implicit', 'rewards'), ('meta_judge', 'comparisons')):
    folder = tmp_path / 'run' / 'm2' / stage
    whole = sorted(line for p in folder.glob(f'{stem}*.jsonl') for line in p.read_text().splitlines())
    shutil.rmtree(folder)
    subprocess.run([ROOT / 'launch' / 'local.sh', '2', sys.executable, '-m', f'srlm_jax.sample.{stage}',
                    '--config=configs/iter2.py:tiny', f'--workdir={tmp_path / "run"}', *config_flags('m2')],
                   cwd=ROOT, env=dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=''), check=True)
    assert sorted(line for p in folder.glob(f'{stem}*.jsonl') for line in p.read_text().splitlines()) == whole
    assert stage == 'prompts' or len(list(folder.glob(f'{stem}-*-of-00002.jsonl'))) == 2


def test_a_killed_training_continues_and_ends_with_the_same_parameters(demo, tmp_path):
  shutil.copytree(demo[0], tmp_path / 'run')
  folder = tmp_path / 'run' / 'm2' / 'model'
  done = json.loads((folder / 'done.json').read_text())
  lines = (folder / 'metrics.jsonl').read_text()
  (folder / 'done.json').unlink()
  shutil.rmtree(folder / 'steps' / str(done['steps']))  # as if killed after the checkpoint before
  said = main('train', '--config=configs/iter2.py:tiny', f'--workdir={tmp_path / "run"}', *config_flags('m2'))
  assert 'continues after step' in said
  again = json.loads((folder / 'done.json').read_text())
  assert again['params'] == done['params'] and again['loss'] == done['loss']
  (folder / 'done.json').unlink()  # as if killed after the last checkpoint: there is no step left to take
  main('train', '--config=configs/iter2.py:tiny', f'--workdir={tmp_path / "run"}', *config_flags('m2'))
  assert json.loads((folder / 'done.json').read_text())['params'] == done['params']
  steps = [json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  assert steps == [json.loads(line)['step'] for line in lines.splitlines()]


def test_the_loop_ends_cleanly_on_real_weights_and_real_data_that_cannot_judge(stories, tmp_path):
  said = main('loop', '--size=stories', f'--workdir={tmp_path}', f'--m0={stories}',
              f'--data={DATA / "oasst1" / "validation.en.messages.jsonl.gz"}', '--set=prompts.count=8',
              '--set=data.ranked_eval=4', '--set=data.test_prompts=4', '--set=data.ift=24',
              '--set=respond.max_tokens=32', '--set=judge.max_tokens=32', '--set=sample.slots=32')
  assert re.search(r'm2 was not trained: \d+ of 96 judgements parsed and \d+ pairs are left', said), said
  assert '--set=judge.template' in said and list(table(said)) == ['sft', 'm1']  # M0 is not evaluated
  assert json.loads((tmp_path / 'results.json').read_text())['stopped']


def test_what_is_missing_is_said(tmp_path):
  assert '--data is missing' in main('loop', '--size=stories', f'--workdir={tmp_path}', code=1)
  assert 'needs 1,241,579,667,456 bytes' in main('loop', f'--workdir={tmp_path}', code=1)
  assert not any(tmp_path.iterdir())


def test_metrics_of_steps_after_the_checkpoint_are_dropped_and_nan_stops(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "loss": 2.0}\n{"step": 5, "loss": 1.0}\n{"step": 9, "lo')
  writer = metrics.Writer(tmp_path, 4)
  with pytest.raises(InputError, match='step 6, of a: loss is nan'):
    metrics.finite('step 6, of a', dict(grad_norm=1.0, loss=float('nan')))
  writer.write(5, dict(loss=0.5))
  writer.close()
  assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 0, "loss": 2.0}\n{"step": 5, "loss": 0.5}\n'


def test_a_malformed_line_stops_training_before_anything_is_written(demo, tmp_path):
  shutil.copytree(demo[0] / 'data', tmp_path / 'data')
  shutil.copytree(demo[0] / 'm0', tmp_path / 'm0')
  path = tmp_path / 'data' / 'seeds' / 'ift.jsonl'
  for name in ('manifest.json', 'done.json'):  # as if the user had made these files
    (path.parent / name).unlink()
  lines = path.read_text().splitlines()
  path.write_text('\n'.join([*lines[:6], lines[6][:-9], *lines[7:]]) + '\n')
  said = main('train', '--config=configs/sft.py:tiny', f'--workdir={tmp_path}', *config_flags('sft'), code=1)
  assert f'{path}:7: not a JSON object' in said and not (tmp_path / 'sft').exists()
  path.write_text('')
  said = main('train', '--config=configs/sft.py:tiny', f'--workdir={tmp_path}', *config_flags('sft'), code=1)
  assert 'no example is left to train on: the files are empty' in said and not (tmp_path / 'sft').exists()


DOCUMENTS = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
BLOCKS = [block for path in DOCUMENTS for block in re.findall(r'```sh\n(.*?)```', path.read_text(), re.DOTALL)]
COMMANDS = [line.split('#')[0].strip() for block in BLOCKS for line in block.splitlines()]


def test_every_make_verb_of_the_documents_exists():
  verbs = set(re.findall(r'make ([a-z][a-z-]*)`', (ROOT / 'CONTRIBUTING.md').read_text()))
  verbs |= {c.split()[1] for c in COMMANDS if c.startswith('make ')}
  assert verbs >= {'demo', 'test', 'lint', 'setup', 'test-slow'}
  for verb in verbs:
    assert subprocess.run(['make', '-n', verb], cwd=ROOT, capture_output=True).returncode == 0, verb


def test_every_command_of_the_documents_runs(others, stories, tmp_path):
  """Against the finished demo; the loop's own stages are found done, which proves that their flags resolve alike."""
  shutil.copytree(others, tmp_path / 'runs' / 'demo')
  ran = []
  for command in COMMANDS:
    if not command.startswith('python ') or 'srlm_jax.loop' in command or 'srlm_jax.study' in command:
      continue  # the loop has tests of its own, above
    command = command.replace('runs/', f'{tmp_path}/runs/').replace('$DATA', str(DATA))
    if command.startswith('python bench/'):
      assert subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT).returncode == 0, command
      continue
    words = shlex.split(command)[2:]
    name = re.search(r'configs/(\w+)\.py', command)
    model = dict(sft='sft', iter1='m1', iter2='m2', iter3='m3')[name[1]] if name else ''
    flags = [] if 'srlm_jax.data.seeds' in command or not name else list(config_flags(model))
    said = main(words[0].removeprefix('srlm_jax.'), *words[1:], *flags)
    assert not flags or 'done before' in said, command
    ran.append(words[0])
  assert len(ran) >= 26
  assert (tmp_path / 'runs' / 'm2_back' / 'steps' / '0').exists() and (tmp_path / 'runs' / 'seeds' / 'data').exists()
