import itertools
import json
import math
import sys

from absl import flags
from conftest import CHANGES, main, ROOT
from ml_collections import config_flags
import pytest

from srlm_jax import ablations, cli, config as configs, InputError, loop
from srlm_jax.models import config as model_config
from srlm_jax.models.config import Config, PRESETS, RopeScaling

LLAMA3 = dict(
    architectures=['LlamaForCausalLM'], model_type='llama', hidden_size=64, intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=2, vocab_size=96, max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0, hidden_act='silu', tie_word_embeddings=True, attention_bias=False,
    mlp_bias=False,
    bos_token_id=1, eos_token_id=[2, 3], torch_dtype='bfloat16', use_cache=True, pretraining_tp=1,
    rope_scaling=dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=8192))


def test_a_llama_3_config_is_read():
  assert model_config.from_hf(LLAMA3) == Config(
      D=64, F=128, K=2, G=4, H=8, V=96, layers=2, context=131072, rope_theta=500000.0,
      rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), norm_eps=1e-5, tied=True)


def test_rope_parameters_of_newer_transformers_are_read():
  new = dict(LLAMA3, rope_parameters=dict(LLAMA3['rope_scaling'], rope_theta=500000.0))
  del new['rope_scaling'], new['rope_theta']
  assert model_config.from_hf(new) == model_config.from_hf(LLAMA3)
  plain = dict(new, rope_parameters=dict(rope_type='default', rope_theta=1234.0))
  found = model_config.from_hf(plain)
  assert found.rope_theta == 1234.0 and found.rope_scaling is None


@pytest.mark.parametrize('name', PRESETS)
def test_configs_round_trip_through_the_hugging_face_format(name):
  fields = json.loads(json.dumps(model_config.to_hf(PRESETS[name])))
  assert model_config.from_hf(fields) == PRESETS[name]
  llama3 = model_config.from_hf(LLAMA3)
  assert model_config.from_hf(model_config.to_hf(llama3)) == llama3


@pytest.mark.parametrize('change, message', [
    (dict(model_type='mixtral'), 'model_type'), (dict(hidden_act='gelu'), 'hidden_act'),
    (dict(mlp_bias=True), 'mlp_bias'),
    (dict(sliding_window=4096), 'sliding_window'), (dict(quantization_config=dict(bits=4)),
                                                    'quantization_config'),
    (dict(attention_dropout=0.1), 'attention_dropout'), (dict(vocab_size=None), 'vocab_size'),
    (dict(rope_scaling=dict(type='yarn', factor=4.0)), 'yarn'),
    (dict(rope_scaling=dict(rope_type='llama3', factor=8.0)), 'low_freq_factor'),
    (dict(num_key_value_heads=3), 'num_key_value_heads')])
def test_the_error_names_an_unsupported_field(change, message):
  with pytest.raises(InputError, match=message):
    model_config.from_hf(LLAMA3 | change)


def test_the_error_names_the_config_file(tmp_path):
  with pytest.raises(InputError, match='holds no config.json'):
    model_config.load(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(LLAMA3 | dict(sliding_window=1)))
  with pytest.raises(InputError, match='config.json: sliding_window'):
    model_config.load(tmp_path)


LONG = {str: 'x' * 5000, tuple: ('x' * 5000,)}
INVALID = {  # values that a key of each type refuses for any range
    int: [math.nan, math.inf, -math.inf, 1.5, 2.0, 10**20, 10**400, 10**5000, -10**400, '4', '',
          True, [4],
          [10**5000], (4,), None],
    float: [math.nan, math.inf, -math.inf, 1e20, 1e300, -1e300, 10**20, 10**400, 10**5000, -10**400,
            '0.5', '',
            True, False, [0.5], (0.5,), None, 1j],
    bool: [0, 1, 0.0, math.nan, 'true', '', [True], None, 10**5000],
    str: [0, 1.0, math.nan, True, ['x'], ('x',), None, 10**5000, b'x'],
    tuple: ['x', ['x'], (), (1,), ('x', None), (math.nan,), None, True, 10**5000]}


def short(value) -> str:
  """The id of a test case."""
  return str(value)[:40]


def force(key, value, name='m2', size='tiny'):
  """A config with `value` at `key`, without the type casts of ConfigDict."""
  config = configs.get(name, size).copy_and_resolve_references()
  section, _, name = key.rpartition('.')
  place = config[section] if section else config
  place._fields[name] = value
  return config


def refused(key, value) -> str:
  """Checks that the value is refused in one sentence -> that sentence."""
  with pytest.raises(InputError) as error:
    configs.check(force(key, value))
  text = str(error.value)
  assert text.startswith(f'config.{key} is ') and '; it ' in text, text
  assert len(text) < 400 and '\n' not in text and '. ' not in text.replace('.. (', ''), text
  return text


@pytest.mark.parametrize('key, value, sentence', [
    ('train.epochs', math.nan,
     'config.train.epochs is nan; it must be a finite number above 0 and at most 1,000,000 '
     '(passes over the data)'),
    ('train.b1', 2.0,
     'config.train.b1 is 2.0; it must be 0 or more and less than 1 '
     '(decay of the first moment per step)'),
    ('data.ift', -5, 'config.data.ift is -5; it must be 0 to 1,000,000,000 (examples: '),
    ('respond.n', 10**20,
     'config.respond.n is 100000000000000000000; it must be above 0 and at most 1,000,000,000 '
     '(candidates per prompt)'),
    ('seed', 2**64, 'config.seed is 18446744073709551616; it must be 0 to 4,294,967,295 ('),
    ('seed', 10**400, 'config.seed is an int of about 400 digits; it must be 0 to 4,294,967,295 ('),
    ('train.batch', True,
     'config.train.batch is True; it must be a whole number above 0 and at most'),
    ('mesh.fsdp', 0,
     'config.mesh.fsdp is 0; it must be -1, or above 0 and at most 1,000,000,000 ('),
    ('respond.temperature', -0.7,
     'config.respond.temperature is -0.7; it must be 0, or 1e-30 to 100 ('),
    ('respond.top_p', 0.0, 'config.respond.top_p is 0.0; it must be 1e-30 to 1 ('),
    ('train.loss', 'ppo', "config.train.loss is 'ppo'; it is sft or dpo ("),
    ('train.remat', True, 'config.train.remat is True; it is auto, none, dots or full (what the '
     'backward pass recomputes; auto: chosen; full was True, none was False)'),
    ('data.synthetic', 1, 'config.data.synthetic is 1; it must be True or False ('),
    ('train.data', 'ift', "config.train.data is 'ift'; it must be a tuple of strings (")])
def test_the_error_states_the_key_the_value_and_the_allowed_values(key, value, sentence):
  assert refused(key, value).startswith(sentence)


@pytest.mark.parametrize('key', configs.SETTINGS)
def test_every_key_refuses_wrong_types_and_values_out_of_range(key):
  values = configs.SETTINGS[key].values
  bad = list(INVALID[values.kind])
  if values.choices:
    bad += ['', 'x', LONG[str], values.choices[0].upper(), values.choices[0] + ' ']
  if values.kind in (int, float):
    low = values.least if values.above == -math.inf else values.above
    high = min(values.most, values.below)
    assert math.isfinite(low) and math.isfinite(high), 'the range of a number must be bounded'
    if values.also != -1 and low > -1:
      bad += [-1, -1.0]
    if values.above == 0 and values.also != 0:
      bad += [0]
    if low > -2:
      bad += [-2, -10**9]
    bad += [math.nextafter(values.least, -math.inf), math.nextafter(values.most, math.inf),
            values.above, values.below]
  for value in bad:
    refused(key, value)


@pytest.mark.parametrize('key', configs.SETTINGS)
def test_every_key_accepts_its_default_and_both_ends_of_its_range(key):
  found = configs.SETTINGS[key]
  v = found.values
  good = [found.default, *v.choices]
  if v.also is not None:
    good += [v.also]
  if v.kind is int:
    good += [v.least if math.isfinite(v.least) else v.above + 1,
             v.most if math.isfinite(v.most) else v.below - 1]
  elif v.kind is float:
    good += [v.least if math.isfinite(v.least) else math.nextafter(v.above, math.inf),
             v.most if math.isfinite(v.most) else math.nextafter(v.below, -math.inf)]
  elif v.kind is bool:
    good += [True, False]
  elif not v.choices:
    good += [LONG[v.kind]]
  for value in good:
    found.check(key, value)


@pytest.mark.parametrize('key', configs.SETTINGS)
def test_every_key_has_a_unit_and_a_source(key):
  found = configs.SETTINGS[key]
  assert type(found.default) is found.values.kind
  assert len(found.unit) > 3 and '. ' not in found.unit
  assert found.source in ('PAPER 2.2', 'PAPER 3.1', 'PAPER 3.3', configs.META, configs.INSTRUCT,
                          configs.LORA, configs.OURS)


@pytest.mark.parametrize('name, size', itertools.product(configs.MODELS, configs.SIZES))
def test_every_config_has_exactly_the_known_keys_and_valid_values(name, size):
  config = configs.get(name, size)
  values = dict(configs.flat(config))
  assert {*values} == {*configs.SETTINGS} and config.is_locked and config.train.is_locked
  for key, value in values.items():
    assert type(value) is configs.SETTINGS[key].values.kind
  configs.check(config)


def test_unknown_and_missing_keys_are_refused():
  config = force('train.lerning_rate', 1.0)
  with pytest.raises(InputError, match='config.train.lerning_rate is not a config key; a config '
                     'has the keys of SETTINGS'):
    configs.check(config)
  config = configs.get('m2').copy_and_resolve_references().unlock()
  del config.judge.quorum
  with pytest.raises(InputError, match='config.judge.quorum is missing'):
    configs.check(config)


@pytest.mark.parametrize('name, size', [('m9', 'tiny'), ('m1', 'huge')])
def test_an_unknown_model_or_size_is_refused(name, size):
  with pytest.raises(InputError, match='is unknown; it is one of'):
    configs.get(name, size)


@pytest.mark.parametrize('changes, message', [
    ({'judge.quorum': 4}, 'quorum is 4, more than the 3'),
    ({'train.beta': 0.0}, 'beta is 0.0; it must be above 0'),
    ({'train.select': 'x'}, 'a command with {checkpoint} in it'),
    ({'data.source': 'oasst', 'data.ranked_tune': 1}, 'ranked_tune is 1; only the sandbox'),
    ({'data.source': 'oasst', 'data.ranked_tune': 0, 'judge.by': 'oracle'},
     'in the sandbox also oracle or random'),
    ({'prompts.min_words': 151},
     'config.prompts.min_words is 151, more than the 150 of prompts.max_words; lower one or raise'),
    ({'train.learning_rate': 1e-9},
     'config.train.learning_rate_end is 4e-06, more than the 1e-09 of train.learning_rate; lower'),
    ({'train.data': ('ift', 'eft', 'ift')}, "config.train.data names 'ift' twice; name each"),
    ({'train.data': ('pairs', 'judge_pairs,pairs')}, "config.train.data names 'pairs' twice"),
    ({'train.data': ('pear',)}, "config.train.data names 'pear'; it may name corpus, ift, eft"),
    ({'train.data': ('pairs, judge_pairs',)}, "config.train.data names ' judge_pairs'; it"),
    ({'train.data': ('pairs', 'corpus')}, 'train.loss=dpo trains on prompts with responses'),
    ({'train.data': ('pairs,',)}, "config.train.data names ''; it may name corpus,"),
    ({'train.data': ('x' * 5000,)}, r"config.train.data names 'xxx.*xx\.\. \(5002 characters\)"),
    ({'train.init': 'm9'},
     "config.train.init is 'm9'; it is empty, m0, sft, m1, m2, m3, m4, m5 or m6, or a path with a "
     "'/'"),
    ({'train.init': 'sampler'}, "config.train.init is 'sampler'; it is empty"),
    ({'sampler': 'llama-2-7b'}, "config.sampler is 'llama-2-7b'; it is empty"),
    ({'pairs.older': 'x' * 5000}, r"config.pairs.older is 'xxx.*xx\.\. \(5002 characters\);"),
    ({'prompts.author': 'M0'},
     "config.prompts.author is 'M0'; it is empty, m0, sft, m1, m2, m3, m4, m5, m6 or sampler, or a "
     "path")],
    ids=short)
def test_invalid_combinations_and_unknown_names_are_refused(changes, message):
  config = configs.get('m2', 'tiny')
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError, match=message) as error:
    configs.check(config)
  assert '\n' not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize('changes', [
    {'prompts.min_words': 150}, {'train.learning_rate': 4e-6},
    {'train.data': configs.TRAINING_DATA[1:]},  # without corpus
    {'train.data': (','.join(configs.TRAINING_DATA[1:]),)},
    *({key: model} for key in configs.NAMES_A_MODEL
      for model in (*configs.MODELS, '', '/m', './m', 'gs://b/m')),
    {'prompts.author': 'sampler'}], ids=short)
def test_valid_combinations_and_known_names_are_accepted(changes):
  config = configs.get('m2', 'tiny')
  config.update_from_flattened_dict(changes)
  configs.check(config)


@pytest.mark.parametrize('name', configs.MODELS)
@pytest.mark.parametrize('size', configs.SIZES)
def test_the_changes_of_the_tests_and_the_ablations_are_valid(name, size):
  for ablation in ('', *ablations.ABLATIONS):
    if size == 'tiny' or ablation not in ('oracle_judge', 'random_judge'):
      changes = [*ablations.changes(ablation, size), *(CHANGES if size == 'tiny' else ())]
      loop.load_config(name, size, '', '', changes)


def test_an_int_for_a_float_and_comma_separated_data_are_accepted():
  config = configs.get('m2', 'tiny')
  config.train.epochs = 3
  config.train.data = ('pairs,judge_pairs',)
  configs.check(config)
  assert config.train.epochs == 3.0 and configs.training_data(config) == ['pairs', 'judge_pairs']


def parse(monkeypatch, *flag):
  """The config that a program reads from its flags."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  monkeypatch.setattr(sys, 'argv', ['program', '--config=configs/iter2.py:tiny', *flag])
  values(sys.argv)
  return values.config


@pytest.mark.parametrize('key, text', [
    ('train.epochs', 'nan'), ('train.epochs', 'inf'), ('train.epochs', '1' + '0' * 400),
    ('train.b1', '2'),
    ('train.learning_rate', '-1e-5'), ('data.ift', '-5'), ('respond.n', str(10**20)),
    ('respond.n', '9' * 4000),
    ('seed', str(2**64)), ('seed', '-1'), ('respond.temperature', '1e-310'),
    ('train.learning_rate', '5e-324'), ('mesh.data', '0')], ids=short)
def test_values_from_config_flags_and_set_are_range_checked(key, text, monkeypatch):
  monkeypatch.chdir(ROOT)
  with pytest.raises(InputError, match=f'^config.{key} is '):
    configs.check(parse(monkeypatch, f'--config.{key}={text}'))
  with pytest.raises(InputError, match=f'^config.{key} is '):
    loop.load_config('m2', 'tiny', '', '', [f'{key}={text}'])


@pytest.mark.parametrize('change, message', [
    ('respond.n=1e3', "--set=respond.n=1e3: '1e3' is not an int; respond.n must be a whole number "
     "above 0 and at most 1,000,000,000 (candidates per prompt)"),
    ('respond.n=' + '9' * 5000, ".. (5002 characters) is not an int; respond.n must be a whole "),
    ('respond.n=4.0', "'4.0' is not an int"),
    ('train.epochs=many', "'many' is not a float; train.epochs must be a finite number above 0"),
    ('train.pack=yes', "'yes' is not a bool; train.pack must be True or False"),
    ('respond=4', "--set=respond=4: respond is a section; set one of its keys: max_tokens, n, "),
    ('x' * 5000 + '=1', 'the config has no key "xxx'), ('=', 'the config has no key ""'),
    ('x' * 5000 + ':seed=1', "there is no model 'xxx"),
    ('name=' + 'x' * 5000, 'name says which config'),
    ('m1:train.epochs=1:2', "is not a float")], ids=short)
def test_an_invalid_set_flag_gives_a_one_sentence_error(change, message):
  with pytest.raises(InputError) as error:
    loop.load_config('m1', 'tiny', '', '', [change])
  text = str(error.value)
  assert message in text and len(text) < 600 and '\n' not in text


@pytest.mark.parametrize('key', [name for name, key in configs.SETTINGS.items()
                                 if key.values.kind in (int, float)])
def test_numeric_keys_refuse_invalid_text(key):
  for text in ('nan', 'inf', '-inf', '1e400', '-1e400', '', 'x', '0x10', '--', '9' * 5000,
               str(10**20), 'True', '[1]'):
    with pytest.raises(InputError):
      loop.load_config('m2', 'tiny', '', '', [f'{key}={text}'])


@pytest.mark.parametrize('module, flag', [
    ('data.seeds', ['--config=configs/sft.py:stories', '--config.data.path=x.jsonl',
                    '--config.data.ift=-5']),
    ('sandbox', ['--config=configs/sft.py:tiny', f'--config.seed={2**64}']),
    ('loop', ['--size=tiny', '--set=m3:train.b1=2'])])
def test_a_refused_config_writes_no_file(module, flag, tmp_path):
  printed = main(module, *flag, f'--workdir={tmp_path / "run"}', code=1)
  errors = [line for line in printed.splitlines() if line.startswith('error: ')]
  assert len(errors) == 1 and errors[0].startswith('error: config.')
  assert not [p for p in tmp_path.rglob('*') if p.is_file()]


@pytest.mark.parametrize('text, shown', [
    ('import nope', "raises ModuleNotFoundError (No module named 'nope')"),
    ('def get_config(): return x', "raises NameError (name 'x' is not defined)"),
    ('def get_config(): return {}["k"]', "raises KeyError ('k')"),
    ('def get_config(): raise ValueError("bad value")', 'raises ValueError (bad value)'),
    ('def (', 'raises SyntaxError (invalid syntax)'),
    ('', "raises AttributeError (module 'config_config' has no attribute 'get_config')"),
    ('def get_config(): return {}', 'defines a get_config() that returns no config')])
def test_a_config_file_that_raises_is_one_sentence(text, shown, tmp_path):
  file = tmp_path / 'a.py'
  file.write_text(text)
  printed = main('train', f'--config={file}', f'--workdir={tmp_path / "run"}', code=1)
  errors = [line for line in printed.splitlines() if line.startswith('error: ')]
  assert len(errors) == 1 and errors[0].startswith(f'error: --config={file} {shown}'), printed
  assert 'Traceback' not in printed and 'give a file like those in configs/' in printed


@pytest.mark.parametrize('flag, shown', [
    ('--config.respond.n=' + '9' * 5000, '--config.respond.n=99'),
    ('--config.train.batch=' + 'x' * 5000, '--config.train.batch=xx'),
    ('--config.train.pack=' + 'x y ' * 2000, '--config.train.pack=x y'),
    ('--config.train.' + 'x' * 5000 + '=1', 'no key "xx'),
    ('--' + 'x' * 5000 + '=1', 'name')], ids=short)
def test_a_long_flag_is_shortened_in_the_error(flag, shown, tmp_path):
  printed = main('train', '--config=configs/iter2.py:tiny', f'--workdir={tmp_path}', flag, code=1)
  errors = [line for line in printed.splitlines() if line.startswith('error: ')]
  assert len(errors) == 1 and shown in errors[0] and len(errors[0]) < 400, printed
  if '9' in flag:
    assert 'value has 5000 digits' in errors[0], 'the error must give the reason'


@pytest.mark.parametrize('old, new', configs.RENAMED.items())
def test_the_error_for_a_renamed_key_gives_the_new_key(old, new, tmp_path):
  assert new in configs.SETTINGS or old == 'judge.on'
  assert old not in configs.SETTINGS
  with pytest.raises(InputError, match=f'{old} is now {new}'):
    loop.load_config('m2', 'tiny', '', '', [f'{old}=1'])
  with pytest.raises(SystemExit):
    cli._parse_flags(['program', f'--config.{old}=1'])
