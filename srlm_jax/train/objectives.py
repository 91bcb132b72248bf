"""The training objectives: how each value of (train.loss, train.reference) trains.

To add a loss: write it in `losses.py`, add its rows to OBJECTIVES, and its name to `config.py`.
"""
from collections.abc import Callable, Iterator, Sequence
import dataclasses

from srlm_jax import catalog, records, schema
from srlm_jax.data import examples as training
from srlm_jax.data.examples import Examples
from srlm_jax.train import batch as batches, losses


@dataclasses.dataclass(frozen=True)
class Objective:
  """What training needs to know about a loss and its reference.

  examples: (config.train, chat, files, tokenizer) -> Examples
  pack: (rows, packing.Shape) -> Batch or PairBatch, or (.., reference_logps) -> CachedPairBatch
  loss: of single responses, token_logps [B, N] -> the sum of losses []; of pairs,
    (config.train, policy, reference, lengths, soft_labels) -> losses and metrics, as losses.dpo
  """
  examples: Callable[..., Examples]
  pack: Callable[..., batches.Batch]
  loss: Callable
  needs_reference_params: bool = False  # the step computes the reference's log-probs
  needs_reference_logps: bool = False   # they are computed once before training


def find(config) -> Objective:
  """The objective of the `train` section of a config."""
  return OBJECTIVES[config.loss, config.reference]


def sft_examples(config, chat: str, files: Sequence, tokenizer) -> Examples:
  """The documents of a corpus, or responses to prompts."""
  if config.data == ('corpus',):
    return training.corpus(_read(files, schema.Document), tokenizer, config.max_length)
  return training.sft(_responses(files), tokenizer, chat, config.max_length)


def pair_examples(config, chat: str, files: Sequence, tokenizer) -> Examples:
  """Pairs of responses to the same prompt, and demonstrations."""
  kinds = ((file, catalog.KINDS[file.name]) for file in files)
  found = (record for file, kind in kinds for record in records.read(
      file, schema.Preference if issubclass(kind, schema.Preference) else kind))
  return training.dpo(found, tokenizer, chat, config.max_length)


_SFT = Objective(sft_examples, batches.pack, losses.sft_loss)
OBJECTIVES = {
    ('sft', 'step'): _SFT,  # SFT has no reference
    ('sft', 'cached'): _SFT,
    ('dpo', 'step'): Objective(pair_examples, batches.pack_pairs, losses.dpo,
                               needs_reference_params=True),
    ('dpo', 'cached'): Objective(pair_examples, batches.pack_cached_pairs, losses.dpo,
                                 needs_reference_logps=True),
}


def _responses(files) -> Iterator[schema.Demonstration | schema.EftExample | schema.Positive]:
  """The records that SFT trains on; of a pair, the chosen response and its finish."""
  for file in files:
    if issubclass(catalog.KINDS[file.name], schema.Preference):
      for pair in records.read(file, schema.Preference):
        yield schema.Demonstration(id=pair.id, prompt=pair.prompt, response=pair.chosen,
                                   finish=pair.chosen_finish, messages=pair.messages,
                                   token_ids=pair.chosen_token_ids)
    else:
      yield from records.read(file, catalog.KINDS[file.name])


def _read(files, kind: type[records.Record]) -> Iterator[records.Record]:
  for file in files:
    yield from records.read(file, kind)
