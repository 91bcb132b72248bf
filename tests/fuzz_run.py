"""Fuzzing targets: what a run reads. See tests/fuzzing.py."""
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import pathlib
import re
import shutil
import types
from unittest import mock

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
  stage,
  study,
)
from srlm_jax.data import oasst, prompt_files, ranked, templates
from srlm_jax.eval import agreement, alpaca, endpoint, harness, head_to_head, mt_bench
from srlm_jax.report import page
from srlm_jax.reward import eft, health, judges, pairs, scores
from srlm_jax.sample import meta_judge, prompts
from srlm_jax.sandbox import audit, oracle
from srlm_jax.train import run as train

# Instead of a file's bytes: it is a folder, a link to nothing, a link to itself, absent.
PLACES = (b'//folder', b'//dangling', b'//loop', b'//absent')


def place(path: pathlib.Path, data: bytes):
  """Makes the file what `data` says, one of PLACES or its bytes."""
  remove(path)
  if data == PLACES[0]:
    path.mkdir()
  elif data == PLACES[1]:
    path.symlink_to('nothing')
  elif data == PLACES[2]:
    path.symlink_to(path.name)
  elif data != PLACES[3]:
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
      self._restore(folder, files, name)

  def _restore(self, folder, files, name):
    remove(folder / name)
    done = str(pathlib.PurePath(name).with_name('done.json'))
    for file in {name, done} & files.keys():
      (folder / file).write_bytes(files[file])
    for path in folder.rglob('*'):  # what the reader wrote
      if str(path.relative_to(folder)) not in files and not path.is_dir():
        path.unlink()
    for file, data in files.items():
      if not (folder / file).exists():
        (folder / file).write_bytes(data)


def finished_run(folder):
  tiny_run.make(folder)
  tiny_run.finish(folder)


report = Files(finished_run, lambda folder: page.remake([folder], folder.parent / 'report.html'))


def run_stages(*found):
  """Runs stages that need no model: (program, model) of each."""
  def run(folder):
    # A board has a process and threads of its own.
    with mock.patch.object(metrics, 'Board'), mock.patch.object(scores, 'DRAWS', 10):
      for program, name in found:
        program.run(configs.get(name, 'tiny'), folder)
  return run


round_stages = Files(tiny_run.make, run_stages((pairs, 'm2'), (health, 'm2'), (audit, 'm2')),
                     is_consistent=True, of='m2/(prompts|respond|judge)/')
ranked_stages = Files(tiny_run.make, run_stages((eft, 'm1'), (agreement, 'm2')),
                      is_consistent=True, of='data/seeds/ranked|m1/judge/|m2/judge_eval/')


def make_for_oracle(folder):
  """A run whose prompts are instructions of the sandbox."""
  shutil.rmtree(tiny_run.make(folder) / 'm2' / 'oracle')
  for path in (folder / 'data/seeds/ranked.jsonl', *folder.glob('m2/answers*/*.jsonl')):
    path.write_text(re.sub(r'"prompt": "[^"]*"', '"prompt": "Name two nice fruits."',
                           path.read_text()))
    tiny_run.consistent(path.parent)


def make_answers(folder):
  made = tiny_run.make(folder.parent / 'other')
  for name in ('m1', 'm2'):
    for part in ('answers', 'oracle'):
      shutil.copytree(made / name / part, folder / name / part)
  shutil.rmtree(made)


def read_answers(folder):
  """As a comparison of two models does, by a judge and by grades."""
  both = head_to_head.Both(folder / 'm1' / 'answers', folder / 'm2' / 'answers')
  list(head_to_head.requests(both))
  graded = head_to_head.Both(folder / 'm1' / 'oracle', folder / 'm2' / 'oracle', is_graded=True)
  head_to_head.compare_scores((a.score, b.score) for a, b in graded)


oracle_stage = Files(make_for_oracle, run_stages((oracle, 'm2')), is_consistent=True,
                     of='data/seeds/ranked|m2/(answers|answers_greedy|judge_eval)/')


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
  records.kept(folder, 'responses')
  records.keep_shards(folder, 'responses', 1)
  records.kept(folder, 'responses')


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
    loaded(name).example, loaded(name).state(loaded(name).highest),
    f'1 point for relevance.\n**Total {loaded(name).state(loaded(name).lowest)}** out of 5 points')]


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
    for key in cache._places:
      cache.get(key)
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

TARGETS = [
    Target('parse', ARRAY,
           lambda given: records.parse(given[1], 'x.jsonl:1', getattr(schema, given[0]))),
    Target('read_any', [lines(RANKED), lines(OASST)],
           fuzzing.in_file(lambda path: list(records.read_any(path)), 'x.jsonl')),
    Target('read_json', [json.dumps(LM_EVAL).encode(), json.dumps(TREE).encode()],
           fuzzing.in_file(lambda path: records.read_json(path, 'give another file'))),
    Target('gzip', [gzip.compress(lines(rows), mtime=0) for rows in (RANKED, OASST)],
           fuzzing.in_file(lambda path: list(records.read_any(path)), 'x.jsonl.gz')),
    Target('shards', files := Files(make_shards, read_shards), files, damage=damaged_file,
           share=0.5),
    Target('appender', [lines([dataclasses.asdict(samples.response(f'p{i}/0')) for i in range(3)])],
           fuzzing.in_file(append, 'x.jsonl')),
    Target('model_folder', files := Files(make_model, read_model), files, damage=damaged_file,
           share=0.25),
    Target('model_folder_consistent', files := Files(make_model, read_model, is_consistent=True),
           files, damage=damaged_file, share=0.25),
    Target('lock', [json.dumps(LOCK).encode(), json.dumps(LOCK | lock._pid_scope()).encode()],
           fuzzing.in_file(read_lock, 'lock.json')),
    Target('judgement', JUDGEMENTS, judge_text),
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
    Target('mt_bench', files := Files(make_mt_bench, read_mt_bench), files, damage=damaged_file),
    Target('alpaca', [json.dumps(ANNOTATIONS).encode()], fuzzing.in_file(read_alpaca)),
    Target('lm_eval', files := Files(make_harness, read_harness), files, damage=damaged_file),
    Target('head_to_head', [lines([dict(id='ab', text='Winner: A'), dict(id='ba', text='[[C]]')])],
           fuzzing.in_file(read_replies, 'x.jsonl')),
    Target('compared_answers', files := Files(make_answers, read_answers, is_consistent=True),
           files, damage=damaged_file, share=0.1),
    Target('judge_cache', [lines([dataclasses.asdict(schema.JudgeAnswer(
        id=f'{i}', text='[[7]]', finish='eos', prompt_tokens=5)) for i in range(3)])],
           fuzzing.in_file(read_cache, 'endpoint.jsonl')),
    Target('completion', [json.dumps(COMPLETION).encode()], read_completion),
    Target('study', STUDIES, STUDIES, damage=damaged_file),
    Target('set', [text.encode() for text in SETS], read_set, damage=changed_text, share=0.5),
    Target('round_stages', round_stages, round_stages, damage=damaged_file, share=0.025),
    Target('ranked_stages', ranked_stages, ranked_stages, damage=damaged_file, share=0.025),
    Target('oracle_stage', oracle_stage, oracle_stage, damage=damaged_file, share=0.025),
    Target('report', report, report, damage=damaged_file, share=0.1),
]
