"""What a run takes from its M0: the shape, and values for what the config leaves open."""
import json

from conftest import main
import hf_folders
import pytest

from srlm_jax import base, catalog, config as configs, InputError, loop, stage
from srlm_jax.checkpoint import convert
from srlm_jax.models.config import PRESETS


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return hf_folders.llama3(tmp_path_factory.mktemp('m0') / 'Llama')


def fit(name='m2', m0='', changes=(), workdir=''):
  return base.fit(loop.load_config(name, 'auto', str(m0), '', list(changes)), workdir)


def values(config):
  return {key: catalog.look_up(config, key) for key in configs.FROM_M0}


def test_every_open_value_is_chosen_for_m0(folder):
  assert values(fit('sft', folder)) == {
      'chat': 'tokenizer', 'train.max_length': 2048, 'train.learning_rate': 5e-6,
      'train.learning_rate_end': 1e-6, 'sample.size': 4096}
  assert values(fit('m2', folder)) == values(fit('sft', folder)) | {
      'train.learning_rate': 5e-7, 'train.learning_rate_end': 5e-8}


def test_lora_gets_larger_learning_rates_than_full_training(folder):
  changes = ['train.lora_rank=16']  # also for m0, which this loop does not train
  for name in configs.MODELS:
    full, found = fit(name, folder).train, fit(name, folder, changes).train
    assert found.learning_rate == pytest.approx(5 * full.learning_rate)
    assert found.learning_rate_end == pytest.approx(5 * full.learning_rate_end)


def test_without_a_chat_template_the_format_is_that_of_the_published_sizes(tmp_path):
  assert fit(m0=hf_folders.llama3(tmp_path / 'Llama', has_template=False)).chat == 'llama2'


def test_a_chat_template_may_be_a_file_of_its_own(tmp_path):
  found = hf_folders.llama3(tmp_path / 'Llama', has_template=False)
  (found / 'chat_template.jinja').write_text(hf_folders.LLAMA3_TEMPLATE)
  assert fit(m0=found).chat == 'tokenizer'


def test_the_largest_models_get_the_values_of_the_paper():
  """Those that the size 70b has."""
  for name in configs.MODELS[1:]:
    published, found = configs.get(name, '70b'), fit(name, changes=['model=llama2-70b'])
    different = {key for key, value in configs.flat(found)
                 if value != catalog.look_up(published, key)}
    assert different == {'size', 'train.select'}  # auto, which `fit` chooses too


def test_lengths_are_at_most_the_context_and_grow_with_the_responses(tmp_path):
  small = hf_folders.llama3(tmp_path / 'small', max_position_embeddings=1500)
  found = fit(m0=small)
  assert (found.train.max_length, found.sample.size) == (1500, 1500)
  large = hf_folders.llama3(tmp_path / 'large')
  found = fit(m0=large, changes=['respond.max_tokens=8192'])
  assert (found.train.max_length, found.sample.size) == (16384, 32768)


def test_values_of_the_user_win(folder):
  changes = {'chat': 'plain', 'train.max_length': 512, 'train.learning_rate': 1e-5,
             'train.learning_rate_end': 1e-6, 'sample.size': 1024}
  assert values(fit('m2', folder, [f'{key}={value}' for key, value in changes.items()])) == changes
  # The end of the learning rate is chosen for its start.
  found = fit('m2', folder, ['train.learning_rate=1e-8'])
  assert found.train.learning_rate_end == 1e-9
  with pytest.raises(InputError, match='learning_rate_end is 1e-05, more than the 5e-07'):
    fit('m2', folder, ['train.learning_rate_end=1e-5'])


def test_a_key_may_be_left_open_at_any_size(folder):
  found = base.fit(loop.load_config('m2', 'stories', str(folder), '', [
      'chat=auto', 'model=']), '')
  assert found.chat == 'tokenizer' and found.train.learning_rate == 1e-5


def test_the_converted_m0_gives_the_same_without_its_folder(folder, tmp_path):
  """So a run that is resumed, and every stage on its own, gets what the loop chose."""
  convert.from_hf(folder, stage.model_folder(tmp_path, 'm0'))
  for name in configs.MODELS[1:]:
    with_folder, without = fit(name, folder), fit(name, workdir=tmp_path)
    without.m0 = with_folder.m0
    assert without == with_folder


def test_every_chosen_value_is_in_one_line(folder):
  given = {name: loop.load_config(name, 'auto', str(folder), '', ['chat=plain'])
           for name in ('sft', 'm2', 'm3')}
  every = {name: base.fit(config, '') for name, config in given.items()}
  assert base.chosen(every, given) == (
      'chosen for M0: train.max_length=2048, train.learning_rate=5e-06 (sft), '
      'train.learning_rate=5e-07 (m2, m3), train.learning_rate_end=1e-06 (sft), '
      'train.learning_rate_end=5e-08 (m2, m3), sample.size=4096')
  assert base.chosen(every, every) == ''


def test_a_stage_refuses_a_value_that_is_still_open(folder, tmp_path):
  config = loop.load_config('m2', 'auto', str(folder), '', [])
  spec = catalog.find('sample.respond', 'prompts')
  with pytest.raises(InputError, match='config.chat is auto, which leaves it to be chosen'):
    stage.Stage(spec, config, tmp_path)


def test_the_shape_of_m0_is_compared_with_the_size(folder, tmp_path):
  printed = main('loop', '--size=7b', f'--m0={folder}', '--data=x', f'--workdir={tmp_path}', code=1)
  assert printed.strip().endswith(
      f'error: {folder} has D = 32, and config.model = llama2-7b has 4096; name the right one, or '
      'none: the loop without --size, or --config.model= for a stage')
  assert not any(tmp_path.iterdir())


def test_the_memory_of_the_real_shape_is_needed(folder, tmp_path):
  """That of config.json, whatever the weights are."""
  fields = json.loads((folder / 'config.json').read_text())
  large = PRESETS['llama2-70b']
  fields |= dict(hidden_size=large.D, intermediate_size=large.F, num_attention_heads=64,
                 num_key_value_heads=8, num_hidden_layers=80, vocab_size=128256)
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  params = 70_553_706_496  # of Llama-3.1-70B
  printed = main('loop', f'--m0={tmp_path}', '--data=x', f'--workdir={tmp_path / "run"}', code=1)
  assert f'training m3 at size auto ({params:,} parameters) needs {18 * params:,} bytes' in printed
  assert 'chat=llama2' in printed and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('flags, message', [
    ([], 'error: nothing says what M0 is; give its Hugging Face folder (--m0=FOLDER for the loop '
     'and the plan, --config.m0=FOLDER for a stage), or a preset as the size: tiny, hard,'),
    (['--m0={tmp}'], 'error: {tmp} holds no config.json; name a checkpoint or a Hugging Face'),
    (['--m0={tmp}/absent'], 'error: {tmp}/absent holds no config.json'),
    (['--m0={tmp}/gpt'], "error: {tmp}/gpt/config.json: model_type = 'gpt2' is not supported; use "
     'a model of one of the families llama, mistral, olmo2, qwen2, qwen3'),
    (['--m0={folder}', '--set=respond.max_tokens=4096', '--set=sample.size=4096'],
     'error: config.respond.max_tokens is 4096, and a row of the cache has 4096 tokens in all')],
     ids=['no m0', 'empty', 'absent', 'gpt2', 'long'])
def test_bad_input_is_one_sentence_before_anything_is_written(flags, message, folder, tmp_path):
  (tmp_path / 'gpt').mkdir()
  (tmp_path / 'gpt' / 'config.json').write_text('{"model_type": "gpt2"}')
  names = dict(tmp=tmp_path, folder=folder)
  printed = main('loop', *(flag.format(**names) for flag in flags), '--data=x',
                 f'--workdir={tmp_path / "run"}', code=1)
  errors = [line for line in printed.splitlines() if line.startswith('error: ')]
  assert len(errors) == 1 and errors[0].startswith(message.format(**names)), printed
  assert not (tmp_path / 'run').exists()
