"""The judge behind an API: real servers, of the sandbox's oracle and one that breaks."""
from collections import Counter
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time

from boards import shown
from conftest import config_flags, main, real_data, ROOT, run_main, server
import numpy as np
import processes
import pytest
import samples
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
import test_evaluators
import uvicorn

from srlm_jax import (
  config as configs,
  InputError,
  lock,
  loop,
  model_files,
  preemption,
  records,
  schema,
  stage,
)
from srlm_jax.conversation import Message
from srlm_jax.data import prompt_files
from srlm_jax.eval import endpoint, head_to_head, mt_bench
from srlm_jax.reward import judges
from srlm_jax.sandbox import endpoint as oracle, world

SECRET = 'sk-marker-3141592653589793'


@contextlib.contextmanager
def serving(app):
  """A server of the application in a thread -> its URL.

  Its logging is not configured: that would close absl's log handler and, inside a test with capfd,
  the stream that this one writes to, pytest's stderr of the session.
  """
  http = uvicorn.Server(uvicorn.Config(app, port=0, log_level='critical', log_config=None,
                                       timeout_graceful_shutdown=0))
  thread = threading.Thread(target=http.run, daemon=True)
  thread.start()
  while not http.started:
    assert thread.is_alive()
    time.sleep(0.01)
  try:
    yield f'http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}/v1'
  finally:
    http.should_exit = True
    thread.join()


@contextlib.contextmanager
def sandbox(tmp_path, fail=0, key=''):
  """The oracle -> its URL, and a function that reads its log."""
  path = tmp_path / 'server.log'
  with serving(oracle.Api(fail, str(path), key).app()) as url:
    yield url, lambda: [json.loads(line) for line in path.read_text().splitlines()]


def section(url, **changes):
  c = configs.get('m2', 'tiny').endpoint.unlock()
  c.url, c.model = url, 'oracle'
  c.update(changes)
  return c


def asked(count):
  """Requests of the judge template, in the sandbox."""
  judge, rng = judges.load('sandbox'), np.random.default_rng(0)
  for i in range(count):
    text = judge.render(prompt=world.instruction(rng), response=f'Sure, pear {i}.')
    yield endpoint.Request(f'q{i}', (Message('user', text),))


@pytest.fixture
def quick(monkeypatch):
  """Pauses between attempts are short."""
  monkeypatch.setattr(endpoint, 'LONGEST_PAUSE', 0.05)
  monkeypatch.setattr(oracle, 'RETRY_AFTER', 0.2)


def test_every_template_gets_the_grade_in_its_own_format():
  prompt, responses = 'Name two nice fruits.', ('Sure, pear and fig.', 'pear and fig.', 'dog')
  for name in oracle.TEMPLATES:
    judge = judges.load(name)
    for response in responses:
      score, _ = judge.parse(oracle.answer(judge.render(prompt=prompt, response=response)))
      wanted = judge.nearest(sum(world.grade(prompt, response)) / 5 * judge.highest)
      assert score == wanted, name
  for first, second, verdict in [(0, 1, 'A'), (2, 1, 'B'), (1, 1, 'tie')]:
    text = head_to_head.render(prompt, responses[first], responses[second])
    assert head_to_head.parse(oracle.answer(text)) == verdict
  assert mt_bench.rating(oracle.answer(mt_bench.render((prompt,), responses[:1], ()))) == 10
  both = mt_bench.render(('What do cows eat?', prompt), responses[:2], ('grass', 'pear and fig'))
  assert mt_bench.rating(oracle.answer(both)) == 6
  assert oracle.answer('Hello.') is None
  assert judge.parse(oracle.answer(judge.render(prompt='Why?', response='x')))[0] is None


def test_kept_answers_are_given_one_at_a_time(tmp_path):
  """A resumed run has one of their requests in memory, not all."""
  read = []

  def requests(count):
    for request in asked(count):
      read.append(request.id)
      yield request
  with sandbox(tmp_path) as (url, log):
    c = section(url, concurrency=1)
    with endpoint.open(c, tmp_path / 'out') as client:
      dict(client.ask(asked(20)))
    with endpoint.open(c, tmp_path / 'out') as client:
      read_before = [(len(read), name) for name, _ in client.ask(requests(24))]
  assert read_before[:20] == [(i + 1, f'q{i}') for i in range(20)]
  assert [name for _, name in read_before] == read == [f'q{i}' for i in range(24)]
  assert len(log()) == 24


def test_one_failure_in_five_and_all_answers_arrive(tmp_path, quick):
  wanted = {r.id: oracle.answer(r.messages[0].content) for r in asked(40)}
  with sandbox(tmp_path, fail=5) as (url, log):
    c = section(url, timeout=0.5, price_in=2.0, price_out=10.0)
    with endpoint.open(c, tmp_path / 'out') as client:
      assert dict(client.ask(asked(40))) == wanted
      cost, sent = client.cost, client.sent
    seen = log()
    outcomes = Counter(line['outcome'] for line in seen)
    # An answer that comes after the time-out, on a slow machine, is asked for again.
    assert outcomes['answered'] >= 40 and {*outcomes} == {'answered', '429', '500', 'hangs'}
    assert sent == len(seen)
    kept = list(records.read(tmp_path / 'out' / endpoint.FILE, schema.JudgeAnswer))
    paid = sum(2e-6 * a.prompt_tokens + 1e-5 * a.answer_tokens for a in kept)
    assert cost == pytest.approx(paid) and cost > 0
    for line in seen:  # Retry-After is obeyed
      if line['outcome'] == '429':
        later = min(x['time'] for x in seen
                    if x['request'] == line['request'] and x['number'] > line['number'])
        assert later - line['time'] >= 0.2
    # The same requests again: all from the file, at the same cost.
    with endpoint.open(c, tmp_path / 'out') as client:
      assert dict(client.ask(asked(40))) == wanted
      assert (client.sent, client.cost) == (0, cost)


def test_only_what_is_missing_is_asked(tmp_path):
  wanted = {r.id: oracle.answer(r.messages[0].content) for r in asked(9)}
  with sandbox(tmp_path) as (url, log):
    def ask(requests, **changes):
      with endpoint.open(section(url, **changes), tmp_path / 'out') as client:
        found = dict(client.ask(requests))
        assert client.cost is None  # without prices
        return found, client.sent
    assert ask(asked(8)) == ({k: wanted[k] for k in [*wanted][:8]}, 8)
    assert ask(asked(9)) == (wanted, 1)
    path = tmp_path / 'out' / endpoint.FILE
    path.write_bytes(path.read_bytes()[:-5])  # a kill cut off the last line
    assert ask(asked(9)) == (wanted, 1)
    one = dict(q0=wanted['q0'])
    for changes in (dict(temperature=1.0), dict(model='other'), dict(max_tokens=7)):
      assert ask(asked(1), **changes) == (one, 1)
    again = endpoint.Request('q0', next(asked(1)).messages, 1)  # another sample
    assert ask([again]) == (one, 1)
    assert ask([again, *asked(9)]) == (wanted, 0)


def test_equal_requests_are_sent_once(tmp_path):
  one = next(asked(1)).messages
  with sandbox(tmp_path) as (url, log), endpoint.open(section(url), tmp_path / 'out') as client:
    found = dict(client.ask(endpoint.Request(str(i), one) for i in range(20)))
    assert len(found) == 20 and len({*found.values()}) == 1 and len(log()) == 1


def test_the_rate_limit_is_honoured(tmp_path):
  start = time.time()
  with sandbox(tmp_path) as (url, log):
    with endpoint.open(section(url, per_minute=1200), tmp_path / 'out') as client:
      assert len(dict(client.ask(asked(16)))) == 16
    times = sorted(line['time'] for line in log())
  assert all(when >= start + i / 20 for i, when in enumerate(times))  # 20 per second


def breaking(reply, calls):
  """A server whose answer to request number i is `reply(i, request)`."""
  async def chat(request):
    calls.append(await request.json())
    return reply(len(calls), request)
  return Starlette(routes=[Route('/v1/chat/completions', chat, methods=['POST'])])


def completion(content, **fields):
  return JSONResponse(dict(id='x', object='chat.completion', created=0, model='m', choices=[
      dict(index=0, finish_reason='stop', message=dict(role='assistant', content=content)) | fields
  ]))


def ask_one(reply, folder, **changes):
  calls = []
  with serving(breaking(reply, calls)) as url:
    with endpoint.open(section(url, **changes), folder) as client:
      return [answer for _, answer in client.answers(asked(1))], calls


@pytest.mark.parametrize('status', [400, 401, 403, 404, 422])
def test_a_refused_request_fails_at_once_with_one_sentence(tmp_path, monkeypatch, status, capfd):
  monkeypatch.setenv('JUDGE_KEY', SECRET)

  def refuse(_, request):  # some servers repeat the key
    message = f'No,\n{request.headers["authorization"]}'
    return JSONResponse(dict(error=dict(message=message)), status)
  with serving(breaking(refuse, calls := [])) as url:
    with endpoint.open(section(url, key_env='JUDGE_KEY', concurrency=1), tmp_path) as client:
      with pytest.raises(InputError, match=f'answered {status}: No, Bearer .key.') as error:
        list(client.ask(asked(5)))
  assert len(calls) == 1
  assert '\n' not in str(error.value) and SECRET not in repr(error.getrepr(style='long'))
  assert SECRET not in ''.join(capfd.readouterr())


def test_strange_answers(tmp_path, quick):
  def strange(i, _):
    return {1: JSONResponse(dict(error='no choices')), 2: Response('<html>'),
            3: Response('{', media_type='application/json'), 4: JSONResponse([1]),
            5: JSONResponse({}, 503)}.get(i) or Response(
                completion('Score: 4 half').body.replace(b'half', b'\\ud83d'),
                media_type='application/json')
  (answer,), calls = ask_one(strange, tmp_path)
  assert (answer.text, answer.finish, len(calls)) == ('Score: 4 ?', 'eos', 6)
  assert calls[0]['max_tokens'] == 1024 and calls[0]['temperature'] == 0
  (answer,), calls = ask_one(lambda *_: completion(None, finish_reason='length'), tmp_path,
                             model='b', temperature=-1)
  assert (answer.text, answer.finish) == ('', 'length') and 'temperature' not in calls[0]
  with pytest.raises(InputError, match=r'answered 500: .* \(3 attempts\); the answers so far are'):
    ask_one(lambda *_: JSONResponse({}, 500), tmp_path, model='c', attempts=3)
  with pytest.raises(InputError, match='gave no answer: Connection error. .*2 attempts'):
    with endpoint.open(section('http://127.0.0.1:9/v1', attempts=2), tmp_path / 'd') as client:
      list(client.ask(asked(3)))


def test_replies_of_any_shape(tmp_path, quick, monkeypatch):
  monkeypatch.setenv('JUDGE_KEY', SECRET)
  now = {}

  def reply(_, request):
    key = request.headers['authorization']
    return JSONResponse(now) if now else completion(key)

  def ask(body, folder=tmp_path, **changes):
    now.clear()
    now.update(body)
    with endpoint.open(section(url, **changes), folder) as client:
      (_, answer), = client.answers(asked(1))
      return answer, client.sent
  message = dict(role='assistant', content='8')
  one = dict(index=0, finish_reason='stop', message=message)
  parts = [dict(type='text', text='Score: '), dict(type='image'), dict(type='text', text='8')]
  bodies = [
      (dict(choices=[dict(one, message=dict(message, content=parts))]), 'Score: 8', (0, 0)),
      (dict(choices=[one], usage=dict(prompt_tokens=3.5, completion_tokens=2)), '8', (3, 2)),
      (dict(choices=[one], usage=dict(prompt_tokens='3', completion_tokens=-1)), '8', (0, 0)),
      (dict(choices=[one], usage=[]), '8', (0, 0)),
      (dict(choices=[dict(one, message=dict(
          message, content='<think>at first [[3]]</think> [[8]]'))]), '[[8]]', (0, 0))]
  failing = ({'a': 1}, [dict(one, message='8')], [dict(one, message=dict(content=8))], [{}], ['8'],
             [dict(one, message=dict(content=[1]))])
  with serving(breaking(reply, [])) as url:
    for i, (body, text, counts) in enumerate(bodies):
      answer, _ = ask(body, model=f'm{i}')
      assert (answer.text, answer.prompt_tokens, answer.answer_tokens) == (text, *counts)
      assert ask({}, model=f'm{i}') == (answer, 0)  # the file can be read
    for choices in failing:
      with pytest.raises(InputError, match='answered without a (message|text) .2 attempts'):
        ask(dict(choices=choices), tmp_path / 'failed', attempts=2)
    # The key is in no file also where a server repeats it.
    assert ask({}, key_env='JUDGE_KEY')[0].text == 'Bearer [key]'
  assert SECRET not in (tmp_path / endpoint.FILE).read_text()


def test_the_variables_of_openai_go_to_openai_alone(tmp_path, monkeypatch):
  own = dict(OPENAI_ORG_ID='organization-x', OPENAI_PROJECT_ID='project-x',
             OPENAI_CUSTOM_HEADERS='X-Mine: header-x', OPENAI_API_KEY='key-x')
  for name, value in own.items():
    monkeypatch.setenv(name, value)
  seen = []

  def reply(_, request):
    seen.append(str(request.headers.raw))
    return completion('8')
  ask_one(reply, tmp_path)
  assert seen and not any(value.split()[-1] in seen[0] for value in own.values())
  assert all(os.environ[name] == value for name, value in own.items())
  with endpoint.open(section('https://api.openai.com/v1'), tmp_path) as client:
    sent = client._api.default_headers
    assert sent['OpenAI-Organization'] == 'organization-x' and sent['X-Mine'] == 'header-x'


def test_one_program_judges_in_a_folder(tmp_path):
  answers(tmp_path / 'a', 1)
  a = f'--a={tmp_path}/a/answers', f'--b={tmp_path}/a/answers'
  records.write(tmp_path / 'model_answer' / 'm.jsonl', [
      dict(question_id=1, choices=[dict(turns=['x'])])])
  questions = {1: prompt_files.Turns(question_id=1, turns=('Why?',))}
  with lock.held_output(tmp_path / 'out', '--out'):
    said = main('eval.head_to_head', *a, f'--out={tmp_path}/out', '--judge=http://127.0.0.1:9/v1',
                '--judge_model=x', code=1)
    assert 'out is in use by' in said and 'use another --out' in said
    with pytest.raises(InputError, match='in use by .* use another folder for --judgments'):
      mt_bench.judge_answers([tmp_path / 'model_answer' / 'm.jsonl'], section('http://x/v1'),
                             questions, tmp_path / 'out' / 'j.jsonl')
  assert not (tmp_path / 'out').exists()


def test_a_reply_that_was_cut_gives_no_verdict(tmp_path):
  request = head_to_head.JudgeRequest(id='x', prompt_id='p', order='ab', text='Which one?')
  for finish, verdict in (('length', None), ('stop', 'A')):
    text = 'A begins well, so [[A]] seems ahead, but'
    with serving(breaking(lambda *_: completion(text, finish_reason=finish), [])) as url:  # noqa: B023
      with endpoint.open(section(url), tmp_path / finish) as client:
        replies = head_to_head.ask(client, [request], 1)
    assert head_to_head.verdicts([request], replies) == {'p': (verdict,)}


def lines(path):
  return path.read_bytes().count(b'\n') if path.exists() else 0


def in_thread(run):
  """Starts `run` -> the thread, and a list that will hold its result."""
  said = []
  thread = threading.Thread(target=lambda: said.append(run()))
  thread.start()
  return thread, said


def test_sigterm_keeps_the_answers(tmp_path):
  answers(tmp_path / 'a', 60)
  answers(tmp_path / 'b', 60, worse=True)
  with sandbox(tmp_path) as (url, log):
    thread, said = in_thread(lambda: run_main(
        'eval.head_to_head', f'--a={tmp_path / "a" / "answers"}', '--judge_per_minute=1200',
        f'--b={tmp_path / "b" / "answers"}', f'--out={tmp_path / "out"}', f'--judge={url}',
        '--judge_model=oracle'))
    cache = tmp_path / 'out' / endpoint.FILE
    while lines(cache) < 5:
      assert thread.is_alive()
      time.sleep(0.01)
    os.kill(server().pid, signal.SIGTERM)
    thread.join()
    code, _, err = said[0]
    assert code == preemption.EXIT_CODE, err
    assert err.splitlines()[-1] == ('head to head: stopped by SIGTERM; finished records are saved; '
                                    'the same command continues')
    assert lines(cache) == len(log()) < 60  # each request that was sent is answered and kept


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_run_on_two_hosts_judged_by_the_endpoint_and_sigterm(tmp_path, victim):
  """The first host judges. A SIGTERM to either one stops both, and the same command continues."""
  rows = [samples.response(f'p{i}/{j}', prompt='Name two nice fruits.', response=f'Sure, {i} {j}.')
          for i in range(10) for j in range(3)]
  records.write(tmp_path / 'm2' / 'respond' / 'responses-00000-of-00001.jsonl', rows)
  folder = tmp_path / 'm2' / 'judge'
  with sandbox(tmp_path) as (url, log):
    def start(per_minute):
      return processes.start(
          2, sys.executable, '-m', 'srlm_jax.eval.endpoint', '--config=iter2:tiny',
          f'--workdir={tmp_path}', '--config.judge.by=endpoint', f'--config.endpoint.url={url}',
          '--config.endpoint.model=oracle', f'--config.endpoint.per_minute={per_minute}')
    hosts = start(120)
    while lines(folder / endpoint.FILE) < 3:
      assert not any(host.poll() for host in hosts)
      time.sleep(0.01)
    hosts[victim].send_signal(signal.SIGTERM)
    stopped = processes.ends(hosts)
    assert [code for code, _ in stopped] == [preemption.EXIT_CODE] * 2, stopped
    for _, said in stopped:
      assert said[-1] == ('m2/judge: stopped by SIGTERM; finished records are saved; the same '
                          'command continues')
    kept = lines(folder / endpoint.FILE)
    assert 3 <= kept == len(log()) < 90 and not (folder / 'done.json').exists()
    ended = processes.ends(start(0))
    assert [code for code, _ in ended] == [0, 0], ended
    assert len(log()) == 90  # none twice
  made = list(records.read_shards(folder, 'judgements', schema.Judgement))
  assert [j.id for j in made] == [f'{r.id}/{j}' for r in rows for j in range(3)]


@pytest.mark.parametrize('changes, message', [
    (dict(url=''), 'no judge is configured'), (dict(model=''), 'its model is not named'),
    (dict(key_env='NO_SUCH_VARIABLE'), 'NO_SUCH_VARIABLE, which should have'),
    (dict(key_env=SECRET), 'is not shown'),
    (dict(url=f'http://me:{SECRET}@x/v1'), 'without a user'),
    (dict(url=f'http://x/v1?key={SECRET}'), 'without a user'),
    (dict(url='no/such/folder'), 'neither a folder nor'),
    (dict(url='.', temperature=-1), 'give a temperature')])
def test_a_bad_section_is_refused(tmp_path, changes, message):
  with pytest.raises(InputError, match=message) as error:
    endpoint.open(section(**(dict(url='http://x/v1') | changes)), tmp_path)
  assert SECRET not in str(error.value)


def answers(folder, count, worse=False):
  rng = np.random.default_rng(0)
  rows = []
  for i in range(count):
    prompt = world.instruction(rng, 'test')
    right = world.listing(world.require(prompt).right[:world.require(prompt).count])
    response = right if worse and i % 3 else f'Sure, {right}.'
    rows.append(samples.response(f'p{i}/0', prompt=prompt, response=response))
  records.write(folder / 'answers' / records.shard_name('responses', 0, 1), rows)
  graded = [schema.GradedResponse(
      **{name: getattr(r, name) for name in schema.Response.__dataclass_fields__},
      score=float(sum(world.grade(r.prompt, r.response)))) for r in rows]
  records.write(folder / 'oracle' / 'graded.jsonl', graded)


@pytest.mark.slow
def test_head_to_head_survives_sigkill_and_shows_the_key_nowhere(tmp_path):
  answers(tmp_path / 'a', 60)
  answers(tmp_path / 'b', 60, worse=True)
  set_key = f'import os; os.environ["JUDGE_KEY"] = {SECRET!r}; os.environ["OPENAI_LOG"] = "debug"'

  def judged(*flags):
    return run_main('eval.head_to_head', f'--a={tmp_path / "a" / "answers"}',
                    f'--b={tmp_path / "b" / "answers"}', f'--out={tmp_path / "out"}', *flags,
                    before=set_key)
  with sandbox(tmp_path, key=SECRET) as (url, log):
    flags = f'--judge={url}', '--judge_model=oracle', '--judge_key_env=JUDGE_KEY'
    cache = tmp_path / 'out' / endpoint.FILE
    thread, said = in_thread(lambda: judged(*flags, '--judge_per_minute=2400'))
    while lines(cache) < 40:
      assert thread.is_alive()
      time.sleep(0.01)
    os.kill(server().pid, signal.SIGKILL)
    thread.join()
    assert said[0][0] == -signal.SIGKILL
    saved, before = lines(cache), len(log())
    assert 40 <= saved < 110 and before - saved <= 8  # those under way at the kill
    said.append(judged(*flags))
    assert said[1][0] == 0, said[1]
    # Every request that had been answered and saved was sent once.
    counts = Counter(line['request'] for line in log())
    assert sum(counts.values()) - len(counts) == before - saved
    with pytest.raises(InputError, match='answered 401: the request lacks the key; name the'):
      ask_one(lambda *_: JSONResponse(dict(error=dict(message='the request lacks the key')), 401),
              tmp_path / 'refused')
  both = head_to_head.Both(*(tmp_path / x / 'oracle' for x in 'ab'), is_graded=True)
  graded = head_to_head.compare_scores((a.score, b.score) for a, b in both)
  found = json.loads((tmp_path / 'out' / 'head_to_head.json').read_text())
  assert found == found | graded and found['wins'] == 40
  assert found['judge'] == 'oracle' and found['first_wins'] == found['second_wins'] == 40
  for path in tmp_path.rglob('*'):
    assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
  assert SECRET not in str(said)


def test_mt_bench_graded_by_the_oracle(tmp_path):
  prompts = ['Name two nice fruits.', 'What do cows eat?']
  questions = [dict(question_id=1, category='math', turns=prompts),
               dict(question_id=2, category='stem', turns=prompts)]
  records.write(tmp_path / 'question.jsonl', questions)
  for model, texts in dict(m1=['pear', 'nuts'], m2=['Sure, pear and fig.', 'grass']).items():
    records.write(tmp_path / 'model_answer' / f'{model}.jsonl', [
        dict(question_id=i, answer_id='x', model_id=model, tstamp=0.0,
             choices=[dict(index=0, turns=texts)]) for i in (1, 2)])
  path, out = tmp_path / 'judge' / 'oracle_single.jsonl', tmp_path / 'mt_bench.json'
  asked_of = {q['question_id']: prompt_files.Turns(**q) for q in questions}

  def grade(model, c, judge_prompts='', references='', path=path, limit=None):
    answers = tmp_path / 'model_answer' / f'{model}.jsonl'
    some = dict([*asked_of.items()][:limit])
    mt_bench.judge_answers([answers], c, some, path, judge_prompts, references)
    return mt_bench.scores(mt_bench.read_judgments(path, asked_of), asked_of)
  with sandbox(tmp_path) as (url, log):
    grade('m1', section(url))
    main('eval.mt_bench', f'--questions={tmp_path / "question.jsonl"}', f'--judgments={path}',
         f'--out={out}', f'--answers={tmp_path / "model_answer" / "m2.jsonl"}', f'--judge={url}',
         '--judge_model=oracle')  # the lines of m1 stay
    found = json.loads(out.read_text())
    assert {name: (row['turn_1'], row['turn_2'], row['scored'], row['judge'])
            for name, row in found.items()} == dict(m1=(4, 4, 4, 'oracle'), m2=(10, 6, 4, 'oracle'))
    # FastChat's prompts are filled as FastChat does.
    templates = {name: dict(
        name=name, type='single', system_prompt='Be fair.', output_format='[[rating]]',
        prompt_template=('{ref_answer_1}\n' if 'math' in name else '') + (
            '<question_2>\n{question_2}\n</question_2>\n<answer_2>\n{answer_2}\n</answer_2>'
            if 'turn' in name else '<question>\n{question}\n</question>\n<answer>\n{answer}\n'
            '</answer>')) for name in mt_bench.FASTCHAT.values()}
    file = tmp_path / 'judge_prompts.jsonl'
    records.write(file, templates.values())
    with pytest.raises(InputError, match='question 1 .math. is graded beside a reference'):
      grade('m2', section(url), file)
    reference = tmp_path / 'model_answer' / 'm2.jsonl'
    # Judgments that were there stay: those of other questions, and of other judges and prompts.
    before = path.read_bytes()
    grade('m2', section(url), limit=1)
    assert len(before.splitlines()) == lines(path) == 8
    before = path.read_bytes()
    for c, prompts, message in [(section(url, model='other'), '', 'judgments of m2 by oracle'),
                                (section(url), file, 'would be by oracle with FastChat.s prompts')]:
      with pytest.raises(InputError, match=message):
        grade('m2', c, prompts, reference)
    assert path.read_bytes() == before
    path = path.with_name('fastchat.jsonl')
    again = grade('m2', section(url), file, reference, path)
    assert dataclasses.asdict(again['m2']) == found['m2']
  made = [line for _, line in records.read_any(path)]
  assert {(x['question_id'], x['turn'], x['judge'][1]) for x in made} == {
      (1, 1, 'single-math-v1'), (1, 2, 'single-math-v1-multi-turn'), (2, 1, 'single-v1'),
      (2, 2, 'single-v1-multi-turn')}
  assert made[0]['user_prompt'].startswith('Sure, pear and fig.\n<question>')
  records.write(tmp_path / 'short.jsonl', [
      dict(question_id=i, choices=[dict(turns=['pear'])]) for i in (1, 2)])
  with pytest.raises(InputError, match='answers 1 of the 2 turns'):
    mt_bench.read_answers(tmp_path / 'short.jsonl', asked_of)


class Strange(test_evaluators.Judge):
  """Some of its grades are none."""

  def grade(self, number):
    return ('Rating: [[0]]', 'Rating: [[70]]', 'I cannot tell.', 'Rating: [7.5]', 'Rating: [[9]]',
            '[[3]] at first, then [[4]]')[number % 6]


@pytest.mark.slow
def test_judgments_equal_those_of_fastchat_and_its_table_shows_them(tmp_path):
  source = real_data('prompts/mt_bench_questions.jsonl')
  data, ours = tmp_path / 'data' / 'mt_bench', tmp_path / 'ours' / 'gpt-4_single.jsonl'
  data.mkdir(parents=True)
  shutil.copy(source, data / 'question.jsonl')
  questions = mt_bench.read_questions(source)
  for file in ('model_answer/m1', 'model_answer/m2', 'reference_answer/gpt-4'):
    records.write(data / f'{file}.jsonl', [
        dict(question_id=i, answer_id='x', model_id='x', tstamp=0.0,
             choices=[dict(index=0, turns=[f'{file} {i} {{question}}', 'Why not?'])])
        for i in questions])
  prompts = tmp_path / 'data' / 'judge_prompts.jsonl'
  records.write(prompts, [
      dict(name=name, type='single', system_prompt='Be fair.', prompt_template=text,
           output_format='[[rating]]') for name, text in test_evaluators.TEMPLATES.items()])
  with test_evaluators.environment(tmp_path, 'SRLM_FASTCHAT', 'fschat==0.2.36', 'openai<1',
                                   'anthropic', 'pandas', 'transformers', 'torch') as run, \
      test_evaluators.serving(Strange) as judge:  # its answers depend on all of a request
    run('-m', 'fastchat.llm_judge.gen_judgment', given='\n', OPENAI_API_BASE=judge)
    files = (f'--answers={data}/model_answer/{model}.jsonl' for model in ('m1', 'm2'))
    main('eval.mt_bench', *files, f'--questions={source}', f'--judgments={ours}',
         f'--judge_prompts={prompts}', f'--references={data}/reference_answer/gpt-4.jsonl',
         f'--judge={judge}', '--judge_model=gpt-4', f'--out={tmp_path}/mt_bench.json')
    shown = [run('-m', 'fastchat.llm_judge.show_result', *flags).split('\n', 2)[2]
             for flags in ((), ('--input-file', str(ours)))]
  assert shown[0] == shown[1] and 'm2' in shown[0]
  found = [sorted(({k: v for k, v in line.items() if k != 'tstamp'}
                   for _, line in records.read_any(path)),
                  key=lambda x: (x['model'], x['question_id'], x['turn']))
           for path in (ours, data / 'model_judgment' / 'gpt-4_single.jsonl')]
  assert len(found[0]) == 320 and found[0] == found[1]
  assert {line['score'] for line in found[0]} == {0, 70, -1, 7.5, 9, 3}


def test_the_judge_of_a_run_is_checked():
  for changes, message in [
      ((), 'endpoint.url is empty'), (('endpoint.url=http://x/v1',), 'endpoint.model is empty'),
      (('endpoint.url=folder',), "'folder'; it is empty, m0"),
      (('endpoint.url=m1', f'endpoint.key_env={SECRET}'), 'is not shown')]:
    with pytest.raises(InputError, match=message) as error:
      loop.load_config('m2', 'tiny', '', '', ['judge.by=endpoint', *changes])
    assert SECRET not in str(error.value)
  config = loop.load_config('m2', 'tiny', '', '', [
      'judge.by=endpoint', 'endpoint.url=m1', 'pairs.strategy=temporal'])
  with pytest.raises(InputError, match='temporal also needs judgements by a model of the run'):
    loop.refuse_mistakes(config)


def test_a_model_that_refuses_a_temperature_judges_a_run(tmp_path):
  records.write(tmp_path / 'm2' / 'respond' / 'responses-00000-of-00001.jsonl', [
      samples.response('p0/0', prompt='Name two nice fruits.', response='pear')])
  config = configs.get('m2', 'tiny')
  config.judge.by, config.endpoint.model, config.endpoint.temperature = 'endpoint', 'm', -1.0
  with serving(breaking(lambda *_: completion('Score: 4'), calls := [])) as url:
    config.endpoint.url = url
    endpoint.run(config, tmp_path)
  assert len(calls) == 3 and not any('temperature' in call for call in calls)
  manifest = json.loads((tmp_path / 'm2' / 'judge' / 'manifest.json').read_text())
  assert manifest['config']['judge.temperature'] == -1


def test_a_run_is_judged_by_the_endpoint(tmp_path, monkeypatch, capfd):
  rows = [samples.response(f'p{i}/{j}', prompt='Name two nice fruits.', response=text)
          for i in range(3) for j, text in enumerate(('Sure, pear and fig.', 'pear', 'dog'))]
  records.write(tmp_path / 'm2' / 'respond' / 'responses-00000-of-00001.jsonl', rows)
  config = configs.get('m2', 'tiny')
  config.judge.by = 'endpoint'
  monkeypatch.setenv('JUDGE_KEY', SECRET)
  with sandbox(tmp_path, fail=7, key=SECRET) as (url, log):
    config.endpoint.url, config.endpoint.model = url, 'oracle'
    config.endpoint.timeout, config.endpoint.key_env = 0.3, 'NO_SUCH_VARIABLE'
    with pytest.raises(InputError, match='NO_SUCH_VARIABLE'):
      endpoint.run(config, tmp_path)
    assert not (tmp_path / 'm2' / 'judge').exists()
    config.endpoint.key_env = 'JUDGE_KEY'
    endpoint.run(config, tmp_path)
    sent = len(log())
    config.endpoint.url = 'http://127.0.0.1:9/v1'  # done: neither the URL nor a request matters
    endpoint.run(config, tmp_path)
    assert len(log()) == sent
    folder = tmp_path / 'm2' / 'judge'
    (folder / 'done.json').unlink()  # as if killed
    endpoint.run(config, tmp_path)
    assert len(log()) == sent
  found = shown(folder / 'tensorboard' / 'judgements')
  assert found['parse_rate'] == {27: 1} and found['score'] == {27: pytest.approx(7 / 3)}
  assert 'score ' in found['samples/text_summary'][27]
  made = list(records.read_shards(folder, 'judgements', schema.Judgement))
  assert [j.id for j in made] == [f'{r.id}/{j}' for r in rows for j in range(3)]
  assert [j.score for j in made] == [5.0] * 3 + [2.0] * 3 + [0.0] * 3 + ([5.0] * 3 + [2.0] * 3 +
                                                                        [0.0] * 3) * 2
  manifest = (folder / 'manifest.json').read_text()
  assert json.loads(manifest)['config']['endpoint.model'] == 'oracle' and url not in manifest
  for path in tmp_path.rglob('*'):
    assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
  said = capfd.readouterr().out
  assert 'this failure is deliberate; the request is repeated in' in said and SECRET not in said
  config.endpoint.model = 'another'
  with pytest.raises(InputError, match='another config.endpoint.model .oracle, now another'):
    endpoint.run(config, tmp_path)


@pytest.mark.slow
def test_the_loop_judged_by_the_endpoint_equals_that_of_the_oracle(tmp_path):
  changes = [f'--set={x[9:]}' if x.startswith('--config.') else x for x in config_flags('m2')]
  run = tmp_path / 'endpoint'

  def looped(folder, *flags):
    return main('loop', '--size=tiny', '--last=m2', f'--workdir={folder}', *changes, *flags)
  with sandbox(tmp_path, fail=25) as (url, _):
    looped(run, '--set=m2:judge.by=endpoint', f'--set=endpoint.url={url}',
           '--set=endpoint.model=oracle', '--set=endpoint.timeout=2')
  looped(tmp_path / 'oracle', '--set=m2:judge.by=oracle')
  for name in ('pairs/scores.jsonl', 'pairs/pairs.jsonl', 'oracle/graded.jsonl'):
    assert (run / 'm2' / name).read_bytes() == (tmp_path / 'oracle' / 'm2' / name).read_bytes()


@pytest.mark.slow
def test_a_judge_in_a_folder_equals_the_sampler_that_judges_itself(tmp_path):
  """M0 in place of M1, as if it was trained here: in both stages, and as a client."""
  own, other = tmp_path / 'own', tmp_path / 'other'
  model = own / 'm1' / 'model'
  main('checkpoint.convert', f'--from_hf={ROOT}/srlm_jax/sandbox/m0', f'--out={model}')
  stage.write_json(model / 'manifest.json', dict(format=stage.FORMAT, config=dict(chat='plain')))
  stage.write_json(model / 'done.json', dict(
      files={}, seconds=0, params=model_files.recorded_hash(model)))
  rng = np.random.default_rng(0)
  rows = [samples.response(f'p{i}/{j}', prompt=world.instruction(rng), response=text)
          for i in range(8) for j, text in enumerate(('Sure, pear and fig.', 'dog'))]
  records.write(own / 'm2' / 'respond' / 'responses-00000-of-00001.jsonl', rows)
  shutil.copytree(own, other)

  def judged(program, workdir, *flags):
    main(program, '--config=iter2:tiny', f'--workdir={workdir}', '--config.sample.slots=16',
         *flags)
    found = records.read_shards(workdir / 'm2' / 'judge', 'judgements', schema.Judgement)
    found = list(found)
    shutil.rmtree(workdir / 'm2' / 'judge')
    return found
  by_endpoint = '--config.judge.by=endpoint', '--config.endpoint.url=m1'
  sampled = judged('sample.judge', own)
  assert len({j.text for j in sampled}) > 8
  assert judged('eval.endpoint', other, *by_endpoint) == sampled
  greedy = judged('sample.judge', own, '--config.judge.temperature=0.0')
  judge = judges.load('sandbox')
  text = {r.id: judge.render(prompt=r.prompt, response=r.response) for r in rows}
  requests = [endpoint.Request(j.id, (Message('user', text[j.response_id]),)) for j in greedy]
  for sent in (16, 0):  # the second time without loading the model
    with endpoint.open(section(str(model), max_tokens=80), tmp_path / 'out') as client:
      assert dict(client.ask(requests)) == {j.id: j.text for j in greedy}
      assert client.sent == sent
