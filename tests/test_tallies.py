"""The numbers that the report keeps of records, against lists and dictionaries of the records."""
from collections import Counter
import doctest
import math
import statistics

from hypothesis import given, settings, strategies as st
import memory
import numpy as np
import processes
import pytest
import samples as make

from srlm_jax import records, schema
from srlm_jax.report import estimates, keyed, rounds, samples, tallies
from srlm_jax.reward import health, scores as scoring

NAMES = st.sampled_from(['a', 'b', 'c', 'd'])
SCORES = st.none() | st.sampled_from([0.0, 1.0, 2.5, 4.1, 4.2, 4.3])
JUDGED = st.lists(st.tuples(NAMES, NAMES, SCORES), max_size=30)  # prompt, candidate, score
RESPONSES = st.lists(st.tuples(NAMES, st.sampled_from(['', ' x', 'x ', 'long text']),
                               st.sampled_from(['eos', 'length', 'too_long'])), max_size=20)
TABLES = st.lists(st.tuples(st.integers(0, 9), st.floats(-5, 5)), max_size=15)


def test_docstrings():
  assert doctest.testmod(keyed).failed == doctest.testmod(samples).failed == 0


def judgements(found) -> list[schema.Judgement]:
  return [make.judgement(f'{prompt}/{name}', j, score, reason=f'why {prompt}')
          for j, (prompt, name, score) in enumerate(found)]


def by_id(table: np.ndarray, field: str, names) -> dict[str, float]:
  """A distinct table as a dictionary of the names whose hashes it has."""
  found = dict(zip(table['id'].tolist(), table[field].tolist(), strict=True))
  assert len(found) == len(table) == sum(hash(name) in found for name in names)
  return {name: found[hash(name)] for name in names if hash(name) in found}


@settings(deadline=None)
@given(JUDGED, st.integers(1, 3))
def test_scores_are_those_of_the_judgements_of_each_response(found, quorum):
  """In any order of the judgements."""
  judged = judgements(found)
  made = tallies.judgements(judged)
  expected = scoring.by_response(judged, quorum)
  means = by_id(made.by_response(quorum), 'score', expected)
  assert {name: None if math.isnan(x) else x for name, x in means.items()} == {
      name: score.mean for name, score in expected.items()}
  assert made.health.histogram == scoring.histogram(
      j.score for j in judged if j.score is not None)
  reasons = Counter(j.reason for j in judged if j.score is None)
  assert [*made.health.unparsed.items()] == [*reasons.items()]
  prompts = {j.prompt_id for j in judged}
  assert by_id(made.by_prompt(), 'judgements', prompts) == Counter(j.prompt_id for j in judged)
  assert by_id(made.by_prompt(), 'parsed', prompts) == {
      p: sum(j.score is not None for j in judged if j.prompt_id == p) for p in prompts}
  assert np.isnan(made.by_response(None)['score']).all()


@settings(deadline=None)
@given(RESPONSES)
def test_responses_are_counted(found):
  given = [make.response(f'{prompt}/{n}', response=text, finish=finish, n_tokens=n)
           for n, (prompt, text, finish) in enumerate(found)]
  made = tallies.responses(given)
  assert len(made) == len(given)
  assert made.health.finish == Counter(r.finish for r in given)
  assert made.rows['characters'].tolist() == [len(r.response) for r in given]
  assert made.rows['tokens'].tolist() == [r.n_tokens for r in given]
  assert made.health.count == len(given)
  last = {r.prompt_id: r for r in given}  # of two answers to a prompt the last one counts
  answers = tallies.answers(given)
  assert answers.rows['id'].tolist() == [hash(name) for name in last]
  assert answers.rows['tokens'].tolist() == [r.n_tokens for r in last.values()]
  assert answers.finished.tolist() == [r.finish == 'eos' for r in last.values()]


@given(TABLES, TABLES)
def test_tables_are_joined_by_id(a, b):
  ours, theirs = (keyed.distinct(keyed.table(rows, 'score')) for rows in (a, b))
  a, b = dict(a), dict(b)
  assert [*zip(ours['id'].tolist(), ours['score'].tolist(), strict=True)] == [*a.items()]
  same = keyed.both(ours, theirs)
  assert [tuple(x['score'].tolist()) for x in same] == [
      tuple(x[i] for i in a if i in b) for x in (a, b)]
  assert keyed.find(ours['id'], np.arange(10)).tolist() == [
      [*a].index(i) if i in a else -1 for i in range(10)]


@settings(deadline=None, max_examples=50)
@given(JUDGED, RESPONSES, st.integers(1, 2))
def test_the_numbers_of_a_round(judged, responses, quorum):
  """Mean over the candidates, ties and warnings, also of judgements without their response."""
  judged = judgements(judged)
  responses = [make.response(f'{prompt}/{"abcd"[n % 4]}', response=text)
               for n, (prompt, text, _) in enumerate(responses)]
  data = rounds.Data(
      model='m2', stages={}, attempts=Counter(), responses=tallies.responses(responses),
      judgements=tallies.judgements(judged), pairs=tallies.pairs([]), texts=samples.OfRound())
  data.scores = data.judgements.by_response(quorum)
  groups, writers = {}, {r.id: r.prompt_id for r in responses}
  for name, score in scoring.by_response(judged, quorum).items():
    if score.mean is not None:
      groups.setdefault(writers.get(name, name), []).append(score.mean)
  found, expected = rounds._judge_mean(data), estimates.mean(groups.values())
  if groups:
    assert (found.value, found.low, found.high, found.count) == (
        pytest.approx(expected.value), pytest.approx(expected.low),
        pytest.approx(expected.high), len(groups))
  else:
    assert found is None
  several = [len({*group}) == 1 for group in groups.values() if len(group) > 1]
  tied = [w for w in rounds.warnings(data) if 'have the same score' in w]
  assert bool(tied) == bool(several and round(statistics.fmean(several), 4) > health.TIED)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3)), max_size=300))
def test_the_shown_prompts_have_the_smallest_hashes(found):
  """In any order of the responses."""
  responses = [make.response(f'p{i}/{n}') for i, n in found]
  texts = samples.OfRound()
  assert [*texts.responses(responses)] == responses
  names = {r.prompt_id for r in responses}
  shown = texts.made('m2', len(names), None)
  first = sorted(names, key=records.digest)[:samples.PROMPTS]
  assert [p.id for p in shown.prompts] == first
  for prompt in shown.prompts:
    assert [c.id for c in prompt.candidates] == [
        r.id for r in responses if r.prompt_id == prompt.id]


SIZES = 1_000, 8_000  # prompts
READERS = [p.name for p in memory.PROGRAMS if p.name.startswith(('report', 'head_to_head'))]


@pytest.fixture(scope='module')
def costs(tmp_path_factory):
  """Of the programs on runs of SIZES: [{name: (cost, records)}]."""
  before = 'pairs, max_min', 'agreement', 'oracle'  # they write what the report reads
  programs = [p for p in memory.PROGRAMS if p.name in (*before, *READERS)]
  folder = tmp_path_factory.mktemp('runs')
  return [processes.apart(memory.costs, programs, prompts, folder) for prompts in SIZES]


@pytest.mark.slow
@pytest.mark.parametrize('name', READERS)
def test_the_memory_for_100_000_prompts_would_be_bounded(costs, name):
  """By its growth. With the texts in memory, the larger run would take 100 MB more."""
  small, large = (found[name][0].peak for found in costs)
  growth = max(large - small, 0) / (SIZES[1] - SIZES[0])
  assert small + 100_000 * growth <= memory.LIMIT
