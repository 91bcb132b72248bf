"""Small random models as they lie in a download folder: config.json, weights and tokenizer.

Written without torch and without srlm_jax: the fields, the names of tensors and the tokens are
those of the published folders of Llama 3.1 and Qwen3, the sizes are small.
"""
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, Regex, trainers

TESTS = pathlib.Path(__file__).parent
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+"
         r'[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')  # pre-tokenization: digits by 3 or one by one
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    '<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}')


def llama3(folder, has_template: bool = True, **fields) -> pathlib.Path:
  """A folder like that of Llama-3.1-8B-Instruct, or without a template like that of the base."""
  special = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>',
             '<|eot_id|>']
  tokenizer = _tokenizer('1,3', 400)
  tokenizer.add_special_tokens(special)
  ids = {token: tokenizer.token_to_id(token) for token in special}
  bos, end, turn = (ids[special[i]] for i in (0, 1, 4))
  tokenizer.post_processor = processors.Sequence([
      processors.ByteLevel(trim_offsets=True),
      processors.TemplateProcessing(single=f'{special[0]} $A', special_tokens=[(special[0], bos)])])
  config = dict(
      architectures=['LlamaForCausalLM'], model_type='llama', attention_bias=False,
      attention_dropout=0.0, bos_token_id=bos, eos_token_id=[end, turn], hidden_act='silu',
      hidden_size=32, initializer_range=0.02, intermediate_size=64, max_position_embeddings=131072,
      mlp_bias=False, num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2,
      pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False,
      rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                        original_max_position_embeddings=8192, rope_type='llama3'),
      torch_dtype='bfloat16', transformers_version='4.42.3', use_cache=True,
      vocab_size=tokenizer.get_vocab_size()) | fields
  names = dict(bos_token=special[0], eos_token=special[4 if has_template else 1])
  if has_template:
    names['chat_template'] = LLAMA3_TEMPLATE
  return _write(folder, config, tokenizer, names, dict(
      bos_token_id=bos, do_sample=True, eos_token_id=[end, turn], temperature=0.6, top_p=0.9))


def qwen3(folder, **fields) -> pathlib.Path:
  """A folder like that of Qwen3: no bos, tied, norms of queries and keys."""
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  tokenizer = _tokenizer('1', 400)
  tokenizer.add_special_tokens(special)
  tokenizer.add_tokens([tokenizers.AddedToken(name, normalized=False)
                        for name in ('<think>', '</think>')])
  pad, end = (tokenizer.token_to_id(special[i]) for i in (0, 2))
  config = dict(
      architectures=['Qwen3ForCausalLM'], model_type='qwen3', attention_bias=False,
      attention_dropout=0.0, bos_token_id=pad, eos_token_id=end, head_dim=16, hidden_act='silu',
      hidden_size=32, initializer_range=0.02, intermediate_size=64, max_position_embeddings=40960,
      max_window_layers=2, num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2,
      rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None,
      tie_word_embeddings=True, torch_dtype='bfloat16', transformers_version='4.51.0',
      use_cache=True, use_sliding_window=False, vocab_size=tokenizer.get_vocab_size() + 7) | fields
  names = dict(bos_token=None, eos_token=special[2], pad_token=special[0], add_bos_token=False,
               chat_template=(TESTS / 'chat_templates' / 'qwen3.jinja').read_text())
  return _write(folder, config, tokenizer, names, dict(
      bos_token_id=pad, do_sample=True, eos_token_id=[end, pad], pad_token_id=pad, top_k=20))


def _tokenizer(digits: str, size: int) -> tokenizers.Tokenizer:
  """A byte-level BPE, trained on the documentation."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(WORDS % digits), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  made.decoder = decoders.ByteLevel()
  text = (TESTS.parent / 'docs' / 'data.md').read_text()
  made.train_from_iterator(text.split('\n\n'), trainers.BpeTrainer(
      vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
  return made


def _write(folder, config: dict, tokenizer, names: dict, generation: dict) -> pathlib.Path:
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config, indent=2))
  (folder / 'generation_config.json').write_text(json.dumps(generation))
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
      names, clean_up_tokenization_spaces=False, tokenizer_class='PreTrainedTokenizerFast')))
  made = tensors(config)
  files = [dict(list(made.items())[i::2]) for i in range(2)]  # two, as those of 8B are several
  where = {}
  for i, part in enumerate(files, 1):
    name = f'model-0000{i}-of-00002.safetensors'
    save_file(part, folder / name, dict(format='pt'))
    where |= dict.fromkeys(part, name)
  total = sum(x.nbytes for x in made.values())
  (folder / 'model.safetensors.index.json').write_text(json.dumps(
      dict(metadata=dict(total_size=total), weight_map=where)))
  return folder


def tensors(c: dict) -> dict[str, np.ndarray]:
  """Random weights by the names of the published files."""
  rng = np.random.default_rng(0)
  D, F, V = c['hidden_size'], c['intermediate_size'], c['vocab_size']
  H = c.get('head_dim', D // c['num_attention_heads'])
  q, kv = c['num_attention_heads'] * H, c['num_key_value_heads'] * H
  shapes = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
  if not c['tie_word_embeddings']:
    shapes['lm_head.weight'] = (V, D)
  layer = {'self_attn.q_proj': (q, D), 'self_attn.k_proj': (kv, D), 'self_attn.v_proj': (kv, D),
           'self_attn.o_proj': (D, q), 'mlp.gate_proj': (F, D), 'mlp.up_proj': (F, D),
           'mlp.down_proj': (D, F), 'input_layernorm': (D,), 'post_attention_layernorm': (D,)}
  if c['model_type'] == 'qwen3':
    layer |= {'self_attn.q_norm': (H,), 'self_attn.k_norm': (H,)}
  for i in range(c['num_hidden_layers']):
    shapes |= {f'model.layers.{i}.{name}.weight': shape for name, shape in layer.items()}
  return {name: (rng.normal(1, 0.1, shape) if len(shape) == 1 else rng.normal(0, 0.06, shape))
          .astype('float32') for name, shape in shapes.items()}
