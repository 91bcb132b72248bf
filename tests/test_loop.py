"""End-to-end tests: the programs run as separate processes, as a user runs them, at tiny sizes."""
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

from boards import shown
from conftest import CHANGES, config_flags, DATA, main, on, OTHERS, ROOT
import numpy as np
import pytest
import yaml

from srlm_jax import (
  ablations,
  catalog,
  config as configs,
  InputError,
  loop,
  metrics,
  model_files,
  preemption,
  records,
  schema,
  sharding,
  stage as stages,
)
from srlm_jax.checkpoint import convert
from srlm_jax.report import card
from srlm_jax.reward import pairs, strategies
from srlm_jax.sandbox import data as sandbox


def table(printed):
  """Parses the table in the loop's output -> {model: {column: text}}."""
  def first_word(line):
    return line.split()[0] if line.split() else ''
  lines = printed.splitlines()
  start = next(i for i, line in enumerate(lines) if first_word(line) == 'model')
  columns = re.split(r'\s{2,}', lines[start].strip())
  rows = itertools.takewhile(lambda line: first_word(line) in ('m0', 'sft', 'm1', 'm2', 'm3'),
                             lines[start + 1:])
  cells = [re.split(r'\s{2,}', line.strip()) for line in rows]
  return {row[0]: dict(zip(columns, row, strict=True)) for row in cells}


def test_the_loop_trains_every_model_and_prints_their_table(demo):
  workdir, printed = demo
  rows = table(printed)
  assert list(rows) == ['sft', 'm1', 'm2', 'm3'], printed  # M0 is not evaluated
  results = json.loads((workdir / 'results.json').read_text())
  saved = {row['model']: row for row in results['models']}
  for model in ('sft', 'm1', 'm2', 'm3'):
    assert float(rows[model]['oracle 0-5']) == pytest.approx(saved[model]['oracle 0-5'], abs=0.006)
    assert 0 < saved[model]['oracle 0-5'] <= 5
  assert (workdir / 'report.html').stat().st_size > 10_000
  hashes = [model_files.recorded_hash(workdir / m / 'model') for m in ('m0', *rows)]
  assert len(set(hashes)) == 5, 'two models have equal parameters'


def test_the_card_of_an_export_has_the_numbers_and_the_command_of_the_run(demo, tmp_path):
  workdir, _ = demo
  convert.to_hf(workdir / 'm2' / 'model', tmp_path / 'hf', license='apache-2.0')
  text = (tmp_path / 'hf' / card.NAME).read_text()
  _, header, body = text.split('---\n', 2)
  assert yaml.safe_load(header) == dict(
      library_name='transformers', pipeline_tag='text-generation', license='apache-2.0',
      tags=['srlm_jax', 'dpo', 'sft'])
  lines = [line.strip('| ').split(' | ') for line in body.splitlines() if line.startswith('|')]
  cells = {line[0]: line[1:] for line in lines}
  m2 = json.loads((workdir / 'results.json').read_text())['models'][-2]
  assert m2['model'] == 'm2' and float(cells['oracle 0-5'][0]) == round(m2['oracle 0-5'], 2)
  assert cells['parameters, as stored'] == [f'`{model_files.recorded_hash(workdir / "m2/model")}`']
  for path in (tmp_path / 'hf').iterdir():
    if path.name != card.NAME:
      found = hashlib.sha256(path.read_bytes()).hexdigest()
      assert cells[f'`{path.name}`, SHA-256'] == [f'`{found}`'], path
  pairs = len((workdir / 'm2' / 'pairs' / 'pairs.jsonl').read_text().splitlines())
  row = next(line for line in lines if '`m2/pairs/pairs.jsonl`' in line)
  assert row[:4] == ['m2', f'm1, `{model_files.recorded_hash(workdir / "m1/model")}`', 'dpo',
                     str(pairs)] and row[6] == str(pairs)
  assert str(workdir) not in text  # no path of this machine

  # The command leads to the config keys of every stage.
  command, _ = re.search(r'```sh\n(.*?)\n(python .*?)\n```', body, re.DOTALL).groups()
  flags = shlex.split(command.replace('\\\n', ''))
  assert flags[:6] == ['python', '-m', 'srlm_jax.loop', '--size=tiny', '--workdir=RUN', '--last=m2']
  changes = [flag.removeprefix('--set=') for flag in flags[6:]]
  for name in ('sft', 'm1', 'm2'):
    config = loop.load_config(name, 'tiny', '', '', changes)
    for path in workdir.glob(f'{name}/*/manifest.json'):
      for key, value in json.loads(path.read_text())['config'].items():
        assert json.loads(json.dumps(catalog.look_up(config, key))) == value, (path, key)


def test_the_card_of_another_step_has_no_numbers_of_the_last_one(demo, tmp_path):
  folder = demo[0] / 'm2' / 'model'
  first, *_, last = model_files.steps(folder)
  assert first < last
  convert.to_hf(folder, tmp_path / 'hf', step=first)
  text = (tmp_path / 'hf' / card.NAME).read_text()
  assert f'step {first} of {last}' in text and '## Results' not in text
  unfinished = tmp_path / 'run' / 'm2' / 'model'
  shutil.copytree(folder, unfinished)
  (unfinished / 'done.json').unlink()
  convert.to_hf(unfinished, tmp_path / 'unfinished')
  assert f': step {last}, ' in (tmp_path / 'unfinished' / card.NAME).read_text()


def test_every_stage_used_the_parameters_of_the_right_model(demo):
  """Regression: each stage must load the right model."""
  workdir, _ = demo
  params = {m: model_files.recorded_hash(workdir / m / 'model')
            for m in ('m0', 'sft', 'm1', 'm2', 'm3')}
  assert params['m0'] == json.loads((sandbox.M0 / 'done.json').read_text())['params']
  # Role -> model, independent of the configs.
  for name, roles in dict(
      sft=dict(init='m0'), m1=dict(init='m0', sampler='sft'),
      m2=dict(init='m1', sampler='m1', author='m0'),
      m3=dict(init='m2', sampler='m2', author='m0')).items():
    config = loop.load_config(name, 'tiny', '', '', list(CHANGES))
    specs = [spec for spec in catalog.STAGES if spec.runs and spec.needed(config)]
    assert {role for spec in specs for role in spec.runs} == {'self', *roles}
    for spec in specs:
      manifest = json.loads((spec.folder(workdir, config) / 'manifest.json').read_text())
      role, = spec.runs
      assert manifest['params'] == params[roles.get(role, name)], f'{name}/{spec.name}'


def test_prompts_do_not_repeat_in_a_later_round(demo, tmp_path):
  workdir, _ = demo
  written = {m: [p.prompt for p in records.read(workdir / m / 'prompts' / 'prompts.jsonl',
                                                schema.Prompt)] for m in ('m2', 'm3')}
  assert not set(written['m2']) & set(written['m3'])
  assert all(len(p) == 48 for p in written.values())
  inputs = json.loads((workdir / 'm3' / 'prompts' / 'manifest.json').read_text())['inputs']
  assert 'm2/prompts/prompts.jsonl' in inputs
  for part in ('data', 'm0', 'm2'):
    shutil.copytree(workdir / part, tmp_path / part)
  for name in ('manifest.json', 'done.json'):  # as if the user had made these files
    (tmp_path / 'm2' / 'prompts' / name).unlink()
  first = next(records.read(workdir / 'm3' / 'prompts' / 'prompts.jsonl', schema.Prompt))
  with (tmp_path / 'm2' / 'prompts' / 'prompts.jsonl').open('a') as f:  # as if M2's round wrote it
    f.write(records.dump(first))
  main('sample.prompts', '--config=configs/iter3.py:tiny', f'--workdir={tmp_path}',
       *config_flags('m3'))
  attempts = records.read(tmp_path / 'm3' / 'prompts' / 'attempts.jsonl', schema.Attempt)
  reasons = {a.text.strip(): a.reason for a in attempts}
  assert reasons[first.prompt] == 'seen before'


def test_dpo_starts_at_ln_2_and_metrics_are_in_jsonl_and_tensorboard(demo):
  for model in ('m2', 'm3'):
    folder = demo[0] / model / 'model'
    first = json.loads((folder / 'metrics.jsonl').read_text().splitlines()[0])
    # Policy and reference are equal, but XLA may sum their log-probs in a different order.
    assert first['step'] == 0 and first['margin'] == pytest.approx(0, abs=1e-6)
    assert first['loss'] == pytest.approx(np.log(2), abs=1e-6)
    found = shown(folder / 'tensorboard')['loss']
    lines = list(records.read_any(folder / 'metrics.jsonl'))
    assert found == pytest.approx({line['step']: line['loss'] for _, line in lines})


def test_every_stage_is_in_tensorboard(demo):
  """The last point of a stage that samples has all records; every model has its agreement."""
  workdir, _ = demo
  for path in workdir.glob('m[123]/*/*-00000-of-00001.jsonl'):
    found = shown(path.parent / 'tensorboard' / path.stem.removesuffix('-00000-of-00001'))
    count = sum(1 for _ in path.open())
    assert max(found['tokens_per_second']) == max(found['slot_utilization']) == count, path
    assert max(found['samples/text_summary']) == count
    generated = json.loads((path.parent / 'done.json').read_text())['generated']
    made = list(records.read(path, catalog.KINDS[path.name.partition('-')[0] + catalog.SHARDS]))
    if isinstance(made[0], schema.Response):
      assert generated == sum(r.n_tokens for r in made)
    assert generated >= count
    if path.parent.name == 'judge':
      scores = [j.score for j in records.read(path, schema.Judgement) if j.score is not None]
      assert found['parse_rate'][count] == pytest.approx(len(scores) / count)
      assert found['score'][count] == pytest.approx(np.mean(scores))
      assert found['score_histogram'][count].num == len(scores)
  attempts = list(records.read(workdir / 'm2' / 'prompts' / 'attempts.jsonl', schema.Attempt))
  found = shown(workdir / 'm2' / 'prompts' / 'tensorboard' / 'attempts')
  accepted = np.mean([not a.reason for a in attempts])
  assert found['accepted'][len(attempts)] == pytest.approx(accepted)
  found = shown(workdir / 'tensorboard' / 'models')
  agreement, oracle = ([json.loads((workdir / model / name / f'{name}.json').read_text())
                        for model in ('sft', 'm1', 'm2', 'm3')] for name in ('agreement', 'oracle'))
  for name, values in (
      ('agreement/pairwise_accuracy_all', [a['pairwise_accuracy_all'] for a in agreement]),
      ('oracle/score', [o['score'] for o in oracle])):
    assert found[name] == pytest.approx(dict(enumerate(values)), abs=1e-3)
  assert set(found['pairs/pairs_per_prompt']) == {2, 3}


def test_records_have_the_counts_and_fields_of_the_paper(demo):
  workdir, _ = demo
  prompts = list(records.read(workdir / 'm2' / 'prompts' / 'prompts.jsonl', schema.Prompt))
  responses = list(records.read_shards(workdir / 'm2' / 'respond', 'responses', schema.Response))
  judgements = list(records.read_shards(workdir / 'm2' / 'judge', 'judgements', schema.Judgement))
  pairs = list(records.read(workdir / 'm2' / 'pairs' / 'pairs.jsonl', schema.Pair))
  assert len(responses) == 4 * len(prompts) and len(judgements) == 3 * len(responses)
  assert len({r.id for r in responses}) == len(responses)
  assert len({j.id for j in judgements}) == len(judgements)
  assert 0 < len(pairs) <= len(prompts)
  assert all(p.chosen_score > p.rejected_score for p in pairs)
  held = {r.prompt for r in records.read(
      workdir / 'data' / 'seeds' / 'heldout.jsonl', schema.HeldOutPrompt)}
  assert not held & {p.prompt for p in prompts}


def test_a_finished_loop_changes_nothing(demo):
  workdir, printed = demo
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*.jsonl')}
  again = main('loop', '--size=tiny', f'--workdir={workdir}', *(f'--set={c}' for c in CHANGES))
  assert 'nothing to do' in again and table(again) == table(printed)
  assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob('*.jsonl')}


def test_a_different_config_in_the_same_workdir_is_an_error(demo):
  changes = (*CHANGES, 'respond.n=5')
  printed = main('loop', '--size=tiny', f'--workdir={demo[0]}', *(f'--set={c}' for c in changes),
                 code=1)
  assert 'respond.n (4, now 5)' in printed


# Sampling stages of M2 -> the file to which they append records: the last one of `writes`.
M2 = configs.get('m2', 'tiny')
APPENDED = {spec.name: spec.writes[-1].replace('*', '00000-of-00001') for spec in catalog.STAGES
            if spec.program == f'sample.{spec.name}' and spec.needed(M2)}


@pytest.mark.parametrize('stage', APPENDED)
def test_a_killed_stage_resumes_and_ends_byte_identical(demo, tmp_path, stage):
  module, name = f'sample.{stage}', APPENDED[stage]
  shutil.copytree(demo[0], tmp_path / 'run')
  folder = tmp_path / 'run' / 'm2' / stage
  whole = {p.name: p.read_bytes() for p in folder.glob('*.jsonl')}
  before = json.loads((folder / 'done.json').read_text())
  (folder / 'done.json').unlink()
  # Ends in the middle of a line and of a batch.
  (folder / name).write_bytes(whole[name][:len(whole[name]) * 2 // 3])
  (folder / 'prompts.jsonl').unlink(missing_ok=True)
  main(module, '--config=configs/iter2.py:tiny', f'--workdir={tmp_path / "run"}',
       *config_flags('m2'))
  assert {p.name: p.read_bytes() for p in folder.glob('*.jsonl')} == whole
  done = json.loads((folder / 'done.json').read_text())
  assert done['seconds'] > 0 and 0 < done['generated'] <= before['generated']  # of the last start
  assert stage == 'prompts' or done['generated'] < before['generated']  # which samples whole rounds


def test_the_older_model_judges_the_same_candidates_and_samples_its_own(others):
  params = {m: json.loads((others / m / 'model' / 'done.json').read_text())['params']
            for m in ('sft', 'm1')}
  for stage, model in (('judge_again', 'sft'), ('respond_older', 'sft'), ('judge_older', 'm1'),
                       ('meta_judge', 'm1')):
    manifest = json.loads((others / 'm2' / stage / 'manifest.json').read_text())
    assert manifest['params'] == params[model]

  def sampled(stage):
    return {r.id for r in records.read_shards(others / 'm2' / stage, 'responses', schema.Response)}

  def judged(stage):
    return {j.response_id for j in records.read_shards(
        others / 'm2' / stage, 'judgements', schema.Judgement)}
  assert judged('judge_again') == sampled('respond')
  assert judged('judge_older') == sampled('respond_older')
  assert not sampled('respond_older') & sampled('respond')


def test_the_implicit_reward_uses_the_log_probs_of_the_sampler(others):
  sampled = {r.id: r for r in records.read_shards(
      others / 'm2' / 'respond', 'responses', schema.Response)}
  rewards = list(records.read_shards(others / 'm2' / 'implicit', 'rewards', schema.ImplicitReward))
  assert [r.id for r in rewards] == list(sampled)
  same = [abs(r.logp - sampled[r.id].logp) < 0.01 for r in rewards if r.logp is not None]
  # They may differ where the tokenizer encodes the text as other tokens than were sampled.
  assert len(same) > 0.9 * len(rewards) and sum(same) > 0.9 * len(same)
  found = [r for r in rewards if r.reward is not None]
  assert all(r.reward == round(r.logp - r.older_logp, 4) for r in found)
  assert np.std([r.reward for r in found]) > 0.1


def test_the_meta_judge_compares_in_both_orders_and_keeps_every_text(others):
  compared = list(records.read_shards(
      others / 'm2' / 'meta_judge', 'comparisons', schema.Comparison))
  pairs = {(c.first, c.second) for c in compared}
  assert pairs and pairs == {(b, a) for a, b in pairs} and all(a != b for a, b in pairs)
  assert all((c.winner is None) == bool(c.reason) for c in compared)
  done = json.loads((others / 'm2' / 'meta_judge' / 'done.json').read_text())
  assert done['comparisons'] == len(compared) and done['judge_pairs'] == sum(
      1 for _ in records.read(others / 'm2' / 'meta_judge' / 'judge_pairs.jsonl',
                              schema.JudgePair))


@pytest.mark.parametrize('strategy', [*strategies.PAIRS, strategies.POSITIVES])
def test_every_strategy_makes_pairs_or_positives(others, tmp_path, strategy):
  shutil.copytree(others / 'm2', tmp_path / 'm2',
                  ignore=shutil.ignore_patterns('pairs', 'model', 'health'))
  config = loop.load_config('m2', 'tiny', '', '', [
      *CHANGES, f'pairs.strategy={strategy}', 'pairs.positive=4'])
  pairs.run(config, tmp_path)
  done = stages.summary(tmp_path / 'm2' / 'pairs')
  made = done.positives if strategy == strategies.POSITIVES else done.pairs
  assert 0 < made and done.strategy == strategy
  assert made + sum(done.dropped.values()) >= done.prompts


SAMPLED = [name for name, spec in OTHERS.items() if spec.program.startswith('sample.')]


@pytest.mark.slow
@pytest.mark.parametrize('stage', SAMPLED)
def test_the_other_killed_stages_end_byte_identical(others, tmp_path, stage):
  spec = OTHERS[stage]
  stems = [w.removesuffix(catalog.SHARDS) for w in spec.writes if w.endswith(catalog.SHARDS)]
  stems = [stem for stem in stems if stem != 'rewards']  # written once, not appended
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


SHARDED = [*(name for name in APPENDED if name != 'prompts'), *SAMPLED]


@pytest.mark.slow
@pytest.mark.parametrize('stage', SHARDED)
def test_a_stage_continues_on_one_host_from_the_shards_of_two(others, tmp_path, stage):
  """Of which one did more than the other."""
  spec = OTHERS.get(stage) or next(
      spec for spec in catalog.STAGES if spec.name == stage and spec.needed(M2))
  shutil.copytree(others, tmp_path / 'run')
  folder = tmp_path / 'run' / 'm2' / stage
  whole = {p.name: p.read_bytes() for p in folder.glob('*.jsonl')}
  for path in folder.glob('*.jsonl'):
    path.unlink()
  (folder / 'done.json').unlink()
  key = dict(respond='prompt_id', respond_older='prompt_id', judge='response_id',
             judge_again='response_id', judge_older='response_id', implicit='id',
             judge_swapped='response_id', meta_judge='response_id')[stage]
  for name in whole:
    if '-of-' in name:
      lines = whole[name].splitlines(keepends=True)
      requests = [b''.join(group) for _, group in itertools.groupby(
          lines, key=lambda line: json.loads(line)[key])]
      for host, share in enumerate((0.7, 0.3)):
        mine = b''.join(requests[host::2])
        (folder / name.replace('00000-of-00001', f'0000{host}-of-00002')).write_bytes(
            mine[:int(len(mine) * share)])
  main(spec.program, '--config=iter2:tiny', f'--workdir={tmp_path / "run"}', *on(spec),
       *config_flags('m2'))
  assert {p.name: p.read_bytes() for p in folder.glob('*.jsonl')} == whole
  assert not list(folder.glob('*.kept'))


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    *([f'--ablation={name}'] for name in ablations.ABLATIONS),
    ['--set=m2,m3:train.data=pairs,judge_pairs'],
    ['--set=m2,m3:pairs.strategy=consistency']], ids=' '.join)
def test_the_loop_runs_every_ablation_and_the_meta_judge(demo, tmp_path, flags):
  # The ablation multiple_choice has another rubric, so its SFT model is judged anew.
  for part in ('data', 'm0') if 'multiple' in flags[0] else ('data', 'm0', 'sft'):
    shutil.copytree(demo[0] / part, tmp_path / part)
  printed = main('loop', '--size=tiny', f'--workdir={tmp_path}', *(f'--set={c}' for c in CHANGES),
                 *flags)
  rows = table(printed)
  assert 'm1' in rows and ('m3' in rows or 'was not trained' in printed), printed
  for model in ('m2', 'm3'):
    if model in rows:
      assert (tmp_path / model / 'health' / 'health.json').exists()


@pytest.mark.slow
def test_eft_examples_are_trained_on_beside_pairs(demo, tmp_path):
  for part in ('data', 'm0', 'sft', 'm1'):
    shutil.copytree(demo[0] / part, tmp_path / part)
  main('loop', '--size=tiny', f'--workdir={tmp_path}', *(f'--set={c}' for c in CHANGES),
       '--ablation=judge_eft', '--last=m2')
  count = [sum(1 for _ in (tmp_path / path).open())
           for path in ('m1/eft/eft.jsonl', 'm2/pairs/pairs.jsonl')]
  done = json.loads((tmp_path / 'm2' / 'model' / 'done.json').read_text())
  assert all(count) and done['examples'] == sum(count)


@pytest.mark.slow
@pytest.mark.parametrize('name, made', [
    ('judge_meta', 'meta_judge/judge_pairs.jsonl'),
    ('judge_majority', 'majority/majority_pairs.jsonl'),
    ('judge_swapped', 'swapped/swapped_pairs.jsonl')])
def test_a_judge_that_learns_from_itself_trains_on_pairs_of_judgements(tmp_path, name, made):
  main('loop', '--size=hard', f'--workdir={tmp_path}', *(f'--set={c}' for c in CHANGES),
       f'--ablation={name}', '--last=m2', '--set=judge_pairs.share=0.5')
  pairs, found = (list(records.read(tmp_path / 'm2' / path, kind)) for path, kind in (
      ('pairs/pairs.jsonl', schema.Pair), (made, schema.JudgePair)))
  done = json.loads((tmp_path / 'm2' / 'model' / 'done.json').read_text())
  assert found and all(pair.chosen != pair.rejected for pair in found)
  assert done['examples'] == len(pairs) + len(found)


def run_on_hosts(hosts, stage, workdir, *flags, start=subprocess.check_output):
  """Runs a sampling stage of m2 in several processes, each with one device."""
  return start(
      [ROOT / 'launch' / 'local.sh', str(hosts), sys.executable, '-m', f'srlm_jax.sample.{stage}',
       '--config=configs/iter2.py:tiny', f'--workdir={workdir}', *config_flags('m2'), *flags],
      cwd=ROOT, env=dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS='', SRLM_RESTARTS='0'))


def in_order(folder, stem):
  """The records of a stage in the order of its requests, as JSON objects."""
  if stem == 'prompts':
    found = records.read(folder / 'prompts.jsonl', schema.Prompt)
  else:
    found = records.read_shards(folder, stem, catalog.KINDS[stem + catalog.SHARDS])
  return [json.loads(records.dump(record)) for record in found]


SAMPLED = dict(prompts='prompts', respond='responses', judge='judgements', implicit='rewards',
               meta_judge='comparisons')


@pytest.mark.slow
@pytest.mark.parametrize('hosts', [2, 4])
def test_several_hosts_write_the_same_records_as_one(others, tmp_path, hosts):
  shutil.copytree(others, tmp_path / 'run')
  for stage, stem in SAMPLED.items():
    folder = tmp_path / 'run' / 'm2' / stage
    expected = in_order(folder, stem)
    shutil.rmtree(folder)
    run_on_hosts(hosts, stage, tmp_path / 'run')
    assert in_order(folder, stem) == expected
    assert stage == 'prompts' or len(list(folder.glob(f'{stem}-*-of-0000{hosts}.jsonl'))) == hosts


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(1, 1, 2), (1, 2, 2)], ids=['groups of 2', 'groups of 4'])
def test_groups_of_hosts_write_the_records_of_one_host(others, tmp_path, mesh):
  """Another mesh rounds differently: a sampled text may change, which is counted."""
  workdir, size = shutil.copytree(others, tmp_path / 'run'), math.prod(mesh)
  flags = [f'--config.sample_mesh.{axis}={n}'
           for axis, n in zip(sharding.NAMES, mesh, strict=True)]
  for stage in ('respond', 'judge', 'implicit'):
    folder, stem = workdir / 'm2' / stage, SAMPLED[stage]
    expected = in_order(folder, stem)
    shutil.rmtree(folder)
    run_on_hosts(4, stage, workdir, *flags)
    shards = {p.name: p.read_bytes() for p in sorted(folder.glob(f'{stem}-*.jsonl'))}
    assert len(shards) == 4 // size
    found = in_order(folder, stem)
    assert [r['id'] for r in found] == [r['id'] for r in expected]
    text = dict(respond='response', judge='text', implicit='id')[stage]
    same = [(a, b) for a, b in zip(found, expected, strict=True) if a[text] == b[text]]
    print(f'{stage}, {mesh}: {len(found) - len(same)} of {len(found)} texts differ')
    assert len(same) >= 0.98 * len(found)
    for a, b in same:
      for key in {'logp', 'older_logp'} & a.keys():
        assert a[key] == pytest.approx(b[key], abs=2e-4), a  # rounded to 1e-4
    # The same mesh, on another number of hosts and after a kill: the same bytes.
    if size == 2:
      shutil.rmtree(folder)
      run_on_hosts(2, stage, workdir, *flags)
      assert in_order(folder, stem) == found
    else:
      for name, data in shards.items():
        (folder / name).write_bytes(data[:len(data) * 2 // 3])
      (folder / 'done.json').unlink()
      run_on_hosts(4, stage, workdir, *flags)
      assert {p.name: p.read_bytes() for p in sorted(folder.glob(f'{stem}-*.jsonl'))} == shards


@pytest.mark.slow
def test_hosts_divide_the_prompts_of_a_file_and_write_the_answers_of_one(demo, tmp_path):
  """Also if one host goes on from what two hosts, and two groups of hosts, left when killed."""
  workdir = shutil.copytree(demo[0], tmp_path / 'run')
  questions = [dict(question_id=i, category='writing' if i % 2 else 'math',
                    turns=[f'Name {i + 2} nice fruits.', 'Name two tools.'][:1 + (i % 3 > 0)])
               for i in range(15)]
  records.write(tmp_path / 'question.jsonl', questions)
  flag, folder = f'--prompts={tmp_path / "question.jsonl"}', workdir / 'm2' / 'answers_to_question'
  stems = 'responses', 'responses_2'

  def found():
    return {stem: in_order(folder, stem) for stem in stems}, (
        folder / 'model_answer' / 'm2.jsonl').read_bytes()
  main('sample.respond', '--config=iter2:tiny', f'--workdir={workdir}', *config_flags('m2'), flag)
  one = found()
  assert [len(rows) for rows in one[0].values()] == [15, 10]
  shutil.rmtree(folder)
  run_on_hosts(2, 'respond', workdir, flag)
  assert found() == one and len(list(folder.glob('*-of-00002.jsonl'))) == 4

  def cut(shares):
    """As if the processes were killed: of every shard a share of its bytes is left."""
    (folder / 'done.json').unlink()
    shutil.rmtree(folder / 'model_answer')
    for path in folder.glob('*-of-*.jsonl'):
      data = path.read_bytes()
      path.write_bytes(data[:int(len(data) * shares[path.name[:-len('-00000-of-00002.jsonl')]])])
  cut(dict(responses=0.9, responses_2=0.0))
  run_on_hosts(1, 'respond', workdir, flag)
  assert found() == one and not list(folder.glob('*.kept'))
  assert sorted(p.name for p in folder.glob('*.jsonl')) == [
      records.shard_name(stem, 0, 1) for stem in stems]
  shutil.rmtree(folder)
  mesh = '--config.sample_mesh.data=1', '--config.sample_mesh.tensor=2'
  run_on_hosts(4, 'respond', workdir, flag, *mesh)
  groups = found()
  assert len(list(folder.glob('*-of-00002.jsonl'))) == 4
  for stem in stems:
    assert [r['id'] for r in groups[0][stem]] == [r['id'] for r in one[0][stem]]
    differ = sum(a != b for a, b in zip(groups[0][stem], one[0][stem], strict=True))
    print(f'{stem}, groups of 2: {differ} of {len(one[0][stem])} answers differ')
    assert differ <= 1  # rounding may move a draw
  cut(dict(responses=1.0, responses_2=0.5))
  run_on_hosts(4, 'respond', workdir, flag, *mesh)
  assert found() == groups


@pytest.mark.slow
def test_sigterm_to_one_host_stops_its_group_at_the_same_call(others, tmp_path):
  folder = shutil.copytree(others, tmp_path / 'run') / 'm2' / 'judge'
  flags = '--config.sample_mesh.data=1', '--config.sample_mesh.tensor=2'
  shutil.rmtree(folder)
  run_on_hosts(2, 'judge', tmp_path / 'run', *flags)
  whole, = (p.read_bytes() for p in folder.glob('judgements-*.jsonl'))
  shutil.rmtree(folder)
  process = run_on_hosts(2, 'judge', tmp_path / 'run', *flags, start=subprocess.Popen)
  path = folder / records.shard_name('judgements', 0, 1)
  while not path.exists() or not path.read_bytes():
    time.sleep(0.05)
    assert process.poll() is None
  found = subprocess.run(['pgrep', '-P', str(process.pid), '-f', 'srlm_jax'], check=True,
                         capture_output=True, text=True)
  os.kill(int(found.stdout.split()[-1]), signal.SIGTERM)
  assert process.wait(timeout=120) == preemption.EXIT_CODE
  assert 0 < len(path.read_bytes()) < len(whole)
  run_on_hosts(2, 'judge', tmp_path / 'run', *flags)
  assert path.read_bytes() == whole


def test_a_killed_training_resumes_and_ends_with_the_same_parameters(demo, tmp_path):
  shutil.copytree(demo[0], tmp_path / 'run')
  folder = tmp_path / 'run' / 'm2' / 'model'
  done = json.loads((folder / 'done.json').read_text())
  lines = (folder / 'metrics.jsonl').read_text()
  (folder / 'done.json').unlink()
  # As if killed between the last two checkpoints.
  shutil.rmtree(folder / 'steps' / str(done['steps']))
  flags = ('--config=configs/iter2.py:tiny', f'--workdir={tmp_path / "run"}', *config_flags('m2'))
  printed = main('train', *flags)
  assert 'continues after step' in printed
  again = json.loads((folder / 'done.json').read_text())
  assert again['params'] == done['params'] and again['loss'] == done['loss']
  (folder / 'done.json').unlink()  # as if killed after the last checkpoint, with no step left
  main('train', *flags)
  assert json.loads((folder / 'done.json').read_text())['params'] == done['params']
  steps = [json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  assert steps == [json.loads(line)['step'] for line in lines.splitlines()]


@pytest.mark.slow
def test_the_loop_stops_with_a_message_if_a_real_model_cannot_judge(stories, tmp_path):
  printed = main('loop', '--size=stories', f'--workdir={tmp_path}', f'--m0={stories}',
              f'--data={DATA / "oasst1" / "validation.en.messages.jsonl.gz"}',
              '--set=prompts.count=8',
              '--set=data.ranked_eval=4', '--set=data.test_prompts=4', '--set=data.ift=24',
              '--set=respond.max_tokens=32', '--set=judge.max_tokens=32', '--set=sample.slots=32')
  stopped = r'm2 was not trained: \d+ of 96 judgements parsed and \d+ pairs are left'
  assert re.search(stopped, printed), printed
  assert '--set=judge.template' in printed
  assert list(table(printed)) == ['sft', 'm1']  # M0 is not evaluated
  assert json.loads((tmp_path / 'results.json').read_text())['stopped']


def test_missing_flags_and_missing_memory_are_reported(tmp_path):
  assert '--data is missing' in main('loop', '--size=stories', f'--workdir={tmp_path}', code=1)
  assert 'needs 1,241,579,667,456 bytes' in main(
      'loop', '--size=70b', f'--workdir={tmp_path}', code=1)
  assert not any(tmp_path.iterdir())


def test_metrics_after_the_checkpoint_are_dropped_and_nan_aborts(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 0, "loss": 2.0}\n{"step": 5, "loss": 1.0}\n{"step": 9, "lo')
  writer = metrics.Writer(tmp_path, 4)
  with pytest.raises(InputError, match='step 6, of a: loss is nan'):
    metrics.finite('step 6, of a', dict(grad_norm=1.0, loss=float('nan')))
  writer.write(5, dict(loss=0.5))
  writer.close()
  assert path.read_text() == '{"step": 0, "loss": 2.0}\n{"step": 5, "loss": 0.5}\n'


def test_a_malformed_line_stops_training_before_anything_is_written(demo, tmp_path):
  shutil.copytree(demo[0] / 'data', tmp_path / 'data')
  shutil.copytree(demo[0] / 'm0', tmp_path / 'm0')
  path = tmp_path / 'data' / 'seeds' / 'ift.jsonl'
  for name in ('manifest.json', 'done.json'):  # as if the user had made these files
    (path.parent / name).unlink()
  lines = path.read_text().splitlines()
  path.write_text('\n'.join([*lines[:6], lines[6][:-9], *lines[7:]]) + '\n')
  flags = ('--config=configs/sft.py:tiny', f'--workdir={tmp_path}', *config_flags('sft'))
  printed = main('train', *flags, code=1)
  assert f'{path}:7: not a JSON object' in printed and not (tmp_path / 'sft').exists()
  path.write_text('')
  printed = main('train', *flags, code=1)
  assert 'no example is left to train on: the files are empty' in printed
  assert not (tmp_path / 'sft').exists()


DOCUMENTS = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
BLOCKS = [block for path in DOCUMENTS
          for block in re.findall(r'```sh\n(.*?)```', path.read_text(), re.DOTALL)]
COMMANDS = [line.split('#')[0].strip() for block in BLOCKS for line in block.splitlines()]


def test_every_make_target_in_the_docs_exists():
  targets = set(re.findall(r'make ([a-z][a-z-]*)`', (ROOT / 'CONTRIBUTING.md').read_text()))
  targets |= {c.split()[1] for c in COMMANDS if c.startswith('make ')}
  assert targets >= {'demo', 'test', 'lint', 'setup', 'test-slow'}
  for target in targets:
    ended = subprocess.run(['make', '-n', target], cwd=ROOT, capture_output=True)
    assert ended.returncode == 0, target


@pytest.mark.parametrize('module, flag, message', [
    ('sample.prompts', '--config.sample.slots=1000000000', 'lower config.sample.slots'),
    ('sample.prompts', '--config.prompts.max_tokens=1000000', 'max_tokens is 1000000'),
    ('sample.prompts', '--config.prompts.chat=tokenizer', 'no chat template'),
    ('sample.implicit', '--config.sample.slots=1000000000', 'lower config.sample.slots'),
    ('sample.implicit', '--config.chat=tokenizer', 'no chat template'),
    ('sample.respond', '--config.chat=tokenizer', 'no chat template'),
    ('sample.judge', '--config.chat=tokenizer', 'no chat template')])
def test_a_refused_sampling_stage_writes_nothing(others, tmp_path, module, flag, message):
  """Else its manifest would refuse the corrected config."""
  for part in ('data', 'm0', 'sft', 'm1'):
    (tmp_path / part).symlink_to(others / part)
  stage = module.removeprefix('sample.')
  shutil.copytree(others / 'm2', tmp_path / 'm2', ignore=shutil.ignore_patterns(stage, 'model'))
  printed = main(module, '--config=iter2:tiny', f'--workdir={tmp_path}', *config_flags('m2'), flag,
                 code=1)
  assert message in printed
  assert not (tmp_path / 'm2' / stage).exists()


def test_every_file_of_a_stage_is_declared(others):
  """In the catalog, from which inputs and training files are found."""
  checked = 0
  for path in others.glob('*/*/done.json'):
    specs = [spec for spec in catalog.STAGES if spec.name == path.parent.name]
    declared = {name for spec in specs for name in spec.writes}
    files = stages.finished(path.parent)['files']
    names = {re.sub(r'-\d{5}-of-\d{5}', '-*', name) for name in files}
    names -= {'config.json', 'tokenizer.model', model_files.SELECTED}
    if 'corpus' not in str(path.parent):
      assert names <= declared, path
    checked += 1
  assert checked > 40


def test_every_command_in_the_docs_runs(others, tmp_path):
  """In a copy of the finished demo. The loop's stages must be done already, with the same flags."""
  shutil.copytree(others, tmp_path / 'runs' / 'demo')
  ran, skipped = [], []
  for command in COMMANDS:
    if (not command.startswith('python ') or 'srlm_jax.loop' in command
        or 'srlm_jax.study' in command):
      continue  # tested above
    if '$DATA' in command and not DATA.exists():
      skipped.append(command)
      continue
    command = command.replace('runs/', f'{tmp_path}/runs/').replace('$DATA', str(DATA))
    if command.startswith('python bench/'):
      ended = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT)
      assert ended.returncode == 0, command
      continue
    words = shlex.split(command)[2:]
    name = re.search(r'--config=(\w+):', command)
    model = dict(sft='sft', iter1='m1', iter2='m2', iter3='m3')[name[1]] if name else ''
    flags = [] if 'srlm_jax.data.seeds' in command or not name else list(config_flags(model))
    printed = main(words[0].removeprefix('srlm_jax.'), *words[1:], *flags)
    assert not flags or '--prompts' in command or 'already done' in printed, command
    ran.append(words[0])
  assert len(ran) + len(skipped) >= 26 and len(skipped) <= 3
  assert (tmp_path / 'runs' / 'm2_back' / 'steps' / '0').exists()
  assert (tmp_path / 'runs' / 'seeds' / 'data').exists() == DATA.exists()
