"""Every config key once, in the table `SETTINGS`: default, allowed values, unit, source.

`get(name, size)` is the config of one model of the paper's table at one size. At the size auto, the
keys of `FROM_M0` are open, and `suited` has their values. `check` refuses what the table does not
allow. Below the table, one function per model and per size sets the values that differ from the
defaults. PAPER is Yuan et al. 2024, arXiv 2401.10020. Lengths are in tokens, learning rates are
those of AdamW.
"""
from collections.abc import Iterator
import dataclasses
import math
import re
import shlex

from ml_collections import ConfigDict

from srlm_jax import closest, InputError

SIZES = ('auto', 'tiny', 'hard', 'stories', '7b', '13b', '70b')  # auto: what suits M0
CHATS = ('plain', 'llama2', 'chatml', 'tokenizer')  # chat formats: data/templates.py
FILES = dict(sandbox_m0='m0', sft='sft', iter1='m1', iter2='m2', iter3='m3', iter4='m4', iter5='m5',
             iter6='m6')
MODELS = ('m0', 'sft', 'm1', 'm2', 'm3', 'm4', 'm5', 'm6')  # in the order of their training
OPTIONAL = MODELS[5:]  # the paper has no such model
# Names in train.data: corpus, ift, eft and positives are for SFT, the others for DPO
# (and pairs for SFT on the chosen responses).
TRAINING_DATA = ('corpus', 'ift', 'eft', 'positives', 'pairs', 'judge_pairs', 'majority_pairs',
                 'swapped_pairs')
PAIR_LOSSES = ('dpo',)  # values of train.loss that train on pairs and have a reference
LOSSES = ('sft', *PAIR_LOSSES)
# Names in train.lora_targets: the linear layers of a block, as Hugging Face and PEFT name them.
LORA_TARGETS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
REMAT = ('none', 'dots', 'full')  # values of train.remat, from the most memory to the least
# Keys that may be open: models/sizing.py then chooses a value for the model and the devices.
OPEN = ('mesh.data', 'mesh.fsdp', 'mesh.tensor', 'train.accumulate', 'train.remat',
        'sample_mesh.data', 'sample_mesh.fsdp', 'sample_mesh.tensor', 'sample.slots')
# Keys that may be open: `suited` then chooses a value for M0.
FROM_M0 = ('chat', 'train.max_length', 'train.learning_rate', 'train.learning_rate_end',
           'sample.size')
# Keys that have a new name, and that name.
RENAMED = {'train.nll': 'train.nll_weight', 'train.by_length': 'train.length_normalize',
           'train.clip': 'train.max_grad_norm', 'eft.tries': 'eft.judgements',
           'judge.on': 'the flag --on of srlm_jax.sample.judge',
           'meta_judge.share': 'judge_pairs.share',
           'meta_judge.score_share': 'judge_pairs.score_share'}
# Keys that name a model, and the names that each takes besides a path.
NAMES_A_MODEL = {'sampler': MODELS, 'train.init': MODELS, 'pairs.older': MODELS,
                 'prompts.author': (*MODELS, 'sampler'), 'endpoint.url': MODELS}


@dataclasses.dataclass(frozen=True)
class Values:
  """The values that a key may have: a type; for numbers also a range, for strings also choices.

  The range includes `least` and `most` and excludes `above` and `below`; `also` is one more value,
  outside of the range. No range includes NaN or infinity. A tuple has at least one string.
  """
  kind: type  # int, float, bool, str or tuple
  least: float = -math.inf
  above: float = -math.inf
  most: float = math.inf
  below: float = math.inf
  also: float | None = None
  choices: tuple[str, ...] = ()

  def has_type(self, value) -> bool:
    """Whether the type is right. An int is accepted as a float; a bool is not a number."""
    if self.kind is tuple:
      return isinstance(value, tuple) and all(isinstance(v, str) for v in value) and value != ()
    kinds = (int, float) if self.kind is float else self.kind
    return isinstance(value, kinds) and isinstance(value, bool) == (self.kind is bool)

  def allow(self, value) -> bool:
    """Whether the value has the type and is in the range or one of the choices."""
    if not self.has_type(value):
      return False
    if self.kind in (int, float):
      inside = self.least <= value <= self.most and self.above < value < self.below
      return inside or value == self.also
    return not self.choices or value in self.choices

  def wanted(self, value=None) -> str:
    """The allowed values, to end an error message; with the type, if `value` has another."""
    if self.choices:
      return f'it is {_listed(self.choices)}'
    kind = {int: 'a whole number', float: 'a finite number', bool: 'True or False', str: 'a string',
            tuple: 'a tuple of strings'}[self.kind]
    if self.kind not in (int, float):
      return f'it must be {kind}'
    text = self._range()
    right = self.has_type(value) and (isinstance(value, int) or math.isfinite(value))
    if not right:
      text = f'{kind} {text}' if text.startswith('above') else f'{kind}, {text}'
    return f'it must be {text}'

  def _range(self) -> str:
    """The range of a number in words."""
    ends = []
    if math.isfinite(self.above):
      ends.append(f'above {self.above:,}')
    if math.isfinite(self.least) and math.isfinite(self.most):
      ends.append(f'{self.least:,} to {self.most:,}')
    elif math.isfinite(self.least):
      ends.append(f'{self.least:,} or more')
    elif math.isfinite(self.most):
      ends.append(f'at most {self.most:,}')
    if math.isfinite(self.below):
      ends.append(f'less than {self.below:,}')
    text = ' and '.join(ends)
    return text if self.also is None else f'{self.also}, or {text}'


@dataclasses.dataclass(frozen=True)
class Setting:
  """One line of the table."""
  default: int | float | bool | str | tuple
  values: Values
  unit: str    # its meaning, with the unit
  source: str  # of the default value

  def check(self, name: str, value):
    """Raises InputError for a value that the table does not allow; `name`: of the key."""
    if not self.values.allow(value):
      raise InputError(f'config.{name} is {show(value)}; {self.wanted(value)}')

  def wanted(self, value=None) -> str:
    """What is allowed instead of `value`, with the unit."""
    return f'{self.values.wanted(value)} ({self.unit})'


def one_of(*choices: str) -> Values:
  return Values(str, choices=choices)


def show(value) -> str:
  """A value of any type, shortened for an error message.

  >>> show('x'), show(10 ** 5000)
  ("'x'", 'an int of about 5000 digits')
  """
  if isinstance(value, int) and value.bit_length() > 128:
    return f'an int of about {round(value.bit_length() * math.log10(2))} digits'
  try:
    return short(repr(value))
  except ValueError:  # Python writes no int of more than 4,300 digits, not in a list either
    return f'a {type(value).__name__}'


def short(text: str, most: int = 120) -> str:
  """A text for an error message; a long one is cut and followed by its length."""
  return text if len(text) <= most else f'{text[:most // 2]}.. ({len(text)} characters)'


# Ranges. Their ends are far beyond any use; they keep arithmetic within int32 and float32.
TINY = 1e-30  # smaller values underflow in float32
MANY = 10**9  # two such counts still add up within int32
COUNT = Values(int, above=0, most=MANY)
COUNT_OR_0 = Values(int, least=0, most=MANY)
COUNT_OR_OPEN = Values(int, above=0, most=MANY, also=-1)
SEED = Values(int, least=0, most=2**32 - 1)  # jax.random.key drops higher bits without x64
TEMPERATURE = Values(float, least=TINY, most=100, also=0)
MASS = Values(float, least=TINY, most=1)
SHARE = Values(float, least=0, most=1)
BELOW_1 = Values(float, least=0, below=1)
WEIGHT = Values(float, least=0, most=1000)
SCORE = Values(float, least=-10**6, most=10**6)  # a template states its own scale
RATE = Values(float, least=TINY, most=10, also=-1)
SWITCH = Values(bool)
TEXT = Values(str)

PAPER = 'PAPER 3.1'
META = 'Meta-Rewarding, arXiv 2407.19594'
INSTRUCT = 'Self-Instruct, arXiv 2212.10560'
TULU = 'Tulu 3, arXiv 2411.15124'
LORA = 'LoRA, arXiv 2106.09685'
OURS = 'not in the paper'

# key: Setting(default, allowed values, meaning with unit, source)
_SECTIONS = {
    '': dict(
        name=Setting('m2', one_of(*MODELS), 'the model of the table', PAPER),
        size=Setting('70b', one_of(*SIZES), 'preset of model, data and training', PAPER),
        seed=Setting(0, SEED, 'seed of all random draws', OURS),
        m0=Setting('', TEXT, 'Hugging Face folder of M0; empty: the one of the sandbox', OURS),
        model=Setting('llama2-70b', TEXT,
                      'shape of M0: a name of models.config.PRESETS; empty: any', PAPER),
        sampler=Setting('', TEXT, 'the model that writes the data of this one', PAPER),
        chat=Setting('llama2', one_of('auto', *CHATS),
                     'chat format of prompt and response; auto: chosen', OURS),
    ),
    'mesh': dict(  # training, over all devices
        data=Setting(-1, COUNT_OR_OPEN, 'devices; -1: chosen', OURS),
        fsdp=Setting(-1, COUNT_OR_OPEN, 'devices; -1: chosen', OURS),
        tensor=Setting(-1, COUNT_OR_OPEN, 'devices; -1: chosen', OURS),
    ),
    'sample_mesh': dict(  # sampling, over the devices of a host or of a group of hosts
        data=Setting(-1, COUNT_OR_OPEN, 'devices; -1: chosen', OURS),
        fsdp=Setting(1, COUNT_OR_OPEN, 'devices; -1: chosen', OURS),
        tensor=Setting(-1, COUNT_OR_OPEN, 'devices; -1: chosen', OURS),
    ),
    'data': dict(
        source=Setting('oasst', one_of('oasst', 'ranked', 'sandbox'),
                       'kind of ranked replies', PAPER),
        # oasst: flat or trees; ranked: see data/ranked.py
        path=Setting('', TEXT, '.jsonl or .gz files, with commas', OURS),
        ift=Setting(3200, COUNT_OR_0, 'examples: of OASST1 English, first turn, rank 0', PAPER),
        test_prompts=Setting(256, COUNT_OR_0, 'prompts held out for head-to-head', PAPER),
        valid_prompts=Setting(253, COUNT_OR_0, 'prompts held out for early stopping', PAPER),
        # 1,630 EFT examples in the paper; prompts of any turn of OASST1
        ranked_train=Setting(2000, COUNT_OR_0, 'prompts for EFT', OURS),
        # 541 replies, 2.85 per prompt
        ranked_eval=Setting(190, COUNT_OR_0, 'prompts to measure judges on', PAPER),
        ranked_tune=Setting(0, COUNT_OR_0, 'prompts to tune on, with eval.split=valid', OURS),
        synthetic=Setting(False, SWITCH, 'keeps messages of OASST1 that a model wrote', OURS),
        documents=Setting(0, COUNT_OR_0, 'documents of the corpus of the sandbox', OURS),
        reviews=Setting('verdicts', one_of('verdicts', 'descriptions'),
                        'kind of reviews in the corpus of the sandbox', OURS),
    ),
    'train': dict(
        init=Setting('', TEXT,
                     'the model to start from, which is also the reference of DPO', PAPER),
        # names of TRAINING_DATA
        data=Setting(('',), Values(tuple), 'names of the files to train on', PAPER),
        batch=Setting(16, COUNT, 'examples or pairs per step; with packing, on average', PAPER),
        pack=Setting(True, SWITCH, 'True: several examples per row; False: one, padded', OURS),
        # the same number on every mesh makes the same steps: docs/training.md
        rows=Setting(-1, COUNT_OR_OPEN, 'packed rows per step; -1: the fewest for the mesh', OURS),
        # more micro-batches keep fewer activations in memory; the result is the same
        accumulate=Setting(-1, COUNT_OR_OPEN, 'micro-batches per step; -1: chosen', OURS),
        epochs=Setting(1.0, Values(float, above=0, most=10**6), 'passes over the data', OURS),
        # A pass over the 3,964 pairs of M2 (PAPER 3.1) has 3,964 / 16 = 248 steps, so with a
        # checkpoint every 200 steps it has two: 200 and 248. Three passes have 744 steps and the
        # checkpoints 200, 400, 600 and 744. M1: 4,830 / 16 = 302 steps, M3: 6,942 / 16 = 434.
        max_epochs=Setting(3.0, Values(float, above=0, most=10**6),
                           'passes over the data at most; with select=wins, instead of epochs',
                           OURS),
        warmup=Setting(0, COUNT_OR_0, 'steps', OURS),
        weight_decay=Setting(0.0, WEIGHT, 'per step, times the learning rate', OURS),
        b1=Setting(0.9, BELOW_1, 'decay of the first moment per step', OURS),
        b2=Setting(0.95, BELOW_1, 'decay of the second moment per step', OURS),
        max_grad_norm=Setting(1.0, Values(float, least=TINY, most=10**12),
                           'clips the gradient to this global norm', OURS),
        dropout=Setting(0.1, BELOW_1, 'share of activations', PAPER),
        # longer examples are dropped and counted
        max_length=Setting(2048, COUNT_OR_OPEN, 'tokens per row; -1: chosen', OURS),
        # parameters are float32
        dtype=Setting('bfloat16', one_of('float32', 'bfloat16'), 'of activations', OURS),
        # train/moments.py; bfloat16 saves 4 of 16 bytes per parameter
        moments=Setting('float32', one_of('float32', 'bfloat16'), "of Adam's moments", OURS),
        # models/llama.py; less recomputation takes more memory: docs/scale.md
        remat=Setting('auto', one_of('auto', *REMAT), 'what the backward pass recomputes; auto: '
                      'chosen; full was True, none was False', OURS),
        # models/lora.py; the adapters take the place of the parameters in what is trained and saved
        lora_rank=Setting(0, Values(int, least=0, most=2**14),
                          'rank of LoRA adapters; 0: trains all parameters', OURS),
        lora_alpha=Setting(32.0, Values(float, least=TINY, most=10**6),
                           'the product of an adapter is multiplied by lora_alpha / lora_rank',
                           LORA),
        lora_targets=Setting(LORA_TARGETS, Values(tuple), 'the adapted layers: LORA_TARGETS', OURS),
        save_every=Setting(200, COUNT, 'steps', PAPER),
        keep=Setting(2, COUNT, 'checkpoints kept', OURS),
        # '': the last; wins: srlm_jax/stopping.py; others: srlm_jax/selection.py
        select=Setting('auto', TEXT, 'the checkpoint to use: empty, wins, agreement, or a command '
                       'with {checkpoint} in it; auto: wins if a judge is configured', PAPER),
        judge=Setting('endpoint', one_of('endpoint', 'oracle', 'random'),
                      'who compares checkpoints with select=wins: the section `endpoint`, or in '
                      'the sandbox a program', PAPER),
        log_every=Setting(10, COUNT, 'steps', OURS),
        # sft: on response tokens only; dpo: on sums of log-probs, reference = init
        loss=Setting('dpo', one_of(*LOSSES), 'the loss', PAPER),
        # cached: once, before training; its parameters are then freed
        reference=Setting('step', one_of('step', 'cached'),
                       'when DPO computes the log-probs of the reference', OURS),
        nll_weight=Setting(0.0, WEIGHT, 'weight of the NLL of the chosen, Iterative RPO', OURS),
        sft_weight=Setting(1.0, WEIGHT, 'weight of the NLL of a demonstration among pairs', OURS),
        length_normalize=Setting(False, SWITCH, 'DPO on log-probs per token instead of sums', OURS),
        learning_rate=Setting(1e-6, RATE, 'per step, before the cosine; -1: chosen', PAPER),
        learning_rate_end=Setting(1e-7, Values(float, least=0, most=10, also=-1),
                                  'per step, after it; -1: chosen', PAPER),
        beta=Setting(0.1, WEIGHT, 'of DPO, per nat of log-prob', PAPER),
    ),
    'sample': dict(
        slots=Setting(-1, COUNT_OR_OPEN, 'rows decoded together, per group of hosts; -1: chosen',
                      OURS),
        size=Setting(4096, COUNT_OR_OPEN,
                     'tokens per row of the cache, at most the context; -1: chosen', OURS),
        steps=Setting(8, COUNT, 'tokens per call; slots are refilled between calls', OURS),
        dtype=Setting('bfloat16', one_of('float32', 'bfloat16'),
                      'of weights and activations', OURS),
        # half the memory after loading, slower on a CPU; bench/int8.py prints what changes
        int8=Setting(False, SWITCH, '8-bit weights', OURS),
        # False is slower, and keeps what the rounding of a merged bfloat16 weight would remove
        lora_merge=Setting(True, SWITCH, 'adds LoRA adapters to the weights', OURS),
    ),
    'prompts': dict(  # self-instruction creation, PAPER 2.2 and 3.1
        # PAPER: Llama-2-Chat-70B, fixed
        author=Setting('m0', TEXT, 'a model of the run, a folder, or sampler', PAPER),
        template=Setting('list', TEXT, 'a name in srlm_jax/data/author_*.txt, or a path', OURS),
        chat=Setting('none', one_of('none', *CHATS),
                     'chat format; none: few-shot continuation', OURS),
        held_out=Setting('', TEXT, 'files of evaluation prompts to exclude, with commas', OURS),
        round=Setting(256, COUNT,
                   'attempts per round; a round shares its shots of accepted prompts', OURS),
        # The paper states pairs, not prompts: 3,964 for M2 and 6,942 for M3 (3.1). If 80 % of the
        # prompts give a pair (a guess: candidates that all tie give none), these need
        # 3,964 / .8 = 4,955 (m2 below) and 6,942 / .8 = 8,678 prompts.
        count=Setting(8700, COUNT, 'accepted prompts wanted', OURS),
        max_attempts=Setting(4, COUNT, 'attempts per wanted prompt', OURS),
        seed_shots=Setting(6, COUNT_OR_0, 'shots from the seeds', PAPER),
        new_shots=Setting(2, COUNT_OR_0, 'shots from the prompts written before', PAPER),
        shot_words=Setting(150, COUNT, 'words; longer seeds are not used as shots', OURS),
        temperature=Setting(0.6, TEMPERATURE, '0: greedy', PAPER),
        top_p=Setting(0.9, MASS, 'probability', PAPER),
        top_k=Setting(0, COUNT_OR_0, 'tokens; 0: all', OURS),
        max_tokens=Setting(192, COUNT, 'tokens', OURS),
        rouge=Setting(0.7, SHARE, 'highest ROUGE-L F with a seed or accepted prompt', INSTRUCT),
        rouge_held_out=Setting(0.7, SHARE, 'highest ROUGE-L F with a held-out prompt', OURS),
        min_words=Setting(4, COUNT, 'words', INSTRUCT),
        max_words=Setting(150, COUNT, 'words', INSTRUCT),
    ),
    'respond': dict(
        n=Setting(4, COUNT, 'candidates per prompt', PAPER),
        temperature=Setting(0.7, TEMPERATURE, '0: greedy', PAPER),
        top_p=Setting(0.9, MASS, 'probability', PAPER),
        top_k=Setting(0, COUNT_OR_0, 'tokens; 0: all', OURS),
        max_tokens=Setting(1024, COUNT, 'tokens', OURS),
    ),
    'judge': dict(
        template=Setting('additive', TEXT,
                         'a name in srlm_jax/reward/judge_*.txt, or a path', PAPER),
        by=Setting('model', one_of('model', 'endpoint', 'oracle', 'random'),
                'who judges: the sampler, the section `endpoint`, or a control', PAPER),
        n=Setting(3, COUNT, 'judgements per candidate, averaged', PAPER),
        quorum=Setting(2, COUNT, 'parsed judgements that a mean needs', OURS),
        temperature=Setting(0.7, TEMPERATURE, '0: greedy', OURS),
        top_p=Setting(0.9, MASS, 'probability', OURS),
        top_k=Setting(0, COUNT_OR_0, 'tokens; 0: all', OURS),
        max_tokens=Setting(256, COUNT, 'tokens: up to 100 words of reasons, then the score', OURS),
        show_thinking=Setting(False, SWITCH,
                              'shows the judge the thinking of responses, not only the answers',
                              OURS),
    ),
    'eft': dict(
        # baseline: judgements of the SFT baseline; ranks: human ranks as scores
        targets=Setting('baseline', one_of('baseline', 'ranks'),
                        'source of the target scores', PAPER),
        judgements=Setting(3, COUNT, 'judgements per ranked reply', OURS),
        quorum=Setting(1, COUNT, 'parsed judgements that the mean of a reply needs', OURS),
    ),
    'pairs': dict(  # srlm_jax/reward/strategies.py describes each strategy, with its source
        strategy=Setting('max_min', TEXT, 'a name in srlm_jax.reward.strategies', 'PAPER 2.2'),
        unfinished_chosen=Setting(False, SWITCH,
                                  'allows a chosen response cut at max_tokens', OURS),
        margin=Setting(1.0, WEIGHT,
                    'for margin: least difference of chosen and rejected, in points', OURS),
        rho=Setting(0.1, Values(float, least=0, most=0.5),
                 'for length_controlled: share of the range of scores per band', OURS),
        positive=Setting(5.0, SCORE, 'for positives_only: least mean score', 'PAPER 3.3'),
        older=Setting('', TEXT, 'the older model: one iteration before the sampler', OURS),
    ),
    'meta_judge': dict(  # runs where train.data names judge_pairs
        template=Setting('meta', TEXT, 'a name in srlm_jax/reward/judge_*.txt, or a path', META),
        temperature=Setting(0.7, TEMPERATURE, '0: greedy', OURS),
        top_p=Setting(0.9, MASS, 'probability', OURS),
        top_k=Setting(0, COUNT_OR_0, 'tokens; 0: all', OURS),
        max_tokens=Setting(256, COUNT, 'tokens', OURS),
        responses=Setting(1, COUNT,
                          'responses per prompt, those with the most varied scores', META),
    ),
    'judge_pairs': dict(  # for each of judge_pairs, majority_pairs and swapped_pairs in train.data
        share=Setting(0.15, Values(float, least=0, most=0.99),
                      'highest share of these and the pairs of responses', OURS),
        score_share=Setting(0.5, SHARE,
                            'highest share of them whose chosen score is the same', OURS),
        of=Setting('both', one_of('both', 'own', 'swapped'), 'for swapped_pairs: judgements of the '
                   'own responses of the prompts, of swapped ones, or as many of both', OURS),
    ),
    'eval': dict(  # answers to held-out prompts
        # valid: the prompts to tune on, and data.ranked_tune of the ranked replies
        split=Setting('test', one_of('test', 'valid'), 'held-out prompts', PAPER),
        temperature=Setting(0.7, TEMPERATURE, '0: greedy', OURS),
        top_p=Setting(0.9, MASS, 'probability', OURS),
        top_k=Setting(0, COUNT_OR_0, 'tokens; 0: all', OURS),
        judgements=Setting(3, COUNT, 'judgements per ranked reply, averaged', OURS),
        quorum=Setting(2, COUNT, 'parsed judgements that the mean of a reply needs', OURS),
    ),
    'endpoint': dict(  # an outside judge: eval/endpoint.py; the flags --judge_KEY of evaluations
        url=Setting('', TEXT, 'http(s)://HOST/v1 of an OpenAI-compatible API, the folder of a '
                    'model, or a model of the run; empty: none', OURS),
        model=Setting('', TEXT, 'name of the model in requests; the server may need it', OURS),
        key_env=Setting('', TEXT, 'environment variable that has the API key; empty: no key', OURS),
        concurrency=Setting(8, Values(int, least=1, most=1000), 'requests at the same time', OURS),
        per_minute=Setting(0, COUNT_OR_0, 'most requests per minute; 0: no limit', OURS),
        timeout=Setting(120.0, Values(float, least=TINY, most=86400),
                        'seconds without an answer, after which a request is repeated', OURS),
        attempts=Setting(8, Values(int, least=1, most=1000), 'per request, before giving up', OURS),
        temperature=Setting(0.0, Values(float, least=0, most=100, also=-1),
                            'of evaluations; -1: not sent, for models that refuse it', OURS),
        max_tokens=Setting(1024, COUNT, 'tokens per answer, of evaluations', OURS),
        price_in=Setting(0.0, Values(float, least=0, most=10**6),
                         'dollars per million tokens of requests; 0: unknown', OURS),
        price_out=Setting(0.0, Values(float, least=0, most=10**6),
                          'dollars per million tokens of answers; 0: unknown', OURS),
    ),
}
SETTINGS = {'.'.join(filter(None, (section, name))): key
        for section, keys in _SECTIONS.items() for name, key in keys.items()}


def get(name: str, size: str = '70b') -> ConfigDict:
  """The config of model `name` (one of MODELS). It is locked: no key can be added."""
  for what, value, known in (('size', size, SIZES), ('model', name, MODELS)):
    if value not in known:
      raise InputError(f'{what} {show(value)} is unknown; it is one of {", ".join(known)}')
  c = _defaults('')
  for section in filter(None, _SECTIONS):
    c[section] = _defaults(section)
  c.name = name
  c.size = size
  c.model = f'llama2-{size}'
  _model(c)
  if size in _CHANGED:
    _CHANGED[size](c)
  return c.lock()


def get_config(text: str) -> ConfigDict:
  """The config `NAME` or `NAME:SIZE` of FILES: what `--config=iter2:tiny` means.

  >>> get_config('iter2:tiny').name
  'm2'
  """
  file, _, size = text.partition(':')
  if file not in FILES:
    raise InputError(f'--config={short(text)}{closest(file, FILES)}: it is the path of a file, or '
                     f'one of {", ".join(FILES)}')
  return get(FILES[file], *filter(None, [size]))


def is_open(value: int | str) -> bool:
  """Whether the value of a key of OPEN leaves it to be chosen."""
  return value in (-1, 'auto')


@dataclasses.dataclass(frozen=True)
class Base:
  """What M0 is."""
  params: int             # the number of its parameters
  context: int            # tokens per row that it supports
  has_chat_template: bool


# Parameters from which M0 gets the paper's learning rates: between 8B and 70B, the sizes for which
# TULU and PAPER state them.
LARGE = 50 * 10**9
# {whether it is large: {whether the loss is one of pairs: learning rate}}; of TULU that of 8B, from
# its commands in allenai/open-instruct, docs/tulu3.md
LEARNING_RATES = {False: {False: 5e-6, True: 5e-7},   # TULU
                  True: {False: 5.5e-6, True: 1e-6}}  # PAPER 3.1
LORA_FACTOR = 5  # the learning rate of LoRA / that of full training: docs/sandbox.md
DECAY = {False: 5, True: 10}  # the learning rate at the start / at the end: PAPER 3.1, as above
CHAT = 'llama2'  # of an M0 without a chat template: that of the published sizes


def suited(c: ConfigDict, base: Base) -> dict[str, int | float | str]:
  """{key: value} of the keys of FROM_M0 that a config leaves open, chosen for its M0.

  The lengths are those of the published sizes, or what `respond.max_tokens` needs: a row of
  training holds a prompt and a response, a row of the cache the judge's request. Both are at most
  the context.
  """
  is_pair, most = c.train.loss in PAIR_LOSSES, c.respond.max_tokens
  rate = c.train.learning_rate
  if is_open(rate):
    rate = LEARNING_RATES[base.params >= LARGE][is_pair]
    rate = float(f'{rate * LORA_FACTOR:.4g}') if c.train.lora_rank else rate
  found = {'chat': 'tokenizer' if base.has_chat_template else CHAT,
           'train.max_length': min(max(2048, 2 * most), base.context),
           'train.learning_rate': rate,
           'train.learning_rate_end': float(f'{rate / DECAY[is_pair]:.4g}'),
           'sample.size': min(max(4096, 4 * most), base.context)}
  values = dict(flat(c))
  return {key: value for key, value in found.items() if is_open(values[key])}


def training_data(c: ConfigDict) -> list[str]:
  """The names in `train.data`. A flag gives them as one string with commas."""
  return ','.join(c.train.data).split(',')


def mixes_demonstrations(t: ConfigDict) -> bool:
  """Whether the section `train` has records of one response, for SFT, among pairs."""
  names = {*','.join(t.data).split(',')}
  return t.loss in PAIR_LOSSES and not names.isdisjoint(('ift', 'eft', 'positives'))


def lora_targets(t: ConfigDict) -> list[str]:
  """The names in `lora_targets` of the section `train`. A flag gives them as one string."""
  return ','.join(t.lora_targets).split(',')


def selection(c: ConfigDict) -> str:
  """`train.select`; for auto: wins, which is early stopping, if a judge is configured, else ''."""
  if c.train.select != 'auto':
    return c.train.select
  return 'wins' if c.endpoint.url and c.train.init else ''


def epochs(t: ConfigDict) -> float:
  """The passes over the data of the section `train`; with early stopping the most of them."""
  return t.max_epochs if t.select == 'wins' else t.epochs


def ranked_split(c: ConfigDict) -> str:
  """The split of the ranked replies on which a judge is measured: eval, or tune for tuning."""
  return 'tune' if c.eval.split == 'valid' and c.data.ranked_tune else 'eval'


def check(c: ConfigDict):
  """Raises InputError if a key is missing or unknown, a value is not allowed, or two conflict."""
  values = dict(flat(c))
  _check_keys({*values})
  for name, key in SETTINGS.items():
    key.check(name, values[name])
  _check_order(values)
  _check_sandbox(c)
  _check_endpoint(c)
  _check_training(c.train, training_data(c))
  _check_stopping(c)
  for key, known in NAMES_A_MODEL.items():
    if values[key] and values[key] not in known and '/' not in values[key]:
      raise InputError(f'config.{key} is {show(values[key])}; it is empty, {_listed(known)}, or a '
                       "path with a '/'")


def _check_keys(found: set[str]):
  """Refuses missing, unknown and renamed keys."""
  for key in sorted(found ^ {*SETTINGS}):
    if key in RENAMED:
      raise InputError(f'config.{key} is now {RENAMED[key]}; write the new name')
    problem = 'missing' if key in SETTINGS else 'not a config key'
    raise InputError(f'config.{short(key)} is {problem}; a config has the keys of SETTINGS in '
                     'srlm_jax/config.py and no others')


def _check_order(values: dict):
  """Refuses a value that is larger than another one which limits it."""
  for low, high in (('judge.quorum', 'judge.n'), ('eft.quorum', 'eft.judgements'),
                    ('eval.quorum', 'eval.judgements'), ('prompts.min_words', 'prompts.max_words'),
                    ('train.learning_rate_end', 'train.learning_rate'),
                    ('train.accumulate', 'train.batch')):
    if values[low] > values[high] and not is_open(values[high]):
      raise InputError(f'config.{low} is {values[low]}, more than the {values[high]} of {high}; '
                       f'lower one or raise the other')


def _check_sandbox(c: ConfigDict):
  """Refuses what only the sandbox has, with other sources of data."""
  if c.data.source == 'sandbox':
    return
  if c.judge.by not in ('model', 'endpoint'):
    raise InputError(f'config.judge.by is {c.judge.by!r}; it is model or endpoint, and in the '
                     'sandbox also oracle or random')
  if c.data.ranked_tune:
    raise InputError(f'config.data.ranked_tune is {c.data.ranked_tune}; only the sandbox makes '
                     'ranked replies to tune on, with other sources it is 0')


def _check_endpoint(c: ConfigDict):
  """Refuses a judge that is not named, and what would put a secret into a manifest or a log."""
  if c.judge.by == 'endpoint' and not c.endpoint.url:
    raise InputError('config.judge.by is endpoint, and config.endpoint.url is empty; give the URL '
                     'of an OpenAI-compatible API, or the folder of a model')
  if c.judge.by == 'endpoint' and is_url(c.endpoint.url) and not c.endpoint.model:
    raise InputError(f'config.judge.by is endpoint, and config.endpoint.model is empty; give the '
                     f'name of the model at {c.endpoint.url}')
  check_url('config.endpoint.url', c.endpoint.url)
  check_key_env('config.endpoint.key_env', c.endpoint.key_env)


def is_url(place: str) -> bool:
  """Whether a judge is behind a URL, not in a folder."""
  return re.match('https?://', place) is not None


def check_url(name: str, url: str):
  """Raises InputError for a URL that contains a secret, or that no client takes; `name`: of it."""
  if is_url(url) and (not re.fullmatch(r'https?://[^/@?#\s]+(/[^@?#\s]*)?', url)):
    raise InputError(f'{name} must be http(s)://HOST/PATH, without a user, a password, a query or '
                     'spaces; a key comes from the environment alone (endpoint.key_env)')


def check_key_env(name: str, variable: str):
  """Raises InputError for what is no name of an environment variable; the text is not shown."""
  if variable and not re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', variable):
    raise InputError(f'{name} is not the name of an environment variable (its value is not shown: '
                     'it may be a key); put the key into a variable, and give the name of that')


def _check_training(t: ConfigDict, names: list[str]):
  """Refuses mistakes in the section `train`; `names`: those in `train.data`."""
  if t.loss in PAIR_LOSSES and not t.beta > 0:
    raise InputError(f'config.train.beta is {t.beta}; it must be above 0 with '
                     f'train.loss={t.loss}')
  if not (t.pack or is_open(t.rows) or t.rows == t.batch):
    raise InputError(f'config.train.rows is {t.rows}, and without packing (train.pack=False) a '
                     f'step has one row for each of the {t.batch} examples of train.batch; leave '
                     f'it at -1')
  if t.select not in ('', 'auto', 'wins', 'agreement') and not _names_checkpoint(t.select):
    raise InputError(f'config.train.select is {t.select!r}; it is empty, auto, wins, agreement, or '
                     'a command with {checkpoint} in it')
  if t.loss in PAIR_LOSSES and 'corpus' in names:
    raise InputError(f'config.train.data names corpus, and train.loss={t.loss} trains on prompts '
                     f'with responses; take it out, or set train.loss=sft')
  for key, given, known in (('data', names, TRAINING_DATA),
                            ('lora_targets', lora_targets(t), LORA_TARGETS)):
    for i, name in enumerate(given):
      if name not in known:
        raise InputError(f'config.train.{key} names {show(name)}; it may name {", ".join(known)}')
      if name in given[:i]:
        raise InputError(f'config.train.{key} names {show(name)} twice; name each of them once')


def _check_stopping(c: ConfigDict):
  """Refuses early stopping where something that it needs is missing."""
  if selection(c) != 'wins':
    return
  begin, end = 'config.train.select is wins, ', '; or set train.select to empty'
  if c.train.select == 'auto':
    begin = 'early stopping is on, because config.endpoint.url is set (train.select is auto), '
  if not c.train.init:
    raise InputError(f'{begin}and {c.name} starts from no model (train.init is empty) with which '
                     f'its first checkpoint could be compared{end}')
  if not c.data.valid_prompts:
    raise InputError(f'{begin}and data.valid_prompts is 0: there is no prompt on which checkpoints '
                     f'could be compared; give more{end}')
  if c.train.keep < 2:
    raise InputError(f'{begin}which compares two checkpoints, and train.keep is {c.train.keep}; '
                     f'set it to 2 or more{end}')
  if c.train.judge == 'endpoint' and not c.endpoint.url:
    raise InputError(f'{begin}and no judge is configured; give config.endpoint.url, in the sandbox '
                     f'set train.judge=oracle{end}')
  if c.train.judge != 'endpoint' and c.endpoint.url and c.judge.by != 'endpoint':
    raise InputError(f'{begin}and {c.name} asks no judge at config.endpoint.url: train.judge is '
                     f'{c.train.judge}; set train.judge=endpoint, or give endpoint.url only to '
                     f'models that use it')
  if c.train.judge != 'endpoint' and c.data.source != 'sandbox':
    raise InputError(f'config.train.judge is {c.train.judge!r}, which only the sandbox has; with '
                     f'data.source={c.data.source} it is endpoint')


def flat(c: ConfigDict, section: str = '') -> Iterator[tuple[str, object]]:
  """Yields (SECTION.KEY, value) for every key of a config."""
  for name, value in c.items():
    if isinstance(value, ConfigDict):
      yield from flat(value, f'{section}{name}.')
    else:
      yield section + name, value


def sft() -> ConfigDict:
  """The section `train` for SFT."""
  t = _defaults('train')
  t.loss = 'sft'
  t.learning_rate = 5.5e-6      # PAPER 3.1
  t.learning_rate_end = 1.1e-6  # PAPER 3.1
  t.beta = 0.0                  # of DPO alone
  return t


def dpo() -> ConfigDict:
  """The section `train` for DPO."""
  return _defaults('train')


def _defaults(section: str) -> ConfigDict:
  return ConfigDict({name: key.default for name, key in _SECTIONS[section].items()})


def _names_checkpoint(command: str) -> bool:
  try:
    return any('{checkpoint}' in word for word in shlex.split(command))
  except ValueError:  # a quote that is not closed
    return False


def _listed(choices) -> str:
  """
  >>> _listed(['a', 'b', 'c'])
  'a, b or c'
  """
  return ' or '.join(filter(None, (', '.join(choices[:-1]), choices[-1])))


def _model(c: ConfigDict):
  """Sets what each model trains on, who samples that, and where it starts from (PAPER 2.4)."""
  name = c.name
  older = dict(zip(MODELS[1:], MODELS, strict=False))  # the model before each one
  c.sampler = older[name] if name not in ('m0', 'sft') else ''
  c.train = sft() if name in ('m0', 'sft', 'm1') else dpo()
  c.train.init = 'm0' if name == 'm1' else older.get(name, '')
  c.train.data = dict(m0=('corpus',), sft=('ift',), m1=('ift', 'eft')).get(name, ('pairs',))
  c.pairs.older = older[c.sampler] if c.train.loss == 'dpo' else ''
  if name == 'm2':
    c.prompts.count = 5000


def _auto(c: ConfigDict):
  """Any M0, with the data and training of the paper; what is open is chosen for M0."""
  c.model = ''
  for key in FROM_M0:
    c.update_from_flattened_dict({key: 'auto' if key == 'chat' else -1})


def _stories(c: ConfigDict):
  """tinyllamas-260k on OASST1: real weights and data, but too small to judge. Not in the paper."""
  _small(c)
  c.model = 'stories-260k'
  c.data.ift = 60
  c.data.test_prompts = 16
  c.data.valid_prompts = 8
  c.data.ranked_train = 40
  c.data.ranked_eval = 10
  c.train.max_length = 512
  rates = (1e-4, 1e-5) if c.train.loss == 'sft' else (1e-5, 1e-6)
  c.train.learning_rate, c.train.learning_rate_end = rates
  c.train.batch = 8
  c.prompts.count = 40
  c.prompts.round = 20
  c.prompts.shot_words = 12   # 8 shots and an answer in 512 tokens
  c.prompts.max_tokens = 160
  c.respond.max_tokens = 96
  c.judge.template = 'short'
  c.judge.max_tokens = 64
  c.eft.targets = 'ranks'     # the baseline is too small to judge


def _tiny(c: ConfigDict):
  """The sandbox: a toy task that a program grades. Not in the paper; see docs/sandbox.md."""
  _small(c)
  c.model = 'sandbox'
  c.data.source = 'sandbox'
  c.data.ift = 800
  c.data.ranked_train = 500
  c.data.ranked_eval = 300
  c.data.ranked_tune = 300
  c.data.test_prompts = 400
  c.data.valid_prompts = 400
  c.data.documents = 260_000  # of the corpus from which M0 was trained
  c.prompts.template = 'sandbox'
  c.prompts.count = 600
  c.prompts.round = 128
  c.prompts.max_tokens = 48
  c.prompts.rouge = 0.99      # nearly all prompts of this small task are similar
  c.prompts.rouge_held_out = 0.99
  c.respond.n = 4
  c.respond.temperature = 1.0  # at 0.7 most candidates of a prompt are identical
  c.respond.top_p = 1.0
  c.respond.max_tokens = 32
  c.judge.template = 'sandbox'
  c.judge.max_tokens = 80
  c.eft.judgements = 6        # most judgements of the baseline do not parse: M0 saw few of them
  t = c.train
  t.max_length = 192
  t.weight_decay = 0.1
  t.dropout = 0.0
  t.judge = 'oracle'
  if c.name == 'm0':
    t.batch, t.learning_rate, t.learning_rate_end, t.warmup = 8, 2e-3, 1e-4, 100
    t.log_every, t.save_every = 50, 1000
  elif t.loss == 'sft':
    t.batch, t.epochs, t.learning_rate, t.learning_rate_end = 16, 2.0, 3e-4, 3e-5
  else:
    t.batch, t.epochs, t.learning_rate, t.learning_rate_end = 16, 3.0, 4e-5, 4e-6
    t.beta = 2.0              # at 0.1 the model loses its skill as a judge


def _hard(c: ConfigDict):
  """The sandbox with an M0 that, as a judge, seldom checks answers; see docs/judge.md."""
  _tiny(c)
  c.data.reviews = 'descriptions'
  c.eft.judgements = 12       # their scores agree less than those of tiny


def _small(c: ConfigDict):
  """What the sizes for a laptop's CPU have in common."""
  c.chat = 'plain'
  c.meta_judge.template = 'meta_short'
  c.meta_judge.max_tokens = 24
  c.sample.dtype = 'float32'
  c.train.dtype = 'float32'
  c.train.select = ''


# The sizes whose defaults are not the paper's, whose M0 is Llama 2.
_CHANGED = dict(auto=_auto, tiny=_tiny, hard=_hard, stories=_stories)
