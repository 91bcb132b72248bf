"""Every knob once, with its unit and its source; PAPER: Yuan et al. 2024, arXiv 2401.10020.

`get(name, size)` is the config of one model of the paper's table at one size. Lengths are in tokens, rates are
those of AdamW, counts are of examples unless said. `# not in the paper` marks what we chose.
"""
import math
import shlex

from ml_collections import ConfigDict

from srlm_jax import InputError
from srlm_jax.data import templates

SIZES = ('tiny', 'stories', '7b', '13b', '70b')
MODELS = ('m0', 'sft', 'm1', 'm2', 'm3', 'm4')  # in the order of their training


def get(name: str, size: str = '70b') -> ConfigDict:
  """The config of model `name` (m0, sft, m1, m2, m3 or m4), locked: an unknown key is refused."""
  if size not in SIZES:
    raise InputError(f'size {size!r} is unknown; it is one of {", ".join(SIZES)}')
  c = ConfigDict()
  c.name = name
  c.size = size
  c.seed = 0
  c.m0 = ''                   # the loop's: Hugging Face folder of M0; '': the sandbox's own (tiny)
  c.model = f'llama2-{size}'  # what M0 must be: a name of models.config.PRESETS
  c.sampler = dict(m1='sft', m2='m1', m3='m2', m4='m3').get(name, '')  # the model that writes this one's data
  c.chat = 'llama2'           # form of prompt and response: plain, llama2, tokenizer (its own)
  c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))         # training, over all devices; -1: what is left
  c.sample_mesh = ConfigDict(dict(data=1, fsdp=1, tensor=-1))  # sampling, over the devices of each host

  c.data = ConfigDict()
  c.data.source = 'oasst'     # oasst, ranked (any other ranked replies) or sandbox
  c.data.path = ''            # .jsonl or .gz; commas between several; oasst: flat or trees; ranked: see data/ranked.py
  c.data.ift = 3200           # PAPER 3.1: the reply ranked 0; of oasst English, first turn
  c.data.test_prompts = 256   # PAPER 3.1: held out, for head-to-head
  c.data.valid_prompts = 253  # PAPER 3.1: held out, for early stopping
  c.data.ranked_train = 2000  # prompts for EFT, which yields 1,630 in PAPER 3.1; of oasst, any turn
  c.data.ranked_eval = 190    # prompts to measure judges; 541 replies, 2.85 per prompt, PAPER 3.1
  c.data.ranked_tune = 0      # the same to tune on, with eval.split=valid; the sandbox's alone
  c.data.synthetic = False    # of oasst: keep what a model wrote
  c.data.documents = 0        # of the sandbox's corpus

  c.train = sft() if name in ('m0', 'sft', 'm1') else dpo()
  c.train.init = dict(m0='', sft='m0', m1='m0', m2='m1', m3='m2', m4='m3')[name]
  c.train.data = dict(m0=('corpus',), sft=('ift',), m1=('ift', 'eft')).get(name, ('pairs',))

  c.sample = ConfigDict()
  c.sample.slots = 64         # rows decoded together on a host; not in the paper
  c.sample.size = 4096        # tokens that a row of the cache holds, prompt and response; at most the model's context
  c.sample.steps = 8          # tokens a call, between which ended rows make room; not in the paper
  c.sample.dtype = 'bfloat16'
  c.sample.int8 = False       # weights of 8 bits: half the memory, once loaded; bench/int8.py prints what changes

  c.prompts = ConfigDict()    # self-instruction creation, PAPER 2.2 and 3.1
  c.prompts.author = 'm0'     # fixed: a model of the run or a folder (PAPER: Llama-2-Chat-70B); sampler: M_t
  c.prompts.template = 'list'  # srlm_jax/data/author_*.txt by name, or a file by path
  c.prompts.chat = 'none'     # form in which the author is asked: none (continues the list), or a chat form
  c.prompts.held_out = ''     # files of evaluation prompts that may not enter (AlpacaEval, MT-Bench), with commas
  c.prompts.round = 256       # attempts that are shown the same accepted prompts; not in the paper
  # Accepted prompts wanted; not in the paper, which states pairs: 3,964 of M1's and 6,942 of M2's (3.1). If 80 % of the
  # prompts give a pair (a guess: prompts whose candidates all tie give none), 3,964 / .8 = 4,955, 6,942 / .8 = 8,678.
  c.prompts.count = 5000 if name == 'm2' else 8700
  c.prompts.max_attempts = 4  # give up after this many attempts a wanted prompt; not in the paper
  c.prompts.seed_shots = 6
  c.prompts.new_shots = 2     # of those written before
  c.prompts.shot_words = 150  # longer seeds are not shown; not in the paper
  c.prompts.temperature = 0.6
  c.prompts.top_p = 0.9
  c.prompts.top_k = 0  # 0: all
  c.prompts.max_tokens = 192  # not in the paper
  c.prompts.rouge = 0.7       # Self-Instruct: ROUGE-L F against every seed and accepted prompt, at most
  c.prompts.rouge_held_out = 0.7  # the same against held-out and evaluation prompts; not in the paper
  c.prompts.min_words = 4     # Self-Instruct
  c.prompts.max_words = 150   # Self-Instruct

  c.respond = ConfigDict()
  c.respond.n = 4             # candidates a prompt, PAPER 3.1
  c.respond.temperature = 0.7
  c.respond.top_p = 0.9
  c.respond.top_k = 0  # 0: all
  c.respond.max_tokens = 1024  # not in the paper

  c.judge = ConfigDict()
  c.judge.template = 'additive'  # srlm_jax/data/judge_*.txt by name, or a file by path
  c.judge.on = 'ranked' if name == 'm1' else 'responses'  # what the judge stage judges
  c.judge.by = 'model'        # the sampler; or, to compare with: oracle, random (sandbox)
  c.judge.n = 3               # judgements a candidate, averaged; PAPER 3.1
  c.judge.quorum = 2          # parsed judgements that a mean needs; not in the paper
  c.judge.temperature = 0.7   # not in the paper
  c.judge.top_p = 0.9         # not in the paper
  c.judge.top_k = 0  # 0: all
  c.judge.max_tokens = 256    # up to 100 words of reasons, then the score

  c.eft = ConfigDict()
  c.eft.targets = 'baseline'  # written by the SFT baseline, as in PAPER 3.1; or ranks: people's ranks as scores
  c.eft.tries = 3             # judgements of each ranked reply; not in the paper
  c.eft.quorum = 1            # parsed judgements that a reply's mean needs; not in the paper

  c.pairs = ConfigDict()      # srlm_jax/sample/strategies.py says what each strategy does, and whose it is
  c.pairs.strategy = 'max_min'  # PAPER 2.2
  c.pairs.unfinished_chosen = False  # may a response cut at the length limit be chosen? not in the paper
  c.pairs.margin = 1.0        # points between chosen and rejected at least: margin
  c.pairs.rho = 0.1           # share of the range of scores that makes a band, 0 to 0.5: length_controlled
  c.pairs.positive = 5.0      # mean score from which a response is a positive, PAPER 3.3: positives_only
  c.pairs.older = dict(m2='sft', m3='m1', m4='m2').get(name, '')  # the model before the sampler, to compare with

  c.meta_judge = ConfigDict()  # Meta-Rewarding (2407.19594); runs where train.data names judge_pairs
  c.meta_judge.template = 'meta'
  c.meta_judge.temperature = 0.7
  c.meta_judge.top_p = 0.9
  c.meta_judge.top_k = 0  # 0: all
  c.meta_judge.max_tokens = 256
  c.meta_judge.responses = 1  # a prompt, those on whose judgements the judge differs most
  c.meta_judge.share = 0.15   # of all pairs to train on, at most
  c.meta_judge.score_share = 0.5  # of the judge pairs, at most with one score chosen

  c.eval = ConfigDict()       # answers to held-out prompts
  c.eval.split = 'test'       # held-out prompts; valid, to tune on: then ranked replies too (data.ranked_tune)
  c.eval.temperature = 0.7
  c.eval.top_p = 0.9
  c.eval.top_k = 0  # 0: all
  c.eval.judgements = 3       # of each ranked reply of the evaluation set, averaged
  c.eval.quorum = 2           # of them must have a score
  {'tiny': _tiny, 'stories': _stories}.get(size, _published)(c)
  return c.lock()


def training_data(c: ConfigDict) -> list[str]:
  """The names in `train.data`, which a flag writes as one text with commas."""
  return ','.join(c.train.data).split(',')


def ranked_split(c: ConfigDict) -> str:
  """The split of the seeds' ranked replies on which a judge is measured: eval, or tune while tuning."""
  return 'tune' if c.eval.split == 'valid' and c.data.ranked_tune else 'eval'


def check(c: ConfigDict):
  """Raises InputError for a value that no stage can work with, by name."""
  for section, names in dict(
      train=('batch', 'accumulate', 'epochs', 'max_length', 'save_every', 'log_every', 'keep', 'learning_rate'),
      sample=('slots', 'size', 'steps'), respond=('n', 'max_tokens'), judge=('n', 'quorum', 'max_tokens'),
      prompts=('round', 'count', 'max_attempts', 'max_tokens', 'min_words'), eft=('tries', 'quorum'),
      eval=('judgements', 'quorum'), meta_judge=('max_tokens', 'responses')).items():
    for name in names:
      if c[section][name] <= 0:
        raise InputError(f'config.{section}.{name} is {c[section][name]}; it must be above 0')
  for section in ('train', 'sample'):
    if c[section].dtype not in ('float32', 'bfloat16'):
      raise InputError(f'config.{section}.dtype is {c[section].dtype!r}; it is float32 or bfloat16')
  if c.judge.by not in ('model', *('oracle', 'random') * (c.data.source == 'sandbox')):
    raise InputError(f'config.judge.by is {c.judge.by!r}; it is model, and in the sandbox also oracle or random')
  if c.eval.split not in ('test', 'valid'):
    raise InputError(f'config.eval.split is {c.eval.split!r}; it is test or valid')
  if c.data.source not in ('oasst', 'ranked', 'sandbox'):
    raise InputError(f'config.data.source is {c.data.source!r}; it is oasst, ranked or sandbox')
  if c.data.ranked_tune and c.data.source != 'sandbox':
    raise InputError(f'config.data.ranked_tune is {c.data.ranked_tune}; only the sandbox makes ranked replies to tune '
                     f'on, with other sources it is 0')
  if c.eft.targets not in ('baseline', 'ranks'):
    raise InputError(f'config.eft.targets is {c.eft.targets!r}; it is baseline or ranks')
  if c.chat not in templates.CHATS or c.prompts.chat not in ('none', *templates.CHATS):
    raise InputError(f'config.chat is {c.chat!r} and config.prompts.chat {c.prompts.chat!r}; they are one of '
                     f'{", ".join(templates.CHATS)}, and config.prompts.chat may be none')
  _check_train(c.train)
  for section, name in (('judge', 'n'), ('eft', 'tries'), ('eval', 'judgements')):
    if c[section].quorum > c[section][name]:
      raise InputError(f'config.{section}.quorum is {c[section].quorum}, more than the {c[section][name]} judgements '
                       f'({section}.{name})')
  for key, highest in (('pairs.rho', 0.5), ('meta_judge.share', 0.99), ('meta_judge.score_share', 1)):
    section, name = key.split('.')
    if not 0 <= c[section][name] <= highest:
      raise InputError(f'config.{key} is {c[section][name]}; it is 0 to {highest}')


def _check_train(t: ConfigDict):
  if t.reference not in ('step', 'cached'):
    raise InputError(f'config.train.reference is {t.reference!r}; it is step or cached')
  if t.loss not in ('sft', 'dpo'):
    raise InputError(f'config.train.loss is {t.loss!r}; it is sft or dpo')
  if t.select not in ('', 'agreement'):
    try:
      command = any('{checkpoint}' in word for word in shlex.split(t.select))
    except ValueError:  # a quote that is not closed
      command = False
    if not command:
      raise InputError(f'config.train.select is {t.select!r}; it is empty, agreement, or a command with '
                       '{checkpoint} in it')
  for name, good, what in (('dropout', 0 <= t.dropout < 1, '0 or more, and less than 1'),
                           ('beta', t.loss == 'sft' or t.beta > 0, 'above 0'),
                           ('clip', t.clip > 0, 'above 0'), ('warmup', t.warmup >= 0, '0 or more'),
                           ('learning_rate', math.isfinite(t.learning_rate), 'finite')):
    if not good:
      raise InputError(f'config.train.{name} is {t[name]}; it must be {what}')


def _train() -> ConfigDict:
  t = ConfigDict()
  t.init = ''                 # the model that it starts from; DPO's reference too
  t.data = ('',)              # the files that it reads: corpus, ift, eft, positives (SFT); pairs, judge_pairs (DPO)
  t.batch = 16                # examples or pairs a step, PAPER 3.1; packed, on average
  t.pack = True               # several examples a row; False: one each, padded
  t.accumulate = 1            # micro-batches a step: same result, fewer activations at a time
  t.epochs = 1.0              # passes over the data; not in the paper
  t.warmup = 0                # steps; not in the paper
  t.weight_decay = 0.0        # not in the paper
  t.b1 = 0.9                  # not in the paper
  t.b2 = 0.95                 # not in the paper
  t.clip = 1.0                # global norm of the gradient; not in the paper
  t.dropout = 0.1             # PAPER 3.1
  t.max_length = 2048         # tokens a row; longer examples are dropped and counted; not in the paper
  t.dtype = 'bfloat16'        # of activations; parameters and moments are float32
  t.remat = True
  t.save_every = 200          # steps, PAPER 3.1
  t.keep = 2                  # checkpoints kept
  t.select = ''               # the last; or of all the best by 'agreement', or by a command: srlm_jax/selection.py
  t.log_every = 10            # steps
  return t


def sft() -> ConfigDict:
  t = _train()
  t.loss = 'sft'              # on response tokens alone
  t.learning_rate = 5.5e-6    # PAPER 3.1, cosine from ..
  t.learning_rate_end = 1.1e-6  # .. to
  t.beta = t.nll = 0.0        # DPO's alone ..
  t.reference, t.by_length = 'step', False  # .. these too
  return t


def dpo() -> ConfigDict:
  t = _train()
  t.loss = 'dpo'              # sums of log-probs, reference = init
  t.reference = 'step'        # its log-probs: in every step; or 'cached': once, before, and its parameters go
  t.nll = 0.0                 # weight of the chosen response's NLL by token (Iterative RPO); not in the paper
  t.by_length = False         # log-probs by token instead of sums (length-normalised DPO); not in the paper
  t.learning_rate = 1e-6      # PAPER 3.1
  t.learning_rate_end = 1e-7  # PAPER 3.1
  t.beta = 0.1                # PAPER 3.1
  return t


def _published(c: ConfigDict):
  """Llama 2: the paper's numbers stand."""
  if c.size == '70b':
    c.mesh.tensor = 8  # one key/value head a chip; batch 16 then spreads over as many as 128 chips


def _stories(c: ConfigDict):
  """tinyllamas-260k on OASST1: real weights, real data, far too small to judge. All of it: not in the paper."""
  _small(c)
  c.model = 'stories-260k'
  c.data.ift = 60
  c.data.test_prompts = 16
  c.data.valid_prompts = 8
  c.data.ranked_train = 40
  c.data.ranked_eval = 10
  c.train.max_length = 512
  c.train.learning_rate, c.train.learning_rate_end = (1e-4, 1e-5) if c.train.loss == 'sft' else (1e-5, 1e-6)
  c.train.batch = 8
  c.prompts.count = 40
  c.prompts.round = 20
  c.prompts.shot_words = 12   # 8 shots and an answer in 512 tokens
  c.prompts.max_tokens = 160
  c.respond.max_tokens = 96
  c.judge.template = 'short'
  c.judge.max_tokens = 64
  c.eft.targets = 'ranks'     # a baseline this small cannot write them


def _tiny(c: ConfigDict):
  """The sandbox: a small world whose answers a program grades. Not in the paper; docs/sandbox.md says why."""
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
  c.prompts.rouge = 0.99      # in so small a world nearly all prompts resemble one another
  c.prompts.rouge_held_out = 0.99
  c.respond.n = 4
  c.respond.temperature = 1.0  # at 0.7 most candidates of a prompt are equal
  c.respond.top_p = 1.0
  c.respond.max_tokens = 32
  c.judge.template = 'sandbox'
  c.judge.max_tokens = 80
  c.eft.tries = 6             # M0 has seen few verdicts: most judgements of the baseline have no score
  t = c.train
  t.max_length = 192
  t.weight_decay = 0.1
  t.dropout = 0.0
  if c.name == 'm0':
    t.batch, t.learning_rate, t.learning_rate_end, t.warmup = 8, 2e-3, 1e-4, 100
    t.log_every, t.save_every = 50, 1000
  elif t.loss == 'sft':
    t.batch, t.epochs, t.learning_rate, t.learning_rate_end = 16, 2.0, 3e-4, 3e-5
  else:
    t.batch, t.epochs, t.learning_rate, t.learning_rate_end = 16, 3.0, 4e-5, 4e-6
    t.beta = 2.0              # at 0.1 the judge forgets how to judge while it learns to answer


def _small(c: ConfigDict):
  """What every size for a laptop's CPU shares."""
  c.chat = 'plain'
  c.meta_judge.template = 'meta_short'
  c.meta_judge.max_tokens = 24
  c.sample_mesh.data, c.sample_mesh.tensor = -1, 1
  c.sample.slots = 128
  c.sample.dtype = 'float32'
  c.train.dtype = 'float32'
  c.train.remat = False
