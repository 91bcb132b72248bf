"""Continuous batching of transformers as a peer of bench/sample.py; see peers.py.

The cache is just large enough. By default it takes most of the memory, and then 96 tokens took 17.7
CPU seconds instead of 1.8. Samples share the full pages of their common prompts.
"""
import peers

PAGE = 32           # tokens
BATCH_TOKENS = 512  # per step


def main():
  parent = peers.Parent()
  settings = parent.settings
  import torch
  import transformers
  transformers.logging.set_verbosity_error()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = transformers.LlamaForCausalLM.from_pretrained(
      settings['folder'], dtype=settings['dtype'], attn_implementation='sdpa',
      trust_remote_code=False).to(device).eval()
  batching = transformers.ContinuousBatchingConfig(
      page_size=PAGE, max_batch_tokens=BATCH_TOKENS, max_requests_per_batch=settings['rows'],
      num_blocks=settings['rows'] * -(-settings['size'] // PAGE))

  def answer(task: dict) -> dict:
    samples = [(request['ids'], length) for request in task['requests']
               for length in request['lengths']]
    chance = dict(do_sample=False)
    if task['temperature']:
      chance = dict(do_sample=True, temperature=task['temperature'], top_p=task['top_p'], top_k=0)
    config = transformers.GenerationConfig(eos_token_id=-1, **chance)
    ids = [None] * len(samples)
    with model.continuous_batching_context_manager(
        config, continuous_batching_config=batching) as manager:
      for i, (prompt, length) in enumerate(samples):
        manager.add_request(prompt, str(i), max_new_tokens=length)
      while None in ids:
        found = manager.get_result(timeout=1)
        if found is None and not manager.is_running():
          raise RuntimeError('the generation thread ended')
        if found and found.error:
          raise RuntimeError(found.error)
        if found:
          ids[int(found.request_id)] = found.generated_tokens
    return dict(ids=ids)
  parent.serve(transformers.__version__, answer)


if __name__ == '__main__':
  main()
