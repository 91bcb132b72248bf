"""transformers as a peer of bench/sample.py; see peers.py.

`transformers` is `generate` on left-padded batches.
"""
from collections.abc import Sequence

import peers


def main():
  parent = peers.Parent()
  settings = parent.settings
  import torch
  import transformers
  transformers.logging.set_verbosity_error()

  class Ends(transformers.StoppingCriteria):
    """Ends every row at its own length."""

    def __init__(self, width: int, lengths: Sequence[int]):
      self.ends = width + torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
      return (input_ids.shape[1] >= self.ends).to(input_ids.device)

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = transformers.LlamaForCausalLM.from_pretrained(
      settings['folder'], dtype=settings['dtype'], attn_implementation='sdpa',
      trust_remote_code=False).to(device).eval()
  model.generation_config.eos_token_id = None  # samples end at their lengths alone

  def generate(batch, temperature: float, top_p: float) -> list[list[int]]:
    width = max(len(r['ids']) for r in batch)
    ids = [[0] * (width - len(r['ids'])) + r['ids'] for r in batch]
    mask = [[0] * (width - len(r['ids'])) + [1] * len(r['ids']) for r in batch]
    lengths = [length for r in batch for length in r['lengths']]
    chance = dict(do_sample=False)
    if temperature:
      chance = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    with torch.inference_mode():
      out = model.generate(
          torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device),
          num_return_sequences=len(batch[0]['lengths']), max_new_tokens=max(lengths),
          pad_token_id=0,
          stopping_criteria=transformers.StoppingCriteriaList([Ends(width, lengths)]), **chance)
    return [row[:length] for row, length in zip(out[:, width:].tolist(), lengths, strict=True)]

  def answer(task: dict) -> dict:
    requests, ids = task['requests'], []
    size = max(settings['rows'] // len(requests[0]['lengths']), 1)
    for i in range(0, len(requests), size):
      ids += generate(requests[i:i + size], task['temperature'], task['top_p'])
    return dict(ids=ids)
  parent.serve(transformers.__version__, answer)


if __name__ == '__main__':
  main()
