"""Stages that read records as streams: the same results as of all records in memory, in bounded
memory."""
from collections import Counter
import itertools
import json
import statistics
import types

from hypothesis import given, strategies as st
import memory
import numpy as np
import processes
import pytest
from samples import judgement, pair, response

from srlm_jax import config as configs, InputError, records, schema, spill
from srlm_jax.data import examples
from srlm_jax.data.examples import Example
from srlm_jax.reward import health, judge_pairs, pairs, scores as scoring, strategies
from srlm_jax.sample import meta_judge
from srlm_jax.sandbox import audit, world


def drawn(seed: int, prompts: int = 60):
  """Random records of m2, {STAGE: records}, with ties, unfinished, unjudged and equal responses."""
  rng = np.random.default_rng(seed)
  found = dict(respond=[], judge=[], judge_again=[], implicit=[], respond_older=[], judge_older=[])

  def answer(stage, name, i):
    text = ['same', 'a' * 3, 'b' * 9, ' ', 'Sure, pear and fig.'][rng.integers(5)]
    finish = ['eos', 'eos', 'eos', 'eos', 'length', 'too_long'][rng.integers(6)]
    prompt = 'Name two nice fruits.' if i % 3 else f'Why {i}?'
    found[stage].append(response(name, prompt=prompt, response=text, finish=finish))

  def judge(stage, name):
    for j in range(rng.integers(5)):  # none at all, too
      score = [None, 1.0, 2.0, 2.5, 4.0, 5.0][rng.integers(6)]
      text, reason = f'{rng.integers(2)}', '' if score is not None else 'no score'
      found[stage].append(judgement(name, j, score, text=text, reason=reason))
  for i in rng.permutation(prompts).tolist():
    for n in range(rng.integers(1, 5)):
      name = f'p{i}/{n}'
      answer('respond', name, i)
      judge('judge', name)
      judge('judge_again', name)
      reward = None if rng.random() < 0.1 else float(rng.normal())
      found['implicit'].append(schema.ImplicitReward(id=name, reward=reward, logp=reward,
                                                     older_logp=0.0))
    for n in range(rng.integers(3)):
      answer('respond_older', f'p{i}/older{n}', i)
      judge('judge_older', f'p{i}/older{n}')
  return found


STEMS = dict(respond='responses', respond_older='responses', implicit='rewards')


def write(workdir, found, hosts=1):
  """Writes the records as a run on so many hosts does."""
  for stage, rows in found.items():
    stem = STEMS.get(stage, 'judgements')
    key = {'responses': 'prompt_id', 'judgements': 'response_id'}.get(stem, 'id')
    names = list(dict.fromkeys(getattr(r, key) for r in rows))
    for host in range(hosts):
      mine = {*names[host::hosts]}
      records.write(workdir / 'm2' / stage / records.shard_name(stem, host, hosts),
                    [r for r in rows if getattr(r, key) in mine])


def means(found, stage, quorum=2):
  return {name: score for name, score in scoring.by_response(found[stage], quorum).items()
          if score.mean is not None}


def mean(values, digits):
  return round(statistics.fmean(values), digits) if values else None


def expected_pairs(found, strategy, config):
  """-> candidates by prompt, pairs or positives, and the summary, with everything in memory."""
  is_temporal = strategy == 'temporal'
  scores = means(found, 'judge') | (means(found, 'judge_older') if is_temporal else {})
  again = means(found, 'judge_again') if strategy == 'consistency' else {}
  rewards = {r.id: r.reward for r in found['implicit']} if strategy == 'implicit_reward' else {}
  prompts = {}
  for r in found['respond'] + (found['respond_older'] if is_temporal else []):
    score = scores.get(r.id)
    prompts.setdefault(r.prompt_id, []).append(strategies.Candidate(
        r.id, r.response, r.finish, score and score.mean, score and score.spread,
        again[r.id].mean if r.id in again else None, rewards.get(r.id),
        r in found['respond_older']))
  choose = strategies.PAIRS.get(strategy, strategies.positives_only)
  choices = {name: choose(some, config.pairs) for name, some in prompts.items()}
  chosen = {name: choice for name, choice in choices.items() if not isinstance(choice, str)}
  judged = found['judge'] + (found['judge_older'] if is_temporal else [])
  parsed = [j.score for j in judged if j.score is not None]
  taus = {name: strategies.kendall_tau(some) for name, some in prompts.items()}
  rate = 1.0
  if strategy == 'consistency':
    rate = strategies.consistency_rate([tau for tau in taus.values() if tau is not None])
  both = [] if strategy == strategies.POSITIVES else list(chosen.values())
  margins = [a.score - b.score for a, b in both]
  summary = dict(
      prompts=len(prompts), judgements=len(judged), parsed=len(parsed),
      score_histogram=scoring.histogram(parsed),
      dropped=Counter(x for x in choices.values() if isinstance(x, str)),
      all_scores_equal=sum(map(strategies.has_tie, prompts.values())),
      spread=mean([c.spread for some in prompts.values() for c in some
                   if c.spread is not None], 2),
      margin=mean(margins, 2), smallest_margin=round(min(margins), 2) if margins else None,
      chosen_characters=mean([len(a.response) for a, _ in both], 2),
      rejected_characters=mean([len(b.response) for _, b in both], 2),
      chosen_minus_rejected_characters=mean(
          [len(a.response) - len(b.response) for a, b in both], 2),
      soft_label=round(rate, 4) if strategy == 'consistency' else None)
  return prompts, chosen, taus, rate, summary


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('strategy', [*strategies.PAIRS, strategies.POSITIVES])
def test_pairs_are_those_of_all_records_in_memory(tmp_path, strategy, seed):
  config, found = configs.get('m2'), drawn(seed)
  config.pairs.strategy, config.pairs.positive = strategy, 2.0
  write(tmp_path, found, hosts=1 + seed * 2)
  pairs.run(config, tmp_path)
  prompts, chosen, taus, rate, summary = expected_pairs(found, strategy, config)
  folder = tmp_path / 'm2' / 'pairs'
  assert [(c.id, c.score, c.spread)
          for c in records.read(folder / 'scores.jsonl', schema.CandidateScore)] == [
      (c.id, c.score, c.spread) for some in prompts.values() for c in some]
  if strategy == strategies.POSITIVES:
    made = list(records.read(folder / 'positives.jsonl', schema.Positive))
    assert [(x.id, x.response, x.score) for x in made] == [
        (c.id, c.response, c.score) for some in chosen.values() for c in some]
  else:
    made = list(records.read(folder / 'pairs.jsonl', schema.Pair))
    assert [(x.id, x.chosen_id, x.rejected_id, x.chosen, x.rejected) for x in made] == [
        (name, a.id, b.id, a.response, b.response) for name, (a, b) in chosen.items()]
    if strategy == 'consistency':
      assert [(x.tau, x.soft_label) for x in made] == [(taus[x.id], rate) for x in made]
  assert len(made) > 2
  done = json.loads((folder / 'done.json').read_text())
  assert {key: done[key] for key in summary} == summary
  assert done['pairs'] + done['positives'] == len(made)


@pytest.mark.parametrize('strategy, stage', [
    ('max_min', 'judge'), ('consistency', 'judge_again'), ('implicit_reward', 'implicit'),
    ('temporal', 'judge_older'), ('temporal', 'respond_older')])
def test_records_in_another_order_are_refused_before_anything_is_written(
    tmp_path, strategy, stage):
  config, found = configs.get('m2'), drawn(0)
  config.pairs.strategy = strategy
  found[stage] = found[stage][::-1]
  write(tmp_path, found)
  other = 'm2/respond_older/' if stage == 'judge_older' else 'm2/respond/'
  with pytest.raises(InputError, match=(
      f'm2/{stage}/.*-\\*.jsonl has records of p.*, which .*/{other}.* does not have in this place'
      f'; restore .*/{other}.*, or delete .*/m2/{stage} and run its stage again')):
    pairs.run(config, tmp_path)
  assert not (tmp_path / 'm2' / 'pairs').exists()


@pytest.mark.parametrize('seed', range(3))
def test_the_health_is_that_of_all_records_in_memory(tmp_path, seed):
  found = drawn(seed)
  made = [pair(f'p{i}', chosen='x' * i, rejected='y' * (i % 5), chosen_score=3 + i / 7)
          for i in range(9)]
  write(tmp_path, found)
  records.write(tmp_path / 'm2' / 'pairs' / 'pairs.jsonl', made)
  health.run(configs.get('m2'), tmp_path)
  measured = json.loads((tmp_path / 'm2' / 'health' / 'health.json').read_text())
  responses, judgements = found['respond'], found['judge']
  scores, groups = means(found, 'judge'), {}
  for r in responses:
    groups.setdefault(r.prompt_id, []).append(scores[r.id].mean if r.id in scores else None)
  groups = [[x for x in some if x is not None] for some in groups.values()]
  groups = [some for some in groups if len(some) > 1]
  distinct = {(r.prompt_id, r.response.strip()) for r in responses}
  parsed = [j.score for j in judgements if j.score is not None]
  prompts = len({r.prompt_id for r in responses})
  assert measured['responses'] == dict(
      count=len(responses), empty=sum(not r.response.strip() for r in responses),
      unfinished=round(1 - sum(r.finish == 'eos' for r in responses) / len(responses), 4),
      cut=sum(r.finish == 'length' for r in responses),
      too_long=sum(r.finish == 'too_long' for r in responses),
      repeated=round(1 - len(distinct) / len(responses), 4),
      characters=mean([len(r.response) for r in responses], 1))
  histogram = scoring.histogram(parsed)
  assert measured['judgements'] == dict(
      count=len(judgements), parse_rate=round(len(parsed) / len(judgements), 4),
      unparsed={'no score': len(judgements) - len(parsed)}, score_histogram=histogram,
      largest_share=round(max(histogram.values()) / len(parsed), 4))
  assert measured['ties'] == dict(prompts=len(groups), all_equal=round(
      sum(len({*some}) == 1 for some in groups) / len(groups), 4))
  chosen, rejected = (mean([len(text) for text in texts], 1) for texts in zip(
      *((p.chosen, p.rejected) for p in made), strict=True))
  assert measured['pairs'] == dict(
      count=9, per_1000_prompts=round(9000 / prompts, 1), chosen_characters=chosen,
      rejected_characters=rejected, length_gap=round(chosen - rejected, 1),
      margin=mean([p.chosen_score - p.rejected_score for p in made], 3))


@pytest.mark.parametrize('seed', range(3))
def test_the_audit_is_that_of_all_records_in_memory(seed):
  found = drawn(seed)
  scores, groups = {name: s.mean for name, s in means(found, 'judge').items()}, {}
  grades = {r.id: sum(world.grade(r.prompt, r.response)) for r in found['respond']
            if world.parse(r.prompt)}
  for r in found['respond']:
    groups.setdefault(r.prompt_id, []).append(r.id)
  made = {name: [pair(name, chosen_id=a, rejected_id=b)
                 for a, b in itertools.combinations(some, 2)] for name, some in groups.items()}
  measured = audit.measure(found['respond'], scores.get, made.get)
  margins = [grades[p.chosen_id] - grades[p.rejected_id] for some in made.values() for p in some
             if p.chosen_id in grades]
  both = [(scores[name], grades[name]) for name in grades if name in scores]
  assert measured['right'] == mean([m > 0 for m in margins], 4)
  assert measured['tied'] == mean([m == 0 for m in margins], 4)
  assert (measured['judge_mean'], measured['oracle_mean']) == tuple(
      mean(values, 4) for values in zip(*both, strict=True))
  assert measured['within_half'] == mean([abs(j - o) <= 0.5 for j, o in both], 4)
  assert measured['pairs'] == sum(map(len, made.values()))
  assert measured['prompts'] == len({name.partition('/')[0] for name in grades if name in scores})
  assert measured['oracle_histogram'] == scoring.histogram(grades.values())


def test_intervals_do_not_depend_on_how_many_resamples_are_computed_together(monkeypatch):
  rng = np.random.default_rng(0)
  sums, counts = rng.normal(size=(30, 2)), rng.integers(0, 4, (30, 2))
  whole = scoring.intervals(sums, counts)
  monkeypatch.setattr(scoring, 'WEIGHTS', 30 * 7)
  for a, b in zip(whole, scoring.intervals(sums, counts), strict=True):
    assert a == pytest.approx(b, rel=1e-12)


class Records:
  """What `meta_judge.select` reads of a stage."""

  def __init__(self, found):
    self._found = found

  def read(self, file):
    return iter(self._found[file.partition('/')[0]])

  def path(self, file):
    return file


def test_the_judgements_to_compare_are_those_of_all_records_in_memory():
  config, found = configs.get('m2'), drawn(4, prompts=80)
  config.meta_judge.responses = 2
  judge = types.SimpleNamespace(render=lambda prompt, response: f'{prompt} | {response}')
  selected = meta_judge.select(Records(found), config, judge)
  by_prompt = {}
  for score in means(found, 'judge').values():
    first = {}
    for j in score.judgements:
      if j.score is not None:
        first.setdefault(j.text, j)
    if len(first) > 1:
      by_prompt.setdefault(score.judgements[0].prompt_id, []).append(
          (-score.spread, score.judgements[0].response_id, list(first.values())))
  expected = [group for _, some in sorted(by_prompt.items()) for _, _, group in sorted(some)[:2]]
  assert [sorted(judged.group, key=lambda j: j.index) for judged in selected] == expected
  assert len(selected) == len(expected) > 9
  texts = {r.id: f'{r.prompt} | {r.response}' for r in found['respond']}
  assert [judged.asked for judged in selected] == [texts[g[0].response_id] for g in expected]


@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0]), st.integers(0, 5)), max_size=12),
       st.integers(0, 60), st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.3, 0.5, 1.0]))
def test_the_limits_leave_the_largest_selection(made, pair_count, share, score_share):
  made = [judge_pairs.Rating(str(i), score, gap) for i, (score, gap) in enumerate(made)]
  most = judge_pairs.allowed(pair_count, share)
  kept = judge_pairs.limit(made, most, score_share)
  ordered, best = sorted(made, key=lambda p: (-p.gap, records.digest(p.id))), []
  for size in range(min(most, len(made)) + 1):  # the greedy selection of each size
    taken, counts = [], Counter()
    for p in ordered:
      if len(taken) < size and counts[p.chosen_score] < int(score_share * size + 1e-9):
        counts[p.chosen_score] += 1
        taken.append(p)
    best = taken if len(taken) == size else best
  assert kept == best


@given(st.lists(st.tuples(st.text(max_size=2), st.text(max_size=3)), max_size=20))
def test_texts_on_a_disk_keep_their_order(rows):
  found = spill.Spill()
  for key, text in rows:
    found.add(key, text)
  assert list(found) == [text for _, text in rows]
  assert list(found.sorted()) == [text for _, text in sorted(rows, key=lambda row: row[0])]
  for key in {key for key, _ in rows} | {'x'}:
    assert found.get(key) == [text for name, text in rows if name == key]
    assert (key in found) == any(name == key for name, _ in rows)


TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=5)


@given(st.lists(st.builds(Example, st.text(), TOKENS, st.lists(TOKENS, max_size=2).map(tuple),
                          st.floats(0, 1)), max_size=5))
def test_stored_examples_are_those_that_were_added(rows):
  stored = examples.Stored()
  for row in rows:
    stored.append(row)
  assert len(stored) == len(rows) and list(stored) == rows
  assert [stored[i] for i in reversed(range(len(rows)))] == rows[::-1]
  assert list(map(repr, stored)) == list(map(repr, rows))  # the hash of a cached reference


@given(st.lists(st.floats(-1e300, 1e300), max_size=20))
def test_a_running_mean_is_exact(values):
  running = scoring.Mean()
  for value in values:
    running.add(value)
  assert running.value == (statistics.fmean(values) if values else None)


@pytest.mark.slow
def test_the_memory_of_stages_hardly_grows_with_their_records(tmp_path):
  """In memory, the records of 3,000 prompts would take 90 MB or more."""
  names = 'pairs, temporal', 'health', 'audit', 'eft', 'agreement', 'meta-judge', 'judge'
  programs = [p for p in memory.PROGRAMS if p.name in (*names, 'pairs, max_min')]
  base, found = (processes.apart(memory.costs, programs, prompts, tmp_path)
                 for prompts in (10, 3000))
  assert {*names} < found.keys()
  for name, (cost, count) in found.items():
    assert cost.peak < base[name][0].peak + 45, name
    assert name == 'writing' or count > 10_000
    assert cost.peak < memory.LIMIT
