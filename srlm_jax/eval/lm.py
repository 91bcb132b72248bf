"""lm-evaluation-harness with this engine: any of its tasks, without torch.

  python -m srlm_jax.eval.lm --model=runs/x/m2/model --tasks=arc_easy,gsm8k --out=results.json

`srlm_jax.eval.harness` does the same for several models and compares them. In Python,
`lm.adapter()` registers the model `srlm_jax` with lm_eval.
"""
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
from importlib import metadata
import json
import pathlib
from typing import Any

from absl import flags
from etils import epath
import jax
import tqdm

from srlm_jax import cli, InputError, model_files, records
from srlm_jax.config import CHATS
from srlm_jax.conversation import Message
from srlm_jax.data import templates
from srlm_jax.sample import engine as engines

MAX_GEN_TOKS = 256  # tokens to generate, where a task does not say
# The names that lm_eval has for the number of tokens to generate, the first one first.
LENGTHS = 'max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens'
ROWS = 4096  # rows to score between two steps of the progress bar
ADVICE = 'install the extra: pip install -e \'.[eval]\''
# What lm_eval passes to every model, and this engine chooses itself.
IGNORED = 'batch_size', 'max_batch_size', 'device'


@dataclasses.dataclass(frozen=True)
class Options:
  """How a model is loaded and reads text."""
  chat: str = ''         # chat format; '': that of its training here, or its tokenizer's template
  max_length: int = 0    # most tokens of a text; 0: the model's context
  add_bos_token: bool | None = None   # whether texts begin with bos; None: as the tokenizer says
  prefix_token_id: int | None = None  # what an empty context becomes; None: bos, or else eos
  dtype: str = ''        # '': float32 on a CPU, else bfloat16
  int8: bool = False     # 8-bit weights
  slots: int = -1        # samples that decode together; -1: chosen
  tensor: int = -1       # devices for tensor parallelism; -1: chosen
  seed: int = 0


class Model:
  """A checkpoint or a Hugging Face folder, and what the harness asks of it."""

  def __init__(self, folder: str, options: Options):
    if jax.process_count() > 1:
      raise InputError('lm-evaluation-harness runs on one host; start it in one process')
    self.chat = options.chat or engines.chat_of(folder)
    # The engine takes the model's context, if that is less.
    config = engines.config_alone(
        options.dtype, options.tensor, options.seed, slots=options.slots, int8=options.int8,
        size=options.max_length or 2**31 - 1)
    self.engine, self.tokenizer = engines.load(config, folder, 'lm_eval', self.chat)
    self.max_length = self.engine.size
    if options.max_length > self.max_length:
      raise InputError(f'max_length is {options.max_length}, and the model\'s context has '
                       f'{self.max_length} tokens; lower it')
    tokenizer, add = self.tokenizer, options.add_bos_token
    if add and tokenizer.bos_id is None:
      raise InputError(f'the tokenizer in {folder} has no bos token; leave add_bos_token out')
    self._adds_bos = tokenizer.adds_bos if add is None else add
    given = options.prefix_token_id
    self.prefix_id = [*tokenizer.start, tokenizer.eos_ids[0]][0] if given is None else given
    self._shortened = 0  # texts that lost their beginning

  def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
    """Token ids of a text; `add_bos` None: with bos as the options say, unless it begins with it.
    """
    ids = self.tokenizer.encode(text)
    if add_bos is None:
      add_bos = self._adds_bos and ids[:1] != self.tokenizer.start
    return [*self.tokenizer.start, *ids] if add_bos else ids

  def render(self, history: Sequence[Mapping[str, str]], is_open: bool) -> str:
    """A conversation in the chat format, for `encode`; `is_open`: the last message goes on."""
    if self.chat == 'none':
      raise InputError('the model has no chat template; name a chat format, as chat=plain, or run '
                       'without apply_chat_template')
    said = tuple(Message(m['role'], m['content']) for m in history)
    if not is_open:
      return templates.chat(self.chat, said, self.tokenizer)
    return templates.with_response(self.chat, said[:-1], said[-1].content, self.tokenizer)

  def score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[engines.Score]:
    """(context ids, continuation ids) -> scores. A context that is too long loses its beginning."""
    fitting = []
    for context, continuation in rows:
      room = self.max_length + 1 - len(continuation)
      if room < 1:
        raise InputError(f'a continuation has {len(continuation)} tokens, more than the '
                         f'{self.max_length} of max_length; leave out the task')
      fitting.append((self._end_of(context, room), continuation))
    self._report()
    found = []
    with tqdm.tqdm(total=len(rows), desc='loglikelihood', delay=2) as bar:
      for start in range(0, len(rows), ROWS):
        found += self.engine.score(fitting[start:start + ROWS])
        bar.update(len(found) - bar.n)
    return found

  def rolling(self, texts: Sequence[str]) -> list[float]:
    """The log-prob of every text, all of whose tokens are predicted."""
    rows, sums = [], [0.0] * len(texts)
    for i, text in enumerate(texts):
      rows += [(i, *window)
               for window in windows(self.encode(text), self.prefix_id, self.max_length)]
    for (i, *_), score in zip(rows, self.score([row[1:] for row in rows]), strict=True):
      sums[i] += score.logp
    return sums

  def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """(prompt, lm_eval's generation_kwargs) -> the responses, up to a stop string.

    A prompt that leaves no room for max_gen_toks loses its beginning.
    """
    rows = []
    for text, kwargs in requests:
      sampling, stops = read_kwargs(kwargs)
      room = self.max_length - sampling.max_tokens
      if room < 1:
        raise InputError(f'max_gen_toks is {sampling.max_tokens}, and a text may have '
                         f'{self.max_length} tokens in all; lower it, or raise max_length')
      rows.append((self._end_of(self.encode(text), room), sampling, stops))
    self._report()
    found = [''] * len(rows)
    with tqdm.tqdm(total=len(rows), desc='generate_until', delay=2) as bar:
      for some in _alike(rows):  # their prompts may have a common prefix
        for i, text in self._generate([(i, *rows[i]) for i in some]):
          found[i] = text
          bar.update()
    return found

  def _generate(self, rows) -> Iterator[tuple[int, str]]:
    """(number, prompt ids, sampling, stops) -> (number, response) in any order."""
    engine, seen = self.engine, Counter()
    slots, running = engine.open([row[1] for row in rows]), {}
    waiting = iter(rows)
    end = self.tokenizer.special.get('eos_token', '')
    while True:
      while len(running) < 2 * engine.slots and (row := next(waiting, None)):
        i, ids, sampling, stops = row
        # The draws depend on the prompt and on how often it came before, not on the other prompts.
        name = records.digest(*map(str, ids))
        request = engines.Request(f'{name}/{seen[name]}', ids, sampling=sampling)
        seen[name] += 1
        running[i] = engine.put(slots, request), [*stops, end]
      if not running:
        return
      engine.advance(slots)
      for i, (results, stops) in list(running.items()):
        text = self.tokenizer.decode(results[0].ids)
        cut = before(text, stops)
        if results[0].finish or cut != text:
          slots.schedule.remove(results)
          del running[i]
          yield i, cut

  def _end_of(self, ids: list[int], room: int) -> list[int]:
    self._shortened += len(ids) > room
    return ids[-room:]

  def _report(self):
    """Says how many texts lost their beginning."""
    if self._shortened:
      print(f'lm_eval: {self._shortened} texts are longer than {self.max_length} tokens; their '
            f'beginning is left out', flush=True)
    self._shortened = 0


def windows(ids: Sequence[int], prefix: int, most: int) -> Iterator[
    tuple[list[int], list[int]]]:
  """A document -> (context, tokens to predict), as the harness divides it.

  Every token is predicted once, the first after `prefix`; context and tokens are at most most + 1.

  >>> list(windows([1, 2, 3, 4, 5, 6, 7], 0, 3))
  [([0], [1, 2, 3]), ([3], [4, 5, 6]), ([4, 5, 6], [7])]
  """
  for start in range(0, len(ids), most):
    end = min(start + most, len(ids))
    context = ids[end - most - 1:start] if start else [prefix]
    yield list(context), list(ids[start:end])


def read_kwargs(kwargs: Mapping[str, Any]) -> tuple[engines.Sampling, list[str]]:
  """lm_eval's generation_kwargs -> how to sample, and the stop strings.

  >>> read_kwargs(dict(until='Q:', do_sample=False, temperature=0.7, max_gen_toks=8))
  (Sampling(temperature=0.0, top_p=1.0, max_tokens=8, top_k=0), ['Q:'])
  """
  given = dict(kwargs)
  until = given.pop('until', None) or []
  lengths = [given.pop(name, None) for name in LENGTHS]
  length = next((int(n) for n in lengths if n is not None), MAX_GEN_TOKS)
  samples, temperature = given.pop('do_sample', None), float(given.pop('temperature', None) or 0)
  top_p, top_k = float(given.pop('top_p', None) or 1), int(given.pop('top_k', None) or 0)
  if given:
    raise InputError(f'generation_kwargs has {", ".join(sorted(given))}, which the engine does not '
                     f'support; leave it out')
  if samples and not temperature:
    raise InputError('generation_kwargs has do_sample=True without a temperature; set one above 0')
  if samples is False:
    temperature = 0.0
  stops = [until] if isinstance(until, str) else list(until)
  return engines.Sampling(temperature, top_p, length, top_k), stops


def before(text: str, stops: Sequence[str]) -> str:
  """The text before the first stop string in it.

  >>> before('a b c', ['c', '', 'b'])
  'a '
  """
  for stop in filter(None, stops):
    text = text.partition(stop)[0]
  return text


def _alike(rows) -> list[list[int]]:
  """Numbers of the rows (prompt, sampling, stops) that differ in the prompt only."""
  groups = {}
  for i, (_, sampling, stops) in enumerate(rows):
    groups.setdefault((sampling, *stops), []).append(i)
  return list(groups.values())


@functools.cache
def adapter():
  """lm_eval's class of this model, which is then registered as `srlm_jax`.

  Its arguments: `model`, a folder, and the fields of `Options`; those of IGNORED have no effect.
  """
  try:
    from lm_eval.api import model as api, registry
  except ModuleNotFoundError as error:
    raise InputError(f'{error.name} is not installed; {ADVICE}') from error

  @registry.register_model('srlm_jax')
  class Adapter(api.TemplateLM):
    """The interface of lm_eval; TemplateLM encodes contexts and continuations."""

    def __init__(self, model: str, **options):
      super().__init__()
      self.folder, self.model = model, Model(model, read_options(options))

    @property
    def eot_token_id(self) -> int:
      return self.model.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
      return self.model.prefix_id

    @property
    def max_length(self) -> int:
      return self.model.max_length

    @property
    def tokenizer_name(self) -> str:
      return f'{self.folder}__{self.model.chat}'.replace('/', '__')

    def chat_template(self, chat_template: bool | str = False) -> str | None:
      """The source of the template, for the results file."""
      if not chat_template:
        return None
      if chat_template not in (True, self.model.chat):
        raise InputError(f'the model was loaded with the chat format {self.model.chat}; load it '
                         f'with chat={chat_template}')
      if self.model.chat == 'tokenizer':
        return self.model.tokenizer.template.source
      return templates.source(self.model.chat)

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
      return self.model.render(chat_history, not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
      return self.model.encode(string, add_special_tokens)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
      found = [tuple(score) for score in self.model.score([row[1:] for row in requests])]
      return self._cached('loglikelihood', [row[0] for row in requests], found)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
      asked = [request.args for request in requests]
      return self._cached('loglikelihood_rolling', asked, self.model.rolling([a[0] for a in asked]))

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
      asked = [request.args for request in requests]
      return self._cached('generate_until', asked, self.model.generate(asked))

    def _cached(self, kind: str, asked: Sequence, found: list) -> list:
      """The answers, after lm_eval's cache of requests has them too."""
      for args, answer in zip(asked, found, strict=True):
        self.cache_hook.add_partial(kind, args, answer)
      return found
  return Adapter


def read_options(given: Mapping[str, Any]) -> Options:
  """The arguments of the model in lm_eval -> options. Raises InputError for an unknown one."""
  names = [field.name for field in dataclasses.fields(Options)]
  if unknown := sorted(given.keys() - {*names, *IGNORED}):
    raise InputError(f'the model srlm_jax has no argument {", ".join(unknown)}; it has '
                     f'{", ".join(["model", *names])}')
  return Options(**{name: given[name] for name in names if name in given})


@dataclasses.dataclass(frozen=True)
class Run:
  """What to evaluate."""
  tasks: Sequence[str]
  include_path: str = ''           # folder with more tasks, as YAML
  num_fewshot: int | None = None   # None: as each task says
  limit: int | None = None         # the first documents of each task; None: all
  apply_chat_template: bool = False


def made_of(folder: str, run: Run, options: Options) -> dict[str, Any]:
  """All that results depend on, as JSON, to know whether a results file is of the same run.

  Raises InputError if the folder has no model.
  """
  source = epath.Path(folder)
  if model_files.exists(folder):
    hashes = model_files.read_hashes(folder)
    files = dict(hashes.files, params=hashes.params.stored)
  else:
    weights = sorted(source.glob('*.safetensors'))
    if not weights:
      raise InputError(f'{folder} has neither a checkpoint nor .safetensors files; name the folder '
                       f'of a model')
    files = model_files.hashes(folder) | {path.name: records.hash_file(path) for path in weights}
  given = pathlib.Path(run.include_path)  # lm_eval reads no buckets
  local = sorted(path for path in given.rglob('*') if path.is_file()) if run.include_path else ()
  tasks = {str(path.relative_to(given)): records.hash_file(path) for path in local}
  found = dict(files=files, local_tasks=tasks, run=dataclasses.asdict(run),
               options=dataclasses.asdict(options), lm_eval=metadata.version('lm_eval'))
  return json.loads(json.dumps(found))


def check_tasks(run: Run):
  """Returns lm_eval's manager of tasks. Raises InputError for a task that it does not have."""
  adapter()  # raises InputError without lm_eval
  if run.include_path and not pathlib.Path(run.include_path).is_dir():
    raise InputError(f'--include_path={run.include_path} is not a folder; name the folder of the '
                     f'tasks')
  manager = _manager(run.include_path)
  for name in run.tasks:
    if name not in manager.all_tasks:
      raise InputError(f'lm_eval has no task {name}; correct --tasks, or name the folder of the '
                       f'task in --include_path')
  return manager


@functools.cache
def _manager(include_path: str):
  from lm_eval import tasks
  return tasks.TaskManager(include_path=include_path or None)


def evaluate(folder: str, run: Run, options: Options) -> str:
  """lm_eval's results, with its samples, as the JSON text that lm_eval writes.

  `config.made_of` in it is what `made_of` gives.
  """
  manager, build = check_tasks(run), adapter()
  import lm_eval
  from lm_eval import utils
  identity = made_of(folder, run, options)
  model = build(folder, **dataclasses.asdict(options))
  found = lm_eval.simple_evaluate(
      model=model, tasks=list(run.tasks), num_fewshot=run.num_fewshot, limit=run.limit,
      apply_chat_template=run.apply_chat_template, task_manager=manager)
  found['config'] |= dict(model='srlm_jax', model_args=dict(
      model=str(folder), **dataclasses.asdict(options)), kernels=model.model.engine.kernels,
      chat=model.model.chat if run.apply_chat_template else '', made_of=identity)
  text = json.dumps(found, default=utils.handle_non_serializable, ensure_ascii=False, indent=1)
  return model.model.tokenizer.readable(text)


def define_flags(tasks: str):
  """The flags that `srlm_jax.eval.harness` has too; `tasks`: the help of --tasks."""
  flags.DEFINE_list('tasks', None, tasks)
  flags.DEFINE_string('include_path', '', 'Folder with more tasks, as YAML.')
  flags.DEFINE_integer('num_fewshot', None, 'Examples in every prompt; default: as each task says.',
                       lower_bound=0)
  flags.DEFINE_integer('limit', None, 'Only the first documents of each task; for tests.',
                       lower_bound=1)
  flags.DEFINE_bool('apply_chat_template', False, 'Ask in the chat format.')
  flags.DEFINE_enum('chat', '', ('', *CHATS), 'Chat format; default: that with which the model was '
                    'trained here, or else the template of its tokenizer.')
  flags.DEFINE_integer('max_length', 0, 'Most tokens of a text; 0: the model\'s context.',
                       lower_bound=0)
  flags.DEFINE_bool('add_bos_token', None, 'Begin every text with bos; default: as the tokenizer '
                    'says.')
  flags.DEFINE_integer('prefix_token_id', None, 'What an empty context becomes; default: bos.',
                       lower_bound=0)
  flags.DEFINE_enum('dtype', '', ('', 'float32', 'bfloat16'),
                    'Type of parameters and activations; default: float32 on a CPU, else bfloat16.')
  flags.DEFINE_bool('int8', False, '8-bit weights.')
  flags.DEFINE_integer('slots', -1, 'Samples that decode together; -1: chosen.', lower_bound=-1)
  flags.DEFINE_integer('tensor', -1, 'Devices for tensor parallelism; -1: chosen.', lower_bound=-1)
  flags.DEFINE_integer('seed', 0, 'Seed of the PRNG.', lower_bound=0, upper_bound=2**32 - 1)


def from_flags(kind, **changes):
  """An object of `kind` with the values of the flags that its fields name."""
  f = flags.FLAGS
  return kind(**{field.name: changes.get(field.name, f[field.name].value if field.name in f else
                                         field.default) for field in dataclasses.fields(kind)})


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  out = epath.Path(f.out)
  text = evaluate(f.model, from_flags(Run), from_flags(Options))
  with records.replacing(out) as file:
    file.write(text)
  for name, values in json.loads(text)['results'].items():
    shown = {key: value for key, value in values.items() if isinstance(value, float)}
    print(f'{name}: ' + ', '.join(f'{key} {value:.4f}' for key, value in shown.items()))
  print(f'{out}: {len(f.tasks)} tasks')


if __name__ == '__main__':
  define_flags('Tasks of lm_eval, separated by commas.')
  flags.DEFINE_string('model', None, 'Folder of a checkpoint or of a Hugging Face model.',
                      required=True)
  flags.DEFINE_string('out', None, 'JSON file to write: lm_eval\'s results.', required=True)
  flags.mark_flag_as_required('tasks')
  cli.run_app(main)
