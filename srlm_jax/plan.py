"""Plans an iteration or the whole loop on a pod, before anything is spent.

  python -m srlm_jax.plan --config=iter2 --pod=v5p-256
  python -m srlm_jax.plan --pod=2x8xh200 --size=70b --last=m3        # all models of the loop
  python -m srlm_jax.plan --pod=8xh100 --m0=llama3.1-8b --last=m1    # of another M0, or its folder
  python -m srlm_jax.plan --config=iter2 --pod=v6e-256 --config.train.batch=128

Prints the programs and their memory, the time of every stage, and what is stored and read. Nothing
is compiled or executed, and no accelerator is needed. The mesh, micro-batches, recomputation, slots
and groups of hosts are chosen by the functions that the run itself uses (models/sizing.py). Memory
and time come from formulas (models/sizing.py, models/costs.py).

Pods are v4-N and v5p-N for N cores, v6e-N for N chips, 8xh100 or 8xh200 for a node, and several of
them as 2xv5p-128 or 4x8xh100.
"""
from collections.abc import Iterator
import dataclasses
import functools
import itertools
import math
import textwrap

from absl import flags
from etils import epath
import jax.numpy as jnp
from ml_collections import ConfigDict

from srlm_jax import (
  ablations,
  base,
  catalog,
  cli,
  closest,
  config as configs,
  InputError,
  loop,
  pods,
)
from srlm_jax.data import packing
from srlm_jax.models import costs, kernels, llama, sizing
from srlm_jax.models.config import PRESETS
from srlm_jax.models.costs import Seconds, Tokens
from srlm_jax.models.sizing import Devices, Mesh
from srlm_jax.pods import Pod
from srlm_jax.report import results
from srlm_jax.reward import judges
from srlm_jax.sample import engine as engines, programs
from srlm_jax.train import objectives

GIB = 2**30
# What only a run can tell, and what is therefore assumed.
LENGTHS = dict(prompt=100, response=400, judgement=150)  # mean tokens; each has a flag
ACCEPTED = 0.5         # share of the attempts that become prompts
PAIRS = 0.8            # pairs per prompt, as in config.py
POSITIVES = 0.3        # share of the responses
EFT = 0.8              # examples per ranked prompt: 1,630 of 2,000 (PAPER 3.1)
REPLIES = 2.85         # ranked replies per prompt (PAPER 3.1)
TOKENS_PER_WORD = 1.4  # of English, with the tokenizer of Llama 2
RECORD = 300, 4        # bytes of a record: without its text, and per token of it


@dataclasses.dataclass(frozen=True)
class Program:
  """A program of a stage, and {what: bytes of one chip} that it needs."""
  stage: str
  name: str
  mesh: Mesh
  rows: int
  width: int
  parts: dict[str, float]
  accumulate: int = 1
  remat: str = ''
  slots: int = 0

  @property
  def bytes(self) -> float:
    return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Job:
  """What a sampling stage computes: `items` prompts with `n` samples each."""
  items: float
  n: int
  prefix: float  # tokens that all prompts share
  own: float     # other tokens of a prompt, on average
  new: float     # tokens of a sample, on average
  most: int      # the largest number of them
  rounds: int = 1  # the items come in rounds, each of which waits for the one before


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage that uses the chips."""
  name: str
  models: list[str]  # that it loads
  work: str          # what it computes, in words
  programs: list[Program]
  seconds: Seconds
  written: float = 0  # bytes of records


@dataclasses.dataclass(frozen=True)
class Plan:
  """The stages of one model on a pod."""
  config: ConfigDict
  pod: Pod
  params: int                     # of the model
  group: int                      # hosts that run one engine
  stages: list[Stage]
  reads: list[tuple[str, float]]  # what is restored, and its bytes, in order
  checkpoints: int                # that are kept
  checkpoint_bytes: float         # of one

  @property
  def stored(self) -> float:
    """Bytes of what is kept."""
    return (self.checkpoints * self.checkpoint_bytes
            + sum(stage.written for stage in self.stages))

  @property
  def seconds(self) -> Seconds:
    return sum((stage.seconds for stage in self.stages), Seconds(0, 0))

  @property
  def chip_hours(self) -> float:
    """By the estimate."""
    return self.seconds.estimate / 3600 * self.pod.chips

  @property
  def too_large(self) -> list[Program]:
    """The programs that cannot fit: even the least that the formula allows is too much."""
    return self.larger_than(devices(self.pod).memory * sizing.MOST_ABOVE)

  @property
  def may_not_fit(self) -> list[Program]:
    """The programs that do not fit by the formula."""
    return self.larger_than(devices(self.pod).memory)

  @property
  def tight(self) -> list[Program]:
    """The programs that leave less memory free than the run wants."""
    return self.larger_than(devices(self.pod).usable)

  def larger_than(self, size: float) -> list[Program]:
    """The programs that need more bytes of a chip."""
    return [p for stage in self.stages for p in stage.programs if p.bytes > size]


def devices(pod: Pod) -> Devices:
  """The devices of a pod, as `sizing.devices` finds them there."""
  memory, slices = int(pod.chip.gib * GIB), pod.count if pod.platform == 'tpu' else 1
  return Devices(pod.platform, pod.chips, memory, slices, pod.count // slices)


def host(pod: Pod) -> Devices:
  """The devices of one of its hosts."""
  return Devices(pod.platform, pod.chips // pod.hosts, int(pod.chip.gib * GIB))


def make(config: ConfigDict, pod: Pod, lengths: dict[str, float]) -> Plan:
  """The plan of one model; `lengths`: as LENGTHS. Raises InputError for an impossible mesh."""
  config = base.with_selection(config)
  planner = Planner(config, pod, lengths)
  stages = [planner.stage(spec) for spec in catalog.STAGES if uses_chips(spec, config)]
  c, params = config.train, llama.param_count(planner.shape)
  saved = planner.saved
  size = sizing.trained(c, planner.shape) * (4 + 2 * jnp.dtype(c.moments).itemsize)
  return Plan(config, pod, params, planner.group, stages,
              [*_reads(config, stages, params, saved, size)],
              min(c.keep, saved) if c.select in ('', 'wins') else saved, size)


def uses_chips(spec: catalog.Spec, config: ConfigDict) -> bool:
  """Whether a stage is needed and runs a model."""
  return spec.needed(config) and (bool(spec.runs) or 'sample.slots' in spec.keys)


def _reads(config, stages: list[Stage], params: float, saved: int, checkpoint: float
           ) -> Iterator[tuple[str, float]]:
  """Yields what is read. Consecutive stages that sample from the same model read it once.

  `saved`: checkpoints that are saved, `checkpoint`: bytes of one. Early stopping reads each of them
  to sample, and all but the last to train on, with the reference again.
  """
  size = functools.partial(_model_bytes, params=params)
  loaded = ''
  for stage in stages:
    if stage.name in ('model', 'reference'):
      if stage.name == 'model':
        yield f'{stage.models[0]} to train', size(stage.models[0])
      c = config.train
      in_step = objectives.find(c).needs_reference_params and not c.lora_rank
      if stage.name == 'reference' or in_step:
        yield f'{stage.models[0]} as the reference', size(stage.models[0])
      loaded = ''
      continue
    if stage.name == 'stopping':
      init, pauses = size(stage.models[0]), saved - 1
      again = init if c.lora_rank or objectives.find(c).needs_reference_params else 0
      yield (f'{stage.models[0]} and {_many(saved, "checkpoint")} to compare',
             init + saved * size(config.name))
      if pauses:
        yield f'{_many(pauses, "checkpoint")} to train on', pauses * (checkpoint + again)
      continue
    for model in stage.models:
      if model != loaded:
        yield f'{model} to sample', size(model)
      loaded = model


def _model_bytes(model: str, params: float) -> float:
  """Models that the run trains are stored in float32; published ones have 16 bits.

  LoRA reads less: the model below its adapters.
  """
  return params * (4 if model in configs.MODELS[1:] else 2)


class Planner:
  """Computes the stages of one model on a pod."""

  def __init__(self, config: ConfigDict, pod: Pod, lengths: dict[str, float]):
    if config.name == 'm0':
      raise InputError('M0 is pretrained, so there is nothing to plan; name another model')
    self.config, self.pod, self.shape = config, pod, base.shape_of(config, '')
    self.prompt, self.response, self.judgement = (
        lengths[name] for name in ('prompt', 'response', 'judgement'))
    self.sampled = dataclasses.replace(self.shape, dtype=config.sample.dtype)
    self.chosen = sizing.sampling(config, self.sampled, host(pod), pod.hosts)
    self.sample_mesh = _mesh(self.chosen, 'sample_mesh')
    self.group = math.prod(dataclasses.astuple(self.sample_mesh)) // host(pod).count
    self.kernels = kernels.choose(pod.platform, self.sampled)
    self.data = [*self._data()]
    self.examples = sum(count for count, _ in self.data)
    self.steps = math.ceil(configs.epochs(config.train) * self.examples / config.train.batch)
    self.saved = math.ceil(self.steps / config.train.save_every)
    self.training = self._training()

  def stage(self, spec: catalog.Spec) -> Stage:
    """A stage that uses the chips."""
    models = [*spec.models(self.config).values()] or [self.config.name]
    if spec.name == 'model':
      most = 'at most ' if self.config.train.select == 'wins' else ''
      return Stage('model', models, f'{most}{self.steps:,} steps', [self.training], self._step())
    if spec.name == 'reference':
      return self._reference(models)
    if spec.name == 'implicit':
      return self._implicit(models)
    job = self._job(spec)
    text = f'{job.items:,.0f} prompts' + (f' x {job.n}' if job.n > 1 else '')
    return Stage(spec.name, models, text, [*self._sampler(spec.name, job)], self._sampling(job),
                 _written(job.items * job.n, job.new))

  # Training.

  def _data(self) -> Iterator[tuple[float, Tokens]]:
    """Yields (examples, their mean tokens) of every file of the training data."""
    c = self.config
    prompts, judged = c.prompts.count, self._rubric() + self.prompt + self.response
    pairs = PAIRS * prompts
    of_pair = 2 if c.train.loss in configs.PAIR_LOSSES else 1  # responses
    def answers(count):
      return costs.example(self.prompt, self.response, count)
    def judgements(count):
      return costs.example(judged, self.judgement, count)
    known = dict(
        ift=(c.data.ift, answers(1)), eft=(EFT * c.data.ranked_train, judgements(1)),
        positives=(POSITIVES * prompts * c.respond.n, answers(1)), pairs=(pairs, answers(of_pair)),
        **dict.fromkeys(('judge_pairs', 'majority_pairs', 'swapped_pairs'), (
            pairs * c.judge_pairs.share / (1 - c.judge_pairs.share), judgements(of_pair))))
    for name in configs.training_data(c):
      if name not in known:
        raise InputError(f'config.train.data names {name}, whose size is not known before it is '
                         f'made; a plan knows {", ".join(known)}')
      yield known[name]

  def _training(self) -> Program:
    """The training step, as training chooses it for these data."""
    config, c = self.config, self.config.train
    shape = dataclasses.replace(self.shape, dtype=c.dtype, dropout=c.dropout)
    mean = sum(count * tokens.total for count, tokens in self.data) / self.examples
    longest = c.max_length
    if c.loss in configs.PAIR_LOSSES:  # the prompt with one response, and the other response
      longest += min(config.respond.max_tokens, c.max_length)
    has_reference = objectives.find(c).needs_reference_params
    work = sizing.work(c, mean, longest, has_reference)
    found = sizing.training(config, shape, devices(self.pod), work)
    mesh, accumulate, remat = _mesh(found, 'mesh'), found['train.accumulate'], found['train.remat']
    multiple = kernels.for_training(self.pod.platform, shape, remat).width_multiple
    if not configs.is_open(c.rows):
      packing.refuse_rows(work.rows, mesh.parts * accumulate)
    rows, width = _up(work.rows, mesh.parts * accumulate), _up(work.width, multiple)
    tokens = rows // (mesh.parts * accumulate) * width
    parts = sizing.training_parts(shape, mesh, tokens, has_reference, accumulate, remat, c.moments,
                                  self.pod.platform, sizing.adapter(c, shape))
    return Program('model', 'step', mesh, rows, width, parts, accumulate, remat)

  def _batch(self) -> Tokens:
    """The mean tokens of the examples of a step."""
    def mean(field):
      total = sum(count * getattr(tokens, field) for count, tokens in self.data)
      return total / self.examples * self.config.train.batch
    return Tokens(mean('total'), mean('seen'), mean('targets'))

  def _step(self) -> Seconds:
    """The seconds of all training steps."""
    c, p = self.config.train, self.training
    step = costs.training_step(
        dataclasses.replace(self.shape, dtype=c.dtype), self.pod, p.mesh, p.rows, p.width,
        self._batch(), c.loss in configs.PAIR_LOSSES, objectives.find(c).needs_reference_params,
        p.accumulate, p.remat, c.moments, sizing.adapter(c, self.shape))
    return step * self.steps

  def _reference(self, models: list[str]) -> Stage:
    """The log-probs of the reference, once per pair; the rows are those of the training step."""
    p, c = self.training, self.config.train
    shape = dataclasses.replace(self.shape, dtype=c.dtype)
    program = dataclasses.replace(
        p, stage='reference', name='forward', accumulate=1, remat='',
        parts=sizing.forward_parts(shape, p.mesh, p.rows // p.mesh.parts * p.width,
                                   self.pod.platform))
    seconds = costs.forward(shape, self.pod, p.mesh, p.rows, p.width, self._batch(), True)
    return Stage('reference', models, f'{self.examples:,.0f} pairs', [program],
                 seconds * (self.examples / c.batch), _written(self.examples, 0))

  # Sampling.

  @property
  def groups(self) -> int:
    """Groups of hosts, each with an engine."""
    return self.pod.hosts // self.group

  def _rubric(self) -> float:
    """Tokens of the judge template without a prompt and a response."""
    judge = judges.load(self.config.judge.template)
    return len(judge.render(prompt='', response='').split()) * TOKENS_PER_WORD

  def _job(self, spec: catalog.Spec) -> Job:
    """What a sampling stage computes."""
    c, count = self.config, self.config.prompts.count
    judged = self.prompt + self.response
    rubric = self._rubric()
    if spec.name == 'prompts':
      attempts, shots = count / ACCEPTED, c.prompts.seed_shots + c.prompts.new_shots
      return Job(attempts, 1, 0, shots * self.prompt, self.prompt, c.prompts.max_tokens,
                 math.ceil(attempts / c.prompts.round))
    if spec.program == 'sample.respond':
      is_new = spec.on in ('prompts', 'older')
      held_out = c.data.test_prompts if c.eval.split == 'test' else c.data.valid_prompts
      return Job(count if is_new else held_out, spec.count(c), 0, self.prompt, self.response,
                 c.respond.max_tokens)
    if spec.name == 'stopping':  # the answers of every checkpoint and of the model before them
      return Job((self.saved + 1) * c.data.valid_prompts, 1, 0, self.prompt, self.response,
                 c.respond.max_tokens, self.saved + 1)
    if spec.program == 'sample.meta_judge':
      compared = count * c.meta_judge.responses * c.judge.n * (c.judge.n - 1)
      # The template is about as long as the judge's, which a prompt contains too.
      return Job(compared, 1, 0, 2 * rubric + judged + 2 * self.judgement, self.judgement,
                 c.meta_judge.max_tokens)
    of_ranked = dict(ranked=c.data.ranked_train, eval=c.data.ranked_eval,
                     agreement=c.data.ranked_eval * self.saved)
    items = of_ranked[spec.on] * REPLIES if spec.on in of_ranked else count * (
        1 if spec.on == 'swapped' else c.respond.n)
    n = c.eval.judgements if spec.on == 'agreement' else spec.count(c)
    return Job(items, n, rubric, judged, self.judgement, c.judge.max_tokens)

  def _sampler(self, stage: str, job: Job) -> Iterator[Program]:
    """The programs of an engine."""
    c, slots, mesh = self.config.sample, self.chosen['sample.slots'], self.sample_mesh
    def parts(tokens):
      return sizing.sampler_parts(c, self.shape, mesh, slots, tokens, self.pod.platform)
    rows, width = self._prefill_shape(min(c.size, self.shape.context) - job.most)  # the longest
    if c.int8:
      both = sizing.loading_bytes(c, self.shape, mesh)
      yield Program(stage, 'loading', mesh, 0, 0, dict(weights=both), slots=slots)
    tokens = rows // mesh.parts * width
    yield Program(stage, 'prefill', mesh, rows, width, parts(tokens), slots=slots)
    yield Program(stage, 'decode', mesh, slots, 1, parts(0), slots=slots)

  def _prefill_shape(self, length: float) -> tuple[int, int]:
    """The rows and the width of a prefill of prompts of a length, as the engine chooses them."""
    width = _up(engines.bucket(math.ceil(length)), self.kernels.width_multiple)
    width = min(width, self.config.sample.size)
    parts = self.sample_mesh.parts
    return parts * max(self.kernels.prefill_tokens // width // parts, 1), width

  def _sampling(self, job: Job) -> Seconds:
    """The seconds of a sampling stage: of the group with the most requests."""
    int8, mesh, shape = self.config.sample.int8, self.sample_mesh, self.sampled
    requests = math.ceil(job.items / job.rounds / self.groups)
    samples, slots = requests * job.n, self.chosen['sample.slots']
    while slots % (2 * mesh.parts) == 0 and slots // 2 >= samples:
      slots //= 2  # as the engine does
    rows, width = self._prefill_shape(job.own)
    prefill = costs.prefill(shape, self.pod, mesh, int8, rows, width, job.prefix)
    step = costs.decode_step(shape, self.pod, mesh, int8, slots, job.own + job.new / 2, job.prefix)
    full = samples * job.new / slots   # steps with all slots busy
    tail = max(job.most - job.new, 0)  # the last samples are longer than the mean
    real = min(1, requests * job.own / (math.ceil(requests / rows) * rows * width))
    floor = prefill.floor * real * math.ceil(requests / rows) + step.floor * full
    estimate = prefill.estimate * math.ceil(requests / rows) + step.estimate * (full + tail)
    return Seconds(floor, estimate) * job.rounds

  def _implicit(self, models: list[str]) -> Stage:
    """The log-probs of all responses under two models."""
    c, mesh = self.config, self.sample_mesh
    width = engines.bucket(math.ceil(self.prompt + self.response))
    tokens = engines.SCORE_PREFILLS * self.kernels.prefill_tokens
    rows = _up(max(tokens // width, 1), mesh.parts)
    parts = sizing.sampler_parts(c.sample, self.shape, mesh, 0, 0, self.pod.platform)
    # Some logits of a batch are in memory, in float32, and two results of the same size.
    logits = rows / mesh.parts * programs.LOGITS * self.shape.V / mesh.tensor
    parts['activations'] += 3 * 4 * logits
    program = Program('implicit', 'log-probs', mesh, rows, width, parts)
    responses = c.prompts.count * c.respond.n
    batches = len(models) * math.ceil(responses / self.groups / rows)
    seconds = costs.prefill(self.sampled, self.pod, mesh, c.sample.int8, rows, width, 0) * batches
    return Stage('implicit', models, f'{responses:,} responses', [program], seconds,
                 _written((1 + len(models)) * responses, 0))


def _written(records: float, tokens: float) -> float:
  """Bytes of so many records with a text of so many tokens."""
  return records * (RECORD[0] + RECORD[1] * tokens)


def _mesh(found: dict, section: str) -> Mesh:
  """The mesh that `sizing` chose."""
  return Mesh(*(found[f'{section}.{axis}'] for axis in ('data', 'fsdp', 'tensor')))


def _up(number: float, multiple: int) -> int:
  return math.ceil(number / multiple) * multiple


FOR_THE_LOOP = 'size', 'm0', 'last', 'ablation', 'set'  # flags that --config excludes
# What may make a plan fit: changes of config keys, in the order in which they are tried.
CHANGES = (
    {'mesh.data': -1, 'mesh.fsdp': -1, 'mesh.tensor': -1},
    {'sample_mesh.data': -1, 'sample_mesh.fsdp': 1, 'sample_mesh.tensor': -1},
    {'train.accumulate': -1}, {'train.remat': 'auto'}, {'train.dtype': 'bfloat16'},
    {'train.reference': 'cached'}, {'train.moments': 'bfloat16'}, {'sample.slots': -1},
    {'sample.dtype': 'bfloat16'}, {'sample.int8': True}, {'sample.size': 2048})


def refuse_too_large(plan: Plan, lengths: dict[str, float], flag: str = '--config.'):
  """Raises InputError if a program cannot fit, with what would fit; `flag`: what sets a key."""
  if not plan.too_large:
    return
  worst = max(plan.too_large, key=lambda program: program.bytes)
  raise InputError(
      f'{_title(plan)} does not fit on {plan.pod.name}: '
      f'{worst.name} of the stage {worst.stage} needs {worst.bytes / GIB:,.1f} GiB per chip '
      f'by formula, {_bound()}, and a chip has {plan.pod.chip.gib}; '
      f'{_remedies(plan, lengths, flag)}')


def _remedies(plan: Plan, lengths: dict[str, float], flag: str) -> str:
  """What fits instead of a plan, in words."""
  found = ' or '.join(_what_fits(plan, lengths, flag))
  return (f'what fits{_legend(found, plan.pod)}: {found}' if found
          else 'nothing that a plan tries fits')


def _title(plan: Plan) -> str:
  """The model that is planned, in words."""
  c = plan.config
  if c.size != 'auto':
    return f'{c.name} of size {c.size}'
  return f'{c.name} from {c.model or c.m0} ({plan.params:,} parameters)'


def _bound() -> str:
  return f'which is up to {sizing.MOST_ABOVE - 1:.0%} above the compiler\'s figure'


def _mark(plans: list[Plan]) -> str:
  """What is said of the memory of a pod behind its name."""
  if any(plan.may_not_fit for plan in plans):
    return ' (may not fit)'
  return ' (tight)' if any(plan.tight for plan in plans) else ''


def _legend(text: str, pod: Pod) -> str:
  """What `_mark` means, if a text contains it."""
  share = sizing.USABLE[pod.platform]
  return f' (tight: more than {share:.0%} of the memory)' if '(tight)' in text else ''


def _what_fits(plan: Plan, lengths: dict[str, float], flag: str) -> Iterator[str]:
  """Yields changes of the config that make it fit, one or two at once, and the smallest pod.

  What leaves the memory free that the run wants comes before what is tight.
  """
  config = plan.config
  known = [change for change in CHANGES if any(
      catalog.look_up(config, key) != value for key, value in change.items())]
  def texts(count, is_tight):
    for some in itertools.combinations(known, count):
      if (found := _fitting(config, plan.pod, some, lengths)) and bool(found.tight) == is_tight:
        yield ' '.join(f'{flag}{key}={value}' for change in some for key, value in change.items()
                       ) + _mark([found])
  for is_tight in (False, True):
    if changes := [*texts(1, is_tight)] or [*itertools.islice(texts(2, is_tight), 1)]:
      yield from changes
      break
  larger = [pod for pod in pods.of_kind(plan.pod.kind) if pod.chips > plan.pod.chips]
  others = [pod for kind in pods.KINDS if kind != plan.pod.kind for pod in pods.of_kind(kind)]
  for is_tight, some in itertools.product((False, True), (larger, others)):
    fitting = (found for pod in some if (found := _fitting(config, pod, (), lengths)))
    if found := next((found for found in fitting if bool(found.tight) == is_tight), None):
      yield f'--pod={found.pod.name}{_mark([found])}'
      return


def _fitting(config, pod: Pod, changes, lengths: dict[str, float]) -> Plan | None:
  """-> the plan of a config with these changes on a pod, None if it does not fit by the formula."""
  values = {key: value for change in changes for key, value in change.items()}
  try:
    changed = catalog.replace(config, values)
    configs.check(changed)
    plan = make(changed, pod, lengths)
  except InputError:  # the change is invalid, or no mesh of the pod divides the model
    return None
  return None if plan.may_not_fit else plan


def cheaper(plans: list[Plan], lengths: dict[str, float]) -> Iterator[list[Plan]]:
  """Yields the plans for the smaller pods of the same chip on which everything fits."""
  pod = plans[0].pod
  for smaller in pods.of_kind(pod.kind):
    if smaller.chips < pod.chips:
      found = [_fitting(plan.config, smaller, (), lengths) for plan in plans]
      if all(found):
        yield found


def text(plan: Plan) -> str:
  """What a plan says, as tables."""
  pod, groups = plan.pod, plan.pod.hosts // plan.group
  lines = [f'{_title(plan)} on {pod.name}: '
           f'{_many(pod.chips, "chip")} of {pod.chip.gib} GiB, {_many(pod.hosts, "host")}; '
           f'sampling by {_many(groups, "group")} of {_many(plan.group, "host")}']
  lines.append('\nGiB per chip of every program:')
  table = [['stage', 'program', 'mesh', 'rows', 'width', 'micro-batches',
            'remat', 'slots', 'parameters', 'reference', 'optimizer', 'gradients',
            'activations, cache', f'total of {pod.chip.gib}']]
  for program in (p for stage in plan.stages for p in stage.programs):
    table.append(_memory(program))
  lines.append(results.aligned(table))
  lines += map(_wrapped, _warnings(plan))
  lines.append('\nTime of every stage:')
  table = [['stage', 'model', 'work', 'floor', 'estimate', 'chip-hours by the estimate']]
  for stage in plan.stages:
    table.append([stage.name, ', '.join(stage.models), stage.work, *_times(stage.seconds),
                  f'{stage.seconds.estimate / 3600 * pod.chips:,.1f}'])
  table.append(['all', '', '', *_times(plan.seconds), f'{plan.chip_hours:,.1f}'])
  lines.append(results.aligned(table))
  records = sum(stage.written for stage in plan.stages)
  lines += ['', *map(_wrapped, (
      f'Storage: {_many(plan.checkpoints, "checkpoint")} of {_gb(plan.checkpoint_bytes)} '
      f'(parameters and moments), {_gb(records)} of records.',
      'Read from storage, once per pod: ' + ', '.join(
          f'{what} {_gb(size)}' for what, size in plan.reads)
      + f'; {_gb(sum(size for _, size in plan.reads))} in all.'))]
  return '\n'.join(lines)


def _warnings(plan: Plan) -> Iterator[str]:
  """Yields a sentence about the stages that may not fit, and one about those that are tight."""
  pod, above = plan.pod, plan.may_not_fit
  if above:
    largest = {}
    for program in above:
      largest[program.stage] = max(largest.get(program.stage, 0), program.bytes / GIB)
    stages = ', '.join(f'{stage} with {gib:,.1f} GiB' for stage, gib in largest.items())
    yield f'May not fit: {stages} by formula, {_bound()}.'
  if tight := {program.stage: None for program in plan.tight if program not in above}:
    yield (f'More than {sizing.USABLE[pod.platform]:.0%} of the memory, which may fail: '
           f'{", ".join(tight)}.')


def _memory(program: Program) -> list[str]:
  """A line of the table of programs."""
  parts, mesh = program.parts, program.mesh
  def gib(*names):
    found = sum(parts.get(name, 0) for name in names)
    return f'{found / GIB:.1f}' if found else '-'
  return [program.stage, program.name, f'{mesh.data} x {mesh.fsdp} x {mesh.tensor}',
          str(program.rows), f'{program.width:,}',
          str(program.accumulate) if program.remat else '-',
          program.remat or '-', str(program.slots or '-'), gib('parameters', 'weights'),
          gib('reference'), gib('optimizer'), gib('gradients'),
          gib('copies', 'activations', 'cache', 'unused'), f'{program.bytes / GIB:.1f}']


def _wrapped(text: str) -> str:
  return textwrap.fill(text, 100, break_on_hyphens=False)  # which names of pods have


def _times(seconds: Seconds) -> list[str]:
  return [_duration(seconds.floor), _duration(seconds.estimate)]


def _duration(seconds: float) -> str:
  """
  >>> _duration(45), _duration(1500), _duration(9000)
  ('45 s', '25 min', '2.5 h')
  """
  if seconds < 120:
    return f'{seconds:.0f} s'
  return f'{seconds / 60:.0f} min' if seconds < 7200 else f'{seconds / 3600:.1f} h'


def _gb(size: float) -> str:
  """
  >>> _gb(2.5e9), _gb(3e6), _gb(276e9)
  ('2.5 GB', '0.003 GB', '276 GB')
  """
  return f'{size / 1e9:,.{0 if size >= 1e10 else 1 if size >= 1e8 else 3}f} GB'


def _many(count: int, what: str) -> str:
  return f'{count} {what}' if count == 1 else f'{count} {what}s'


def notes(pod: Pod, lengths: dict[str, float]) -> str:
  """What the numbers mean, and what they assume."""
  calibrated = ('nothing calibrates the estimates for GPUs' if pod.platform == 'gpu' else
                'the estimate is calibrated on the TPU compiler\'s estimates in docs/scale.md')
  return '\n'.join(map(_wrapped, (
      f'Nothing was measured. Floor: the chips at their published peak. Estimate: by formula; '
      f'{calibrated}. Reading, writing, compiling and what crosses between slices are in neither.',
      f'Assumed: {lengths["prompt"]:g} tokens per prompt, {lengths["response"]:g} per response, '
      f'{lengths["judgement"]:g} per judgement on average (flags --prompt, --response, '
      f'--judgement); {ACCEPTED:.0%} of the attempts become prompts, {PAIRS:.0%} of the prompts '
      f'give a pair; rows as wide as the longest example that the config allows.')))


def show_cheaper(plans: list[Plan], lengths: dict[str, float]) -> str:
  """The smaller pods on which everything fits, as a table, and this one."""
  found = [*cheaper(plans, lengths), plans]
  table = [['pod', 'chips', 'floor', 'estimate', 'chip-hours by the estimate']]
  for some in found:
    seconds = sum((plan.seconds for plan in some), Seconds(0, 0))
    table.append([some[0].pod.name + _mark(some), str(some[0].pod.chips), *_times(seconds),
                  f'{sum(plan.chip_hours for plan in some):,.1f}'])
  start = 'Smaller pods on which everything fits' if len(found) > 1 else 'No smaller pod fits'
  lines = results.aligned(table)
  return f'{start}{_legend(lines, plans[0].pod)}:\n{lines}'


def _total(plans: list[Plan]) -> str:
  """A sentence on the storage of the whole loop."""
  m0 = _model_bytes('m0', plans[0].params)
  return (f'Storage of the whole loop: {_gb(m0 + sum(plan.stored for plan in plans))}, M0 with '
          f'{_gb(m0)} included.')


def report(planned: list[ConfigDict], pod: Pod, lengths: dict[str, float],
           is_loop: bool = False) -> Iterator[str]:
  """Yields the parts of the printed plan; raises InputError for a model that cannot fit."""
  plans, flag = [], '--set=' if is_loop else '--config.'
  for config in planned:
    configs.check(config)
    config = base.fit(config, '')
    plans.append(make(config, pod, lengths))
    refuse_too_large(plans[-1], lengths, flag)
    yield f'{text(plans[-1])}\n'
    if plans[-1].may_not_fit:
      yield _wrapped(f'For {config.name}, {_remedies(plans[-1], lengths, flag)}.') + '\n'
  if is_loop:
    yield f'{_total(plans)}\n'
  yield f'{show_cheaper(plans, lengths)}\n'
  yield notes(pod, lengths)


def define_flags():
  cli.define_config('One model: iter2, iter2:70b, or the path of a file; without it, all models of '
                    'the loop.')
  flags.DEFINE_string('pod', None, f'Where it runs: {pods.FORMS}.', required=True)
  flags.DEFINE_enum('size', 'auto', configs.SIZES, 'Without --config: the size.')
  flags.DEFINE_string('m0', '', 'Without --config: the Hugging Face folder of M0, or a name of '
                      'models.config.PRESETS.')
  flags.DEFINE_enum('last', 'm3', configs.MODELS[1:], 'Without --config: the last model.')
  flags.DEFINE_enum('ablation', '', ['', *ablations.ABLATIONS],
                    'Without --config: one change of the paper.')
  flags.DEFINE_multi_string('set', [], 'Without --config: changes a config key, as in the loop.')
  for name, mean in LENGTHS.items():
    flags.DEFINE_float(name, mean, f'Mean tokens of a {name}.', 1, 100_000)


def of_m0(name: str, size: str, m0: str, changes: list[str]) -> ConfigDict:
  """The config of one model; `m0`: a folder, or a name of PRESETS, which gives the shape."""
  if m0 in PRESETS:
    return loop.load_config(name, size, '', '', [f'model={m0}', *changes])
  if m0 and '/' not in m0 and not epath.Path(m0).exists():
    raise InputError(f'--m0={configs.short(m0)}{closest(m0, PRESETS)}: it is the Hugging Face '
                     f'folder of M0, or one of {", ".join(PRESETS)}')
  return loop.load_config(name, size, m0, '', changes)


def main(argv):
  cli.refuse_arguments(argv)
  f = flags.FLAGS
  pod = pods.find(f.pod)
  lengths = {name: f[name].value for name in LENGTHS}
  if f.config:
    if ignored := [f'--{name}' for name in FOR_THE_LOOP if f[name].present]:
      raise InputError(f'{" and ".join(ignored)} cannot be combined with --config: name the size '
                       'as in --config=iter2:70b, and change keys by --config.KEY=VALUE')
    planned = [f.config]
  else:
    changes = [*ablations.changes(f.ablation, f.size), *f.set]
    names = configs.MODELS[1:configs.MODELS.index(f.last) + 1]
    planned = [of_m0(name, f.size, f.m0, changes) for name in names]
  for part in report(planned, pod, lengths, is_loop=not f.config):
    print(part)


if __name__ == '__main__':
  define_flags()
  cli.run_app(main)
