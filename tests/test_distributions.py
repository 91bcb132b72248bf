import dataclasses
import json

from conftest import init, make_mesh
import jax
import numpy as np
import pytest

from srlm_jax import conversation, InputError, records, schema, stage
from srlm_jax.checkpoint import store
from srlm_jax.eval import distributions
from srlm_jax.eval.distributions import Text
from srlm_jax.models import config as model_config
from srlm_jax.models.config import PRESETS
from srlm_jax.sample import engine as engines

TINY = PRESETS['tiny-test']
FRUIT = [f'Name a {word}.' for word in ('fruit', 'pear', 'fig', 'plum', 'red fruit', 'fig fruit')]


def texts(*found: str) -> list[Text]:
  return [Text(str(i), text) for i, text in enumerate(found)]


def test_distinct_n_grams_by_hand():
  """12 equal prompts of 4 words: half of the 48, 36 and 24 n-grams are in a sample."""
  other = [' '.join(f'w{i}x{j}' for j in range(4)) for i in range(30)]
  found = distributions.distinct(dict(same=texts(*['A b c, d!'] * 12), other=texts(*other)))
  assert [(d.n, d.ngrams, d.mean, d.deviation) for d in found['same']] == [
      (1, 24, 0.1667, 0.0), (2, 18, 0.1667, 0.0), (3, 12, 0.1667, 0.0)]
  assert [(d.mean, d.deviation) for d in found['other']] == [(1, 0)] * 3


def test_distinct_n_grams_do_not_depend_on_the_size_of_a_set():
  rng = np.random.default_rng(0)
  made = [' '.join(f'w{i}' for i in rng.integers(0, 300, 10)) for _ in range(500)]
  found = distributions.distinct(dict(all=texts(*made), part=texts(*made[:60])))
  (all_of_it, *_), (part, *_) = found['all'], found['part']
  assert abs(all_of_it.mean - part.mean) < 3 * (all_of_it.deviation + part.deviation) / 2
  plain = [len({*words}) / len(words) for words in (' '.join(made).split(),
                                                    ' '.join(made[:60]).split())]
  assert plain[1] > 3 * plain[0]


def test_a_sample_is_chosen_by_the_hashes_of_ids():
  made = texts(*map(str, range(50)))
  found = distributions.sample(made, 20).used
  assert found == sorted(made, key=lambda t: records.digest(t.id))[:20] != made[:20]
  assert found == distributions.sample(made[::-1], 20).used
  assert len(distributions.sample(made, 60).used) == 50
  assert distributions.sample(texts('a', 'a b', 'a b c'), 1).words.tolist() == [1, 2, 3]


def test_the_nearest_seeds_of_new_prompts():
  vectors = dict(ift=np.array([[1., 0], [-1, 0.]]), eft=np.array([[9., 9]]),
                 m2=np.array([[2., 0], [0, 1], [0, 0]]))
  used = dict(ift=texts('a b', 'c d'), eft=texts('e f'), m2=texts('a b c', 'x y', 'c d'))
  found, = distributions.nearest(used, vectors, ['a b', 'c d'])
  assert found.set == 'm2' and found.rouge_shares == (0.3333, *[0.0] * 7, 0.3333, 0.3333)
  assert found.nearest[0] == schema.Neighbour(text='c d', seed='c d', rouge_l=1)
  assert found.nearest[1] == schema.Neighbour(text='a b c', seed='a b', rouge_l=0.8)
  assert found.farthest[0] == schema.Neighbour(text='x y', seed='', rouge_l=0)
  assert found.rouge_l.mean == 0.6
  center = np.mean([*vectors['ift'], *vectors['eft'], *vectors['m2']], 0)
  cosines = [max((x - center) @ (y - center) / np.linalg.norm(x - center)
                 / np.linalg.norm(y - center) for y in vectors['ift']) for x in vectors['m2']]
  assert found.cosine.mean == pytest.approx(np.mean(cosines), rel=1e-3)


def test_new_prompts_are_compared_with_held_out_and_judge_prompts():
  apart = [schema.SetDistance(a=name, b='ift', energy=x, low=x, high=x, p_value=0.001)
           for name, x in (('judge', 0.3), ('heldout', 0.02), ('m2', 0.04))]
  assert distributions.findings(apart)[-1] == (
      'The energy distance of the new prompts for m2 to IFT is 0.0400 [0.0400, 0.0400], p <= '
      '0.001; it is 0.0200 for the held-out prompts and 0.3000 for the judge prompts of EFT.')


def write(workdir, folder: str, **files):
  """A finished stage with these files, {name: records}."""
  path = workdir / folder
  path.mkdir(parents=True, exist_ok=True)
  for name, rows in files.items():
    records.write(path / f'{name}.jsonl', rows)
  stage.write_json(path / 'manifest.json', dict(format=stage.FORMAT, config={}))
  stage.write_json(path / 'done.json', dict(files=records.contents(path), seconds=1))


def prompts(name: str, found: list[str]) -> list[schema.Prompt]:
  return [schema.Prompt(id=f'{name}{i}', prompt=text) for i, text in enumerate(found)]


@pytest.fixture
def workdir(tmp_path, tokenizer_folder):
  """A run with M0, seeds, EFT and the prompts of m2: fruits everywhere but in m2."""
  model = tmp_path / 'm0' / 'model'
  model.mkdir(parents=True)
  (model / 'config.json').write_text(json.dumps(model_config.to_hf(TINY)))
  (model / 'tokenizer.model').write_bytes((tokenizer_folder / 'tokenizer.model').read_bytes())
  with jax.set_mesh(make_mesh(1, 1, 1)):
    saver = store.manager(model, keep=1)
    store.save(saver, 0, jax.tree.map(lambda x: 4 * x, init(TINY)))
    saver.close()
  replies = (schema.Reply(id='x', text='pear', rank=0), schema.Reply(id='y', text='fig', rank=1))
  turns = conversation.in_turns(['Name a fruit.', 'Pear.', 'Name a plum.'])
  said = [*[(text, ()) for text in FRUIT[:5] * 2], (conversation.text(turns), turns)]
  write(tmp_path, 'data/seeds',
        ift=[schema.Demonstration(id=f'i{n}', prompt=p, response='pear') for n, p in
             enumerate(FRUIT * 4)],
        ranked=[schema.RankedPrompt(id=f'r{n}/a', prompt=p, messages=m, split='train',
                                    replies=replies) for n, (p, m) in enumerate(said)],
        heldout=[schema.HeldOutPrompt(id=f'h{n}', prompt=p, split='test') for n, p in
                 enumerate(FRUIT[:3])])
  write(tmp_path, 'm1/eft', eft=[
      schema.EftExample(id=records.join(f'r{n}/a', reply.id), prompt=f'Score: 0 1 2 3 {p}',
                        response='5', score=5) for n, (p, _) in enumerate(said)
      for reply in replies])
  write(tmp_path, 'm2/prompts', prompts=prompts('m2', [f'Score: {n} 3 4' for n in range(12)]))
  return tmp_path


def found(workdir) -> schema.Distributions:
  return distributions.read(workdir / distributions.FILE)


def test_a_run_is_measured_again_only_if_its_data_change(workdir, monkeypatch):
  monkeypatch.setattr(distributions, 'MOST_TOKENS', 16)  # one width, one compilation
  lengths, mean_hidden = [], engines.Engine.mean_hidden
  monkeypatch.setattr(engines.Engine, 'mean_hidden', lambda self, rows, skip: (
      lengths.extend(map(len, rows)) or mean_hidden(self, rows, skip)))
  distributions.run(workdir, limit=20)
  first = found(workdir)
  assert [(s.name, s.count, s.used) for s in first.sets] == [
      ('ift', 24, 20), ('eft', 11, 11), ('judge', 22, 20), ('heldout', 3, 3), ('m2', 12, 12)]
  assert max(lengths) == 16 and len(lengths) == sum(s.used for s in first.sets)
  assert [s.cut > 0 for s in first.sets] == [False, True, True, False, False]
  assert first.missing == ('The run has no finished prompts for m3 (m3/prompts).',)
  assert {p.set for p in first.points} == {'ift', 'eft', 'heldout', 'm2'}
  assert any(p.text.startswith('[user] Name a fruit. [assistant] Pear.') for p in first.points)
  # Fruits and scores are told apart, fruits and fruits are not. Three prompts are too few.
  p_values = {(d.a, d.b): d.p_value for d in first.distances}
  assert p_values.keys() == {('eft', 'ift'), ('judge', 'ift'), ('m2', 'ift'), ('judge', 'eft'),
                             ('m2', 'eft')}
  assert p_values['eft', 'ift'] > 0.05 and p_values['m2', 'ift'] == p_values['m2', 'eft'] == 0.001
  assert [n.set for n in first.nearest] == ['heldout', 'm2']

  load = distributions.engines.load
  monkeypatch.setattr(distributions.engines, 'load', None)
  distributions.run(workdir, limit=20)  # reads no model
  monkeypatch.setattr(distributions.engines, 'load', load)
  write(workdir, 'm3/prompts', prompts=[])
  distributions.run(workdir, limit=20)
  again = found(workdir)  # computed again, with the same figures
  assert not again.missing and again.sets[-1] == schema.PromptSet(
      name='m3', title='new prompts for m3', word_shares=(0.0,) * len(again.word_bins))
  assert again.sets[:-1] == first.sets and again.points == first.points
  assert dataclasses.replace(again, sets=first.sets, missing=first.missing,
                             inputs=first.inputs) == first


def test_a_run_without_eft_and_new_prompts_has_a_map(workdir):
  for folder in ('m1/eft', 'm2/prompts'):
    (workdir / folder / 'done.json').unlink()
  sources, missing = distributions.find(workdir)
  assert [*sources] == ['ift', 'ranked', 'heldout'] and len(missing) == 3
  sets, seeds = distributions.prompts_of(sources, 400)
  assert [*sets] == ['ift', 'heldout']
  assert seeds == FRUIT * 4 + FRUIT[:5] * 2 + ['Name a fruit.']  # 'Name a plum.' is too short
  vectors = {name: np.random.default_rng(0).normal(size=(len(s.used), 4))
             for name, s in sets.items()}
  made = distributions.measure(sets, vectors, dict(ift=0, heldout=0), seeds)
  assert not made['distances'] and len(made['points']) == 27


def test_bad_input_is_refused(workdir):
  with pytest.raises(InputError, match='no checkpoint in .*m9/model'):
    distributions.run(workdir, 'm9')
  ranked = workdir / 'data' / 'seeds' / 'ranked.jsonl'
  kept = ranked.read_text()
  ranked.write_text('')
  with pytest.raises(InputError, match='ranked.jsonl has changed since its stage finished'):
    distributions.run(workdir)
  write(workdir, 'data/seeds')
  with pytest.raises(InputError, match=r'judges a reply to the prompt \'r0/a\', which ranked'):
    distributions.run(workdir)
  ranked.write_text(kept)
  records.write(workdir / 'data' / 'seeds' / 'ift.jsonl', [])
  write(workdir, 'data/seeds')
  (workdir / 'eval').mkdir()
  (workdir / distributions.FILE).write_text('{')
  with pytest.raises(InputError, match='distributions.json: not a JSON object'):
    distributions.run(workdir)
