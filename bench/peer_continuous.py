"""Continuous batching of transformers as a peer of bench/sample.py; see peers.py."""
import peers


def main():
  parent = peers.Parent()
  settings = parent.settings
  import torch
  import transformers
  from transformers.generation.configuration_utils import ContinuousBatchingConfig
  transformers.logging.set_verbosity_error()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  import os
  model = transformers.LlamaForCausalLM.from_pretrained(
      settings['folder'], dtype=settings['dtype'], attn_implementation=os.environ.get('ATTN', 'sdpa')).to(device).eval()

  def answer(task: dict) -> dict:
    samples = [(request['ids'], length) for request in task['requests']
               for length in request['lengths']]
    chance = dict(do_sample=False)
    if task['temperature']:
      chance = dict(do_sample=True, temperature=task['temperature'], top_p=task['top_p'], top_k=0)
    generation = transformers.GenerationConfig(eos_token_id=-1, max_new_tokens=settings['size'], **chance)
    batching = ContinuousBatchingConfig(max_requests_per_batch=settings['rows'], **eval(os.environ.get('CB', '{}')))
    ids = [None] * len(samples)
    with model.continuous_batching_context_manager(
        generation, continuous_batching_config=batching) as manager:
      for i, (prompt, length) in enumerate(samples):
        manager.add_request(prompt, str(i), max_new_tokens=length)
      while None in ids:
        found = manager.get_result(timeout=1)
        if found is None and not manager.is_running():
          raise RuntimeError('the generation thread ended')
        if found:
          if found.error: raise RuntimeError(found.error)
          ids[int(found.request_id)] = found.generated_tokens
    return dict(ids=ids)
  parent.serve(transformers.__version__, answer)


if __name__ == '__main__':
  main()
