import importlib.util
import json

from conftest import init, ROOT, run_main, tokenizer_bytes
import pytest

from srlm_jax import (
  catalog,
  cli,
  config as configs,
  InputError,
  loop,
  model_files,
  records,
  stage,
)
from srlm_jax.checkpoint import store
from srlm_jax.models.config import PRESETS


def make(workdir, name='pairs', inputs=(), keys=(), runs=(), template='', **changes):
  """A stage of m2 that declares these config keys; `changes` apply to the judge section."""
  c = configs.get('m2', 'tiny')
  c.judge.update(changes)
  return stage.Stage(catalog.Spec(name, 'program', (), keys=keys, runs=runs), c, workdir, template,
                     inputs)


@pytest.fixture
def m1(tmp_path, tokenizer_folder, mesh):
  """A checkpoint folder."""
  folder = tmp_path / 'm1' / 'model'
  store.write_model_files(PRESETS['tiny-test'], tokenizer_folder, folder)
  saver = store.manager(folder, None)
  store.save(saver, 1, init(PRESETS['tiny-test']))
  saver.close()
  return folder


def test_begin_writes_the_manifest_and_finish_writes_done_json(tmp_path, m1):
  (tmp_path / 'in.jsonl').write_text('{}\n')
  def made():
    return make(tmp_path, 'pairs', [tmp_path / 'in.jsonl'], ('judge.n', 'judge.template'),
                ('sampler',))
  s = made()
  assert not s.done and not s.folder.exists()
  s.begin()
  manifest = json.loads((s.folder / 'manifest.json').read_text())
  assert manifest['params'] == model_files.recorded_hash(m1) and manifest['format'] == stage.FORMAT
  assert manifest['config'] == {'judge.n': 3, 'judge.template': 'sandbox'}
  assert list(manifest['inputs']) == ['in.jsonl'] and manifest['environments'][0]['versions']['jax']
  assert set(manifest['model_files']) == {'sampler/config.json', 'sampler/tokenizer.model'}
  assert not (s.folder / 'done.json').exists()
  s.finish(pairs=3)
  again = made()
  assert again.done and stage.finished(s.folder)['pairs'] == 3


def test_the_error_names_what_changed_since_the_stage_began(tmp_path, m1):
  source = tmp_path / 'in.jsonl'
  source.write_text('{}\n')
  def made(n=3, source=source, runs=('sampler',)):
    return make(tmp_path, 'pairs', [source], ('judge.n',), runs, n=n)
  made().begin()
  made()
  with pytest.raises(InputError, match=r'config.judge.n \(3, now 2\)'):
    made(2)
  with pytest.raises(InputError, match=r'sampler/config.json \(\w+, now None\)'):
    made(runs=())
  hf = json.loads((m1 / 'config.json').read_text())
  (m1 / 'config.json').write_text(json.dumps(hf | dict(rope_theta=7.0)))
  with pytest.raises(InputError, match='config.json changed after the model was made'):
    made()
  (m1 / 'config.json').write_text(json.dumps(hf, indent=1) + '\n')
  made()
  with (m1 / 'tokenizer.model').open('ab') as f:
    f.write(b'x')
  with pytest.raises(InputError, match='tokenizer.model changed after the model was made'):
    made()
  (m1 / 'tokenizer.model').write_bytes(tokenizer_bytes())
  source.write_text('{"id": 1}\n')
  with pytest.raises(InputError, match='inputs.in.jsonl'):
    made()
  with pytest.raises(InputError, match='does not exist'):
    made(source=tmp_path / 'nothing')


def test_a_stage_compares_and_reads_only_its_declared_keys(tmp_path):
  make(tmp_path, keys=('judge.n',)).begin()
  make(tmp_path, keys=('judge.n',), quorum=1)  # this stage does not read judge.quorum
  view = catalog.Spec('pairs', 'program', (), keys=('judge.n',)).view(configs.get('m2', 'tiny'))
  assert view.judge.n == 3 and view.name == 'm2'
  with pytest.raises(catalog.Undeclared, match='config.judge.quorum is read and not declared'):
    view.judge.quorum  # noqa: B018


def test_a_key_missing_from_an_older_manifest_counts_as_its_default(tmp_path):
  """A key added later does not invalidate older stages, unless it is set."""
  make(tmp_path, keys=('judge.n',)).begin()
  make(tmp_path, keys=('judge.n', 'judge.template'))
  with pytest.raises(InputError, match=r'config.judge.template \(sandbox, now additive\)'):
    c = configs.get('m2', 'tiny')
    c.judge.template = 'additive'
    stage.Stage(catalog.Spec('pairs', 'program', (), keys=('judge.n', 'judge.template')), c,
                tmp_path)
  make(tmp_path, 'pairs')  # keys that the stage no longer reads are ignored


@pytest.mark.parametrize('text', [
    '{}', '', '[]', '{"stage": "m2/pairs", "config": {"seed": 0}, "versions": {}}'])
def test_an_invalid_or_older_manifest_is_refused(tmp_path, text):
  (tmp_path / 'm2' / 'pairs').mkdir(parents=True)
  (tmp_path / 'm2' / 'pairs' / 'manifest.json').write_text(text)
  advice = 'delete that folder or use another --workdir'
  with pytest.raises(InputError, match=f'manifest.json.*{advice}'):
    make(tmp_path, 'pairs')


@pytest.mark.parametrize('flags, message', [
    (['--config=configs/iter2.py:tiny', '--config.train.lerning_rate=1'],
     'no key "lerning_rate" (did you mean "learning_rate"?)'),
    (['--config=configs/iter2.py:tiny', '--config.zzz=1'], 'no key "zzz"'),
    (['--config=configs/iter2.py:tiny', '--config.train.batch=many'], 'invalid literal'),
    (['--config=configs/iter2.py:huge'], "size 'huge' is unknown"),
    (['--config=configs/none.py'], 'configs/none.py cannot be read'),
    (['--config=iter9:tiny'], 'it is the path of a file, or one of sandbox_m0, sft, iter1'),
    (['--config=iter2:huge'], "size 'huge' is unknown"),
    (['--config=iter2:tiny', '--config.train.lerning_rate=1'], 'no key "lerning_rate"'),
    ([], '--config'), (['--config=configs/iter2.py:tiny', 'train'], "'train' is not a flag"),
    (['--config=configs/iter2.py', '--wrkdir=x'], 'wrkdir'),
    (['--config=configs/iter2.py'], 'm2 starts from m1, which has no checkpoint in'),
    (['--config=configs/iter2.py:tiny', '--workdir=/tmp/srlm-nothing-here'],
     'm2 starts from m1, which has no checkpoint')])
def test_bad_flags_give_a_one_sentence_error_and_exit_code_1(flags, message):
  code, _, printed = run_main('train', *flags)
  lines = [line for line in printed.splitlines() if line.startswith('error: ')]
  assert code == 1 and len(lines) == 1 and message in lines[0], printed
  assert 'Traceback' not in printed and not (ROOT / 'runs' / 'iter2-70b').exists()


def test_every_file_is_hashed_once(tmp_path, judged, monkeypatch):
  """Hashing shards of gigabytes twice would double the start of a stage."""
  path, read = judged / records.shard_name('judgements', 1, 2), []
  real = records.describe
  monkeypatch.setattr(records, 'describe', lambda path: read.append(path.name) or real(path))
  make(tmp_path, 'pairs', [path])
  assert read == [path.name]
  read.clear()
  assert make(tmp_path, 'judge').done
  assert sorted(read) == [records.shard_name('judgements', i, 2) for i in range(2)]


def test_inputs_outside_of_the_workdir_may_be_moved(tmp_path):
  (tmp_path / 'here').mkdir()
  (tmp_path / 'there').mkdir()
  for folder, text in (('here', 'a'), ('there', 'b')):
    (tmp_path / folder / 'data.jsonl').write_text(text)
  both = [tmp_path / folder / 'data.jsonl' for folder in ('here', 'there')]
  make(tmp_path / 'run', 'pairs', both).begin()
  (tmp_path / 'here').rename(tmp_path / 'new')
  moved = [tmp_path / folder / 'data.jsonl' for folder in ('new', 'there')]
  make(tmp_path / 'run', 'pairs', moved)
  moved[0].write_text('c')
  with pytest.raises(InputError, match='inputs.data.jsonl'):
    make(tmp_path / 'run', 'pairs', moved)


def test_a_resumed_stage_keeps_the_environments_of_both_runs(tmp_path, monkeypatch):
  def begin(host):
    monkeypatch.setattr(stage.environment, 'devices', lambda: dict(host=host))
    monkeypatch.setattr(stage.environment, 'record', lambda: dict(host=host))
    make(tmp_path, 'pairs').begin()
    return stage.read_manifest(tmp_path / 'm2' / 'pairs' / 'manifest.json')['environments']
  assert begin('a') == [dict(host='a')]
  assert begin('b') == [dict(host='a'), dict(host='b')]
  assert len(begin('a')) == 2


def test_a_resumed_stage_keeps_the_values_that_were_chosen(tmp_path, monkeypatch):
  spec = catalog.Spec('respond', 'program', (), keys=('sample.slots',),
                      unrecorded=('sample_mesh.data', 'sample_mesh.tensor'))
  config = configs.get('m2', 'tiny')

  def start(**given):
    return stage.Stage(spec, catalog.replace(spec.view(config), given), tmp_path)

  def values(s):
    return s.config.sample.slots, s.config.sample_mesh.data, s.config.sample_mesh.tensor
  first = start()
  assert values(first) == (-1, -1, -1)
  first.begin(catalog.replace(first.config, {
      'sample.slots': 64, 'sample_mesh.data': 2, 'sample_mesh.tensor': 4}))
  assert stage.read_manifest(first.folder / 'manifest.json')['config'] == {'sample.slots': 64}
  assert values(start()) == (64, 2, 4)
  assert values(start(**{'sample.slots': 64, 'sample_mesh.tensor': 4})) == (64, 2, 4)
  assert values(start(**{'sample_mesh.tensor': 1})) == (64, -1, 1)  # the old data would not fit
  with pytest.raises(InputError, match=r'another config.sample.slots \(64, now 32\)'):
    start(**{'sample.slots': 32})
  monkeypatch.setattr(stage.environment, 'devices', lambda: dict(devices=3))
  assert values(start()) == (64, -1, -1)  # the mesh must suit the devices; slots change rounding
  start().begin(catalog.replace(start().config, {'sample_mesh.data': 1, 'sample_mesh.tensor': 3}))
  assert values(start()) == (64, 1, 3)
  monkeypatch.undo()
  assert values(start()) == (64, 2, 4)  # of the last start on the same devices


def test_a_file_in_place_of_the_workdir_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  for workdir in ('file', 'file/run'):
    with pytest.raises(InputError, match='file is a file, not a folder; give another path'):
      cli.cache_compilations(tmp_path / workdir)
  with pytest.raises(InputError, match='is a folder; give a file'):
    records.hash_file(tmp_path)


def test_inputs_from_an_unfinished_stage_are_refused(tmp_path):
  before = make(tmp_path, 'judge')
  before.begin()
  (before.folder / 'judgements.jsonl').write_text('{}\n')
  with pytest.raises(InputError, match='m2/judge is not finished; run that stage again'):
    make(tmp_path, 'pairs', [before.folder / 'judgements.jsonl'])
  (tmp_path / 'm1' / 'model').mkdir(parents=True)
  (tmp_path / 'm1' / 'model' / 'manifest.json').write_text('{}')
  with pytest.raises(InputError, match='m1/model is not finished'):
    stage.finished_model(tmp_path, 'm1')


@pytest.fixture
def judged(tmp_path):
  """A finished stage with two shards."""
  s = make(tmp_path, 'judge')
  s.begin()
  for i in range(2):
    records.write(s.folder / records.shard_name('judgements', i, 2),
                  [dict(id=f'{i}{j}') for j in range(3)])
  s.finish()
  return s.folder


@pytest.mark.parametrize('change', [lambda lines: lines[1:], lambda lines: [*lines, lines[0]],
                                    lambda lines: [],
                                    lambda lines: [lines[1], *lines[1:]],
                                    lambda lines: [*lines[:2], '{"id": "x"}\n']])
def test_a_shard_changed_after_its_stage_finished_is_refused(judged, tmp_path, change):
  path = judged / records.shard_name('judgements', 1, 2)
  make(tmp_path, 'pairs', [path])
  path.write_text(''.join(change(path.read_text().splitlines(keepends=True))))
  for run in (lambda: make(tmp_path, 'pairs', [path]),  # reads the shard
              lambda: make(tmp_path, 'judge')):  # wrote the shard
    with pytest.raises(InputError, match=r'-00001-of-00002.jsonl has changed since its stage '
                                         r'finished \(3 records then\)'):
      run()


def test_files_added_to_or_removed_from_a_finished_stage_are_refused(judged, tmp_path):
  path = judged / records.shard_name('judgements', 1, 2)
  records.write(judged / 'more.jsonl', [dict(id='a')])
  with pytest.raises(InputError, match='more.jsonl was added after its stage finished'):
    make(tmp_path, 'pairs', [judged / 'more.jsonl'])
  with pytest.raises(InputError, match='more.jsonl was added after its stage finished'):
    make(tmp_path, 'judge')
  (judged / 'more.jsonl').unlink()
  (judged / 'manifest.json').rename(judged / 'elsewhere')
  for name, inputs in (('judge', []), ('pairs', [path])):
    with pytest.raises(InputError, match='has a done.json and no manifest.json'):
      make(tmp_path, name, inputs)
  (judged / 'elsewhere').rename(judged / 'manifest.json')
  path.unlink()
  with pytest.raises(InputError, match='has changed since its stage finished'):
    make(tmp_path, 'judge')


def test_duplicate_ids_across_shards_are_refused(tmp_path):
  s = make(tmp_path, 'judge')
  s.begin()
  for i in range(2):
    records.write(s.folder / records.shard_name('judgements', i, 2), [dict(id='a')])
  with pytest.raises(InputError, match="a second record with the id 'a'"):
    s.finish()
  assert not (s.folder / 'done.json').exists()


@pytest.mark.parametrize('text', ['{}', '', '[]', '{"files": {}}', '{"files": 3, "seconds": 1}'])
def test_a_damaged_done_file_is_refused(judged, tmp_path, text):
  (judged / 'done.json').write_text(text)
  for name, inputs in (('judge', []), ('pairs', [judged / records.shard_name('judgements', 0, 2)])):
    with pytest.raises(InputError, match='done.json.*delete it, and run that stage again'):
      make(tmp_path, name, inputs)


def test_the_catalog_names_only_existing_keys_files_roles_and_programs():
  written = {f'{spec.name}/{file}' for spec in catalog.STAGES for file in spec.writes}
  for spec in catalog.STAGES:
    assert {*spec.keys, *spec.unrecorded} <= {*configs.SETTINGS}, spec
    assert {*spec.reads, *spec.reads_if, *spec.reads_if_there} <= written, spec
    assert {*spec.runs} <= {*catalog.ROLES}, spec
    assert importlib.util.find_spec(f'srlm_jax.{spec.program}'), spec
    assert spec is catalog.find(spec.program, spec.on)
  assert {*catalog.READ_IF} <= {key for spec in catalog.STAGES for key in spec.keys}


@pytest.mark.parametrize('name', configs.TRAINING_DATA)
def test_every_training_set_is_written_by_a_stage(name):
  config = configs.get('m2', 'tiny')
  config.train.data = (name,)
  path, = catalog.training_files('run', config)
  assert path.name == f'{name}.jsonl' and len(path.parts) == 4


def test_needs_returns_the_stages_that_each_config_needs():
  def needed(name, **changes):
    c = configs.get(name, 'tiny').unlock()
    c.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return [stage for stage in catalog.NAMES if catalog.needs(stage, c)]
  common = {'seeds', 'model', 'judge_eval', 'agreement', 'answers', 'answers_greedy', 'oracle'}
  assert {*needed('sft')} == common
  assert {*needed('m1')} == common | {'judge', 'health', 'eft'}
  assert {*needed('m1', eft__targets='ranks')} == common | {'eft'}
  own = common | {'prompts', 'respond', 'judge', 'pairs', 'health', 'audit'}
  assert {*needed('m2')} == own
  assert {*needed('m2', pairs__strategy='consistency')} == own | {'judge_again'}
  assert {*needed('m2', pairs__strategy='implicit_reward')} == own | {'implicit'}
  assert {*needed('m2', pairs__strategy='temporal')} == own | {'respond_older', 'judge_older'}
  assert {*needed('m2', train__data=('pairs', 'judge_pairs'))} == own | {
      'meta_judge', 'audit_judge_pairs'}
  assert {*needed('m2', train__data=('pairs', 'majority_pairs'))} == own | {
      'majority', 'audit_judge_pairs'}
  assert {*needed('m2', train__data=('pairs', 'swapped_pairs'))} == own | {
      'swap', 'judge_swapped', 'swapped', 'audit_judge_pairs'}
  assert {*needed('m2', train__data=('pairs', 'eft'))} == own
  assert {*needed('m2', train__reference='cached')} == own | {'reference'}
  assert {*needed('m2', train__select='agreement')} == own | {'selection'}
  assert {*needed('m2', judge__by='oracle')} == own
  for url in ('http://x/v1', 'm1'):
    assert {*needed('m2', judge__by='endpoint', endpoint__url=url)} == own
  assert {*needed('m2', data__source='oasst')} == own - {'answers_greedy', 'oracle', 'audit'}


def test_an_input_that_the_catalog_does_not_declare_is_refused(tmp_path):
  with pytest.raises(catalog.Undeclared, match='program reads pairs/pairs.jsonl, which is not'):
    make(tmp_path).read('pairs/pairs.jsonl')


def test_the_error_for_an_unknown_on_flag_lists_the_valid_values():
  with pytest.raises(InputError, match=r'--on=agin \(did you mean "again"\?\): it is one of'):
    catalog.find('sample.judge', 'agin')


def test_a_changed_template_is_refused(tmp_path):
  s = make(tmp_path, 'judge', template='Judge {prompt}')
  s.begin()
  with pytest.raises(InputError, match='template'):
    make(tmp_path, 'judge', template='Grade {prompt}')


@pytest.mark.parametrize('key, value, message', [
    ('train.batch', 0, 'train.batch is 0; it must be above 0'),
    ('train.dtype', 'fl32', "train.dtype is 'fl32'"),
    ('train.loss', 'ppo', "train.loss is 'ppo'"), ('train.select', 'agreemnt',
                                                   "select is 'agreemnt'; it is empty"),
    ('train.select', "grade '{checkpoint}", 'or a command with {checkpoint}'),
    ('train.dropout', -0.1, 'dropout is -0.1; it must be 0 or more'),
    ('train.beta', 0.0, 'beta is 0.0; it must be'),
    ('train.max_grad_norm', 0.0, 'max_grad_norm is 0.0'), ('train.learning_rate', float('nan'),
                                         'learning_rate is nan'),
    ('judge.quorum', 4, 'quorum is 4, more than the 3'),
    ('train.learning_rate', -0.5, 'learning_rate is -0.5; it must be -1, or'),
    ('judge.n', 0, 'judge.n is 0')])
def test_the_error_names_the_key_of_an_invalid_value(key, value, message):
  c = configs.get('m2', 'tiny')
  configs.check(c)
  c.update_from_flattened_dict({key: value})
  with pytest.raises(InputError, match=message):
    configs.check(c)


def test_set_changes_all_models_or_only_the_named_ones():
  def load(name, *changes):
    return loop.load_config(name, 'tiny', '', '', list(changes))
  assert load('m2', 'train.batch=4').train.batch == load('m0', 'train.batch=4').train.batch == 4
  assert load('m2', 'm2,m3:train.epochs=7').train.epochs == 7.0
  assert load('m1', 'm3:train.epochs=7').train.epochs != 7.0
  assert load('m2', 'train.data=ift,eft').train.data == ('ift', 'eft')
  assert load('m2', 'data.synthetic=true').data.synthetic is True
  assert load('m2', 'judge.template=/a:b.txt').judge.template == '/a:b.txt'
  for change, message in (('train.bach=4', 'no key "bach" .did you mean "batch"'),
                          ('m9:train.batch=4', "no model 'm9'"),
                          ('train.batch=x', "'x' is not an int; train.batch"),
                          ('train=4', 'train is a section'),
                          ('train.batch', "'' is not an int"), ('seed.x=1', 'no key "x"')):
    with pytest.raises(InputError, match=message):
      load('m2', change)


def test_a_renamed_key_keeps_its_value_in_an_older_manifest(tmp_path):
  """Not the default of the new name: the stage was made with another value."""
  def stage_with(weight):
    c = configs.get('m2', 'tiny')
    c.train.nll_weight = weight
    return stage.Stage(catalog.Spec('model', 'program', (), keys=('train.nll_weight',)), c,
                       tmp_path)
  s = stage_with(0.5)
  s.begin()
  path = s.folder / 'manifest.json'
  path.write_text(path.read_text().replace('train.nll_weight', 'train.nll'))
  stage_with(0.5)
  with pytest.raises(InputError, match=r'train.nll_weight \(0.5, now 0.0\)'):
    stage_with(0.0)


def test_a_model_that_lost_its_last_step_or_got_another_is_refused(m1, tmp_path):
  done = dict(params=model_files.recorded_hash(m1), files={}, seconds=1)
  stage.write_json(m1 / 'done.json', done)
  stage.write_json(m1 / 'manifest.json', dict(format=stage.FORMAT, config={}))
  assert stage.finished_model(tmp_path, 'm1') == m1
  stage.write_json(m1 / 'done.json', dict(done, params='0' * 16))
  with pytest.raises(InputError, match='the last step of .* but training ended with 0000'):
    stage.finished_model(tmp_path, 'm1')


@pytest.mark.parametrize('entry', [3, None, [1], [1, 2, 3], [1, 2]])
def test_a_malformed_entry_of_a_done_file_is_refused(judged, tmp_path, entry):
  found = json.loads((judged / 'done.json').read_text())
  found['files'][records.shard_name('judgements', 0, 2)] = entry
  (judged / 'done.json').write_text(json.dumps(found))
  with pytest.raises(InputError, match='not a count and a hash'):
    make(tmp_path, 'judge')


def test_readers_outside_of_stages_check_the_records_too(judged):
  stage.check_records(judged)
  path = judged / records.shard_name('judgements', 0, 2)
  path.write_text(path.read_text() + '{"id": "more"}\n')
  with pytest.raises(InputError, match='has changed since its stage finished'):
    stage.check_records(judged)


def test_training_data_is_recorded_the_same_from_a_flag_and_a_file():
  spec = catalog.find('train')
  a, b = configs.get('m1', 'tiny'), configs.get('m1', 'tiny')
  b.train.data = ('ift,eft',)
  assert spec.recorded(a) == spec.recorded(b)


@pytest.mark.parametrize('count', [999, -1, 4, None])
def test_a_count_that_is_not_that_of_the_records_is_refused(judged, tmp_path, count):
  found = json.loads((judged / 'done.json').read_text())
  found['files'][records.shard_name('judgements', 0, 2)][0] = count
  (judged / 'done.json').write_text(json.dumps(found))
  with pytest.raises(InputError, match=f'has changed since its stage finished .{count} records'):
    make(tmp_path, 'judge')
