"""Makes the sandbox's seeds: the corpus and tokenizer of M0, IFT, ranked replies, held-out prompts."""
from srlm_jax import stage
from srlm_jax.data import judges, records
from srlm_jax.models import config as model_config
from srlm_jax.sandbox import corpus, world


def run(config, workdir):
  """Writes data/seeds: corpus.jsonl, tokenizer.model, ift.jsonl, ranked.jsonl, heldout.jsonl."""
  judge = judges.load(config.judge.template)
  s = stage.Stage(config, workdir, 'seeds', ('data', 'model', 'judge.template'), template=str(judge), model='data')
  if s.done:
    return
  s.begin()
  c = config.data
  if stage.is_first_host():
    seeds = world.seeds(config.seed, c.ift, c.ranked_train, c.ranked_eval, c.test_prompts)
    held = {r['prompt'] for r in seeds['heldout']} | {r['prompt'] for r in seeds['ranked'] if r['split'] == 'eval'}
    texts = list(corpus.documents(config.seed, c.documents, held, judge))
    corpus.train_tokenizer(texts, s.folder / 'tokenizer.model', model_config.PRESETS[config.model].V, judge)
    records.write(s.folder / 'corpus.jsonl', (dict(id=f'd{i}', text=text) for i, text in enumerate(texts)))
    for name, made in seeds.items():
      records.write(s.folder / f'{name}.jsonl', made)
  s.finish(documents=c.documents, ift=c.ift, ranked=c.ranked_train + c.ranked_eval, heldout=c.test_prompts)


if __name__ == '__main__':
  stage.main(run)
