"""docs/recipes.md: its plans are those that are printed, its commands run with small models."""
import dataclasses
import re
import shlex

import aot
from conftest import main, real_data, ROOT
import hf_folders
import pytest
import scale_rows

from srlm_jax import base, config as configs, loop, plan, pods, stage
from srlm_jax.models import config as model_config

RECIPES = (ROOT / 'docs' / 'recipes.md').read_text()
BLOCKS = re.findall(r'```text\n(.*?)```', RECIPES, re.DOTALL)
PLANS = [block for block in BLOCKS if block.startswith('python -m srlm_jax.plan')]
MACHINES = '8xh100', 'v5p-8'
FAMILIES = {'Llama-3.1-8B': ('llama3.1-8b', lambda folder: hf_folders.llama3(folder, False)),
            'Qwen3-8B': ('qwen3-8b', hf_folders.qwen3)}
# Makes the recipe small enough for a test. A random model does not judge.
CHANGES = ('data.ift=16', 'data.ranked_train=8', 'data.ranked_eval=3', 'data.test_prompts=2',
           'data.valid_prompts=2', 'respond.max_tokens=8', 'judge.max_tokens=8',
           'eval.judgements=2', 'eft.targets=ranks', 'train.batch=8', 'sample.slots=4',
           'prompts.count=2', 'prompts.round=2', 'prompts.max_tokens=8', 'prompts.shot_words=20')


def planned(name, last):
  return [loop.load_config(model, 'auto', '', '', [f'model={name}'])
          for model in configs.MODELS[1:configs.MODELS.index(last) + 1]]


@pytest.mark.parametrize('block', PLANS, ids=lambda block: block.partition('\n')[0])
def test_the_plans_are_those_that_are_printed(block):
  command, _, printed = block.partition('\n')
  found = re.fullmatch(r'python -m srlm_jax.plan --m0=(\S+) --pod=(\S+) --last=(\S+)', command)
  name, pod, last = found.groups()
  parts = plan.report(planned(name, last), pods.find(pod), plan.LENGTHS, is_loop=True)
  assert printed.strip('\n') == '\n'.join(parts)


def test_the_table_has_what_the_plans_print():
  compiled = []
  for name, _ in FAMILIES.values():
    for machine in MACHINES:
      pod = pods.find(machine)
      made = {config.name: plan.make(base.fit(config, ''), pod, plan.LENGTHS)
              for config in planned(name, 'm2')}
      printed = '\n'.join(map(plan.text, made.values()))
      step = {model: next(p for s in found.stages if s.name == 'model' for p in s.programs)
              for model, found in made.items()}
      sampler = max(p.bytes for found in made.values() for s in found.stages
                    if s.name != 'model' for p in s.programs)
      gib = [f'{size / plan.GIB:.1f}' for size in (step['m1'].bytes, step['m2'].bytes, sampler)]
      times = [plan._duration(found.seconds.estimate) for found in made.values()]
      assert all(text in printed for text in (*gib, *times))
      storage = plan._total([*made.values()]).split(': ')[1].split(',')[0]
      row = [name, machine, *gib[:2], f'{gib[2]} of {pod.chip.gib}', *times, storage]
      assert f'| {" | ".join(row)} |' in RECIPES, row
      assert not any(found.tight for found in made.values())
      for program in aot.RECIPES:  # the compiled steps are those that are planned
        if (program.size, program.pod) == (name, machine):
          m2 = step['m2']
          assert (dataclasses.astuple(m2.mesh), m2.rows, m2.width, m2.remat) == (
              program.mesh, program.rows * m2.mesh.parts, program.width, program.config.remat)
          compiled.append(name)
  assert compiled == [name for name, _ in FAMILIES.values()]
  text = ' '.join(RECIPES.split())
  (llama,), (qwen,) = ([row.gib for row in scale_rows.rows() if row.program.size == name]
                       for name in compiled)
  assert f'needs {llama} GiB for the M2 step of Llama-3.1-8B on v5p-8 and {qwen} for' in text


def test_the_line_of_what_is_chosen_is_the_one_that_is_printed(tmp_path):
  folder = hf_folders.llama3(tmp_path / 'Llama', has_template=False)
  given = {name: loop.load_config(name, 'auto', str(folder), '', [])
           for name in ('m0', 'sft', 'm1', 'm2')}
  every = {name: base.fit(config, '') for name, config in given.items()}
  assert f'\n{base.chosen(every, given)}\n' in RECIPES


def commands(name) -> list[list[str]]:
  """The commands of a recipe, as words."""
  section = RECIPES.partition(f'\n## {name}\n')[2].partition('\n## ')[0]
  block = re.search(r'```text\n(.*?)```', section, re.DOTALL)[1]
  return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.mark.parametrize('name', FAMILIES)
def test_every_flag_of_a_recipe_exists(name):
  """Of the commands that are not run below too."""
  for words in commands(name):
    if words[:2] == ['hf', 'download']:
      assert {word for word in words if word.startswith('--')} <= {
          '--exclude', '--local-dir', '--repo-type'}
      assert words[-2] == '--local-dir'
    else:
      assert words[:2] in (['python', '-m'], ['pip', 'install'])


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_the_recipe_runs_with_a_small_random_model(name, tmp_path):
  data = real_data('oasst1/validation.en.messages.jsonl.gz')
  folder = FAMILIES[name][1](tmp_path / name)
  printed = []
  for words in commands(name):
    if words[0] != 'python':
      continue
    words = [word.replace('/m2/model', '/m1/model')  # a random model gets no further
             .replace('/shared', str(tmp_path))
             .replace(f'{tmp_path}/oasst1/2023-04-12_oasst_ready.trees.jsonl.gz', str(data))
             for word in words[2:]]
    module = words[0].removeprefix('srlm_jax.')
    changes = [f'--set={change}' for change in CHANGES] if module == 'loop' else []
    printed.append(main(module, *words[1:], *changes))
  _, m1, m2, _ = printed
  chat = 'tokenizer' if name == 'Qwen3-8B' else 'llama2'
  assert (f'chosen for M0: chat={chat}, train.max_length=2048, train.learning_rate=5e-06, '
          'train.learning_rate_end=1e-06, sample.size=4096\n') in m1
  assert 'train.learning_rate=5e-07 (m2)' in m2 and 'm1/model: already done' in m2
  assert 'm2 was not trained: ' in m2
  workdir, = (tmp_path / 'runs').iterdir()
  for model in ('sft', 'm1'):
    made = stage.read_manifest(workdir / model / 'model' / 'manifest.json')['config']
    assert (made['chat'], made['model'], made['train.max_length']) == (chat, '', 2048)
    assert (made['train.learning_rate'], made['train.learning_rate_end']) == (5e-6, 1e-6)
  exported, = tmp_path.glob('*-M2')
  assert model_config.load(exported) == model_config.load(folder)
  # A stage on its own chooses the same, from the converted M0.
  again = main('train', '--config=sft:auto', f'--workdir={workdir}',
               *(f'--config.{change}' for change in CHANGES))
  assert again.startswith(f'chosen for M0: chat={chat}, ') and 'sft/model: already done' in again
