"""CTranslate2 as a peer of bench/sample.py; see peers.py.

CTranslate2 runs static batches of prompts, sorted by length. All samples of a request share its
prefill (`num_hypotheses`), and all requests share the common prefix (`static_prompt`; its keys and
values stay cached between rounds). The callback ends each sample at its length, and the batch gets
smaller then.
"""
import collections
import os
import pathlib
import tempfile

import peers

BATCHES = 2  # that run at the same time, each on its share of the cores


def main():
  parent = peers.Parent()
  settings = parent.settings
  import ctranslate2
  import tokenizers
  import transformers

  class Converter(ctranslate2.converters.TransformersConverter):
    """The token with id i is the text of i."""

    def load_tokenizer(self, *_, **__):
      vocabulary = {str(i): i for i in range(transformers.AutoConfig.from_pretrained(
          settings['folder'], trust_remote_code=False).vocab_size)}
      return transformers.PreTrainedTokenizerFast(
          tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, '0')),
          unk_token='0', bos_token='1', eos_token='2')

  with tempfile.TemporaryDirectory() as folder:
    model = pathlib.Path(folder, 'model')
    Converter(settings['folder']).convert(model)
    generator = ctranslate2.Generator(
        str(model), compute_type=settings['dtype'], inter_threads=BATCHES,
        intra_threads=max(len(os.sched_getaffinity(0)) // BATCHES, 1))

  def answer(task: dict) -> dict:
    requests, ids = task['requests'], collections.defaultdict(list)
    n, lengths = len(requests[0]['lengths']), [r['lengths'] for r in requests]
    prompts = [list(map(str, r['ids'])) for r in requests]
    common = os.path.commonprefix([p[:-1] for p in prompts])

    def ends(step) -> bool:
      found = ids[step.batch_id, step.hypothesis_id]
      found.append(step.token_id)
      return len(found) == lengths[step.batch_id][step.hypothesis_id]

    chance = dict(sampling_topk=1)
    if task['temperature']:
      chance = dict(sampling_topk=0, sampling_topp=task['top_p'],
                    sampling_temperature=task['temperature'])
    generator.generate_batch(
        [p[len(common):] for p in prompts], static_prompt=common or None, num_hypotheses=n,
        callback=ends, end_token=[], include_prompt_in_result=False,
        max_batch_size=max(settings['rows'] // n, 1), max_length=settings['size'], **chance)
    return dict(ids=[ids[i, j] for i in range(len(requests)) for j in range(n)])
  parent.serve(ctranslate2.__version__, answer)


if __name__ == '__main__':
  main()
