"""Fuzzing targets: what a run reads. See tests/fuzzing.py."""
import contextlib
import dataclasses
import functools
import gzip
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import tempfile
import types
from unittest import mock

from conftest import tokenizer_bytes
from etils import epath
import fuzzing
from fuzzing import Target
from hypothesis import strategies as st
import samples
import schemas
import tiny_run

from srlm_jax import (
  config as configs,
  InputError,
  lock,
  loop,
  metrics,
  model_files,
  records,
  schema,
  selection,
  stage,
  stopping,
  storage,
  study,
)
from srlm_jax.data import oasst, prompt_files, ranked, templates, tokenizer as tokenizers
from srlm_jax.eval import (
  agreement,
  alpaca,
  distributions,
  endpoint,
  harness,
  head_to_head,
  mt_bench,
)
from srlm_jax.report import page
from srlm_jax.reward import eft, health, judge_pairs, judges, pairs, scores, swap
from srlm_jax.sample import engine as engines, meta_judge, prompts, shards
from srlm_jax.sandbox import audit, oracle, world
from srlm_jax.train import objectives, run as train

# Instead of a file's bytes: it is a folder, a link to nothing, to itself, or to a device without an
# end, a pipe that nobody writes to, absent.
PLACES = (b'//folder', b'//dangling', b'//loop', b'//zero', b'//pipe', b'//absent')


def place(path: pathlib.Path, data: bytes):
  """Makes the file what `data` says, one of PLACES or its bytes."""
  remove(path)
  if data == PLACES[0]:
    path.mkdir()
  elif data == PLACES[1]:
    path.symlink_to('nothing')
  elif data == PLACES[2]:
    path.symlink_to(path.name)
  elif data == PLACES[3]:
    path.symlink_to('/dev/zero')
  elif data == PLACES[4]:
    os.mkfifo(path)
  elif data != PLACES[5]:
    path.write_bytes(data)


def remove(path: pathlib.Path):
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def damaged_file(rng, data, others):
  """Damages a file's bytes, or what is in its place."""
  way = rng.random()
  if way < 0.04:
    return rng.choice(PLACES)
  return (fuzzing.other_values if way < 0.6 else fuzzing.damaged)(rng, data, others)


def damaged_gzip(rng, data, others):
  """Damages the compressed bytes, or what they hold."""
  if rng.random() < 0.5:
    return fuzzing.damaged(rng, data, others)
  return gzip.compress(fuzzing.damaged(rng, gzip.decompress(data)), mtime=0)


@contextlib.contextmanager
def quiet():
  """Takes what programs print, as strictly as a terminal does."""
  out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8', errors)
              for errors in ('strict', 'backslashreplace'))
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    yield
    out.flush()


class Files:
  """A folder of which one file at a time is damaged, and read. Afterwards it is as before."""

  def __init__(self, make, read, is_consistent=False, of=''):
    """make(folder) writes it; read(folder) reads it. of: a pattern of the files to damage.

    is_consistent: the done.json beside the file then has the hash of the damaged file.
    """
    self._make, self._read, self._is_consistent, self._of = make, read, is_consistent, of

  @functools.cached_property
  def _made(self) -> tuple[pathlib.Path, dict[str, bytes]]:
    """The folder, and what is in it."""
    folder = fuzzing.folders() / 'run'
    self._make(folder)
    return folder, {str(path.relative_to(folder)): path.read_bytes()
                    for path in sorted(folder.rglob('*')) if path.is_file()}

  def __iter__(self):
    return iter([item for item in self._made[1].items() if re.match(self._of, item[0])])

  def __call__(self, given: fuzzing.Input):
    """Reads the folder with one file as given."""
    name, data = given
    folder, files = self._made
    try:
      place(folder / name, data)
      if self._is_consistent:
        tiny_run.consistent((folder / name).parent)
      with quiet():
        self._read(folder)
    finally:
      self._restore(folder, files)

  def _restore(self, folder, files):
    """Removes what is not as it was made, and writes what is missing then."""
    folders = {str(parent) for name in files for parent in pathlib.PurePath(name).parents}
    for path in sorted(folder.rglob('*'), reverse=True):  # the files of a folder before it
      name = str(path.relative_to(folder))
      is_as_made = not path.is_symlink() and (
          name in folders if path.is_dir() else
          path.is_file() and name in files and path.read_bytes() == files[name])
      if not is_as_made:
        remove(path)
    for name, data in files.items():
      if not (folder / name).exists():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def finished_run(folder):
  tiny_run.make(folder)
  tiny_run.finish(folder)


report = Files(finished_run, lambda folder: page.remake([folder], folder.parent / 'report.html'))


def run_stages(*found, **changes):
  """Runs stages that need no model: (program, model) of each. changes: of the config."""
  def run(folder):
    # A board has a process and threads of its own.
    with mock.patch.object(metrics, 'Board'), mock.patch.object(scores, 'DRAWS', 10):
      for program, name in found:
        try:
          program.run(config_of(name, **changes), folder)
        except OSError as error:  # as cli.run_app does
          raise storage.failure(error, [str(folder)]) or error from error
  return run


def config_of(name, **changes):
  """The config of a model; changes: {SECTION.KEY: value}."""
  config = configs.get(name, 'tiny').unlock()
  for key, value in changes.items():
    section, _, key = key.partition('.')
    config[section][key] = value
  return config


def run_without(*stages):
  """Writes a finished run without some of its stages."""
  def make(folder):
    finished_run(folder)
    for name in stages:
      shutil.rmtree(folder / name)
  return make


def grade_all(folder):
  """The stage with grades of its own, because the prompts are not of the sandbox."""
  def grade(_, response):
    return [len(response) > i for i in range(5)]
  required = world.require('Name two fruits.')
  with mock.patch.object(world, 'grade', grade), mock.patch.object(
      world, 'require', lambda prompt: required):
    run_stages((oracle, 'm2'))(folder)


oracle_stage = Files(run_without('m2/oracle'), grade_all, is_consistent=True,
                     of='data/seeds/ranked|m2/(answers|answers_greedy|judge_eval)/')

BY_REWARD = {'pairs.strategy': 'implicit_reward'}


def make_rewards(folder):
  run_without('m2/pairs')(folder)
  rewards = [schema.ImplicitReward(id=f'p{i}/{n}', reward=0.5 * n - i, logp=-1.0, older_logp=-2.0)
             for i in range(3) for n in range(2)]
  tiny_run.write(folder, config_of('m2', **BY_REWARD), 'implicit', {
      tiny_run.shard('rewards'): rewards}, dict(responses=6, without_reward=0))


reward_stage = Files(make_rewards, run_stages((pairs, 'm2'), **BY_REWARD), is_consistent=True,
                     of='m2/(respond|judge|implicit)/')


def make_comparisons(folder):
  finished_run(folder)
  names = [f'p{i}/{n}' for i in range(3) for n in range(2)]
  records.write(folder / 'm2' / 'meta_judge' / tiny_run.shard('comparisons'), [
      schema.Comparison(id=f'{name}/{a}:{name}/{b}', response_id=name, first=f'{name}/{a}',
                        second=f'{name}/{b}', text='?', winner=b - a, reason='', finish='eos')
      for name in names[:-1] for a, b in itertools.permutations(range(2))])


def compare_judgements(folder):
  """The stage with comparisons that a model has written."""
  def written(s, stem, *_):
    s.begin()
    return records.read_shards(s.folder, stem, schema.Comparison)
  with mock.patch.object(shards, 'write', written):
    run_stages((meta_judge, 'm2'), **{'meta_judge.responses': 2})(folder)


comparisons = Files(make_comparisons, compare_judgements, is_consistent=True,
                    of='m2/(respond|judge|pairs|meta_judge)/')


def make_swapped(folder):
  finished_run(folder)
  config = config_of('m2', **JUDGE_PAIRS)
  tiny_run.write(folder, config, 'respond', {tiny_run.shard('responses'): [
      samples.response(f'p{i}/{n}', prompt=f'Name fruit {i}.', response=f'{i} {n}')
      for i in range(3) for n in range(2)]}, params='hash-m1')
  swapped = [samples.response(f'p{i}/p{2 - i}', prompt_id=f'p{i}', prompt=f'Name fruit {i}.')
             for i in (0, 2)]
  tiny_run.write(folder, config, 'swap', {'swapped.jsonl': swapped})
  tiny_run.write(folder, config, 'judge_swapped', {tiny_run.shard('judgements'): [
      samples.judgement(r.id, j, float(5 * j)) for r in swapped for j in range(2)]}, dict(
          judgements=4, parsed=4, lowest=0.0, highest=5.0, unparsed={}), 'hash-m1')


def make_judge_pairs(folder):
  """All stages that need no model, and swap with them."""
  by_vote, by_swap = (functools.partial(judge_pairs.run, on=on) for on in ('majority', 'swapped'))
  run_stages(*((types.SimpleNamespace(run=run), 'm2') for run in (by_vote, by_swap)),
             **JUDGE_PAIRS)(folder)
  shutil.rmtree(folder / 'm2' / 'swap')
  run_stages((swap, 'm2'), **JUDGE_PAIRS)(folder)


JUDGE_PAIRS = {'train.data': ('pairs', 'majority_pairs', 'swapped_pairs'),
               'judge_pairs.share': 0.5, 'judge_pairs.score_share': 1.0, 'judge.quorum': 1}
judge_pair_stages = Files(make_swapped, make_judge_pairs, is_consistent=True,
                          of='m2/(respond|judge|pairs|swap|judge_swapped)/')


def compare_answers(folder):
  """As eval.head_to_head does, with replies of a judge and with grades."""
  for part, is_graded in (('answers', False), ('oracle', True)):
    both = head_to_head.Both(folder / 'm2' / part, folder / 'm1' / part, is_graded)
    if is_graded:
      result = head_to_head.compare_scores((a.score, b.score) for a, b in both)
    else:
      found = head_to_head.verdicts(head_to_head.requests(both), {
          request.id: 'A' for request in head_to_head.requests(both)})
      result = head_to_head.compare(found)
    result |= head_to_head._mean_lengths(both, None)
    records.dump(schema.HeadToHead(a='m2', b='m1', **result))


answers = Files(finished_run, compare_answers, is_consistent=True, of='m[12]/(answers|oracle)/')


def read_distributions(folder):
  """All that eval.distributions reads beside the model."""
  sources, _ = distributions.find(folder)
  distributions.prompts_of(sources, 2)
  distributions.read(folder / distributions.FILE)


prompt_sets = Files(finished_run, read_distributions, is_consistent=True,
                    of='data/seeds/|m1/eft/|m2/prompts/|eval/distributions')

COMMAND = 'measure {checkpoint}'


def make_steps(folder):
  """Two checkpoints, of which one is measured."""
  finished_run(folder)
  model = folder / 'm2' / 'model'
  shutil.copytree(model / 'steps' / '10', model / 'steps' / '20')
  (model / 'selected.json').unlink()
  path = model / 'manifest.json'
  found = json.loads(path.read_text())
  found['config']['train.select'] = COMMAND
  stage.write_json(path, found)
  records.write(folder / 'm2' / 'selection' / 'measures.jsonl', [
      schema.Measure(step=10, measure=0.25)])


def select(folder):
  with mock.patch.object(selection, '_command', lambda *_: 0.5):
    run_stages((selection, 'm2'), **{'train.select': COMMAND})(folder)


measures = Files(make_steps, select,
                 of='m2/selection/|m2/model/(manifest|done|steps|config|selected)')
BY_WINS = {'train.select': 'wins', 'train.judge': 'random'}


def make_wins(folder):
  """Two comparisons of checkpoints, of which one was made."""
  make_steps(folder)
  shutil.rmtree(folder / 'm2' / 'selection')
  stopping._stage(config_of('m2', **BY_WINS), folder).begin()


def stop(folder):
  """Early stopping with answers and checkpoints that are there."""
  def train_run(config, workdir, wins):
    wins(10) and wins(20)

  def answers_of(_, workdir, step):
    return workdir / ('m2' if step == 20 else 'm1') / 'answers'
  with (mock.patch.object(train, 'run', train_run), mock.patch.object(
      stopping, '_answers', answers_of), mock.patch.object(engines, 'choose', lambda c, _: c)):
    run_stages((stopping, 'm2'), **BY_WINS)(folder)


wins = Files(make_wins, stop, is_consistent=True,
             of='m2/stopping/|m2/model/(manifest|done)|m[12]/answers/|data/seeds/heldout')


@functools.cache
def trained_on() -> tuple[pathlib.Path, tokenizers.Tokenizer]:
  """A folder for a file of training data, and a tokenizer."""
  folder = fuzzing.folders()
  (folder / 'tokenizer.model').write_bytes(tokenizer_bytes())
  return folder, tokenizers.load(folder)


def training_files() -> list[tuple[str, bytes]]:
  with tempfile.TemporaryDirectory() as folder:
    finished_run(pathlib.Path(folder))
    paths = [pathlib.Path(folder, name) for name in (
        'data/seeds/ift.jsonl', 'm1/eft/eft.jsonl', 'm2/pairs/pairs.jsonl')]
    found = [(path.name, path.read_bytes()) for path in paths]
  positive = schema.Positive(id='a', prompt='Why?', response='So.', score=5.0, finish='eos')
  documents = [schema.Document(id=f'{i}', text='Name a fruit. ' * 20) for i in range(3)]
  return [*found, ('positives.jsonl', lines([dataclasses.asdict(positive)])),
          ('corpus.jsonl', lines(map(dataclasses.asdict, documents)))]


def read_training(given):
  """The examples of a file of training data, for each objective that takes it."""
  name, data = given
  folder, tokenizer = trained_on()
  path = folder / name
  path.write_bytes(data)
  data_names = ('corpus',) if name == 'corpus.jsonl' else ('pairs',)
  config = config_of('m2', **{'train.data': data_names}).train
  found = objectives.sft_examples(config, 'plain', [epath.Path(path)], tokenizer)
  if name == 'pairs.jsonl':
    found = objectives.pair_examples(config, 'plain', [epath.Path(path)], tokenizer)
  assert all(found.examples[i].responses for i in range(len(found.examples)))


round_stages = Files(tiny_run.make, run_stages((pairs, 'm2'), (health, 'm2'), (audit, 'm2')),
                     is_consistent=True, of='m2/(prompts|respond|judge)/')
ranked_stages = Files(tiny_run.make, run_stages((eft, 'm1'), (agreement, 'm2')),
                      is_consistent=True, of='data/seeds/ranked|m1/judge/|m2/judge_eval/')


def make_model(folder):
  tiny_run.make(folder.parent / 'other')
  shutil.copytree(folder.parent / 'other' / 'm2' / 'model', folder / 'm2' / 'model')
  shutil.rmtree(folder.parent / 'other')
  (folder / 'm2' / 'model' / 'source.json').write_text('{"config.json": ["a", ""]}')
  # steps/N/hash covers source.json
  path = folder / 'm2' / 'model' / 'steps' / '10' / 'hash' / 'metadata'
  stage.write_json(path, json.loads(path.read_text()) | dict(
      files=model_files.hashes(folder / 'm2' / 'model')))


def read_model(workdir):
  """What the programs read of a trained model beside its arrays."""
  folder = stage.finished_model(workdir, 'm2')
  stage.trained_with(folder, 'train.select')
  stage.check_records(folder)
  model_files.read_hashes(folder)
  model_files.read_source(folder)
  stage.summary(folder)
  train._begun_rows(folder)
  metrics.last(folder)
  with mock.patch.object(metrics, 'Board'):
    metrics.Writer(folder, 1).close()
    metrics.show_finished(workdir, 'm2/model')


def make_shards(folder):
  folder.mkdir()
  for host in range(2):
    records.write(folder / records.shard_name('responses', host, 2), [
        samples.response(f'p{i}/{n}') for i in range(host, 5, 2) for n in range(2)])
  records.write(folder / 'responses.kept', [samples.response('p9/0')])


def read_shards(folder):
  """As readers do, and as a stage that continues on one host."""
  list(records.read_shards(folder, 'responses', schema.Response))
  records.contents(folder)
  records.Kept(folder, 'responses').get('p9')
  records.keep_shards(folder, 'responses', 1)
  records.Kept(folder, 'responses').get('p0')


def append(path):
  out = records.Appender(path)
  out.append([samples.response('p9/0')])
  out.close()
  return list(records.read(path, schema.Response))


LOCK = dict(id='a', owner='me', host='h', boot=None, namespace=None, pid=1, started=5, since='now')


def read_lock(path):
  file = lock._open(path)
  with mock.patch.object(lock, 'BEAT', 0), quiet():
    if found := lock._current_holder(file, path.parent, False):
      raise InputError(f'in use by {lock._describe(found)}')


def judge_text(given):
  """Reads a judgement in a template; one without a score counts as refused."""
  name, data = given
  score, reason = judges.read(loaded(name), data.decode(errors='replace'), 'eos')
  if score is None:
    raise InputError(reason)


@functools.cache
def loaded(name):
  slots = meta_judge.SLOTS if name.startswith('meta') else ('prompt', 'response')
  return judges.load(name, slots)


TEMPLATES = sorted(path.stem.removeprefix('judge_')
                   for path in pathlib.Path(judges.__file__).parent.glob('judge_*.txt'))
JUDGEMENTS = [(name, text.encode()) for name in TEMPLATES for text in (
    loaded(name).example, loaded(name).state(loaded(name).highest))]
# For a template without numbers there is no total.
TOTALS = [(name, f'1 point for relevance.\n**Total {loaded(name).state(loaded(name).lowest)}** out '
           f'of 5 points'.encode()) for name in TEMPLATES]


def verdict(data):
  text = data.decode(errors='replace')
  if head_to_head.parse(text) is None and mt_bench.rating(text) == mt_bench.NO_SCORE:
    raise InputError('no verdict')


OASST = [dict(message_id='a', parent_id=None, text='Why?', role='prompter', lang='en', rank=None,
              tree_state='ready_for_export', deleted=False, synthetic=False),
         dict(message_id='b', parent_id='a', text='So.', role='assistant', lang='en', rank=0),
         dict(message_id='c', parent_id='a', text='No.', role='assistant', lang='en', rank=1),
         dict(message_id='d', parent_id='b', text='Really?', role='prompter', lang='en'),
         dict(message_id='e', parent_id='d', text='Yes.', role='assistant', lang='en', rank=0)]
TREE = dict(message_tree_id='a', tree_state='ready_for_export', prompt=OASST[0] | dict(
    replies=[OASST[1] | dict(replies=[OASST[3] | dict(replies=[OASST[4]])]), OASST[2]]))
RANKED = [dict(prompt='Name a fruit.', replies=[
    dict(text='Pear.', rank=0), dict(text='No.', rank=1), dict(text='Not.', rank=1)]),
          dict(id='a', messages=[dict(role='user', content='Why?'),
                                 dict(role='assistant', content='So.'),
                                 dict(role='user', content='Really?')],
               replies=[dict(text='Yes.', score=3.5, id='x'), dict(text='No.', score=-1)])]
QUESTIONS = [dict(question_id=81, category='writing', turns=['Write.', 'Again.']),
             dict(question_id=111, category='math', turns=['Add.', 'More.'], reference=['1', '2'])]
JUDGMENTS = [dict(question_id=q, model='m2', turn=turn, score=7.5, judge=['gpt', 'single-v1'],
                  user_prompt='a', judgment='[[7.5]]', tstamp=1.5)
             for q in (81, 111) for turn in (1, 2)]
ANSWERS = [dict(question_id=q, answer_id='x', model_id='m2', choices=[dict(
    index=0, turns=['One.', 'Two.'])]) for q in (81, 111)]
JUDGE_PROMPTS = [dict(name=name, type='single', system_prompt='', output_format='[[rating]]',
                      prompt_template='{question}{answer}' if 'turn' not in name else
                      '{question_1}{answer_1}{question_2}{answer_2}')
                 for name in mt_bench.FASTCHAT.values()]
ANNOTATIONS = [dict(instruction=f'{i}?', preference=p, generator_1='gpt', generator_2='m2',
                    output_1='a', output_2='b') for i, p in enumerate((1.5, 2.0, 1.0, None))]
LM_EVAL = {'results': {'arc_easy': {'acc_norm,none': 0.5, 'acc_norm_stderr,none': 0.1},
                       'mmlu': {'acc,none': 0.25, 'acc_stderr,none': 'N/A'},
                       'gsm8k': {'exact_match,strict-match': 0.0}},
           'n-shot': {'arc_easy': 25, 'mmlu': 5}, 'config': {'limit': None, 'chat': 'plain'},
           'n-samples': {'arc_easy': {'original': 9, 'effective': 9}, 'a': {'effective': 4}},
           'group_subtasks': {'mmlu': ['a', 'b'], 'arc_easy': []}}
STUDY = dict(name='loop', seeds=2, changes=['seed=1'], models=[dict(
    {heading: 0.5 for heading in study.COLUMNS}, model=model, runs=2,
    errors={heading: 0.1 for heading in study.COLUMNS[:4]}, gain=None,
    against=dict(mean=0.1, over_seeds=0.1, interval=[-0.1, 0.3], over_prompts=0.2, least=0.0,
                 most=0.2), judge={heading: None for heading in study.JUDGE})
                                                               for model in ('m1', 'm2')])


def lines(rows) -> bytes:
  return b''.join(json.dumps(row).encode() + b'\n' for row in rows)


def make_mt_bench(folder):
  folder.mkdir()
  for name, rows in dict(questions=QUESTIONS, judgments=JUDGMENTS, answers=ANSWERS,
                         prompts=JUDGE_PROMPTS).items():
    (folder / f'{name}.jsonl').write_bytes(lines(rows))


def read_mt_bench(folder):
  questions = mt_bench.read_questions(folder / 'questions.jsonl')
  found = mt_bench.scores(mt_bench.read_judgments(folder / 'judgments.jsonl', questions), questions)
  print(mt_bench.text_table(found))
  answers = mt_bench.read_answers(folder / 'answers.jsonl', questions)
  prompts = mt_bench.read_prompts(folder / 'prompts.jsonl')
  references = {name: ('a', 'b') for name in questions}
  for known in ({}, prompts):
    for grading in mt_bench.gradings('m2', answers, questions, references, known):
      json.dumps(grading.messages[-1].content, ensure_ascii=False).encode()


def read_alpaca(path):
  found = alpaca.win_rate(alpaca.read_annotations(path))
  json.dumps(dataclasses.asdict(found), ensure_ascii=False).encode()


def make_harness(folder):
  folder.mkdir()
  (folder / 'a.json').write_text(json.dumps(LM_EVAL))
  (folder / 'b.json').write_text(json.dumps(LM_EVAL | {'config': {'limit': 9}}))


def read_harness(folder):
  given = [f'{name}={folder / name}.json' for name in ('a', 'b')]
  found = harness.table(harness.read_models(given))
  print(harness.text_table(found))
  for limit in found.limits.values():
    print(f'{limit:g}')
  records.parse(records.dump(found).encode(), 'harness.json', schema.Harness)
  harness._is_of(folder / 'a.json', {})


def read_prompts(path):
  found = prompt_files.read(path)
  if prompt_files.is_fastchat(found):
    answers = [samples.response('a/0') for _ in found]
    list(prompt_files.model_answers(found, answers, answers, 'm2'))


def read_replies(path):
  asked = [head_to_head.JudgeRequest(id=name, prompt_id='p', order=name, text='?')
           for name in ('ab', 'ba')]
  texts = head_to_head.read_replies(path, asked)
  head_to_head.compare(head_to_head.verdicts(asked, texts))


def read_cache(path):
  cache = endpoint.Cache(path)
  try:
    for answer in records.read(path, schema.JudgeAnswer):
      assert cache.get(answer.id).id == answer.id
  finally:
    cache.close()


def namespace(value):
  """JSON as the library's objects: their attributes may be any JSON."""
  if isinstance(value, dict):
    return types.SimpleNamespace(**{str(key): namespace(x) for key, x in value.items()})
  return [namespace(x) for x in value] if isinstance(value, list) else value


def read_completion(data):
  """An answer of a server. A failure of the endpoint is asked again."""
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise InputError('not JSON') from error
  try:
    answer = endpoint._read('key', namespace(value))
  except endpoint._Failure as failure:
    raise InputError(failure.reason) from failure
  records.dump(answer).encode()


COMPLETION = dict(choices=[dict(message=dict(content='[[7]]'), finish_reason='stop')],
                  usage=dict(prompt_tokens=5, completion_tokens=7))
SETS = ['judge.n=2', 'm2,m3:train.epochs=2.5', 'pairs.strategy=margin', 'train.data=ift,eft',
        'sample.int8=true', 'train.learning_rate=1e-5', 'seed=7', 'train.select=x {checkpoint}',
        'endpoint.url=https://host/v1', 'mesh.data=2', 'judge.template=additive']


def read_set(data):
  """A change of the config, as --set gives it."""
  loop.load_config('m2', 'tiny', '', '', [data.decode(errors='surrogateescape')])


def changed_text(rng, data, others):
  """Flags have no NUL; half of the changes are to the value."""
  start = data.rfind(b'=') + 1 if rng.random() < 0.5 else 0
  if start and rng.random() < 0.5:
    return data[:start] + rng.choice((*fuzzing.VALUES, *SETS)).strip('"').encode()
  return data[:start] + fuzzing.damaged(rng, data[start:], others)[:20_000].replace(b'\0', b'')


def read_templates(path):
  """A template of any use."""
  for slots in (('prompt', 'response'), meta_judge.SLOTS):
    try:
      return judges.load(str(path), slots).parse('Score: 3')
    except InputError as error:
      last = error
  if '{shots}' not in str(last):
    raise last
  return templates.load_author(str(path))


def template_files():
  folder = pathlib.Path(judges.__file__).parent
  return [(folder / f'judge_{name}.txt').read_bytes() for name in TEMPLATES]


STUDIES = Files(lambda folder: (folder.mkdir(), (folder / 'loop.json').write_text(
    json.dumps(STUDY)), (folder / 'margin.json').write_text(json.dumps(STUDY | dict(name='a')))),
    study.overview)
ARRAY = st.one_of(*(schemas.any_record(kind).map(
    lambda row: (type(row).__name__, records.dump(row).encode())) for kind in schemas.KINDS))
# Damaged files of a run, on which a report once failed.
IN_REPORT = [('m2/audit/audit.json', b'{"pairs": 3, "right": -1}'),
             ('eval/alpaca_m2.json', b'//loop'),
             ('m1/judge/done.json', json.dumps(dict(
                 judgements=6, parsed=5, lowest=-1e15, highest=-1e15, unparsed={}, seconds=0
             )).encode())]


def in_folder(name: str, files: Files, share: float, examples=()) -> Target:
  """A target whose inputs are the files of a folder."""
  return Target(name, files, files, damage=damaged_file, is_folder=True, share=share,
                examples=examples)


TARGETS = [
    Target('parse', ARRAY,
           lambda given: records.parse(given[1], 'x.jsonl:1', getattr(schema, given[0]))),
    Target('read_any', [lines(RANKED), lines(OASST)],
           fuzzing.in_file(lambda path: list(records.read_any(path)), 'x.jsonl')),
    Target('read_json', [json.dumps(LM_EVAL).encode(), json.dumps(TREE).encode()],
           fuzzing.in_file(lambda path: records.read_json(path, 'give another file'))),
    Target('gzip', [gzip.compress(lines(rows), mtime=0) for rows in (RANKED, OASST)],
           fuzzing.in_file(lambda path: list(records.read_any(path)), 'x.jsonl.gz'),
           damage=damaged_gzip),
    in_folder('shards', Files(make_shards, read_shards), share=0.5),
    Target('appender', [lines([dataclasses.asdict(samples.response(f'p{i}/0')) for i in range(3)])],
           fuzzing.in_file(append, 'x.jsonl')),
    in_folder('model_folder', Files(make_model, read_model), share=0.25),
    in_folder('model_folder_consistent', Files(make_model, read_model, is_consistent=True),
              share=0.25),
    Target('lock', [json.dumps(LOCK | lock._pid_scope() | dict(started=1)).encode()],
           fuzzing.in_file(read_lock, 'lock.json'), refused=[json.dumps(LOCK).encode()]),
    Target('judgement', JUDGEMENTS + [x for x in TOTALS if b'Score: ' in x[1]], judge_text,
           refused=[x for x in TOTALS if b'Score: ' not in x[1]]),
    Target('verdict', [b'Both are good.\nWinner: A', b'So [[B]] is better.', b'Rating: [[7.5]]'],
           verdict),
    Target('judge_template', template_files(), fuzzing.in_file(read_templates, 'judge.txt')),
    Target('oasst', [lines(OASST), lines([TREE]), lines([TREE, *OASST])],
           fuzzing.in_file(lambda path: list(oasst.turns(records.read_any(path), False)),
                           'x.jsonl')),
    Target('ranked', [lines(RANKED)], fuzzing.in_file(
        lambda path: list(ranked.turns(records.read_any(path))), 'x.jsonl')),
    Target('prompts_jsonl', [lines(QUESTIONS), lines([dict(prompt='a'), dict(prompt='b', id='x')]),
                             lines([dict(instruction='a'), dict(instruction='b')])],
           fuzzing.in_file(read_prompts, 'x.jsonl')),
    Target('prompts_json', [json.dumps(rows).encode() for rows in (QUESTIONS, ANNOTATIONS)],
           fuzzing.in_file(read_prompts, 'x.json')),
    Target('held_out_prompts', [json.dumps(rows).encode() for rows in (QUESTIONS, ANNOTATIONS)],
           fuzzing.in_file(prompts.evaluation_prompts, 'x.json')),
    in_folder('mt_bench', Files(make_mt_bench, read_mt_bench), share=1),
    Target('alpaca', [json.dumps(ANNOTATIONS).encode()], fuzzing.in_file(read_alpaca)),
    in_folder('lm_eval', Files(make_harness, read_harness), share=1),
    Target('head_to_head', [lines([dict(id='ab', text='Winner: A'), dict(id='ba', text='[[C]]')])],
           fuzzing.in_file(read_replies, 'x.jsonl')),
    Target('judge_cache', [lines([dataclasses.asdict(schema.JudgeAnswer(
        id=f'{i}', text='[[7]]', finish='eos', prompt_tokens=5)) for i in range(3)])],
           fuzzing.in_file(read_cache, 'endpoint.jsonl')),
    Target('completion', [json.dumps(COMPLETION).encode()], read_completion),
    in_folder('study', STUDIES, share=1),
    Target('set', [text.encode() for text in SETS], read_set, damage=changed_text, share=0.5),
    Target('training_records', training_files(), read_training, share=0.5),
    in_folder('round_stages', round_stages, share=0.05),
    in_folder('ranked_stages', ranked_stages, share=0.05),
    in_folder('oracle', oracle_stage, share=0.05),
    in_folder('implicit_reward', reward_stage, share=0.05),
    in_folder('meta_judge', comparisons, share=0.05),
    in_folder('judge_pairs', judge_pair_stages, share=0.05),
    in_folder('answers', answers, share=0.05),
    in_folder('distributions', prompt_sets, share=0.05),
    in_folder('selection', measures, share=0.05),
    in_folder('stopping', wins, share=0.05),
    in_folder('report', report, share=0.05, examples=IN_REPORT),
]
