"""vLLM as a peer of bench/sample.py; see peers.py.

By default vLLM's engine is a process of its own, which keeps one core for its scheduler. Here the
engine runs in this process, on all cores. With 16 rows on two cores this gave 279 and 225 tokens
per second (respond, judge); a process of its own on all cores 253 and 201;
VLLM_CPU_OMP_THREADS_BIND=nobind 193 and 162; this process with Intel's OpenMP 284 and 215. A
variable that is set outside replaces the one here.
"""
import os

import peers

ENVIRONMENT = dict(VLLM_ENABLE_V1_MULTIPROCESSING='0', VLLM_CPU_KVCACHE_SPACE='2',  # GiB
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
