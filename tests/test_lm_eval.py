"""Exports in transformers and lm-evaluation-harness, as anybody would use them: `make test-parity`.

Both read only the exported folder. Ours are the log-probs of the full forward pass and the greedy
responses of the engine, from the checkpoint.
"""
import dataclasses
import glob
import json
import os
import subprocess
import sys

from conftest import full_logits, make_mesh
import hf_folders
import jax
import numpy as np
import pytest
from test_export import byte_level

from srlm_jax.checkpoint import convert, store
from srlm_jax.conversation import Message
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.eval import lm
from srlm_jax.models import config as model_config, llama
from srlm_jax.sample import engine as engines
from srlm_jax.sandbox import world
from srlm_jax.sandbox.data import M0

torch = pytest.importorskip('torch')
lm_eval = pytest.importorskip('lm_eval')
instance = pytest.importorskip('lm_eval.api.instance')
huggingface = pytest.importorskip('lm_eval.models.huggingface')
tasks, utils = (pytest.importorskip(f'lm_eval.{name}') for name in ('tasks', 'utils'))
transformers = pytest.importorskip('transformers')

COUNT, MAX_TOKENS = 100, 32
ATOL = 1e-4  # nats, of a whole response
SAME = 99    # of COUNT greedy strings: rounding may decide between two tokens
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}
test_split: test
doc_to_text: "{{{{{text}}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE = f"""
output_type: generate_until
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: [], max_gen_toks: {MAX_TOKENS}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@dataclasses.dataclass(frozen=True)
class Ours:
  """A model here: its checkpoint, its export, and the greedy responses to COUNT prompts."""
  checkpoint: str
  export: str
  config: model_config.Config
  params: dict
  tokenizer: tokenizers.Tokenizer
  prompts: list[str]
  results: list

  @property
  def texts(self) -> list[str]:
    return [self.tokenizer.decode(r.ids).strip() for r in self.results]

  def logps(self, pairs) -> list[float]:
    """(prompt ids, response ids) -> the log-likelihood of each response."""
    tokens = np.zeros((len(pairs), max(len(a) + len(b) for a, b in pairs)), np.int32)
    for row, (before, after) in zip(tokens, pairs, strict=True):
      row[:len(before) + len(after)] = [*before, *after]
    with jax.set_mesh(make_mesh(1, 1, 1)):
      table = np.asarray(jax.nn.log_softmax(
          full_logits(llama.Llama(self.config), self.params, tokens)))
    return [sum(float(table[i, len(before) + j - 1, token]) for j, token in enumerate(after))
            for i, (before, after) in enumerate(pairs)]


@pytest.fixture(scope='module', params=['m0', 'stories'])
def ours(request, tmp_path_factory):
  source = M0 if request.param == 'm0' else request.getfixturevalue('stories')
  folder, mesh = tmp_path_factory.mktemp(request.param), make_mesh(1, 1, 1)
  convert.from_hf(source, folder / 'ours')
  convert.to_hf(folder / 'ours', folder / 'hf', chat='plain', shard_bytes=500_000)
  assert len(list((folder / 'hf').glob('*.safetensors'))) > 1
  return measured(folder, mesh, COUNT)


def measured(folder, mesh, count: int, chat: str = 'plain') -> Ours:
  """Samples the greedy responses of the checkpoint in `folder`/ours."""
  config = model_config.load(folder / 'ours')
  tokenizer = tokenizers.load(folder / 'ours', config.V)
  rng = np.random.default_rng(0)
  prompts = [world.instruction(rng) for _ in range(count)]
  with jax.set_mesh(mesh):
    params, _ = store.restore_params(folder / 'ours', mesh, 'float32')
    ends = {*tokenizer.eos_ids, templates.end_of_turn(chat, tokenizer)}
    engine = engines.Engine(llama.Llama(config), params, mesh, sorted(ends), 0, 'test',
                            slots=20, size=config.context, steps=8)
    requests = [engines.Request(str(i), templates.encode_prompt(chat, prompt, tokenizer))
                for i, prompt in enumerate(prompts)]
    sampling = engines.Sampling(0.0, 1.0, MAX_TOKENS)
    results = [found for _, (found,) in engine.generate(requests, sampling)]
  return Ours(str(folder / 'ours'), str(folder / 'hf'), config, params, tokenizer, prompts, results)


def without_eos(ours: Ours, ids) -> list[int]:
  return [i for i in ids if i not in ours.tokenizer.eos_ids]


def documents(ours: Ours) -> list[dict]:
  """Each prompt, with our greedy response to it and to the next prompt as choices."""
  texts = [ours.tokenizer.decode(without_eos(ours, r.ids)).strip() or '.' for r in ours.results]
  return [dict(prompt=prompt, formatted=templates.chat('plain', prompt, None),
               choices=[texts[i], texts[(i + 1) % COUNT]])
          for i, prompt in enumerate(ours.prompts)]


def run_lm_eval(ours: Ours, folder, tasks: dict[str, str], *flags) -> dict[str, list]:
  """Runs `lm_eval --model hf` on tasks, {name: YAML} -> {name: responses by document}."""
  (folder / 'docs.jsonl').write_text(''.join(json.dumps(d) + '\n' for d in documents(ours)))
  for name, text in tasks.items():
    (folder / f'{name}.yaml').write_text(text.format(name=name, folder=folder))
  offline = dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', HF_HOME=str(folder / 'home'))
  done = subprocess.run(
      [sys.executable, '-m', 'lm_eval', '--model', 'hf', '--model_args',
       f'pretrained={ours.export}', '--tasks', ','.join(tasks), '--include_path', str(folder),
       '--output_path', str(folder / 'out'), '--log_samples', '--device', 'cpu',
       '--batch_size', '10', *flags], capture_output=True, text=True, env=os.environ | offline)
  assert done.returncode == 0, done.stderr[-3000:]
  found = {}
  for name in tasks:
    path, = glob.glob(f'{folder}/out/*/samples_{name}_*.jsonl')
    with open(path) as file:
      rows = sorted(map(json.loads, file), key=lambda row: row['doc_id'])
    found[name] = [row['resps'] for row in rows]
  return found


def yaml(text: str, kind: str) -> str:
  """A task on the field `text` of the documents, for str.format."""
  return TASK.replace('{text}', text) + kind.replace('{', '{{').replace('}', '}}')


def same(found, wanted) -> int:
  return sum(a.strip() == b.strip() for a, b in zip(found, wanted, strict=True))


def test_lm_eval_gives_our_log_likelihoods_and_greedy_strings(ours, tmp_path):
  found = run_lm_eval(ours, tmp_path, dict(choice=yaml('formatted', CHOICE),
                                       greedy=yaml('formatted', GENERATE)))
  pairs = [templates.encode_pair('plain', d['prompt'], text, ours.tokenizer)
           for d in documents(ours) for text in d['choices']]
  theirs = [float(logp) for row in found['choice'] for (logp, _), in row]
  worst = np.abs(np.subtract(theirs, ours.logps(pairs))).max()
  strings = same((text for (text,), in found['greedy']), ours.texts)
  # The engine's own log-probs, of the responses whose text has their ids again.
  of_engine = [(theirs[2 * i], sum(result.token_logps[:len(pairs[2 * i][1])]))
               for i, result in enumerate(ours.results)
               if without_eos(ours, result.ids) == pairs[2 * i][1]]
  engine = max(abs(a - b) for a, b in of_engine)
  print(f'lm_eval: {len(theirs)} log-likelihoods differ by at most {worst:.1e}, {len(of_engine)} '
        f'of the engine by {engine:.1e}; {strings} of {COUNT} greedy strings are equal')
  assert worst < ATOL and engine < ATOL and len(of_engine) > COUNT / 2 and strings >= SAME


def test_lm_eval_with_the_chat_template_gives_our_greedy_strings(ours, tmp_path):
  tasks = dict(greedy=yaml('prompt', GENERATE))
  found = run_lm_eval(ours, tmp_path, tasks, '--apply_chat_template')
  assert same((text for (text,), in found['greedy']), ours.texts) >= SAME


def test_transformers_gives_our_ids_and_greedy_strings(ours):
  tokenizer = transformers.AutoTokenizer.from_pretrained(ours.export)
  model = transformers.AutoModelForCausalLM.from_pretrained(ours.export).eval()
  texts = []
  for prompt, result in zip(ours.prompts, ours.results, strict=True):
    messages = [dict(role='user', content=prompt)]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,
                                           return_tensors='pt')
    ids = inputs['input_ids'][0].tolist()
    assert ids == templates.encode_prompt('plain', prompt, ours.tokenizer)
    assert tokenizer(templates.chat('plain', prompt, None))['input_ids'] == ids
    text = ours.tokenizer.decode(without_eos(ours, result.ids)).strip() or '.'
    before, after = templates.encode_pair('plain', prompt, text, ours.tokenizer)
    messages.append(dict(role='assistant', content=text))
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole == [*before, *after, ours.tokenizer.eos_ids[0]]
    messages.append(dict(role='user', content='And then?'))
    wanted = templates.encode_prompt('plain', [Message(**m) for m in messages], ours.tokenizer)
    assert wanted == tokenizer.apply_chat_template(messages, return_dict=False,
                                                   add_generation_prompt=True)
    with torch.no_grad():
      out = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
    texts.append(tokenizer.decode(out[0, len(ids):], skip_special_tokens=True))
  strings = same(texts, ours.texts)
  print(f'transformers: {strings} of {COUNT} greedy strings are equal')
  assert strings >= SAME


SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, vocab_size=270, max_position_embeddings=256,
             initializer_range=0.3)
FAMILIES = dict(llama=('Llama', {}), mistral=('Mistral', dict(sliding_window=7)),
                qwen2=('Qwen2', {}), qwen3=('Qwen3', {}), olmo2=('Olmo2', {}))


@pytest.mark.parametrize('chat', ['tokenizer', 'plain'])
@pytest.mark.parametrize('name', FAMILIES)
def test_exports_of_every_family_give_our_ids_and_greedy_tokens(tmp_path, name, chat):
  """Random models of transformers with a byte-level tokenizer; qwen2 and qwen3 have no bos.

  The class that transformers takes for qwen2 adds a token of its own, so V leaves room.
  """
  kind, changes = FAMILIES[name]
  torch.manual_seed(0)
  model = getattr(transformers, f'{kind}ForCausalLM')(
      getattr(transformers, f'{kind}Config')(**SMALL | changes))
  model.save_pretrained(str(tmp_path / 'source'))
  fields = json.loads((tmp_path / 'source' / 'config.json').read_text())
  byte_level(tmp_path / 'source', **dict(bos_token=None) if 'qwen' in name else {})
  (tmp_path / 'source' / 'config.json').write_text(json.dumps(fields))
  convert.from_hf(tmp_path / 'source', tmp_path / 'ours')
  convert.to_hf(tmp_path / 'ours', tmp_path / 'hf', chat=chat)
  ours = measured(tmp_path, make_mesh(1, 1, 1), 12, chat)
  tokenizer = transformers.AutoTokenizer.from_pretrained(ours.export)
  found = transformers.AutoModelForCausalLM.from_pretrained(ours.export).eval()
  for key, tensor in model.state_dict().items():
    assert torch.equal(found.state_dict()[key], tensor), key
  for prompt, result in zip(ours.prompts, ours.results, strict=True):
    inputs = tokenizer.apply_chat_template(
        [dict(role='user', content=prompt)], add_generation_prompt=True, return_dict=True,
        return_tensors='pt')
    ids = inputs['input_ids'][0].tolist()
    assert ids == templates.encode_prompt(chat, prompt, ours.tokenizer)
    with torch.no_grad():
      out = found.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
    assert out[0, len(ids):].tolist() == result.ids


# The adapter of `eval.lm` against the harness's own model, on the same requests.
PLACES = ('the garden', 'a small house', 'the river', 'an old school')
ENDS = (' and they were very happy.', ' but it was too late.', ' with a big red ball.', ' again!')
BOTH = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/docs.jsonl"}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
KINDS = dict(
    choice="""
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: best
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    greedy="""
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    rolling="""
output_type: loglikelihood_rolling
doc_to_target: "{{long}}"
metric_list: [{metric: bits_per_byte}]
""")


def stories_documents(ours) -> list[dict]:
  """Beginnings of stories with four ends each, and texts of a few more tokens than a context.

  The model wrote these texts itself: the harness adds log-probs in float32, so that a sum below
  -1024 is rounded by 1e-4.
  """
  rng = np.random.default_rng(1)
  names = 'Tom Lily Ben Anna Max'.split()
  texts = [f'Once upon a time, {name} went to {place}. {name} saw a cat'
           for name in names for place in PLACES]
  warm = dict(do_sample=True, temperature=0.7, max_gen_toks=150)
  written = [text + more for text, more in zip(
      texts, ours.model.generate([(text, warm) for text in texts]), strict=True)]
  found = []
  for i, text in enumerate(texts):
    long = written[i]
    for j in range(1, 99):
      if len(ours.tok_encode(long)) > 1.1 * ours.max_length:
        break
      long += ' ' + written[(i + j) % len(written)]
    found.append(dict(text=text, choices=[ENDS[i] for i in rng.permutation(4)],
                      best=int(rng.integers(4)), long=long))
  return found


@dataclasses.dataclass(frozen=True)
class Pair:
  """lm_eval's own model and the adapter, of one folder."""
  folder: str
  theirs: object
  ours: object

  def ask(self, kind: str, *requests):
    """The answers of both to requests, given as tuples of arguments."""
    made = [instance.Instance(request_type=kind, doc={}, arguments=r, idx=i)
            for i, r in enumerate(requests)]
    return [getattr(model, kind)(made, disable_tqdm=True) for model in (self.theirs, self.ours)]


def pair_of(folder, checkpoint=None, **options) -> Pair:
  # Rows one by one: some rolling windows get other log-probs in lm_eval's batches than alone.
  return Pair(str(folder), huggingface.HFLM(
      pretrained=str(folder), device='cpu', dtype='float32', batch_size=1, **options),
      lm.adapter()(str(checkpoint or folder), slots=8, **options))


@pytest.fixture(scope='module', params=['stories', 'checkpoint', 'random'])
def pair(request, tmp_path_factory):
  """tinyllamas-260k, the same as a checkpoint, and a random Llama 3."""
  folder = tmp_path_factory.mktemp('pair')
  if request.param == 'random':
    return pair_of(hf_folders.llama3(folder / 'random', max_position_embeddings=256))
  stories = request.getfixturevalue('stories')
  if request.param == 'stories':
    return pair_of(stories)
  convert.from_hf(stories, folder / 'ours')
  return pair_of(stories, folder / 'ours')


def compare(pair: Pair, requests) -> list[bool]:
  """Log-likelihoods within ATOL and the same greedy flags -> the flags."""
  theirs, ours = pair.ask('loglikelihood', *requests)
  worst = np.abs(np.subtract([logp for logp, _ in theirs], [logp for logp, _ in ours])).max()
  print(f'{len(requests)} log-likelihoods differ by at most {worst:.1e}')
  assert worst < ATOL
  flags = [is_greedy for _, is_greedy in ours]
  assert flags == [is_greedy for _, is_greedy in theirs]
  return flags


def test_the_adapter_gives_the_results_of_lm_evals_own_model(pair, tmp_path):
  documents = stories_documents(pair.ours)
  (tmp_path / 'docs.jsonl').write_text(''.join(json.dumps(d) + '\n' for d in documents))
  first, = pair.ask('generate_until', (documents[0]['text'], dict(until=[], max_gen_toks=24)))[0]
  stop = first[8:10]  # which some responses contain
  for name, kind in KINDS.items():
    text = BOTH.format(name=name, folder=tmp_path) + kind.replace('"STOP"', json.dumps(stop))
    (tmp_path / f'{name}.yaml').write_text(text)
  manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
  theirs, ours = (lm_eval.simple_evaluate(model=model, tasks=list(KINDS), task_manager=manager)
                  for model in (pair.theirs, pair.ours))
  for key in ('acc,none', 'acc_norm,none', 'acc_stderr,none', 'acc_norm_stderr,none'):
    assert ours['results']['choice'][key] == theirs['results']['choice'][key], key
  assert 0 < ours['results']['choice']['acc,none'] < 1

  def answers(found, name):
    return [row['resps'] for row in sorted(found['samples'][name], key=lambda row: row['doc_id'])]
  by_choice = [np.array([one for row in answers(found, 'choice') for (one,) in row], float)
               for found in (theirs, ours)]
  rolling = [np.array(answers(found, 'rolling'), float).ravel() for found in (theirs, ours)]
  differences = [np.abs(a - b).max() for a, b in (rolling, [x[:, 0] for x in by_choice])]
  strings = [[text for (text,), in answers(found, 'greedy')] for found in (theirs, ours)]
  stopped = sum(a != b for a, b in zip(strings[1], pair.ask(
      'generate_until', *((d['text'], dict(until=[], max_gen_toks=24)) for d in documents))[1],
      strict=True))
  print(f'{pair.folder}: {by_choice[0].shape[0]} log-likelihoods differ by at most '
        f'{differences[1]:.1e}, {len(documents)} rolling by {differences[0]:.1e}; '
        f'{same(*strings)} of {len(documents)} greedy strings are equal, {stopped} stopped')
  assert differences[1] < ATOL and differences[0] < 2e-4
  np.testing.assert_array_equal(by_choice[0][:, 1], by_choice[1][:, 1])
  assert strings[0] == strings[1] and 0 < stopped


def test_log_likelihoods_at_the_edges(pair):
  text = 'Once upon a time, there was a little girl named Lily. She loved to play outside.'
  greedy, = pair.ask('generate_until', (text, dict(until=[], max_gen_toks=12)))[1]
  most, prefix = pair.ours.max_length, pair.ours.tok_encode(text)
  long = text * (most // len(prefix) + 2)
  full = next(k for k in range(most, len(long)) if len(pair.ours.tok_encode(long[:k])) == most)
  flags = compare(pair, [
      (text, ' ' + greedy.strip()), (text, ' ' + greedy.strip() + '!'), ('', text),
      (text + ' ', 'A'), ('User:', ' ' + text), (long, ' The end.'), (long, ' Of it.'),
      (text, ' É 漢 😀'),
      *((long[:k], ' cat') for k in range(full - 12, full + 12, 2))])
  assert not all(flags)


def test_rows_one_by_one_are_the_right_comparison(tmp_path):
  """In batches of 8, lm_eval's own model gives some documents another log-prob than row by row."""
  pair = pair_of(hf_folders.llama3(tmp_path / 'random', max_position_embeddings=256))
  in_batches = huggingface.HFLM(pretrained=pair.folder, device='cpu', dtype='float32', batch_size=8)
  requests = [instance.Instance(request_type='loglikelihood_rolling', doc={}, idx=i,
                                arguments=(document['long'],))
              for i, document in enumerate(stories_documents(pair.ours))]
  alone, eight, ours = (np.array(model.loglikelihood_rolling(requests, disable_tqdm=True))
                        for model in (pair.theirs, in_batches, pair.ours))
  apart = np.abs(eight - alone)
  print(f'lm_eval in batches of 8 and alone: {(apart > 2e-4).sum()} of {len(apart)} documents '
        f'differ, by at most {apart.max():.2f}; ours and alone: {np.abs(ours - alone).max():.1e}')
  assert np.abs(ours - alone).max() < 2e-4 < apart.max()


def test_the_adapter_by_its_name_takes_lm_evals_own_arguments(stories, tmp_path):
  lm.adapter()
  documents = [dict(text=f'Once upon a time, there were {n}', choices=[' cats.', ' of'], best=0)
               for n in ('two', 'three')]
  (tmp_path / 'docs.jsonl').write_text(''.join(json.dumps(d) + '\n' for d in documents))
  (tmp_path / 'choice.yaml').write_text(
      BOTH.format(name='choice', folder=tmp_path) + KINDS['choice'])
  manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
  found = lm_eval.simple_evaluate(
      model='srlm_jax', model_args=dict(model=str(stories)), tasks=['choice'], batch_size=8,
      max_batch_size=16, device='cpu', task_manager=manager)
  assert found['n-samples']['choice']['effective'] == 2


def test_the_harness_evaluates_a_model_once_and_says_what_was_measured(stories, tmp_path):
  documents = [dict(text=f'Once upon a time, there were {n}', choices=[' cats.', ' of'], best=0)
               for n in ('two', 'three', 'four')]
  folder, out = tmp_path / 'tasks', tmp_path / 'eval' / 'harness.json'
  folder.mkdir()
  (folder / 'docs.jsonl').write_text(''.join(json.dumps(d) + '\n' for d in documents))
  (folder / 'choice.yaml').write_text(BOTH.format(name='choice', folder=folder) + KINDS['choice'])

  def run(*flags) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, '-m', 'srlm_jax.eval.harness', f'--out={out}', f'--include_path={folder}',
         f'--model=a={stories}', *flags], capture_output=True, text=True,
        env=os.environ | dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1',
                              HF_HOME=str(tmp_path / 'home')))
    return done.returncode, done.stdout + done.stderr
  for task in ('choic*', 'choice,nothing'):
    code, text = run(f'--tasks={task}')
    assert code == 1 and f'lm_eval has no task {task.split(",")[-1]}' in text
    assert 'Traceback' not in text and not out.parent.exists()
  for flags, is_kept in ((['--limit=2'], False), (['--limit=2'], True), ([], False)):
    code, text = run('--tasks=choice', *flags)
    assert code == 0 and ('a.json: already there' in text) == is_kept, text
    found = json.loads(out.read_text())
    assert found['counts'] == dict(choice=2 if flags else 3)
    assert found['limits'] == (dict(a=2) if flags else {}) and found['shots'] == dict(choice=0)


@pytest.mark.parametrize('add', [True, False])
def test_add_bos_token_and_prefix_token_id_mean_the_same(stories, add):
  pair = pair_of(stories, add_bos_token=add, prefix_token_id=7)
  requests = [('Once upon a time', ' there was'), ('', 'Once upon a time')]
  compare(pair, requests)
  theirs, ours = pair.ask('loglikelihood_rolling', ('Once upon a time there was a cat.',))
  assert abs(theirs[0] - ours[0]) < ATOL
  theirs, ours = pair.ask('generate_until', ('Once upon', dict(until=['.'], max_gen_toks=16)))
  assert theirs == ours
  assert pair.ours.tok_encode('Once') == pair.theirs.tok_encode('Once')


def test_a_chat_template_gives_the_same_ids_and_strings(tmp_path):
  pair = pair_of(hf_folders.llama3(tmp_path / 'random', max_position_embeddings=256))
  history = [dict(role='system', content='Be kind.'), dict(role='user', content='Name a fruit.'),
             dict(role='assistant', content='Pear.'), dict(role='user', content='Another.')]
  for said, asks in ((history, True), ([*history, dict(role='assistant', content='A')], False)):
    theirs, ours = (model.apply_chat_template(said, add_generation_prompt=asks)
                    for model in (pair.theirs, pair.ours))
    assert pair.ours.tok_encode(ours) == pair.theirs.tok_encode(theirs)
    assert pair.ours.model.tokenizer.readable(ours) == theirs
  found = [model.generate_until([instance.Instance(
      request_type='generate_until', doc={}, idx=0,
      arguments=(model.apply_chat_template(history), dict(until=[], max_gen_toks=24)))])
      for model in (pair.theirs, pair.ours)]
  assert found[0] == found[1] and found[0][0]
  assert pair.ours.chat_template(True) == pair.theirs.chat_template(True)


def test_rolling_windows_are_those_of_the_harness():
  for count in range(1, 12):
    for most in range(1, 6):
      wanted = map(utils.make_disjoint_window, utils.get_rolling_token_windows(
          list(range(count)), 99, most, 1))
      assert list(lm.windows(list(range(count)), 99, most)) == list(wanted)
