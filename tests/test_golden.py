"""The packaged M0 against what transformers computes with it: golden_m0.json, by make_golden.py.

It needs only files of the repository: neither torch nor $SRLM_TEST_DATA.
"""
import dataclasses
import hashlib
import json

from conftest import full_logits, main, ROOT
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax.checkpoint import convert
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.models import config as model_config, llama
from srlm_jax.sample import engine, generate

M0 = ROOT / 'srlm_jax' / 'sandbox' / 'm0'
GOLDEN = json.loads((ROOT / 'tests' / 'golden_m0.json').read_text())
CASES = GOLDEN['cases']
# In nats. transformers' own float32 log-probs are up to 8e-6 from its float64 ones (`rounding` of a
# case), and ours, summed in another order, up to 1.1e-5 from its float32 ones. 5e-5 leaves room for
# other processors; one bfloat16 activation changes the log-probs by more than 100 times that.
ATOL = 5e-5
LONGEST = max(range(len(CASES)), key=lambda i: len(CASES[i]['ids']))


def test_the_values_are_of_the_packaged_files():
  for name, value in GOLDEN['files'].items():
    found = hashlib.sha256((M0 / name).read_bytes()).hexdigest()
    assert found == value, f'{name} of M0 changed; run tests/make_golden.py'


def test_the_values_cover_both_ends_of_a_response_and_twenty_four_tokens():
  assert {case['finish'] for case in CASES} == {'eos', 'length'}
  assert len(CASES[LONGEST]['ids']) == 24
  assert max(case['rounding'] for case in CASES) < ATOL / 5
  assert min(case['gap'] for case in CASES) > 100 * ATOL  # rounding changes no greedy token


@pytest.mark.parametrize('case', CASES, ids=range(len(CASES)))
def test_the_tokenizer_gives_the_ids_of_transformers(case):
  tokenizer = tokenizers.load(M0, 1024)
  assert templates.encode_prompt('plain', case['prompt'], tokenizer) == case['prompt_ids']
  assert (case['ids'][-1] in tokenizer.eos_ids) == (case['finish'] == 'eos')


def test_the_forward_pass_gives_the_log_probs_of_transformers(mesh):
  config = model_config.load(M0)
  params = convert.load_hf(M0, mesh, 'float32')
  rows = [case['prompt_ids'] + case['ids'] for case in CASES]
  tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)  # causal: padding changes nothing
  for row, ids in zip(tokens, rows, strict=True):
    row[:len(ids)] = ids
  labels = tokens[:, 1:, None]

  def logps_and_best(dtype):
    logits = full_logits(llama.Llama(dataclasses.replace(config, dtype=dtype)), params, tokens)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), labels, 2)[..., 0]
    return np.asarray(logps), np.asarray(logits).argmax(-1)

  (logps, best), (rounded, _) = logps_and_best('float32'), logps_and_best('bfloat16')
  for i, case in enumerate(CASES):
    first, last = len(case['prompt_ids']) - 1, len(rows[i]) - 1
    wanted = case['prompt_logps'] + case['logps']
    np.testing.assert_allclose(logps[i, :last], wanted, rtol=0, atol=ATOL)
    assert np.abs(rounded[i, :last] - wanted).max() > 100 * ATOL
    assert best[i, first:last].tolist() == case['ids']


def check_sampled(found: generate.Generated, case: dict):
  for key in ('prompt_ids', 'ids', 'finish'):
    assert getattr(found, key) == case[key]
  np.testing.assert_allclose(found.logps, case['logps'], rtol=0, atol=ATOL)


@pytest.mark.parametrize('case', CASES, ids=range(len(CASES)))
def test_the_sampler_gives_the_greedy_ids_and_log_probs_of_transformers(mesh, case):
  greedy = engine.Sampling(0.0, 1.0, 24)
  check_sampled(generate.generate(str(M0), case['prompt'], 'plain', greedy, seed=0,
                                  dtype='float32', mesh=mesh), case)


def test_the_program_gives_the_greedy_ids_and_log_probs_of_transformers():
  case = CASES[LONGEST]
  printed = main('sample.generate', f'--model={M0}', f'--prompt={case["prompt"]}', '--chat=plain',
                 '--temperature=0', '--top_p=1', '--max_tokens=24', '--json')
  check_sampled(generate.Generated(**json.loads(printed)), case)
