"""The table of objectives covers the config, and its batches have what the loss needs."""
import itertools

import pytest

from srlm_jax import config as configs, InputError, records, schema
from srlm_jax.data import tokenizer as tokenizers
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Packing
from srlm_jax.train import objectives
from srlm_jax.train.batch import CachedPairBatch, PairBatch


def test_every_loss_and_reference_of_the_config_has_an_objective():
  choices = (configs.SETTINGS[key].values.choices for key in ('train.loss', 'train.reference'))
  assert objectives.OBJECTIVES.keys() == set(itertools.product(*choices))


def test_a_loss_with_a_reference_gets_its_parameters_or_its_log_probs():
  example = Example('a', [1, 2], ([3], [4, 5]))
  packed = Packing([example], 1, 1, 0)
  for objective in objectives.OBJECTIVES.values():
    more = (dict(a=[-1.0, -2.0]),) if objective.needs_reference_logps else ()
    batch = objective.pack(packed.rows(0), packed.shape, *more)
    assert isinstance(batch, CachedPairBatch) == objective.needs_reference_logps
    assert isinstance(batch, PairBatch) == (
        objective.needs_reference_logps or objective.needs_reference_params)


def test_sft_reads_the_records_of_every_stage_and_the_chosen_responses_of_pairs(
    tmp_path, tokenizer_folder):
  config, tokenizer = configs.get('m1', 'tiny').train, tokenizers.load(tokenizer_folder)
  text = dict(prompt='Name a fruit.', response='pear')
  cut = dict(prompt='Name a fruit.', chosen='fig', rejected='plum', chosen_finish=schema.CUT,
             rejected_finish='eos')
  rows = dict(
      ift=schema.Demonstration(id='i', **text), eft=schema.EftExample(id='e', score=4.0, **text),
      positives=schema.Positive(id='o', score=5.0, finish=schema.CUT, **text),
      pairs=schema.Preference(id='p', **cut))
  files = [tmp_path / f'{name}.jsonl' for name in rows]
  for file, row in zip(files, rows.values(), strict=True):
    records.write(file, [row])
  made = objectives.sft_examples(config, 'plain', files, tokenizer).examples
  ended = [e.responses[0][-1] == tokenizer.eos_ids[0] for e in made]
  assert ([e.id for e in made], ended) == ([*'ieop'], [True, True, False, False])
  assert tokenizer.decode(made[3].responses[0]).strip() == 'fig'
  records.write(files[2], [dict(text, id='o', score=5.0)])  # it may be cut
  with pytest.raises(InputError, match='positives.jsonl:1: .* missing required field finish'):
    objectives.sft_examples(config, 'plain', files, tokenizer)
