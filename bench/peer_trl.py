"""TRL as a peer of bench/train.py; see peers.py. The clock runs from the first step to the last."""
import tempfile
import time
import warnings

import peers
import timing


def main():
  parent = peers.Parent()
  settings = parent.settings
  import datasets
  import numpy as np
  import tokenizers
  import torch
  import transformers
  import trl
  transformers.logging.set_verbosity_error()
  datasets.disable_progress_bars()
  warnings.simplefilter('ignore')

  class Dpo(trl.DPOTrainer):
    """DPOTrainer for examples that are tokenized already."""

    def _prepare_dataset(self, dataset, *_):
      return dataset

  class Clock(transformers.TrainerCallback):
    """The time and the CPU seconds at the first and the last step of a round."""
    first = last = None

    def on_step_begin(self, *_, **__):
      self.first = self.first or (time.perf_counter(), timing.tree_cpu_seconds())

    def on_step_end(self, *_, **__):
      if torch.cuda.is_available():
        torch.cuda.synchronize()
      self.last = time.perf_counter(), timing.tree_cpu_seconds()

  def model():
    return transformers.LlamaForCausalLM.from_pretrained(
        settings['folder'], dtype=settings['dtype'], attn_implementation='sdpa',
      trust_remote_code=False)

  loss, batch, examples = settings['loss'], settings['batch'], settings['examples']
  steps = [examples[i:i + batch] for i in range(0, len(examples), batch)]
  vocabulary = tokenizers.models.WordLevel({'<pad>': 0, '<eos>': 1}, '<pad>')
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizers.Tokenizer(vocabulary), pad_token='<pad>', eos_token='<eos>')
  with tempfile.TemporaryDirectory() as folder:
    arguments = dict(
        output_dir=folder, per_device_train_batch_size=batch, max_steps=len(steps),
        learning_rate=0.0, logging_steps=1, save_strategy='no', report_to=[], disable_tqdm=True,
        gradient_checkpointing=False, bf16=settings['dtype'] == 'bfloat16',
        max_length=settings['context'], dataloader_pin_memory=False)
    if loss == 'dpo':
      rows = [dict(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
              for prompt, chosen, rejected in examples]
      kind, config = Dpo, trl.DPOConfig(beta=0.1, **arguments)
      extra = dict(ref_model=model())
    else:
      rows = [dict(input_ids=prompt + response,
                   completion_mask=[0] * len(prompt) + [1] * len(response))
              for prompt, response in examples]
      kind, config = trl.SFTTrainer, trl.SFTConfig(completion_only_loss=True, **arguments)
      extra = {}
    clock = Clock()
    trainer = kind(model=model(), args=config, train_dataset=datasets.Dataset.from_list(rows),
                   processing_class=tokenizer, callbacks=[clock], **extra)
    trainer.remove_callback(transformers.PrinterCallback)

    def answer(_) -> dict:
      clock.first = None
      trainer.train()
      name = 'loss' if loss == 'sft' else 'logps/chosen'
      values = [row[name] for row in trainer.state.log_history if name in row]
      seconds, cpu = (end - start for start, end in zip(clock.first, clock.last, strict=True))
      return dict(value=float(np.average(values, weights=list(map(len, steps)))), seconds=seconds,
                  cpu=cpu)
    parent.serve(trl.__version__, answer)


if __name__ == '__main__':
  main()
