"""Makes the data of the sandbox: the seeds of a run or, for m0, the corpus and the tokenizer.

  python -m srlm_jax.sandbox --config=sft:tiny --workdir=runs/demo
  python -m srlm_jax.sandbox --config=sandbox_m0:tiny --workdir=runs/m0
"""
import itertools

from etils import epath

from srlm_jax import catalog, hosts, InputError, records, schema, stage
from srlm_jax.models import config as model_config
from srlm_jax.sandbox import corpus, people

# The trained M0 of each size of the sandbox, as a Hugging Face folder; `make sandbox-m0` made it.
M0 = epath.resource_path('srlm_jax') / 'sandbox' / 'm0'
M0S = dict(tiny=M0, hard=M0.parent / 'm0_hard')


def run(config, workdir):
  if config.name == 'm0':
    make_corpus(config, workdir)
  else:
    make_seeds(config, workdir)


def make_seeds(config, workdir):
  """Writes ift.jsonl, ranked.jsonl and heldout.jsonl into data/seeds."""
  spec = catalog.find('sandbox')
  config = spec.view(config)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  s.begin()
  c = config.data
  if hosts.is_first_host():
    made = people.seeds(config.seed, c.ift, c.ranked_train, c.ranked_eval, c.ranked_tune,
                        c.test_prompts, c.valid_prompts)
    for name, rows in made.items():
      records.write(s.folder / f'{name}.jsonl', rows)
  s.finish(ift=c.ift, ranked=c.ranked_train + c.ranked_eval + c.ranked_tune,
           heldout=c.test_prompts + c.valid_prompts)


def make_corpus(config, workdir):
  """Writes corpus.jsonl and tokenizer.model into data/corpus."""
  spec = catalog.find('sandbox', 'corpus')
  config = spec.view(config)
  if not config.data.documents or config.model not in model_config.PRESETS:
    raise InputError(f'config.data.documents is {config.data.documents} and config.model is '
                     f'{config.model!r}; the corpus needs documents and a model of PRESETS in '
                     f'models/config.py')
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  s.begin()
  if hosts.is_first_host():
    path = s.folder / 'corpus.jsonl'
    texts = corpus.documents(config.seed, config.data.documents, config.data.reviews)
    records.write(path, (schema.Document(id=f'd{i}', text=text) for i, text in enumerate(texts)))
    sample = itertools.islice(records.read(path, schema.Document), corpus.TOKENIZED)
    corpus.train_tokenizer((document.text for document in sample), s.folder / 'tokenizer.model',
                           model_config.PRESETS[config.model].V)
  s.finish(documents=config.data.documents)
