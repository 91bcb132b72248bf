"""The extra `eval` in a new environment: both harnesses run, and our readers parse their output."""
import json
import os
import shutil
import subprocess
import sys

from conftest import ROOT
import pytest
import samples

from srlm_jax import records

QUESTIONS = [dict(goal='Once upon a time', sol1='there was a little girl.', sol2='zq xv 7 kk',
                  label=i % 2) for i in range(4)]
TASK = """\
task: piqa
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{goal}}"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list:
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ANNOTATOR = """\
local:
  prompt_template: local/prompt.txt
  fn_completions: local
  completions_kwargs: {}
  fn_completion_parser: regex_parser
  completion_parser_kwargs: {outputs_to_match: {1: '1', 2: '2'}}
  batch_size: 1
"""
PROMPT = '<|im_start|>user\n{instruction}\nFIRST {output_1}\nSECOND {output_2}\n<|im_end|>'
ALPACA = """\
import alpaca_eval
from alpaca_eval.annotators import base

def judge(prompts, **_):  # replaces the API
  return dict(completions=['2' if 'good' in p.split('SECOND')[1] else '1' for p in prompts],
              price_per_example=[0.0] * len(prompts), time_per_example=[0.0] * len(prompts))

base.get_fn_completions = lambda _: judge
alpaca_eval.evaluate(
    model_outputs='outputs.json', reference_outputs='reference.json', output_path='annotated',
    annotators_config='FOLDER', name='m2', caching_path=None, precomputed_leaderboard=None,
    is_randomize_output_order=False, fn_metric='get_winrate', sort_by='win_rate',
    is_return_instead_of_print=True)
"""


@pytest.fixture
def installed(tmp_path):
  """-> a function that runs a program of a new environment, in `tmp_path`.

  The environment holds the package with the extra `eval` only.
  """
  source, venv = tmp_path / 'source', tmp_path / 'venv'
  source.mkdir()
  for name in ('setup.py', 'pyproject.toml'):
    shutil.copy(ROOT / name, source)
  for name in ('srlm_jax', 'configs'):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
  environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'OPENAI_API_KEY')}
  environment |= dict(JAX_PLATFORMS='cpu', XLA_FLAGS='', HF_HUB_OFFLINE='1',
                      HF_HOME=str(tmp_path / 'hf'))

  def run(program, *words, code=0):
    done = subprocess.run([venv / 'bin' / program, *words], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout
  try:
    subprocess.run([sys.executable, '-m', 'venv', venv], check=True)
    pip = ('-m', 'pip', 'install', '--quiet', '--disable-pip-version-check')
    run('python', *pip, f'{source}[eval]')
    yield run
  finally:
    shutil.rmtree(venv, ignore_errors=True)  # several GB


@pytest.mark.slow
def test_the_extra_eval_installs_and_runs_both_harnesses(installed, tmp_path, stories):
  run = installed
  run('python', '-m', 'pip', 'check')
  run('python', '-c', 'import alpaca_eval, lm_eval, sys; sys.exit("torch" in sys.modules)')
  run('python', '-c', 'import torch', code=1)
  run('alpaca_eval', '--help')
  run('lm_eval', '--help')
  check_alpaca(run, tmp_path)
  check_harness(run, tmp_path, stories)


def check_alpaca(run, tmp_path):
  """alpaca_eval reads our outputs, and we read the win rate from its annotations."""
  answers = [samples.response(f'h{i}/0', prompt=f'Prompt {i}?', response='good' if i else 'poor')
             for i in range(4)]
  records.write(tmp_path / 'answers' / records.shard_name('responses', 0, 1), answers)
  run('python', '-m', 'srlm_jax.eval.alpaca', '--answers=answers', '--generator=m2',
      '--out=outputs.json')
  reference = [dict(instruction=a.prompt, output='fair', generator='base', dataset='heldout')
               for a in answers]
  (tmp_path / 'reference.json').write_text(json.dumps(reference))
  (tmp_path / 'local').mkdir()
  (tmp_path / 'local' / 'configs.yaml').write_text(ANNOTATOR)
  (tmp_path / 'local' / 'prompt.txt').write_text(PROMPT)
  run('python', '-c', ALPACA.replace('FOLDER', str(tmp_path / 'local')))
  run('python', '-m', 'srlm_jax.eval.alpaca', '--annotations=annotated/annotations.json',
      '--out=rate.json')
  rate = json.loads((tmp_path / 'rate.json').read_text())
  assert rate['generator'] == 'm2'
  assert (rate['win_rate'], rate['wins'], rate['losses']) == (75.0, 3, 1)
  lines = (tmp_path / 'annotated' / 'leaderboard.csv').read_text().splitlines()
  own = dict(zip(*(line.split(',') for line in lines), strict=True))
  for key in ('win_rate', 'standard_error'):
    assert float(own[key]) == rate[key]


def check_harness(run, tmp_path, stories):
  """lm_eval runs a model on a task, and we read its results file, also once more."""
  (tmp_path / 'tasks').mkdir()
  records.write(tmp_path / 'piqa.jsonl', QUESTIONS)
  (tmp_path / 'tasks' / 'piqa.yaml').write_text(TASK.replace('FILE', str(tmp_path / 'piqa.jsonl')))
  run('python', '-m', 'srlm_jax.eval.harness', f'--model=m2={stories}', '--tasks=piqa',
      '--include_path=tasks', '--out=nlp.json')
  run('python', '-m', 'srlm_jax.eval.harness', '--results=m2=lm_eval/m2.json', '--out=again.json')
  table, again = (json.loads((tmp_path / name).read_text()) for name in ('nlp.json', 'again.json'))
  assert table['scores'] == again['scores'] == dict(m2=dict(piqa=50.0))
  assert table['standard_errors'] == again['standard_errors']
  assert 25 < table['standard_errors']['m2']['piqa'] < 30  # of 4 questions
  assert table['metrics'] == dict(piqa='acc_norm,none')
