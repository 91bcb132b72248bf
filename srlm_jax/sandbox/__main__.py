"""Makes the sandbox's data: the seeds of a run; or, for m0, the corpus and the tokenizer.

  python -m srlm_jax.sandbox --config=configs/sft.py:tiny --workdir=runs/demo
  python -m srlm_jax.sandbox --config=configs/sandbox_m0.py --workdir=runs/m0
"""
import itertools

from etils import epath

from srlm_jax import catalog, cli, hosts, records, stage
from srlm_jax.models import config as model_config
from srlm_jax.sandbox import corpus, people

M0 = epath.resource_path('srlm_jax') / 'sandbox' / 'm0'  # what `make sandbox-m0` made, as a Hugging Face folder


def run(config, workdir):
  (make_corpus if config.name == 'm0' else make_seeds)(config, workdir)


def make_seeds(config, workdir):
  """Writes data/seeds: ift.jsonl, ranked.jsonl, heldout.jsonl."""
  spec = catalog.find('sandbox')
  config = spec.view(config)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  s.begin()
  c = config.data
  if hosts.is_first_host():
    made = people.seeds(config.seed, c.ift, c.ranked_train, c.ranked_eval, c.ranked_tune, c.test_prompts,
                        c.valid_prompts)
    for name, rows in made.items():
      records.write(s.folder / f'{name}.jsonl', rows)
  s.finish(ift=c.ift, ranked=c.ranked_train + c.ranked_eval + c.ranked_tune, heldout=c.test_prompts + c.valid_prompts)


def make_corpus(config, workdir):
  """Writes data/corpus: corpus.jsonl, tokenizer.model."""
  spec = catalog.find('sandbox', 'corpus')
  config = spec.view(config)
  s = stage.Stage(spec, config, workdir)
  if s.done:
    return
  s.begin()
  if hosts.is_first_host():
    texts = corpus.documents(config.seed, config.data.documents)
    records.write(s.folder / 'corpus.jsonl', (dict(id=f'd{i}', text=text) for i, text in enumerate(texts)))
    some = (row['text'] for row in itertools.islice(records.read(s.folder / 'corpus.jsonl'), corpus.TOKENIZED))
    corpus.train_tokenizer(some, s.folder / 'tokenizer.model', model_config.PRESETS[config.model].V)
  s.finish(documents=config.data.documents)


if __name__ == '__main__':
  cli.main(run)
