"""What lm-evaluation-harness asks of a model. `test_lm_eval.py` compares with the harness's own."""
import doctest

from conftest import full_logits, make_mesh
import jax
import jax.numpy as jnp
import pytest

from srlm_jax import InputError
from srlm_jax.checkpoint import convert
from srlm_jax.data import templates
from srlm_jax.eval import lm
from srlm_jax.models import config as model_config, llama

TEXT = 'Once upon a time, there was a little girl named Lily.'
LENGTH = 64


@pytest.fixture(scope='module')
def model(stories):
  return lm.Model(str(stories), lm.Options(slots=4, max_length=LENGTH))


def test_docstrings():
  assert doctest.testmod(lm).failed == 0


def greedy(stories, ids, count: int) -> list[int]:
  """The most likely next tokens, each from a full forward pass."""
  found = list(ids)
  with jax.set_mesh(mesh := make_mesh(1, 1, 1)):
    config, params = model_config.load(stories), convert.load_hf(stories, mesh, 'float32')
    for _ in range(count):
      padded = jnp.asarray([found + [0] * (LENGTH - len(found))])
      logits = full_logits(llama.Llama(config), params, padded)
      found.append(int(logits[0, len(found) - 1].argmax()))
  return found[len(ids):]


@pytest.mark.slow
def test_responses_are_greedy_and_end_at_a_stop_string(model, stories):
  ask = dict(until=[], max_gen_toks=16)
  wanted = model.tokenizer.decode(greedy(stories, model.encode(TEXT), 16))
  stop = wanted[10:12]
  long = TEXT * 9  # which loses its beginning
  kept = model.encode(long)[16 - LENGTH:]
  whole, cut, of_long = model.generate([
      (TEXT, ask), (TEXT, ask | dict(until=['zzz', stop])), (long, ask)])
  assert whole == wanted and cut == wanted[:wanted.index(stop)]
  assert of_long == model.tokenizer.decode(greedy(stories, kept, 16))


@pytest.mark.slow
def test_every_sample_of_a_prompt_has_its_own_draws(model):
  warm = dict(until=[], max_gen_toks=16, do_sample=True, temperature=1.0)
  once = model.generate([(TEXT, warm)] * 3)
  assert len({*once}) == 3
  other = ('The end.', warm | dict(do_sample=False))
  assert model.generate([other, (TEXT, warm), (TEXT, warm)])[1:] == once[:2]


@pytest.mark.slow
def test_a_context_that_is_too_long_loses_its_beginning(model):
  ids = model.encode(TEXT * 9)
  long, fitting = model.score([(ids, [5, 6]), (ids[1 - LENGTH:], [5, 6])])
  assert long.logp == pytest.approx(fitting.logp, abs=1e-5)
  with pytest.raises(InputError, match='a continuation has 65 tokens, more than the 64'):
    model.score([([1], [5] * 65)])


def test_bos_begins_a_text_once(model):
  ids, bos = model.encode(TEXT), model.tokenizer.bos_id
  assert ids[0] == bos == model.prefix_id and ids.count(bos) == 1
  assert model.encode(TEXT, False) == ids[1:] and model.encode(TEXT, True) == ids
  chat = templates.chat('plain', 'Name a fruit.', model.tokenizer)  # begins with bos
  assert model.encode(chat) == templates.encode_prompt('plain', 'Name a fruit.', model.tokenizer)
  assert model.tokenizer.readable(chat) == '<s>User: Name a fruit.\nAssistant:'


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_beams=4), 'generation_kwargs has num_beams'),
    (dict(do_sample=True), 'do_sample=True without a temperature'),
    (dict(max_gen_toks=0), 'max_tokens is 0'),
    (dict(max_gen_toks=LENGTH), 'max_gen_toks is 64'),
])
def test_what_the_engine_cannot_do_is_refused(model, kwargs, message):
  with pytest.raises(InputError, match=message):
    model.generate([(TEXT, kwargs)])


def test_a_model_without_chat_format_renders_no_conversation(model):
  assert model.chat == 'none'
  with pytest.raises(InputError, match='has no chat template'):
    model.render([dict(role='user', content='a')], False)


def test_the_arguments_that_lm_eval_passes_to_every_model_have_no_effect():
  given = dict(batch_size='auto', max_batch_size=8, device='cuda:0', slots=4)
  assert lm.read_options(given) == lm.Options(slots=4)
  with pytest.raises(InputError, match='has no argument parallelize, peft; it has model, chat'):
    lm.read_options(dict(peft='a', parallelize=True))
