"""vLLM as a reader of an exported folder, for bench/check_export.py; see peers.py.

It gets only the folder, as any user of vLLM would give it, and dtype=float32: by default vLLM runs
a model that is stored in float32 in 16 bits.
"""
import os

import peers

ENVIRONMENT = dict(VLLM_ENABLE_V1_MULTIPROCESSING='0', VLLM_CPU_KVCACHE_SPACE='1',  # GiB
                   VLLM_LOGGING_LEVEL='ERROR', HF_HUB_OFFLINE='1')


def main():
  parent = peers.Parent()
  os.environ |= ENVIRONMENT | os.environ
  import vllm  # reads the environment
  llm = vllm.LLM(parent.settings['folder'], dtype='float32', max_num_seqs=16,
                 gpu_memory_utilization=0.2)

  def answer(task: dict) -> dict:
    params = vllm.SamplingParams(temperature=0, max_tokens=task['max_tokens'])
    made = llm.chat([[dict(role='user', content=prompt)] for prompt in task['prompts']], params,
                    use_tqdm=False)
    return dict(prompt_ids=[list(one.prompt_token_ids) for one in made],
                texts=[one.outputs[0].text for one in made])
  parent.serve(vllm.__version__, answer)


if __name__ == '__main__':
  main()
