"""The table of objectives covers the config, and its batches have what the loss needs."""
import itertools

from srlm_jax import config as configs
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Packing
from srlm_jax.train import objectives
from srlm_jax.train.batch import CachedPairBatch, PairBatch


def test_every_loss_and_reference_of_the_config_has_an_objective():
  choices = (configs.KNOBS[key].values.choices for key in ('train.loss', 'train.reference'))
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
