import dataclasses
import json
import pathlib
import re
import weakref

from conftest import full_logits, init, make_mesh, MESHES
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srlm_jax import config as configs, hosts, InputError, records, sharding
from srlm_jax.checkpoint import convert, store
from srlm_jax.data import templates, tokenizer as tokenizers
from srlm_jax.data.examples import Example
from srlm_jax.data.packing import Packing
from srlm_jax.models import llama, packed
from srlm_jax.models.config import PRESETS
from srlm_jax.reward import judges
from srlm_jax.sample import engine as engines, programs, shards
from srlm_jax.sample.engine import Request, Sampling
from srlm_jax.sandbox import data as sandbox, people, world
from srlm_jax.train import batch as batches, step as train_step

TINY = PRESETS['tiny-test']
GREEDY, WARM = Sampling(0.0, 1.0, 12), Sampling(1.0, 1.0, 12)
RAGGED = [Request(f'r{i}', list(range(1, 3 + 3 * i))) for i in range(5)]


def make(shape=(1, 1, 1), slots=4, eos=(60,), config=TINY, seed=0, size=128, steps=5, **how):
  mesh = make_mesh(*shape)
  with jax.set_mesh(mesh):
    params = jax.tree.map(lambda x: x * 4, init(TINY))  # far from uniform
    params = jax.tree.map(sharding.put, params, sharding.shardings(params, mesh))
  engine = engines.Engine(llama.Llama(config), params, mesh, eos, seed, 'test', slots=slots,
                          size=size, steps=steps, **how)
  return engine, params


def run(engine, requests, sampling):
  return [r for _, results in engine.generate(requests, sampling) for r in results]


def test_greedy_tokens_are_the_argmax_of_the_full_forward_pass_for_ragged_prompts(mesh):
  engine, params = make()
  for request, result in zip(RAGGED, run(engine, RAGGED, GREEDY), strict=True):
    row = list(request.ids)
    for token in result.ids:
      logits = full_logits(llama.Llama(TINY), params, jnp.asarray([row + [0] * (32 - len(row))]))
      assert token == int(logits[0, len(row) - 1].argmax())
      row.append(token)
    assert result.finish == ('eos' if 60 in result.ids else 'length')
    assert 60 not in result.ids[:-1] and len(result.ids) <= 12


def test_log_probs_at_temperature_1_are_those_of_the_training_step(mesh):
  engine, params = make()
  for request, result in zip(RAGGED, run(engine, RAGGED, WARM), strict=True):
    packed = Packing([Example('', request.ids, (result.ids,))], 1, 1, 0)
    batch = batches.pack(packed.rows(0), packed.shape)
    token_logps = train_step.token_logps(llama.Llama(TINY), params, batch, None)
    np.testing.assert_allclose(result.token_logps, token_logps[0, :len(result.ids)], atol=1e-4)


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2)])
def test_the_log_probs_of_given_responses_equal_those_of_sampling(shape):
  results = run(make()[0], RAGGED, WARM)
  given = [(list(request.ids), result.ids) for request, result in zip(RAGGED, results, strict=True)]
  engine = make(shape)[0]
  found = engine.score(given, share=False)
  np.testing.assert_allclose([score.logp for score in found],
                             [sum(r.token_logps) for r in results], atol=1e-4)
  long = ([3] * 20, [4] * 10)
  # bit-identical and batch-invariant
  assert engine.score([given[4], long, given[0]], share=False)[::2] == [found[4], found[0]]


@pytest.mark.parametrize('window', [None, pytest.param(7, marks=pytest.mark.slow)])
def test_scores_are_those_of_a_full_forward_pass_of_every_row(mesh, window):
  config = dataclasses.replace(TINY, window=window)
  engine, params = make(config=config)

  def logps(row):  # of the token after each one
    padded = jnp.asarray([row + [0] * (TINY.context - len(row))])
    logits = full_logits(llama.Llama(config), params, padded)
    return np.asarray(jax.nn.log_softmax(logits[0]), np.float64)[:len(row)]

  context = list(range(5, 29))
  greedy = []
  for _ in range(3):
    greedy.append(int(logps(context + greedy)[-1].argmax()))
  longest = np.random.default_rng(0).integers(64, size=TINY.context + 1).tolist()
  rows = [(context, greedy), (context, greedy[:1]), (context, [*greedy[:2], 1, 2]),
          (context[::-1], [3]), (context[1:], [4]), (longest[:-9], longest[-9:])]
  wanted = []
  for before, after in rows:
    table = logps([*before, *after[:-1]])[len(before) - 1:]
    wanted.append((table[range(len(after)), after].sum(), (table.argmax(-1) == after).all()))
  assert [is_greedy for _, is_greedy in wanted][:3] == [True, True, False]
  for share in (True, False):
    found = engine.score(rows, share)
    np.testing.assert_allclose([s.logp for s in found], [logp for logp, _ in wanted], atol=1e-4)
    assert [s.is_greedy for s in found] == [is_greedy for _, is_greedy in wanted]


def test_a_shared_context_is_computed_once(mesh, monkeypatch):
  engine, _ = make()
  tokens, score = [], programs.score
  monkeypatch.setattr(programs, 'score', lambda *args: tokens.append(
      int((np.asarray(args[2].positions) > 0).sum())) or score(*args))
  rows = [(list(range(20)), [a, a + 1]) for a in range(4)]
  engine.score(rows)
  engine.score(rows, share=False)
  assert tokens == [19 + 4, 4 * (19 + 1)]


def test_continuations_of_all_lengths_need_few_programs(mesh, monkeypatch):
  engine, _ = make()
  shapes = set()

  def score(model, params, batch):
    shapes.add((batch.tokens.shape[1], batch.targets.shape[1]))
    return np.zeros(batch.targets.shape, np.float32), np.ones(batch.targets.shape, bool)
  monkeypatch.setattr(programs, 'score', score)
  rows = [([2] * 20, [1] * length) for length in range(1, 100)]
  assert len(engine.score(rows, share=False)) == len(rows)
  assert {targets for _, targets in shapes} == {32, 64, 128}
  assert len(shapes) <= 8  # a program for each


@pytest.mark.parametrize('row, message', [
    (([], [1]), 'row 1 to score has an empty context'),
    (([1], []), 'row 1 to score has an empty continuation'),
    (([1, 64], [2]), 'the context of row 1 to score has the id 64'),
    (([1], [2, -1]), 'the continuation of row 1 to score has the id -1'),
    (([1] * 256, [1] * 2), 'row 1 to score has 258 tokens'),
])
def test_rows_that_cannot_be_scored_are_refused(mesh, row, message):
  with pytest.raises(InputError, match=message):
    make()[0].score([([1], [2]), row])


def test_the_mean_hidden_states_of_rows_are_those_of_the_plain_forward_pass():
  """On a mesh, whatever is in the same batch, and without the first tokens."""
  engine, params = make((2, 2, 2))
  params = jax.device_get(params)
  rows = [[1, *range(5, 18)], [1, 9], [1, 60, 2, 9], *([1, i, i] for i in range(20))]
  found = engine.mean_hidden(rows, 1)
  assert found.shape == (len(rows), TINY.D)
  plain = jax.jit(lambda ids: llama.Llama(TINY).apply(
      {'params': params}, ids, jnp.arange(16)[None], packed.Causal(), method='hidden'))
  with jax.set_mesh(make_mesh(1, 1, 1)):
    for ids, mean in zip(rows[:3], found, strict=False):
      hidden = plain(jnp.asarray([ids + [0] * (16 - len(ids))]))[0]  # causal: zeros change nothing
      np.testing.assert_allclose(mean, hidden[1:len(ids)].mean(0), atol=1e-5)
  np.testing.assert_array_equal(engine.mean_hidden(rows[2:3], 1)[0], found[2])


RUBRIC = list(range(3, 43))  # a prefix that some requests share
MIXED = [Request('j0', RUBRIC + [44, 45, 46], 3), Request('own', [9, 8, 7], 2),
         Request('j1', RUBRIC + [50], 3), Request('two', RUBRIC[:20] + [51, 52], 1),
         Request('j2', RUBRIC + [2] * 30, 4), Request('one', [5], 2)]
SHARING = [r for r in MIXED if r.id[0] == 'j']


def test_samples_do_not_depend_on_slots_order_steps_sharing_or_refill():
  sampling = Sampling(0.8, 0.9, 12, 40)
  def records(requests, **how):
    engine, _ = make(**how)
    return {(r.id, i): (x.ids, x.finish) for r, results in engine.generate(requests, sampling)
            for i, x in enumerate(results)}
  wanted = records(MIXED, slots=16, share=False)
  assert len({tuple(wanted['j2', i][0]) for i in range(4)}) == 4
  for requests, how in ((MIXED, dict(slots=1, steps=1)),
                        (MIXED[::-1], dict(slots=5, steps=3, refill=False)),
                        (MIXED[2:], dict(slots=4, steps=16)), (SHARING, dict(slots=4)),
                        (SHARING[::-1], dict(slots=8, shape=(2, 2, 2)))):
    found = records(requests, **how)
    assert found == {key: wanted[key] for key in found} and len(found) == sum(r.n for r in requests)


def test_requests_that_come_one_by_one_get_the_samples_of_a_stream():
  """Also after other samples were stopped and other requests removed."""
  own = [GREEDY, WARM]
  asked = [dataclasses.replace(r, sampling=own[i % 2], top=3 * (i > 0))
           for i, r in enumerate([MIXED[1], MIXED[0], MIXED[5], MIXED[2]])]
  engine, _ = make(slots=4, share=False)
  alike = [dataclasses.replace(request, sampling=None) for request in asked]
  wanted = {r.id: results for i in (0, 1) for r, results in engine.generate(alike[i::2], own[i])}
  # Nor do they differ in a stream of requests that are sampled differently.
  for request, results in engine.generate(asked, WARM):
    assert [r.ids for r in results] == [r.ids for r in wanted[request.id]]
  slots, found = engine.open(), {}
  for i, request in enumerate(asked):
    found[request.id] = engine.put(slots, request)
    lost = engine.put(slots, dataclasses.replace(request, id=f'lost {i}'))
    engine.advance(slots)
    if lost[0].ids and not lost[0].finish:
      slots.schedule.stop(lost[0])
    engine.advance(slots)
    slots.schedule.remove(lost)
  while slots.schedule.running or slots.schedule._waiting:
    engine.advance(slots)
  for request in asked:
    assert [r.ids for r in found[request.id]] == [r.ids for r in wanted[request.id]]
    for result in found[request.id]:
      assert len(result.top) == (len(result.ids) if request.top else 0)
      assert all(len(top) == request.top for top in result.top)
      if request.sampling.temperature == 0:
        for top, i, logp in zip(result.top, result.ids, result.token_logps, strict=False):
          assert max(top, key=top.get) == i and top[i] == logp
  with pytest.raises(InputError, match='the prompt has 120 tokens and max_tokens is 12; together'):
    engine.put(slots, Request('long', [1] * 120, sampling=own[0]))


def test_the_log_probs_of_prompts_are_those_of_the_full_forward_pass(monkeypatch):
  """In parts of the positions, on a mesh, and with the most likely tokens."""
  monkeypatch.setattr(programs, 'LOGITS', 16)
  programs.prompt_logps.clear_cache()
  engine, params = make((2, 2, 2))[0], make()[1]
  prompts = [list(range(1, 40)), [60, 60, 2, 9] * 9]
  found = engine.prompt_logps(prompts, 3)
  programs.prompt_logps.clear_cache()
  with jax.set_mesh(make_mesh(1, 1, 1)):
    for ids, (logps, top) in zip(prompts, found, strict=True):
      logits = full_logits(llama.Llama(TINY), params, jnp.asarray([ids + [0] * (48 - len(ids))]))
      wanted = np.asarray(jax.nn.log_softmax(logits[0]))
      assert len(logps) == len(top) == len(ids) - 1
      for t in range(len(ids) - 1):
        assert logps[t] == pytest.approx(wanted[t, ids[t + 1]], abs=1e-4)
        best = np.argsort(-wanted[t])[:3]
        assert list(top[t]) == best.tolist()
        np.testing.assert_allclose(list(top[t].values()), wanted[t, best], atol=1e-4)
        assert ids[t + 1] not in top[t] or top[t][ids[t + 1]] == logps[t]


@pytest.fixture(scope='module')
def m0(tmp_path_factory):
  """The sandbox's M0 as a checkpoint, and 100 judge prompts of 4 samples."""
  folder, rng = tmp_path_factory.mktemp('m0') / 'model', np.random.default_rng(0)
  convert.from_hf(sandbox.M0, folder)
  tokenizer, judge, asked = tokenizers.load(folder), judges.load('sandbox'), []
  for i in range(100):
    prompt = world.instruction(rng)
    text = judge.render(prompt=prompt, response=people.answer(prompt, rng, i % 6))
    asked.append(Request(f'{i}', templates.encode_prompt('plain', text, tokenizer), 4))
  return folder, asked


@pytest.mark.slow
@pytest.mark.parametrize('dtype, slots, share', [
    ('float32', 48, True), ('float32', 128, False), ('bfloat16', 48, True),
    ('bfloat16', 128, False)])
def test_rounding_changes_few_samples(m0, dtype, slots, share):
  """The guarantee of docs/sampling.md: slots and sharing do not change the random numbers.

  A token differs only where rounding moves a number across the boundary between two tokens.
  """
  folder, asked = m0
  config = configs.get('m2', 'tiny')
  config.sample.dtype = dtype

  def sample(slots, share):
    config.sample.slots = slots
    engine, _ = engines.load(config, folder, 'test')
    engine._share = share
    return run(engine, asked, Sampling(1.0, 1.0, 80))
  pairs = list(zip(sample(128, True), sample(slots, share), strict=True))
  differ = sum(a.ids != b.ids for a, b in pairs)
  print(f'{dtype}, 128 slots and {slots}{"" if share else " without sharing"}: {differ} of '
        f'{len(pairs)} samples differ')
  assert differ <= (8 if dtype == 'float32' else 400)
  for a, b in pairs if dtype == 'float32' else ():
    same = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y),
                len(a.ids))
    np.testing.assert_allclose(a.token_logps[:same], b.token_logps[:same], atol=1e-5)


def test_prefix_and_prompts_are_prefilled_once():
  engine, _ = make(slots=4)
  run(engine, SHARING, GREEDY)
  work, own = engine.work, [len(r.ids) - len(RUBRIC) - 1 for r in SHARING]
  assert work.unshared_prompt_tokens == sum(r.n * len(r.ids) for r in SHARING)
  # the prefix, and the rest of two prompts; the third has no other tokens to prefill
  assert own == [2, 0, 29] and work.prefilled == 48 + 2 * 32
  apart, _ = make(slots=4, share=False)
  run(apart, SHARING, GREEDY)
  assert apart.work.prefilled > 2 * work.prefilled


def test_prompts_without_the_prefix_give_the_same_samples(monkeypatch):
  monkeypatch.setattr(engines, 'PREFIX_REQUESTS', 2)
  late = [MIXED[0], MIXED[2], *MIXED]  # the first two share a rubric that the rest may not
  (found, work), (wanted, most) = (
      ([x.ids for x in run(engine, late, WARM)], engine.work.prefilled)
      for engine in (make()[0], make(share=False)[0]))
  assert found == wanted and work < most


def test_refill_keeps_the_slots_busy():
  """Slots are idle only at the end; in static batches the longest row decides."""
  rng = np.random.default_rng(0)
  lengths = np.minimum(np.exp(rng.normal(size=200) * 0.8 + np.log(8)).astype(int) + 1, 64)
  asked = [Request(f'r{i}', [1, 2, i % 50], lengths=[int(n)]) for i, n in enumerate(lengths)]
  slot_utilization = {}
  for refill in (True, False):
    engine, _ = make(slots=8, steps=1, eos=(), refill=refill)
    assert [len(x.ids) for x in run(engine, asked, Sampling(1.0, 1.0, 64))] == lengths.tolist()
    assert engine.work.generated == lengths.sum()
    slot_utilization[refill] = engine.work.slot_utilization
  assert slot_utilization[True] > 0.9 and slot_utilization[False] < 0.6


def test_the_number_of_compilations_does_not_depend_on_the_number_of_requests():
  """Prompts of 1 to 60 tokens: widths of 16, 32, 48 and 64, and one decode program."""
  prefill = programs.prefill(make_mesh(1, 1, 1))
  prefill.clear_cache(), programs.decode.clear_cache()
  engine, _ = make(slots=8, size=96)
  def compiled(first, count):
    asked = (Request(str(i), [1 + i % 59] * (1 + i * 7 % 60)) for i in range(first, first + count))
    for _ in engine.generate(asked, Sampling(1.0, 1.0, 3)):
      pass
    return prefill._cache_size(), programs.decode._cache_size()
  assert compiled(0, 100) == compiled(100, 1000) == (4, 1)


@pytest.mark.slow
def test_ten_thousand_requests_need_no_more_compilations_or_memory():
  prefill = programs.prefill(make_mesh(1, 1, 1))
  prefill.clear_cache(), programs.decode.clear_cache()
  engine, seen = make(slots=8, size=96)[0], {}
  asked = (Request(str(i), [1 + i % 59] * (1 + i * 7 % 60), 2) for i in range(10_000))
  for i, _ in enumerate(engine.generate(asked, Sampling(1.0, 1.0, 6)), 1):
    if i in (100, 1000, 10_000):
      status = pathlib.Path('/proc/self/status').read_text()
      resident = int(re.search(r'VmRSS:\s+(\d+)', status)[1]) / 1024
      seen[i] = prefill._cache_size(), programs.decode._cache_size(), resident
  print(seen)
  assert seen[100][:2] == seen[10_000][:2] == (4, 1)
  assert seen[10_000][2] < seen[1000][2] + 8  # MB


def test_requests_and_results_are_streamed():
  """The engine reads only as many requests as may wait, and keeps none that it has yielded."""
  asked, most, read, left = [], 0, 0, 0
  limit = engines.PREFIX_REQUESTS + engines.HELD_PER_SLOT * 4

  def stream():
    nonlocal read
    for i in range(3000):
      request = Request(str(i), [1, 2, 3], lengths=[1 + i % 3])
      asked.append(weakref.ref(request))
      read += 1
      yield request
  for _ in make(slots=4, steps=4, eos=())[0].generate(stream(), Sampling(1.0, 1.0, 3)):
    left += 1
    most = max(most, read - left)
    if left == 2000:
      assert sum(ref() is not None for ref in asked) <= limit
  assert left == 3000 and most <= limit


def test_other_ids_and_other_seeds_give_other_samples():
  same = [Request('x', [1, 2, 3], 2), Request('y', [1, 2, 3], 2)]
  first = run(make()[0], same, WARM)
  assert len({tuple(r.ids) for r in first}) == 4
  assert [r.ids for r in first] != [r.ids for r in run(make(seed=1)[0], same, WARM)]


@pytest.mark.parametrize('shape', MESHES)
def test_the_same_tokens_on_every_mesh(shape):
  assert [r.ids for r in run(make(shape, slots=8)[0], RAGGED, WARM)] == [
      r.ids for r in run(make(slots=8)[0], RAGGED, WARM)]


def test_a_row_ends_at_any_of_the_eos_ids():
  free = run(make(eos=(63,))[0], RAGGED[:1], GREEDY)[0]
  end = free.ids[3]
  cut = run(make(eos=(63, end))[0], RAGGED[:1], GREEDY)[0]
  assert cut.ids == free.ids[:free.ids.index(end) + 1] and cut.finish == 'eos'


def test_a_prompt_that_is_too_long_is_named_and_skipped(tmp_path, capsys):
  engine, out = make(size=16)[0], shards.Shard(tmp_path, 'x', hosts.Group(1))
  asked = [Request('long', list(range(1, 8)), 2), Request('short', [1, 2])]
  shards.run(engine, asked, 3, GREEDY, out, lambda request, i, x: dict(
      id=f'{request.id}/{i}', finish=x.finish, ids=x.ids))
  out.close()
  found = [(r['id'], r['finish'] == 'too_long', bool(r['ids']))
           for _, r in records.read_any(out.path)]
  assert found == [('long/0', True, False), ('long/1', True, False), ('short/0', False, True)]
  said = capsys.readouterr().out
  assert said.count('test: the prompt of long has 7 tokens, more than the 4') == 1


def test_prompts_that_are_too_long_do_not_set_the_prefix():
  asked = [Request(str(i), [7] * 300 + [i]) for i in range(4)]
  assert [r.finish for r in run(make()[0], asked, GREEDY)] == ['too_long'] * 4
  found = run(make()[0], [*asked, *SHARING], GREEDY)
  assert [r.ids for r in found[4:]] == [r.ids for r in run(make()[0], SHARING, GREEDY)]


@pytest.mark.parametrize('n', [1, 3])
def test_prompt_and_response_may_fill_a_row_completely(n, mesh):
  """With a prefix of all tokens but the last, with no prefix, and with a prefix of half."""
  for share in (True, False):
    for asked in ([Request(str(i), [3] * 115 + [i], n) for i in range(4)],
                  [Request('a', [3] * 116, n)],
                  [Request(str(i), [3] * 64 + [i] * 52, n) for i in range(4)]):
      engine, params = make(size=128, share=share, eos=())
      for request, results in engine.generate(asked, GREEDY):
        row = [*request.ids, *results[-1].ids]
        assert len(row) == 128
        logits = full_logits(llama.Llama(TINY), params, jnp.asarray([row]))
        assert row[116:] == logits[0, 115:127].argmax(-1).tolist()


def test_an_interrupted_file_is_completed_to_the_same_bytes(tmp_path):
  """After every line, also between the samples of a request; existing lines are not resampled."""
  def record(request, i, x):
    return dict(id=f'{request.id}/{i}', ids=x.ids, logp=round(sum(x.token_logps), 4))
  path, total = tmp_path / 'x-00000-of-00001.jsonl', sum(r.n for r in MIXED)
  def complete(engine):
    out = shards.Shard(tmp_path, 'x', hosts.Group(1))
    shards.run(engine, MIXED, total, WARM, out, record)
    out.close()
  complete(make()[0])
  whole = path.read_bytes()
  lines = whole.splitlines(keepends=True)
  for kept in range(total):
    path.write_bytes(b''.join(lines[:kept]) + lines[kept][:5])
    engine = make()[0]
    complete(engine)
    assert path.read_bytes() == whole
  assert engine.work.generated < 30  # the last request alone


def test_kept_records_are_not_sampled_again(tmp_path):
  """Except those of a request of which one is missing."""
  def record(request, i, x):
    return dict(id=f'{request.id}/{i}', ids=x.ids)
  path, total = tmp_path / 'x-00000-of-00001.jsonl', sum(r.n for r in MIXED)

  def complete(engine, kept):
    out = shards.Shard(tmp_path, 'x', hosts.Group(1))
    out.kept = kept
    shards.run(engine, MIXED, total, WARM, out, record)
    out.close()
  complete(make()[0], {})
  whole = path.read_bytes()
  every = iter([json.loads(line) for line in whole.splitlines()])
  kept = {r.id: [next(every) for _ in range(r.n)] for r in MIXED}
  sampled = sum(len(x['ids']) for x in kept.pop(MIXED[0].id))
  last = next(r for r in reversed(MIXED) if r.n > 1)
  sampled += sum(len(x['ids']) for x in kept[last.id])
  kept[last.id].pop()  # incomplete, so the request is sampled again
  path.unlink()
  engine = make()[0]
  complete(engine, kept)
  assert path.read_bytes() == whole and engine.work.generated == sampled
  path.write_bytes(b''.join(whole.splitlines(keepends=True)[:2]))
  complete(make()[0], kept)
  assert path.read_bytes() == whole


def test_a_training_checkpoint_is_sampled_from_on_another_mesh_in_bf16(tmp_path, tokenizer_folder):
  """Saved on fsdp 4 x tensor 2 in float32, restored on data 4 x tensor 2; also as int8."""
  training = make_mesh(1, 4, 2)
  with jax.set_mesh(training):
    params = jax.tree.map(lambda x: x * 4, init(TINY))
    params = jax.tree.map(sharding.put, params, sharding.shardings(params, training))
    store.write_model_files(TINY, tokenizer_folder, tmp_path)
    saver = store.manager(tmp_path, keep=1)
    store.save(saver, 3, params)
    saver.close()
  config = configs.get('m2', 'tiny')
  with config.unlocked():
    config.sample_mesh.data, config.sample_mesh.tensor, config.sample.dtype = 4, 2, 'bfloat16'
  engine, tokenizer = engines.load(config, tmp_path, 'test')
  found = [r.ids for r in run(engine, RAGGED, GREEDY)]
  one = make_mesh(1, 1, 1)
  with jax.set_mesh(one):
    half = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.bfloat16), params)
  alone = engines.Engine(
      llama.Llama(dataclasses.replace(TINY, dtype='bfloat16')), half, one, tokenizer.eos_ids, 0,
      'test', slots=4, size=128, steps=4)
  wanted = [r.ids for r in run(alone, RAGGED, GREEDY)]
  same = [a == b for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=False)]
  assert np.mean(same) > 0.9  # in bfloat16 the order of a sum changes its rounding
  config.sample.slots = 10**9
  message = 'for 1000000000 rows of 128 tokens, and this host has .*lower config.sample'
  with pytest.raises(InputError, match=message):
    engines.load(config, tmp_path, 'test')
  config.sample.int8, config.sample.slots = True, 4
  assert all(r.ids for r in run(engines.load(config, tmp_path, 'test')[0], RAGGED, GREEDY))


@pytest.mark.parametrize('context', [100, 128])
def test_a_prefill_may_be_wider_than_the_context(context):
  engine, _ = make(config=dataclasses.replace(TINY, context=context))
  asked = [Request(str(i), [7] * 85 + [i]) for i in range(3)]
  assert all(r.ids for r in run(engine, asked, GREEDY))


def test_log_probs_that_are_not_finite_end_the_run_with_the_request_s_name():
  engine, _ = make()
  engine._params = engine._params | dict(embed_VD=engine._params['embed_VD'].at[63].set(jnp.nan))
  with pytest.raises(InputError, match='log-probs of bad are not finite'):
    run(engine, [Request('good', [1, 2]), Request('bad', [1, 63, 3])], WARM)


def test_invalid_engines_are_refused():
  message = 'eos id 64 is not a token of the model, whose vocabulary has 64; use the tokenizer'
  with pytest.raises(InputError, match=message):
    make(eos=(60, 64))
  with pytest.raises(InputError, match='max_tokens is 12, and a row may have 12 tokens in all'):
    run(make(size=12)[0], RAGGED, GREEDY)


