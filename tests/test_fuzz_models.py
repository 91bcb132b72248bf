"""Readers of models, templates, checkpoints and HTTP: damaged input gives success or InputError.

`make fuzz` runs more inputs. What a reader must survive by other means than an input stands here.
"""
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading

import fuzz_models
import fuzzing
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import InputError, model_files
from srlm_jax.checkpoint import convert, hf
from srlm_jax.conversation import Message
from srlm_jax.data import rendering
from srlm_jax.eval import endpoint

ASKED = endpoint.Request('r', (Message('user', 'Why?'),))
PAIR = "{{ messages[0]['content'] }}{{ bos_token }}"


@pytest.mark.parametrize('target', fuzz_models.TARGETS, ids=lambda target: target.name)
def test_damaged_input_is_read_or_refused(target):
  fuzzing.check(target, 2000)


def render(source: str, content: str = 'Hi') -> str:
  template = rendering.Template(source, 'the template')
  return rendering.render(template, [Message('user', content)], dict(bos_token='<s>'), True)


def test_a_template_costs_bounded_memory_and_the_next_one_is_rendered():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(InputError, match='the template needs more than 512 MiB'):
    render("{{ 'a' * 10 ** 10 }}")
  with pytest.raises(InputError, match='makes a text of more than 16,777,216 characters'):
    render("{{ 'a' * 17 * 10 ** 6 }}")
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # kB
  text = 'é 漢 \ud800 \0\n\u2028' + 'x' * 10**6
  assert render(PAIR, text) == text + '<s>'


def test_an_endless_template_is_stopped():
  with pytest.raises(InputError, match='the template needs more than 3 s of CPU time; correct'):
    render('{{ 9 ** (9 ** 99) }}')
  assert render(PAIR) == 'Hi<s>'


def test_threads_and_a_fork_do_not_mix_their_texts():
  found = {}

  def run(i):
    found[i] = [render(PAIR, f'{i} {j}') for j in range(20)]
  threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == {i: [f'{i} {j}<s>' for j in range(20)] for i in range(4)}
  other = rendering._renderer(os.getpid() + 1)
  assert other is not rendering._renderer(os.getpid())
  other.close()


def test_an_interrupted_rendering_leaves_no_text_for_the_next(monkeypatch):
  render(PAIR)
  renderer = rendering._renderer(os.getpid())
  real = renderer._process

  class Interrupted:
    stdin, kill, wait = real.stdin, real.kill, real.wait
    stdout = property(lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
  renderer._process = Interrupted()
  with pytest.raises(KeyboardInterrupt):
    render(PAIR, 'first')
  assert real.poll() is not None and render(PAIR, 'second') == 'second<s>'


def test_an_unexpected_end_of_the_renderer_is_not_blamed_on_the_template():
  render(PAIR)
  rendering._renderer(os.getpid())._process.kill()
  with pytest.raises(InputError, match='^the template was not rendered, because the process that '
                                       'renders it ended .exit code -9.; start the program again'):
    render(PAIR)
  assert render(PAIR, 'again') == 'again<s>'


def test_the_renderer_is_apart_from_its_program(tmp_path, monkeypatch):
  """It imports nothing of the current folder, and gets no signals of the process group."""
  (tmp_path / 'jinja2.py').write_text('raise SystemExit("a module of the current folder")')
  monkeypatch.chdir(tmp_path)
  renderer = rendering._Renderer()
  assert renderer.ask(('a', [], {}, False)) == ['a', '']
  assert os.getpgid(renderer._process.pid) != os.getpgid(0)
  renderer.close()


def test_a_limit_that_is_lower_already_stays():
  code = """
import resource
from srlm_jax.data.rendering import _limit
for kind, most in ((resource.RLIMIT_NOFILE, 70), (resource.RLIMIT_CPU, 70),
                   (resource.RLIMIT_NOFILE, 30), (resource.RLIMIT_CPU, 100)):
  if most == 70:
    resource.setrlimit(kind, (50, 90))
  _limit(kind, most)
  print(*resource.getrlimit(kind))
"""
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert found.stdout == '50 90\n70 90\n30 90\n90 90\n'


def test_the_renderer_ends_with_its_program():
  code = ('import os; from srlm_jax.data import rendering as r; from srlm_jax.conversation import '
          'Message as M; r.render(r.Template("a", "t"), [M("user", "b")], {}, True); '
          'print(r._renderer(os.getpid())._process.pid)')
  for end in ('', '; os.kill(os.getpid(), 9)'):
    command = f'{code}; import sys; sys.stdout.flush(){end}'
    found = subprocess.run([sys.executable, '-c', command], capture_output=True, text=True,
                           timeout=60)
    pid = int(found.stdout)
    for _ in range(500):
      path = pathlib.Path(f'/proc/{pid}/cmdline')
      if not path.exists() or b'rendering' not in path.read_bytes():
        break
      threading.Event().wait(0.02)
    else:
      pytest.fail('the renderer still runs')


@pytest.fixture
def judge(monkeypatch):
  """A hostile server and its client, which gives up soon."""
  server, client = fuzz_models.hostile()
  yield server, client
  server.endless = b''


def test_an_endless_answer_is_refused(judge, monkeypatch):
  server, client = judge
  server.answer = b'HTTP/1.1 200 X\r\nContent-Type: application/json\r\n\r\n'
  server.endless = b' ' * 2**16
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(endpoint._Failure, match='the answer has more than 16,777,216 bytes'):
    client._one_attempt('key', ASKED)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # kB


def test_an_answer_that_comes_slowly_is_refused(judge):
  server, client = judge
  http = client._api._client
  server.answer = b'HTTP/1.1 200 X\r\nContent-Type: application/json\r\n\r\n'
  server.endless = b' '
  # A clock that is a second further at each look; the server is fast.
  clock = iter(range(10**9))
  real, endpoint.time.monotonic = endpoint.time.monotonic, lambda: next(clock)
  try:
    with pytest.raises(endpoint._Failure, match='did not answer in 20 s'):
      client._one_attempt('key', ASKED)
  finally:
    endpoint.time.monotonic = real
  assert http is client._api._client


def test_a_server_that_asks_for_a_long_pause_ends_the_program(judge):
  server, client = judge
  server.answer = fuzz_models._http(429, '{}', **{'Retry-After': '1e10'})
  with pytest.raises(InputError, match='asks to wait for 10000000000 s; the answers so far'):
    client._answer('key', ASKED)


def test_adapters_that_change_each_other_are_an_error(tmp_path):
  for name, base in (('a', 'b'), ('b', 'a')):
    folder = tmp_path / name
    hash_ = folder / 'steps' / '0' / 'hash' / 'metadata'
    hash_.parent.mkdir(parents=True)
    (folder / 'lora.json').write_text(json.dumps(dict(
        rank=1, alpha=1.0, targets=['q_proj'], base=str(tmp_path / base), step=0, params='x')))
    hash_.write_text(json.dumps(dict(
        format=model_files.HASH_FORMAT, stored='x', float32='x', bfloat16='x',
        files=model_files.hashes(folder))))
  with pytest.raises(InputError, match='a is a LoRA adapter that changes itself'):
    model_files.recorded_hash(tmp_path / 'a')


@pytest.mark.parametrize('name', ['²', '٣', '-1', '1e3'])
def test_other_folders_in_steps_are_no_steps(tmp_path, name):
  (tmp_path / 'steps' / name).mkdir(parents=True)
  (tmp_path / 'steps' / '7').mkdir()
  assert model_files.steps(tmp_path) == [7]


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.model', 'generation_config.json',
                                  'model.safetensors', 'tokenizer.json'])
def test_a_folder_in_place_of_a_file_is_an_error(tmp_path, name):
  shutil.copytree(fuzz_models.source(), tmp_path / 'source')
  (tmp_path / 'source' / name).unlink(missing_ok=True)
  (tmp_path / 'source' / name).mkdir()
  with pytest.raises(InputError, match=name):
    convert.from_hf(tmp_path / 'source', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_header_that_claims_more_than_a_file_has_is_not_read(tmp_path):
  path = tmp_path / 'x.safetensors'
  with path.open('wb') as file:
    file.write((2 * 10**7).to_bytes(8, 'little'))
    file.truncate(10**8)  # takes no space
  with pytest.raises(InputError, match='is not a complete safetensors file .its header claims 20,'):
    hf.read_header(path)


@pytest.mark.parametrize('damage', ['empty', 'cut', 'flipped', 'folder'])
def test_a_damaged_entry_of_the_compilation_cache_does_not_break_a_run(tmp_path, damage):
  """The entries have a checksum: a damaged one is a warning, and the program is compiled again."""
  options = dict(jax_compilation_cache_dir=str(tmp_path), jax_enable_compilation_cache=True,
                 jax_persistent_cache_min_compile_time_secs=0.0,
                 jax_persistent_cache_min_entry_size_bytes=0)
  before = {name: getattr(jax.config, name) for name in options}
  jax.experimental.compilation_cache.compilation_cache.reset_cache()
  for name, value in options.items():
    jax.config.update(name, value)
  try:
    def run():
      return np.asarray(jax.jit(lambda x: jnp.sin(x) * 2 + x[::-1])(jnp.arange(8.0)))
    wanted = run()
    files = [path for path in tmp_path.iterdir() if path.name.endswith('-cache')]
    assert files
    for path in files:
      data = path.read_bytes()
      path.unlink()
      if damage == 'folder':
        path.mkdir()
      else:
        half = len(data) // 2
        path.write_bytes(dict(empty=b'', cut=data[:half], flipped=data[:half] + bytes(
            [data[half] ^ 1]) + data[half + 1:])[damage])
    jax.clear_caches()
    with pytest.warns(UserWarning, match='persistent compilation cache'):
      np.testing.assert_array_equal(run(), wanted)
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


@pytest.mark.parametrize('number, message', enumerate((
    'transformers cannot load .*tokenizer.json .*range end index',
    'transformers cannot load .*tokenizer.json .*Precompiled',
    'tokenizer.json has a vocabulary with gaps in its ids',
    'tokenizer.json has a vocabulary with gaps in its ids',
    'tokenizer.json cannot encode .*unknown token but `unk_id` is missing')))
def test_a_tokenizer_on_which_its_library_fails_is_an_error(number, message):
  with pytest.raises(InputError, match=message):
    fuzz_models.read_tokenizer(fuzz_models.damaged_tokenizers()[number])
