"""Every stage of a run, declared once: what it reads, writes and runs, and its config keys.

A stage is a folder WORKDIR/OWNER/NAME. `loop.py` calls the stages in order. `STAGES` says which
files a stage reads and writes, which model it runs, which config keys its manifest lists, whether a
config needs it, and which --on selects it.
"""
from collections.abc import Callable
import dataclasses

from etils import epath
from ml_collections import ConfigDict

from srlm_jax import closest, config as configs, InputError, records, schema

SHARDS = '-*.jsonl'  # the end of the name of a file that groups of hosts write in shards
# Role of a model that a stage runs -> its name in the config.
ROLES = {
    'self': lambda c: c.name,
    'sampler': lambda c: c.sampler,
    'older': lambda c: c.pairs.older,  # the model one iteration before the sampler
    'init': lambda c: c.train.init,
    'judge': lambda c: c.endpoint.url,  # a model, where this is no URL
    'author': lambda c: c.sampler if c.prompts.author == 'sampler' else c.prompts.author,
}


class Undeclared(Exception):
  """A stage reads a config key or a file that it does not declare: a bug, not a user's error."""


def _always(_) -> bool:
  return True


@dataclasses.dataclass(frozen=True)
class Spec:
  """One stage. If several programs can write the same folder, each has a `Spec`.

  Files that it writes are named FILE, files that it reads STAGE/FILE, where STAGE belongs to the
  same model or to `data`. A FILE that ends in `-*.jsonl` is written in shards.
  """
  name: str                              # of the folder
  program: str                           # python -m srlm_jax.PROGRAM
  writes: tuple[str, ...]
  reads: tuple[str, ...] = ()
  # {file: whether a config makes the stage read it}
  reads_if: dict[str, Callable[[ConfigDict], bool]] = dataclasses.field(default_factory=dict)
  reads_if_there: tuple[str, ...] = ()
  reads_training_data: bool = False      # reads the files that `train.data` names
  runs: tuple[str, ...] = ()             # ROLES of the models that it runs
  on: str = ''                           # the program's --on that selects it
  samples: str = ''                      # config key of the samples per item; '': 1
  owner: str = ''                        # parent folder: data, a model, or '' for config.name
  keys: tuple[str, ...] = ()             # config keys that the manifest records; see READ_IF
  unrecorded: tuple[str, ...] = ()       # config keys that it reads and does not record
  needed: Callable[[ConfigDict], bool] = _always  # whether the loop runs it

  def view(self, config: ConfigDict) -> 'View':
    """The part of a config that this stage may read."""
    return View(unwrap(config), self.keys + self.unrecorded + ALWAYS)

  def recorded(self, config) -> dict:
    """{key: value} of the config keys that the manifest records."""
    config = unwrap(config)
    found = {key: look_up(config, key) for key in self.keys
             if key not in READ_IF or READ_IF[key](config)}
    if 'train.data' in found:  # a flag gives one string with commas
      found['train.data'] = configs.training_data(config)
    if 'train.lora_targets' in found:
      found['train.lora_targets'] = configs.lora_targets(config.train)
    return found

  def folder(self, workdir, config):
    """The stage's folder."""
    return epath.Path(workdir) / (self.owner or config.name) / self.name

  def models(self, config) -> dict[str, str]:
    """{role: name} of the models that it runs; '' for one that the config leaves empty.

    Training from scratch runs no model.
    """
    names = {role: ROLES[role](unwrap(config)) for role in self.runs}
    if names.get('init') == '':
      del names['init']
    return names

  def count(self, config) -> int:
    """The samples per item."""
    return look_up(unwrap(config), self.samples) if self.samples else 1

  def inputs(self, workdir, config) -> list:
    """The files that it reads; for missing shards, a placeholder path."""
    config = unwrap(config)
    found = [path for file in (*self.reads, *self.conditional(config))
             for path in paths(file, workdir, config)]
    if self.reads_training_data:
      found += training_files(workdir, config)
    there = [path for file in self.reads_if_there for path in paths(file, workdir, config)]
    return found + [path for path in there if path.exists()]

  def conditional(self, config) -> list[str]:
    """The files of `reads_if` that it reads with this config."""
    return [file for file, condition in self.reads_if.items() if condition(unwrap(config))]

  def check_input(self, file: str, config):
    """Raises Undeclared if the stage does not declare that it reads STAGE/FILE with this config."""
    if file not in (*self.reads, *self.conditional(config), *self.reads_if_there):
      raise Undeclared(f'{self.program} reads {file}, which is not declared; add it to catalog.py')


def paths(file: str, workdir, config) -> list:
  """STAGE/FILE -> [its path], or the paths of its shards; for missing ones, a placeholder."""
  stage, _, name = file.partition('/')
  folder = next(spec for spec in STAGES if spec.name == stage).folder(workdir, unwrap(config))
  return records.shards(folder, stem(name)) if name.endswith(SHARDS) else [folder / name]


def stem(file: str) -> str:
  """
  >>> stem('responses-*.jsonl')
  'responses'
  """
  return file.removesuffix(SHARDS)


class View:
  """A config, or a section of it, that allows reading only declared keys.

  >>> view = find('reward.health').view(configs.get('m2', 'tiny'))
  >>> view.judge.quorum
  2
  >>> view.judge.template
  Traceback (most recent call last):
  srlm_jax.catalog.Undeclared: config.judge.template is read and not declared; add it to catalog.py
  """

  def __init__(self, config: ConfigDict, keys: tuple[str, ...], section: str = ''):
    self._config, self._keys, self._section = config, keys, section

  def __getattr__(self, name: str):
    key = self._section + name
    value = look_up(self._config, key)
    if isinstance(value, ConfigDict):
      return View(self._config, self._keys, key + '.')
    if key not in self._keys:
      raise Undeclared(f'config.{key} is read and not declared; add it to catalog.py')
    return value


def replace(config, values: dict):
  """A config or a View -> the same with other values, {SECTION.KEY: value}."""
  changed = unwrap(config).copy_and_resolve_references()
  changed.update_from_flattened_dict(values)
  return View(changed, config._keys) if isinstance(config, View) else changed


def unwrap(config) -> ConfigDict:
  """Unwraps a View; returns a ConfigDict unchanged."""
  return config._config if isinstance(config, View) else config


def look_up(config: ConfigDict, key: str):
  """The value of SECTION.KEY; raises AttributeError if there is none."""
  for part in key.split('.'):
    config = getattr(config, part)
  return config


def _strategy(*names: str) -> Callable[[ConfigDict], bool]:
  return lambda c: c.pairs.strategy in names


def _trains_on_pairs(c: ConfigDict) -> bool:
  return c.train.loss in configs.PAIR_LOSSES


def _in_sandbox(c: ConfigDict) -> bool:
  return c.data.source == 'sandbox'


def _trains_on(*names: str) -> Callable[[ConfigDict], bool]:
  return lambda c: not {*names}.isdisjoint(configs.training_data(c))


_trains_on_own = _trains_on('pairs', 'positives')  # what the sampler wrote and judged


def _stops_early(c: ConfigDict) -> bool:
  return c.train.select == 'wins'


def _judged_by_endpoint(c: ConfigDict) -> bool:
  return _trains_on_own(c) and c.judge.by == 'endpoint'


_SEEDS = ('data.ift', 'data.ranked_train', 'data.ranked_eval', 'data.test_prompts',
          'data.valid_prompts')
_SAMPLE = ('seed', 'sample.slots', 'sample.size', 'sample.dtype', 'sample.int8',
           'sample.lora_merge')
_SAMPLE_UNRECORDED = ('sample.steps', 'sample_mesh.data', 'sample_mesh.fsdp', 'sample_mesh.tensor')
_RESPOND = ('chat', 'respond.n', 'respond.temperature', 'respond.top_p', 'respond.top_k',
            'respond.max_tokens', *_SAMPLE)
_ANSWERS = ('chat', 'eval.temperature', 'eval.top_p', 'eval.top_k', 'respond.max_tokens', *_SAMPLE)
_GREEDY = ('chat', 'eval.split', 'respond.max_tokens', *_SAMPLE)
_JUDGE = ('chat', 'judge.template', 'judge.temperature', 'judge.top_p', 'judge.top_k',
          'judge.max_tokens', *_SAMPLE)
_SHOWN = ('judge.show_thinking',)
_JUDGE_PAIRS = 'judge_pairs.share', 'judge_pairs.score_share'

ALWAYS = ('name', 'size')  # which config it is; every stage may read them
STAGES = (
    Spec('seeds', 'data.seeds', ('ift.jsonl', 'ranked.jsonl', 'heldout.jsonl', 'counts.json'),
         owner='data', keys=('seed', 'data.source', 'data.synthetic', *_SEEDS),
         unrecorded=('data.path',), needed=lambda c: not _in_sandbox(c)),
    Spec('seeds', 'sandbox', ('ift.jsonl', 'ranked.jsonl', 'heldout.jsonl'), owner='data',
         keys=('seed', 'data.ranked_tune', *_SEEDS), needed=_in_sandbox),
    Spec('corpus', 'sandbox', ('corpus.jsonl', 'tokenizer.model'), owner='data', on='corpus',
         keys=('seed', 'data.documents', 'data.reviews', 'model'), needed=lambda c: c.name == 'm0'),
    Spec('prompts', 'sample.prompts', ('prompts.jsonl', 'attempts.jsonl'),
         reads=('seeds/ift.jsonl', 'seeds/ranked.jsonl', 'seeds/heldout.jsonl'), runs=('author',),
         keys=(*(f'prompts.{key}' for key in (
             'author', 'template', 'chat', 'held_out', 'round', 'count', 'max_attempts',
             'seed_shots', 'new_shots', 'shot_words', 'temperature', 'top_p', 'top_k', 'max_tokens',
             'rouge', 'rouge_held_out', 'min_words', 'max_words')), *_SAMPLE),
         unrecorded=_SAMPLE_UNRECORDED, needed=_trains_on_own),
    Spec('respond', 'sample.respond', ('responses-*.jsonl',), reads=('prompts/prompts.jsonl',),
         runs=('sampler',), on='prompts', samples='respond.n', keys=_RESPOND,
         unrecorded=_SAMPLE_UNRECORDED, needed=_trains_on_own),
    Spec('judge', 'sample.judge', ('judgements-*.jsonl',), reads=('respond/responses-*.jsonl',),
         runs=('sampler',), on='responses', samples='judge.n', keys=('judge.n', *_SHOWN, *_JUDGE),
         unrecorded=('judge.by', *_SAMPLE_UNRECORDED),
         needed=lambda c: _trains_on_own(c) and c.judge.by == 'model'),
    Spec('judge', 'eval.endpoint', ('judgements-*.jsonl', 'endpoint.jsonl'),
         reads=('respond/responses-*.jsonl',),
         keys=('judge.by', 'judge.n', 'judge.template', 'judge.temperature', 'judge.top_p',
               'judge.max_tokens', *_SHOWN, 'endpoint.model'),
         unrecorded=tuple(f'endpoint.{key}' for key in (
             'url', 'key_env', 'concurrency', 'per_minute', 'timeout', 'attempts', 'temperature',
             'max_tokens', 'price_in', 'price_out')),
         needed=lambda c: _judged_by_endpoint(c) and configs.is_url(c.endpoint.url)),
    Spec('judge', 'eval.endpoint', ('judgements-*.jsonl',), reads=('respond/responses-*.jsonl',),
         runs=('judge',), on='local', samples='judge.n',
         keys=('judge.by', 'judge.n', *_SHOWN, *_JUDGE), unrecorded=_SAMPLE_UNRECORDED,
         needed=lambda c: _judged_by_endpoint(c) and not configs.is_url(c.endpoint.url)),
    Spec('judge', 'sandbox.control', ('judgements-*.jsonl',), reads=('respond/responses-*.jsonl',),
         keys=('seed', 'judge.by', 'judge.n', 'judge.template'),
         needed=lambda c: _trains_on_own(c) and c.judge.by in ('oracle', 'random')),
    Spec('judge', 'sample.judge', ('judgements-*.jsonl',), reads=('seeds/ranked.jsonl',),
         runs=('sampler',), on='ranked', samples='eft.judgements',
         keys=('eft.judgements', *_JUDGE), unrecorded=_SAMPLE_UNRECORDED,
         needed=lambda c: c.name == 'm1' and _trains_on('eft')(c) and c.eft.targets == 'baseline'),
    Spec('judge_again', 'sample.judge', ('judgements-*.jsonl',),
         reads=('respond/responses-*.jsonl',), runs=('older',), on='again', samples='judge.n',
         keys=('judge.n', *_SHOWN, *_JUDGE), unrecorded=_SAMPLE_UNRECORDED,
         needed=_strategy('consistency')),
    Spec('respond_older', 'sample.respond', ('responses-*.jsonl',),
         reads=('prompts/prompts.jsonl',), runs=('older',), on='older', samples='respond.n',
         keys=_RESPOND,
         unrecorded=_SAMPLE_UNRECORDED, needed=_strategy('temporal')),
    Spec('judge_older', 'sample.judge', ('judgements-*.jsonl',),
         reads=('respond_older/responses-*.jsonl',), runs=('sampler',), on='older',
         samples='judge.n',
         keys=('judge.n', *_SHOWN, *_JUDGE), unrecorded=_SAMPLE_UNRECORDED,
         needed=_strategy('temporal')),
    Spec('implicit', 'sample.implicit', ('logp-*.jsonl', 'older_logp-*.jsonl', 'rewards-*.jsonl'),
         reads=('respond/responses-*.jsonl',), runs=('sampler', 'older'), keys=('chat', *_SAMPLE),
         unrecorded=_SAMPLE_UNRECORDED, needed=_strategy('implicit_reward')),
    Spec('pairs', 'reward.pairs', ('pairs.jsonl', 'positives.jsonl', 'scores.jsonl'),
         reads=('respond/responses-*.jsonl', 'judge/judgements-*.jsonl'),
         reads_if={'judge_again/judgements-*.jsonl': _strategy('consistency'),
                   'implicit/rewards-*.jsonl': _strategy('implicit_reward'),
                   'respond_older/responses-*.jsonl': _strategy('temporal'),
                   'judge_older/judgements-*.jsonl': _strategy('temporal')},
         keys=('pairs.strategy', 'pairs.unfinished_chosen', 'pairs.margin', 'pairs.rho',
               'pairs.positive', 'judge.quorum'), needed=_trains_on_own),
    Spec('meta_judge', 'sample.meta_judge', ('comparisons-*.jsonl', 'judge_pairs.jsonl'),
         reads=('respond/responses-*.jsonl', 'judge/judgements-*.jsonl', 'pairs/pairs.jsonl'),
         runs=('sampler',), keys=(*(f'meta_judge.{key}' for key in (
             'template', 'temperature', 'top_p', 'top_k', 'max_tokens', 'responses')),
             *_JUDGE_PAIRS, 'judge.template', *_SHOWN, 'judge.quorum', 'chat', *_SAMPLE),
         unrecorded=('judge.n', *_SAMPLE_UNRECORDED), needed=_trains_on('judge_pairs')),
    Spec('swap', 'reward.swap', ('swapped.jsonl',), reads=('respond/responses-*.jsonl',),
         needed=_trains_on('swapped_pairs')),
    Spec('judge_swapped', 'sample.judge', ('judgements-*.jsonl',),
         reads=('swap/swapped.jsonl',), runs=('sampler',), on='swapped', samples='judge.n',
         keys=('judge.n', *_SHOWN, *_JUDGE), unrecorded=_SAMPLE_UNRECORDED,
         needed=_trains_on('swapped_pairs')),
    Spec('majority', 'reward.judge_pairs', ('majority_pairs.jsonl',), on='majority',
         reads=('respond/responses-*.jsonl', 'judge/judgements-*.jsonl', 'pairs/pairs.jsonl'),
         keys=('judge.template', *_SHOWN, 'judge.quorum', *_JUDGE_PAIRS),
         needed=_trains_on('majority_pairs')),
    Spec('swapped', 'reward.judge_pairs', ('swapped_pairs.jsonl',), on='swapped',
         reads=('respond/responses-*.jsonl', 'judge/judgements-*.jsonl', 'pairs/pairs.jsonl',
                'swap/swapped.jsonl', 'judge_swapped/judgements-*.jsonl'),
         keys=('judge.template', *_SHOWN, 'judge.quorum', *_JUDGE_PAIRS, 'judge_pairs.of'),
         needed=_trains_on('swapped_pairs')),
    Spec('health', 'reward.health', ('health.json',), keys=('judge.quorum',),
         reads_if_there=('prompts/attempts.jsonl', 'prompts/prompts.jsonl',
                         'respond/responses-*.jsonl', 'judge/judgements-*.jsonl',
                         'pairs/pairs.jsonl', 'pairs/positives.jsonl'),
         needed=lambda c: needs('judge', c)),
    Spec('audit', 'sandbox.audit', ('audit.json',), keys=('judge.quorum',),
         reads=('respond/responses-*.jsonl', 'judge/judgements-*.jsonl'),
         reads_if_there=('pairs/pairs.jsonl',),
         needed=lambda c: _in_sandbox(c) and _trains_on_own(c)),
    Spec('audit_judge_pairs', 'sandbox.audit', ('audit_judge_pairs.json',), on='judge_pairs',
         reads=('respond/responses-*.jsonl',),
         reads_if={'meta_judge/judge_pairs.jsonl': _trains_on('judge_pairs'),
                   'majority/majority_pairs.jsonl': _trains_on('majority_pairs'),
                   'swapped/swapped_pairs.jsonl': _trains_on('swapped_pairs'),
                   'swap/swapped.jsonl': _trains_on('swapped_pairs')},
         needed=lambda c: _in_sandbox(c) and _trains_on(
             'judge_pairs', 'majority_pairs', 'swapped_pairs')(c)),
    Spec('eft', 'reward.eft', ('eft.jsonl', 'dropped.jsonl'), owner='m1',
         reads=('seeds/ranked.jsonl',),
         reads_if={'judge/judgements-*.jsonl': lambda c: c.eft.targets == 'baseline'},
         keys=('eft.targets', 'eft.quorum', 'judge.template'),
         needed=lambda c: c.name == 'm1' and _trains_on('eft')(c)),
    Spec('reference', 'train', ('logps.jsonl',), reads_training_data=True, runs=('init',),
         on='reference', keys=('chat', 'model', 'train.dtype', 'train.lora_rank'),
         unrecorded=('mesh.data', 'mesh.fsdp', 'mesh.tensor'),
         needed=lambda c: _trains_on_pairs(c) and c.train.reference == 'cached'),
    Spec('model', 'train', ('metrics.jsonl', 'rows.json'), reads_training_data=True,
         runs=('init',),
         keys=('chat', 'model', 'seed', *(f'train.{key}' for key in (
             'init', 'data', 'loss', 'reference', 'batch', 'pack', 'rows', 'accumulate', 'epochs',
             'learning_rate', 'learning_rate_end', 'warmup', 'weight_decay', 'b1', 'b2',
             'max_grad_norm', 'dropout', 'beta', 'nll_weight', 'sft_weight', 'length_normalize',
             'max_length', 'dtype', 'moments', 'lora_rank', 'lora_alpha', 'lora_targets',
             'save_every', 'select', 'max_epochs'))),
         unrecorded=('train.keep', 'train.log_every', 'train.remat', 'mesh.data', 'mesh.fsdp',
                     'mesh.tensor', 'data.source')),
    Spec('stopping', 'stopping', ('wins.jsonl',), reads=('seeds/heldout.jsonl',), runs=('init',),
         keys=('train.judge', *_ANSWERS), unrecorded=_SAMPLE_UNRECORDED,
         needed=lambda c: _stops_early(c) and c.train.judge != 'endpoint'),
    Spec('stopping', 'stopping', ('wins.jsonl', 'endpoint.jsonl'), reads=('seeds/heldout.jsonl',),
         runs=('init',), on='endpoint',
         keys=('train.judge', 'endpoint.model', 'endpoint.temperature', 'endpoint.max_tokens',
               *_ANSWERS),
         unrecorded=_SAMPLE_UNRECORDED,
         needed=lambda c: _stops_early(c) and c.train.judge == 'endpoint'),
    Spec('selection', 'selection', ('measures.jsonl',), keys=('train.select',),
         needed=lambda c: c.train.select not in ('', 'agreement', 'wins')),
    Spec('selection', 'selection', ('measures.jsonl',), reads=('seeds/ranked.jsonl',),
         on='agreement', keys=('train.select', 'eval.judgements', 'eval.quorum',
                               'data.ranked_tune', *_JUDGE),
         unrecorded=_SAMPLE_UNRECORDED, needed=lambda c: c.train.select == 'agreement'),
    Spec('judge_eval', 'sample.judge', ('judgements-*.jsonl',), reads=('seeds/ranked.jsonl',),
         runs=('self',), on='eval', samples='eval.judgements',
         keys=('eval.judgements', 'eval.split', 'data.ranked_tune', *_JUDGE),
         unrecorded=_SAMPLE_UNRECORDED),
    Spec('agreement', 'eval.agreement', ('agreement.json',),
         reads=('seeds/ranked.jsonl', 'judge_eval/judgements-*.jsonl'),
         keys=('judge.template', 'eval.quorum', 'eval.split', 'data.ranked_tune')),
    Spec('answers', 'sample.respond', ('responses-*.jsonl',), reads=('seeds/heldout.jsonl',),
         runs=('self',), on='heldout',
         keys=('eval.split', *_ANSWERS),
         unrecorded=_SAMPLE_UNRECORDED),
    Spec('answers_greedy', 'sample.respond', ('responses-*.jsonl',), reads=('seeds/heldout.jsonl',),
         runs=('self',), on='greedy', keys=_GREEDY, unrecorded=_SAMPLE_UNRECORDED,
         needed=_in_sandbox),
    Spec('oracle', 'sandbox.oracle', ('oracle.json', 'graded.jsonl'),
         reads=('seeds/ranked.jsonl', 'answers/responses-*.jsonl',
                'answers_greedy/responses-*.jsonl', 'judge_eval/judgements-*.jsonl'),
         keys=('eval.split', 'eval.quorum', 'data.ranked_tune'), needed=_in_sandbox),
)
# The records of each JSONL file that a stage writes.
KINDS = {
    'ift.jsonl': schema.Demonstration,
    'ranked.jsonl': schema.RankedPrompt,
    'heldout.jsonl': schema.HeldOutPrompt,
    'corpus.jsonl': schema.Document,
    'prompts.jsonl': schema.Prompt,
    'attempts.jsonl': schema.Attempt,
    'responses-*.jsonl': schema.Response,
    'responses_2-*.jsonl': schema.Response,
    'judgements-*.jsonl': schema.Judgement,
    'endpoint.jsonl': schema.JudgeAnswer,
    'logp-*.jsonl': schema.Logp,
    'older_logp-*.jsonl': schema.Logp,
    'rewards-*.jsonl': schema.ImplicitReward,
    'pairs.jsonl': schema.Pair,
    'positives.jsonl': schema.Positive,
    'scores.jsonl': schema.CandidateScore,
    'comparisons-*.jsonl': schema.Comparison,
    'judge_pairs.jsonl': schema.JudgePair,
    'majority_pairs.jsonl': schema.JudgePair,
    'swapped_pairs.jsonl': schema.JudgePair,
    'swapped.jsonl': schema.Response,
    'eft.jsonl': schema.EftExample,
    'dropped.jsonl': schema.DroppedReply,
    'logps.jsonl': schema.PairLogps,
    'measures.jsonl': schema.Measure,
    'wins.jsonl': schema.StepWins,
    'graded.jsonl': schema.GradedResponse,
}
SUMMARIES = {  # what done.json holds, by stage; others hold numbers that only people read
    'prompts': schema.PromptsSummary,
    'judge': schema.JudgeSummary,
    'judge_again': schema.JudgeSummary,
    'judge_older': schema.JudgeSummary,
    'judge_swapped': schema.JudgeSummary,
    'judge_eval': schema.JudgeSummary,
    'pairs': schema.PairsSummary,
    'eft': schema.EftSummary,
    'model': schema.TrainingSummary,
    'agreement': schema.AgreementSummary,
}
NAMES = tuple(dict.fromkeys(spec.name for spec in STAGES))
# Keys that are read, and recorded, only with some configs.
READ_IF = {
    'pairs.margin': _strategy('margin'),
    'pairs.rho': _strategy('length_controlled'),
    'pairs.positive': _strategy('positives_only'),
    'data.ranked_tune': lambda c: _in_sandbox(c) or c.eval.split == 'valid',
    'eft.quorum': lambda c: c.eft.targets == 'baseline',
    'train.save_every': lambda c: bool(c.train.select),
    'train.epochs': lambda c: not _stops_early(c),
    'train.max_epochs': _stops_early,
    'judge.show_thinking': lambda c: c.judge.show_thinking,
    'train.lora_alpha': lambda c: c.train.lora_rank > 0,
    'train.lora_targets': lambda c: c.train.lora_rank > 0,
    **dict.fromkeys(('train.reference', 'train.beta', 'train.nll_weight',
                     'train.length_normalize'), _trains_on_pairs),
    'train.sft_weight': lambda c: configs.mixes_demonstrations(c.train),
}


def modes(program: str) -> dict[str, Spec]:
  """{value of --on: the stage that a program then runs}."""
  return {spec.on: spec for spec in STAGES if spec.program == program}


def find(program: str, on: str = '') -> Spec:
  """The stage that a program runs with this --on. Raises InputError for another value."""
  specs = modes(program)
  if on not in specs:
    raise InputError(f'--on={on}{closest(on, specs)}: it is one of {", ".join(specs)}')
  return specs[on]


def answers_to(file: str) -> Spec:
  """The stage that answers the prompts of a user's file, of which `file` is the name.

  Its manifest has the hash of that file (`more_inputs` of `stage.Stage`). No loop runs it.
  """
  return Spec(f'answers_to_{file}', 'sample.respond',
              ('responses-*.jsonl', 'responses_2-*.jsonl', 'model_outputs.json'), runs=('self',),
              keys=_ANSWERS, unrecorded=_SAMPLE_UNRECORDED, needed=lambda c: False)


def needs(name: str, config: ConfigDict) -> bool:
  """Whether a loop with this config runs the stage."""
  return any(spec.name == name and spec.needed(config) for spec in STAGES)


def training_files(workdir, config) -> list:
  """The files that `train.data` names: NAME.jsonl of the stage that writes it."""
  folders = {file: spec.folder(workdir, config) for spec in STAGES for file in spec.writes}
  return [folders[f'{name}.jsonl'] / f'{name}.jsonl'
          for name in configs.training_data(unwrap(config))]
