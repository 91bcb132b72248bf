"""alpaca_eval and FastChat themselves read our answers, and we read what they write.

Their judge is a server in this process. Each program gets an environment of its own, because they
need different versions of openai; $SRLM_ALPACA_EVAL and $SRLM_FASTCHAT may name a Python that has
one of them, and $SRLM_EVAL one that has the extras of `make evaluate`. $SRLM_TORCH is the torch
requirement to install, as in test_extras.
"""
import contextlib
import hashlib
import http.server
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading

from conftest import main, ROOT
import pytest

from srlm_jax import records, schema
from srlm_jax.data import prompt_files

QUESTIONS = [dict(question_id=81 + i, category=category, turns=['Name a nice fruit.', 'Why?'][:n])
             for i, (category, n) in enumerate((*((c, 2) for c in prompt_files.FASTCHAT_TEMPERATURES
                                                  if c != 'arena-hard-200'), ('writing', 1)))]
REFERENCES = ('math', 'reasoning', 'coding')  # categories that FastChat judges with a reference
# Judge prompts in FastChat's format; the words are ours.
TEMPLATES = {
    'single-v1': '{question} {answer}',
    'single-math-v1': '{question} {ref_answer_1} {answer}',
    'single-v1-multi-turn': '{question_1} {answer_1} {question_2} {answer_2}',
    'single-math-v1-multi-turn':
        '{question_1} {ref_answer_1} {answer_1} {question_2} {ref_answer_2} {answer_2}'}


class Judge(http.server.BaseHTTPRequestHandler):
  """Gives every request a score from 1 to 10, and a probability that the first output is better."""
  protocol_version = 'HTTP/1.1'

  def do_POST(self):
    asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    number = int(hashlib.sha256(json.dumps(asked['messages']).encode()).hexdigest()[:8], 16)
    choice = dict(index=0, finish_reason='stop', message=dict(
        role='assistant', content=f'Rating: [[{number % 10 + 1}]]'))
    if asked.get('logprobs'):
      share = (number % 1000 + 0.5) / 1001
      top = [dict(token=token, logprob=math.log(p), bytes=None)
             for token, p in (('m', share), ('M', 1 - share))]
      choice['message']['content'] = 'm'
      choice['logprobs'] = dict(content=[top[0] | dict(top_logprobs=top)])
    answer = json.dumps(dict(
        id='1', object='chat.completion', created=0, model=asked['model'], choices=[choice],
        usage=dict(prompt_tokens=1, completion_tokens=1, total_tokens=2))).encode()
    self.send_response(200)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(answer)))
    self.end_headers()
    self.wfile.write(answer)

  def log_message(self, *_):
    pass


@pytest.fixture
def judge():
  """The address of the judge."""
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Judge) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}/v1'
    server.shutdown()
    thread.join()


def python_with(tmp_path, variable: str, *packages: str) -> str:
  """The Python that the variable names, else that of a new environment with `packages`."""
  python = os.environ.get(variable, '')
  if not python:
    python = str(tmp_path / 'venv' / 'bin' / 'python')
    subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'venv'], check=True)
    subprocess.run([python, '-m', 'pip', 'install', '-q', *packages], check=True)
  return python


@contextlib.contextmanager
def environment(tmp_path, variable: str, *packages: str):
  """-> a function that runs Python with `packages` in `tmp_path`, and returns its output."""
  python = python_with(tmp_path, variable, *packages)

  def run(*words, given='', **variables):
    own = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(
        OPENAI_API_KEY='none', JAX_PLATFORMS='cpu', XLA_FLAGS='') | variables
    done = subprocess.run([python, *words], cwd=tmp_path, env=own, input=given, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
  yield run


@pytest.fixture(scope='module')
def m0(tmp_path_factory):
  """A workdir with the sandbox's M0, as any model may be converted."""
  workdir = tmp_path_factory.mktemp('run')
  main('checkpoint.convert', f'--from_hf={ROOT}/srlm_jax/sandbox/m0', f'--out={workdir}/m0/model')
  return workdir


def answer(workdir, path):
  """M0's answers to the prompts of a file -> their folder."""
  main('sample.respond', '--config=sandbox_m0:tiny', f'--workdir={workdir}', f'--prompts={path}')
  return workdir / 'm0' / f'answers_to_{path.stem}'


@pytest.mark.slow
def test_fastchat_judges_our_answers(m0, judge, tmp_path):
  data = tmp_path / 'data' / 'mt_bench'
  records.write(data / 'question.jsonl', QUESTIONS)
  folder = answer(m0, data / 'question.jsonl')
  (data / 'model_answer').symlink_to(folder / 'model_answer')
  records.write(tmp_path / 'data' / 'judge_prompts.jsonl', [
      dict(name=name, type='single', system_prompt='', prompt_template=text,
           output_format='[[rating]]') for name, text in TEMPLATES.items()])
  records.write(data / 'reference_answer' / 'gpt-4.jsonl', [
      dict(question_id=q['question_id'], choices=[dict(turns=['A fig.', 'It is sweet.'])])
      for q in QUESTIONS if q['category'] in REFERENCES])
  with environment(tmp_path, 'SRLM_FASTCHAT', 'fschat==0.2.36', 'openai<1', 'anthropic', 'pandas',
                   'transformers', os.environ.get('SRLM_TORCH', 'torch')) as run:
    run('-m', 'fastchat.llm_judge.gen_judgment', '--model-list', 'm0', given='\n',
        OPENAI_API_BASE=judge)
    shown = run('-m', 'fastchat.llm_judge.show_result', '--model-list', 'm0')
    table = json.loads(run('-c', 'import json; from fastchat.llm_judge import common; '
                                 'print(json.dumps(common.temperature_config))'))
  assert table == prompt_files.FASTCHAT_TEMPERATURES
  main('eval.mt_bench', f'--judgments={data}/model_judgment/gpt-4_single.jsonl',
       f'--questions={data}/question.jsonl', f'--out={tmp_path}/mt_bench.json')
  found = json.loads((tmp_path / 'mt_bench.json').read_text())['m0']
  assert (found['scored'], found['no_score'], found['absent']) == (17, 0, 0)
  means = [float(x) for x in re.findall(r'^m0 .*?([\d.]+)$', shown, re.MULTILINE)]
  assert means == pytest.approx([found['turn_1'], found['turn_2'], found['overall']], abs=1e-5)


def gamed(hub) -> None:
  """Writes invented values as df_gamed.csv into a cache of the hub, for 805 instructions."""
  rng = random.Random(0)
  folder = hub / 'datasets--tatsu-lab--alpaca_eval'
  (folder / 'snapshots' / '0').mkdir(parents=True)
  (folder / 'refs').mkdir()
  (folder / 'refs' / 'main').write_text('0')
  difficulty = [rng.gauss(0, 1) for _ in range(805)]
  with (folder / 'snapshots' / '0' / 'df_gamed.csv').open('w') as file:
    file.write('model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n')
    for name, mean in ('concise', -1.2), ('verbose', 0.6):
      for i, hard in enumerate(difficulty):
        preference = 1 / (1 + math.exp(rng.gauss(0, 1) - mean - hard))
        file.write(f'{name},{i},{preference},{rng.gauss(mean, 1)},{hard},False\n')


# The instructions are not AlpacaEval's, whose hash is put in place of ours.
COMPARE = """\
import dataclasses, json
from srlm_jax import records
from srlm_jax.eval import alpaca
annotations = alpaca.read_annotations('annotated/weighted_alpaca_eval_gpt4_turbo/annotations.json')
try:
  alpaca.length_controlled(annotations)
except alpaca.InputError as error:
  print(error)
alpaca.DIGEST = records.digest(*(a.instruction for a in annotations))
print(json.dumps([dataclasses.asdict(alpaca.win_rate(annotations)),
                  *alpaca.length_controlled(annotations)]))
"""


@pytest.mark.slow
def test_alpaca_eval_annotates_our_answers_and_we_compute_its_win_rates(m0, judge, tmp_path):
  """The length-controlled one with invented reference annotations: the true ones are on a hub."""
  rows = [dict(instruction=f'Name {i} nice fruits.', output=f'{i} figs.' * (i % 7 + 1),
               generator='gpt4_1106_preview', dataset='helpful_base') for i in range(805)]
  (tmp_path / 'alpaca_eval.json').write_text(json.dumps(rows))
  outputs = answer(m0, tmp_path / 'alpaca_eval.json') / 'model_outputs.json'
  gamed(tmp_path / 'hf' / 'hub')
  hub = dict(HF_HOME=str(tmp_path / 'hf'), HF_HUB_OFFLINE='1')
  with environment(tmp_path, 'SRLM_ALPACA_EVAL', f'{ROOT}', 'alpaca-eval>=0.6,<0.7',
                   'setuptools<81') as run:
    run('-c', 'from alpaca_eval import main; main.main()', 'evaluate',
        f'--model_outputs={outputs}', '--reference_outputs=alpaca_eval.json',
        '--output_path=annotated', '--caching_path=None', '--precomputed_leaderboard=None',
        OPENAI_API_BASE=judge, **hub)
    refused, found = run('-c', COMPARE, PYTHONPATH=str(ROOT), **hub).splitlines()
  assert 'is defined for AlpacaEval\'s 805 instructions in their order' in refused
  found, *controlled = json.loads(found)
  folder, = (tmp_path / 'annotated').iterdir()
  names, values = ((folder / 'leaderboard.csv').read_text().splitlines())
  own = dict(zip(names.split(','), values.split(','), strict=True))
  assert own[''] == 'm0' and own['n_total'] == '805'
  for key, value in dict(
      win_rate=found['win_rate'], standard_error=found['standard_error'], n_wins=found['wins'],
      n_wins_base=found['losses'], n_draws=found['draws'],
      discrete_win_rate=found['discrete_win_rate'], length_controlled_winrate=controlled[0],
      lc_standard_error=controlled[1]).items():
    assert float(own[key]) == pytest.approx(value, abs=1e-6), key
  assert abs(controlled[0] - found['win_rate']) > 1  # the lengths differ


@pytest.mark.slow
def test_the_demo_is_evaluated_and_nothing_twice(demo, tmp_path):
  """launch/evaluate_demo.sh; its outside judge is the oracle, so the two must agree."""
  workdir = tmp_path / 'run'
  shutil.copytree(demo[0], workdir)
  python = python_with(tmp_path, 'SRLM_EVAL', f'{ROOT}[eval,judge,serve]')

  def evaluate() -> str:
    done = subprocess.run(
        [ROOT / 'launch' / 'evaluate_demo.sh', workdir], capture_output=True, text=True,
        env=os.environ | dict(PYTHON=python, PYTHONPATH=str(ROOT), JAX_PLATFORMS='cpu',
                              XLA_FLAGS=''))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
  evaluate()
  graded = (records.read(workdir / model / 'oracle' / 'graded.jsonl', schema.GradedResponse)
            for model in ('m3', 'sft'))
  m3, sft = ({r.prompt_id: r.score for r in rows} for rows in graded)
  found = json.loads((workdir / 'eval' / 'm3_sft' / 'head_to_head.json').read_text())
  assert (found['count'], found['judge']) == (24, 'oracle') and len(m3) == 24
  assert found['wins'] == sum(score > sft[name] for name, score in m3.items())
  assert found['losses'] == sum(score < sft[name] for name, score in m3.items())
  scores = json.loads((workdir / 'eval' / 'harness.json').read_text())['scores']
  assert {model: {*tasks} for model, tasks in scores.items()} == dict.fromkeys(
      ('m1', 'm2', 'm3'), {'sandbox_choice', 'sandbox_exact'})
  assert len([*(workdir / 'eval').glob('m*_*/head_to_head.json')]) == 5
  assert (workdir / 'eval' / 'distributions.json').exists()
  page = (workdir / 'report.html').read_text()
  assert 'sandbox_choice' in page and 'Distributions of the prompts' in page
  assert ', 0 of them new' in evaluate()
