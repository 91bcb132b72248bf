"""vLLM as a peer of bench/sample.py; see peers.py.

By default vLLM keeps one core for its scheduler, so that one of two computes. Here all compute. A
variable that is set outside replaces the one here.
"""
import os

import peers

ENVIRONMENT = dict(VLLM_CPU_NUM_OF_RESERVED_CPU='0', VLLM_CPU_KVCACHE_SPACE='2',  # GiB
                   VLLM_LOGGING_LEVEL='ERROR')


def main():
  parent = peers.Parent()
  settings = parent.settings
  os.environ |= ENVIRONMENT | os.environ
  import vllm  # reads the environment
  llm = vllm.LLM(settings['folder'], dtype=settings['dtype'], skip_tokenizer_init=True,
                 max_num_seqs=settings['rows'], max_model_len=settings['size'] + 8,
                 enable_prefix_caching=True, gpu_memory_utilization=0.3)

  def answer(task: dict) -> dict:
    llm.reset_prefix_cache()  # every round starts without the prompts of the last one
    samples = [(request['ids'], length) for request in task['requests']
               for length in request['lengths']]
    params = [vllm.SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False,
                                  temperature=task['temperature'], top_p=task['top_p'])
              for _, length in samples]
    made = llm.generate([dict(prompt_token_ids=ids) for ids, _ in samples], params, use_tqdm=False)
    return dict(ids=[list(one.outputs[0].token_ids) for one in made])
  parent.serve(vllm.__version__, answer)


if __name__ == '__main__':
  main()
