"""The data of the report: every number against an independent computation on small runs."""
import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import samples as make
from scipy import stats

from srlm_jax import InputError, records, schema, stage, study
from srlm_jax.eval import agreement, alpaca
from srlm_jax.report import (
  compare,
  contents,
  differences,
  doubts,
  estimates,
  external,
  keyed,
  measures,
  paper,
  rounds,
  run as runs,
  samples,
  steps,
  summaries,
  tallies,
)
from srlm_jax.report.estimates import Value

NOTHING, UNRANKED = external.External(), differences.pairs([])


def write(folder, name: str, done: dict | None = None, params: str = '', **config):
  """A stage with its manifest, and done.json if `done` is given; `__` in a key stands for a dot."""
  folder = folder / name
  folder.mkdir(parents=True)
  keys = {key.replace('__', '.'): value for key, value in config.items()}
  stage.write_json(folder / 'manifest.json', dict(
      format=stage.FORMAT, stage=name, params=params, config=keys))
  if done is not None:
    stage.write_json(folder / 'done.json', dict(done, seconds=2.5))
  return folder


def model(workdir, name: str, grades=(), lengths=None, judged=None):
  """A trained model whose answer to prompt hI has a length and an oracle score.

  judged: {response id of a ranked reply: scores of its judgements}.
  """
  folder = write(workdir / name, 'model', dict(
      steps=10, loss=0.5, params=f'hash of {name}', examples=8, padding_free=0.5, dropped={}),
      seed=0, model='sandbox')
  stage.write_json(folder / 'rows.json', dict(shape=[2, 30]))
  records.write(folder / 'metrics.jsonl', [
      dict(step=i, loss=0.5, grad_norm=1.0, chosen_reward=0.1 * i,
           alarm_chosen_falling=int(name == 'm2' and i == 2)) for i in range(3)])
  lengths = lengths or [5] * len(grades)
  answers = [make.response(f'h{i}/0', prompt=f'prompt {i}', response='x' * n, n_tokens=n // 2)
             for i, n in enumerate(lengths)]
  if answers:
    folder = write(workdir / name, 'answers', {})
    records.write(folder / 'responses-00000-of-00001.jsonl', answers)
    folder = write(workdir / name, 'oracle', {})
    records.write(folder / 'graded.jsonl', [
        schema.GradedResponse(**dataclasses.asdict(a), score=float(score))
        for a, score in zip(answers, grades, strict=True)])
  if judged is not None:
    write(workdir / name, 'agreement', dict(pairwise_accuracy=None), eval__quorum=1)
    folder = write(workdir / name, 'judge_eval', None)
    records.write(folder / 'judgements-00000-of-00001.jsonl', [
        make.judgement(reply, j, score) for reply, scores in judged.items()
        for j, score in enumerate(scores)])


def evaluated(name: str, grades=(), lengths=(), judged=None) -> measures.Evaluated:
  judgements = tallies.judgements(
      make.judgement(reply, j, score) for reply, scores in (judged or {}).items()
      for j, score in enumerate(scores))
  return measures.Evaluated(
      model=name, folder=None, quorum=1, replies=judgements.by_response(1),
      graded=keyed.table(((hash(f'h{i}'), x) for i, x in enumerate(grades)), 'score'),
      answers=tallies.answers(make.response(f'h{i}/0', response='x' * n)
                              for i, n in enumerate(lengths)), parsed=judgements.by_prompt())


def scores_of(judged: dict[str, list[float | None]]) -> dict[str, float]:
  """{response id: scores of its judgements} -> the means of those that have a score."""
  return {name: np.mean(known) for name, scores in judged.items()
          if (known := [score for score in scores if score is not None])}


def verdict(*models: measures.Evaluated, ranked=(), outside=NOTHING, rounds=(), parsed=None):
  """The steps between models, by (model, against, about)."""
  by_name = {e.model: e for e in models}
  made = {pair: differences.between(*(by_name[m] for m in pair), differences.pairs(ranked), outside)
          for pair in steps.pairs(list(by_name))}
  values = {m: dict(parsed=parsed[m]) if parsed else {} for m in by_name}
  return {(s.model, s.against, s.about): s
          for s in steps.of_models(list(by_name), made, values, rounds)}


def kinds(found) -> list[str]:
  return [doubt.kind for doubt in found]


# Means and intervals


def test_one_value_per_prompt_has_the_interval_of_the_t_test():
  values = np.random.default_rng(0).normal(size=23).tolist()
  found = estimates.mean([x] for x in values)
  interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
  assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
  assert (found.value, found.count, found.of) == (pytest.approx(np.mean(values)), 23, 'prompts')
  assert estimates.mean([[3.0], []]) == Value(value=3.0, count=1) and estimates.mean([[]]) is None


def test_values_of_one_prompt_are_not_independent():
  """Against a bootstrap over prompts; the usual standard error is less than half as large."""
  rng = np.random.default_rng(1)
  groups = [(rng.normal() + 0.1 * rng.normal(size=rng.integers(3, 9))).tolist()
            for _ in range(200)]
  found = estimates.mean(groups)
  means = [np.mean(np.concatenate([groups[i] for i in rng.integers(0, 200, 200)]))
           for _ in range(1000)]
  error = (found.high - found.value) / stats.t.ppf(0.975, 199)
  assert error == pytest.approx(np.std(means), rel=0.1)
  assert error > 2 * stats.sem(np.concatenate(groups))


def test_shares_have_wilsons_interval():
  expected = stats.binomtest(7, 20).proportion_ci(method='wilson')
  assert estimates.wilson(0.35, 20) == pytest.approx(dict(low=expected.low, high=expected.high))
  found = estimates.share_of([i < 7 for i in range(20)], [1] * 20)
  # The standard error is that of 19 values.
  assert dict(low=found.low, high=found.high) == pytest.approx(estimates.wilson(0.35, 19))
  every = stats.binomtest(9, 9).proportion_ci(method='wilson')
  found = estimates.share_of([True] * 9, [1] * 9)
  assert (found.value, found.low, found.high) == (1, pytest.approx(every.low), 1)


def test_differences_of_independent_values_add_their_variances():
  a, b = Value(value=5.0, low=2.0, high=8.0, count=9), Value(value=3.0, low=-1.0, high=7.0, count=4)
  assert estimates.apart(a, b) == Value(value=2.0, low=-3.0, high=7.0, count=4)
  unknown = estimates.apart(a, Value(value=1.0))
  assert unknown.low is None and unknown.value == a.value - 1.0 and unknown.sign == 0
  assert [x.sign for x in (a, b, Value(value=2.0), Value(value=-1.0, low=-2.0, high=-0.1))] == [
      1, 0, 0, -1]


def test_lengths_have_the_quantiles_of_numpy():
  values = np.random.default_rng(0).integers(0, 99, 37).tolist()
  found = measures.lengths(values)
  expected = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95, 1))
  assert list(dataclasses.astuple(found)[2:]) == pytest.approx(list(expected))
  assert (found.count, found.mean) == (37, pytest.approx(np.mean(values)))
  assert measures.lengths([]) is None


# Differences between models


def test_oracle_scores_are_paired_by_prompt():
  a, b = [4.0, 5.0, 2.0, 3.0, 5.0], [3.0, 5.0, 1.0, 1.0, 4.0]
  found = differences.between(evaluated('m2', a), evaluated('m1', b), UNRANKED, NOTHING)
  interval = stats.ttest_rel(a, b).confidence_interval(0.95)
  assert [d.measure for d in found] == ['oracle']
  change = found[0].change
  assert (change.low, change.high) == pytest.approx((interval.low, interval.high))
  assert (change.value, change.count, change.of) == (1.0, 5, 'prompts')
  assert (found[0].ours, found[0].theirs) == (3.8, 2.8)
  only = differences.between(evaluated('m2', a[:3]), evaluated('m1', b), UNRANKED, NOTHING)
  assert only[0].change.count == 3
  assert not differences.between(evaluated('m2', a), evaluated('m1'), UNRANKED, NOTHING)


def judged(rng, ranked, unscored: float) -> dict[str, list[float | None]]:
  return {records.join(r.id, reply.id): [None if rng.random() < unscored else
                                         float(rng.integers(0, 4)) for _ in range(2)]
          for r in ranked for reply in r.replies}


def test_judges_are_compared_on_the_pairs_of_the_same_replies():
  """Against eval.agreement, which counts the pairs of one model in another way."""
  rng = np.random.default_rng(2)
  ranked = [make.ranked(f'r{i}', rng.integers(0, 3, 4).tolist(), 'eval') for i in range(30)]
  ours, theirs = judged(rng, ranked, 0.1), judged(rng, ranked, 0.6)
  a, b = evaluated('m2', judged=ours), evaluated('m1', judged=theirs)
  found = {d.measure: d for d in differences.between(a, b, differences.pairs(ranked), NOTHING)}
  expected, means = [], [scores_of(x) for x in (ours, theirs)]
  for scores in means:
    prompts = [[(reply.rank, scores.get(records.join(r.id, reply.id))) for reply in r.replies]
               for r in ranked]
    expected.append(agreement.agreement(prompts, 5.0)['pairwise_accuracy_all'])
  every = found['pairwise_all']
  assert [every.ours, every.theirs] == pytest.approx(expected)
  assert every.change.value == pytest.approx(expected[0] - expected[1])
  right, count = [0, 0], 0
  for r in ranked:
    for x, y in itertools.permutations(r.replies, 2):
      names = [records.join(r.id, reply.id) for reply in (x, y)]
      if x.rank < y.rank and all(name in scores for name in names for scores in means):
        count += 1
        for i, scores in enumerate(means):
          right[i] += scores[names[0]] > scores[names[1]]
  both = found['pairwise']
  assert [both.ours, both.theirs] == pytest.approx([n / count for n in right])
  parsed = [np.mean([s is not None for scores in x.values() for s in scores])
            for x in (ours, theirs)]
  assert [found['parsed'].ours, found['parsed'].theirs] == pytest.approx(parsed)


def test_win_tie_loss_of_every_two_models():
  a, b, c = evaluated('sft', [1, 2, 3, 4]), evaluated('m1', [2, 2, 4, 1]), evaluated('m2', [5] * 4)
  first, second, third = differences.wins([a, b, c], NOTHING)
  assert (first.a, first.b, first.wins, first.ties, first.losses) == ('m1', 'sft', 2, 1, 1)
  assert first.rate.value == 2.5 / 4 and (third.a, third.b, third.wins) == ('m2', 'm1', 4)
  assert (second.a, second.b, second.by) == ('m2', 'sft', 'oracle')


def head_to_head(a: str, b: str, wins: int, ties: int, losses: int, **fields):
  count = wins + ties + losses
  rate = (wins + ties / 2) / count
  return schema.HeadToHead(**dict(
      a=a, b=b, count=count, wins=wins, ties=ties, losses=losses, win_share=wins / count,
      tie_share=ties / count, loss_share=losses / count, win_rate=rate,
      p_value=stats.binomtest(wins, wins + losses).pvalue if wins + losses else None,
      win_rate_low=rate - 0.1, win_rate_high=rate + 0.125, judge='gpt') | fields)


def test_an_outside_judge_counts_in_either_direction():
  """The file may have the models in any order."""
  models = evaluated('m1', lengths=[5] * 3), evaluated('m2', lengths=[5] * 3)
  files = [head_to_head('m2', 'm1', 120, 40, 40),
           head_to_head('m1', 'm2', 40, 40, 120)]
  for file, low, high in zip(files, (0.1, 0.075), (0.325, 0.3), strict=True):
    outside = external.External(head_to_head=dict(file=file))
    step = verdict(*models, outside=outside)['m2', 'm1', 'answers']
    change = step.differences[0].change
    assert (step.verdict, step.decided_by) == ('better', 'head_to_head')
    assert (change.value, change.low, change.high) == pytest.approx((0.2, low, high))
    assert step.sentence == ('m2 answers better than m1: win rate 0.700 '
                             f'[{0.5 + low:.3f}, {0.5 + high:.3f}] head to head, judged by gpt, on '
                             '200 prompts.')
  graded = dataclasses.replace(files[0], judge='')
  outside = external.External(head_to_head=dict(file=graded))
  assert verdict(*models, outside=outside)['m2', 'm1', 'answers'].verdict == 'not measured'
  assert differences.wins([*models], outside)[0].by == 'program'
  nameless = external.External(head_to_head=dict(file=dataclasses.replace(graded, first_wins=9)))
  assert verdict(*models, outside=nameless)['m2', 'm1', 'answers'].verdict == 'better'


def judged_on(*files, models=('sft', 'm1', 'm2', 'm3')):
  outside = external.External(head_to_head={f'{i}': file for i, file in enumerate(files)})
  return verdict(*map(evaluated, models), outside=outside)


def test_few_or_equal_outcomes_decide_nothing():
  """A percentile bootstrap of equal outcomes has the width 0."""
  def of(*counts):
    rate = (counts[0] + counts[1] / 2) / sum(counts)
    step = judged_on(head_to_head('m3', 'sft', *counts, win_rate_low=rate, win_rate_high=rate))[
        'm3', 'sft', 'answers']
    return step.verdict, kinds(step.doubts)
  assert of(1, 0, 0) == of(4, 0, 0) == of(9, 0, 0) == ('not measured', [])
  assert of(5, 7, 0) == ('no difference seen', ['few', 'includes_zero'])  # p 0.06
  assert of(400, 0, 0) == ('better', []) and of(0, 0, 12) == ('worse', ['few'])
  equal = verdict(evaluated('m1', [1.0] * 40), evaluated('m2', [1.5] * 40))['m2', 'm1', 'answers']
  assert equal.verdict == 'not measured' and 'the same on all prompts' in equal.sentence
  gains = differences.Difference(
      measure='oracle', model='m2', against='m1', ours=3.0, theirs=2.0, paired=True,
      change=estimates.mean([[1.0], [1.0]], 'seeds'))
  step, *_ = steps.of_models(['m1', 'm2'], {('m2', 'm1'): [gains]}, {}, [])
  assert step.verdict == 'not measured'


def test_outside_judges_that_disagree_decide_nothing():
  """Whatever the folders of their files are called."""
  files = [head_to_head('m3', 'sft', 300, 0, 100),
           head_to_head('m3', 'sft', 100, 0, 300, judge='claude')]
  for order in (files, files[::-1]):
    step = judged_on(*order)['m3', 'sft', 'answers']
    assert step.sentence.startswith('m3 answers neither better nor worse than sft, because the '
                                    'outside judges disagree: win rate 0.250')
    assert step.verdict == 'no difference seen' and kinds(step.doubts) == ['disagree']
    assert 'win rate 0.750 [0.650, 0.875] head to head, judged by gpt' in step.doubts[0].sentence
  agreeing = dataclasses.replace(files[0], judge='claude')
  assert judged_on(files[0], agreeing)['m3', 'sft', 'answers'].verdict == 'better'
  unclear = head_to_head('m3', 'sft', 199, 0, 201, judge='claude')
  assert judged_on(files[0], unclear)['m3', 'sft', 'answers'].verdict == 'no difference seen'


def test_the_first_screen_says_what_later_rounds_made_worse():
  found = judged_on(head_to_head('m3', 'sft', 300, 0, 100), head_to_head('m3', 'm2', 100, 0, 300),
                    head_to_head('m2', 'm1', 100, 0, 300)).values()
  assert steps.answer(found).startswith('Yes: m3 answers better than sft')
  assert [doubt.sentence.partition(':')[0] for doubt in steps.doubts_of(found)] == [
      'm2 answers worse than m1', 'm3 answers worse than m2']


def test_the_first_screen_shows_reward_hacking_between_rounds():
  base, noise = np.arange(120) % 5.0, np.resize((-1, 1), 120)
  models = (evaluated(m, x) for m, x in dict(
      sft=base, m1=base + noise, m2=base - noise, m3=base + noise).items())
  found = verdict(*models, rounds=[a_round('m2', 'm1', 2.0), a_round('m3', 'm2', 4.0)]).values()
  assert steps.deciding(found).model == 'm3'
  assert kinds(steps.doubts_of(found)) == ['includes_zero', 'only_own_judge']
  assert 'from 2.00 (m1) to 4.00 (m2)' in steps.doubts_of(found)[1].sentence


# Verdicts and doubts


def test_verdicts_follow_the_interval():
  rng = np.random.default_rng(0)
  base = rng.integers(0, 5, 200).astype(float)
  better, same = base + rng.integers(0, 2, 200), base + rng.choice((-1, 1), 200)
  found = verdict(*(evaluated(m, x) for m, x in dict(
      sft=base, m1=better, m2=base, m3=base + 3 * (same - base)).items()))
  assert {key[:2]: step.verdict for key, step in found.items() if key[2] == 'answers'} == {
      ('m1', 'sft'): 'better', ('m2', 'm1'): 'worse', ('m3', 'm2'): 'no difference seen',
      ('m2', 'sft'): 'no difference seen', ('m3', 'sft'): 'no difference seen'}
  assert steps.answer([*found.values()]).startswith(
      'Not that one can see: m3 answers neither better nor worse than sft: ')
  assert kinds(found['m1', 'sft', 'answers'].doubts) == []
  assert kinds(found['m3', 'm2', 'answers'].doubts) == ['includes_zero']
  judge = found['m1', 'sft', 'judge']
  assert (judge.verdict, judge.sentence) == (
      'not measured', 'No ranks of people compare m1 with sft as judges.')


def a_round(model, writer, mean, judge=None) -> rounds.Round:
  value = Value(value=mean, low=mean - 0.1, high=mean + 0.1, count=50)
  empty = {field.name: None for field in dataclasses.fields(rounds.Round)}
  return rounds.Round(**empty | dict(model=model, writer=writer, judge=judge or writer,
                                     judge_mean=value, warnings=()))


def test_the_models_own_scores_decide_nothing():
  models = evaluated('m1', lengths=[5] * 3), evaluated('m2', lengths=[5] * 3)
  step = verdict(*models, rounds=[a_round('m2', 'm1', 2.0), a_round('m3', 'm2', 4.0)])[
      'm2', 'm1', 'answers']
  assert step.verdict == 'not measured' and 'scores that models give themselves' in step.sentence
  assert steps.answer([step]).startswith('Not known: No outside measure')
  facts = doubts.Facts(has_outside=False, judges=frozenset({'m1'}), has_control=False, seeds=1,
                       is_sandbox=False)
  assert kinds(doubts.of_run(facts)) == ['no_outside', 'one_seed']


def test_a_judge_whose_scores_alone_rise_gives_a_doubt():
  base = np.arange(120) % 5.0
  models = evaluated('m1', base), evaluated('m2', base + np.resize((-1, 1), 120))
  own = [a_round('m2', 'm1', 2.0), a_round('m3', 'm2', 4.0)]
  def found(*made, of=models):
    return kinds(verdict(*of, rounds=made)['m2', 'm1', 'answers'].doubts)
  assert found(*own) == ['includes_zero', 'only_own_judge']
  assert found(a_round('m2', 'm1', 3.9), own[1]) == ['includes_zero']  # within the intervals
  assert found(own[0], a_round('m3', 'm2', 4.0, judge='oracle')) == ['includes_zero']
  better = models[0], evaluated('m2', base + np.resize((0, 1), 120))
  assert found(*own, of=better) == []


def test_doubts_of_a_step():
  base = np.arange(150) % 5.0
  longer = verdict(evaluated('m1', base, [50, 60] * 75),
                   evaluated('m2', base + np.resize((0, 1), 150), [70, 80] * 75))
  step = longer['m2', 'm1', 'answers']
  assert kinds(step.doubts) == ['longer'] and 'from 55 to 75' in step.doubts[0].sentence
  few = verdict(evaluated('m1', [1.0] * 11), evaluated('m2', [2.0, 3.0] * 5 + [2.0]))
  assert kinds(few['m2', 'm1', 'answers'].doubts) == ['few']
  def judged_by(file, ours=(), theirs=(), lengths=((), ())):
    models = evaluated('m1', theirs, lengths[1]), evaluated('m2', ours, lengths[0])
    outside = external.External(head_to_head=dict(file=file))
    step = verdict(*models, outside=outside)['m2', 'm1', 'answers']
    return step.verdict, step.decided_by, kinds(step.doubts)
  file = head_to_head('m2', 'm1', 10, 10, 100)
  assert judged_by(file, base + np.resize((0, 1), 150), base) == ('better', 'oracle', ['disagree'])
  assert judged_by(dataclasses.replace(file, inconsistent=40, left_out=30)) == (
      'worse', 'head_to_head', ['inconsistent', 'left_out'])
  assert judged_by(dataclasses.replace(file, inconsistent=36, left_out=13))[2] == []
  assert judged_by(file, lengths=([5] * 119 + [999], [5] * 120))[2] == []  # not significant
  for seen in (dataclasses.replace(file, characters_a=7.0, characters_b=5.0),
               head_to_head('m1', 'm2', 100, 10, 10, characters_a=5.0, characters_b=7.0)):
    assert judged_by(seen, lengths=([7] * 120, [5] * 120))[2] == ['longer']
    assert judged_by(seen, lengths=([7] * 120, [6] * 120))[2] == ['other_answers']
    assert judged_by(seen, lengths=([7] * 119, [5] * 119))[2] == ['longer', 'other_answers']
  one = verdict(evaluated('m1', [1.0]), evaluated('m2', [2.0]))['m2', 'm1', 'answers']
  assert one.verdict == 'not measured' and one.sentence == (
      'm2 against m1: +1.00 points in the oracle score, on 1 prompt; 1 prompt cannot decide, 10 '
      'are needed.')


def test_alpaca_eval_is_not_paired():
  def made(name, rate):
    return schema.AlpacaEval(generator=name, win_rate=rate, standard_error=1.0, wins=1, draws=0,
                             losses=1, count=805, missing=0, characters=9.0)
  outside = external.External(alpaca=dict(a=made('m1', 10.0), b=made('m2', 15.0)))
  step = verdict(evaluated('m1'), evaluated('m2'), outside=outside)['m2', 'm1', 'answers']
  width = stats.norm.ppf(0.975) * math.sqrt(2)
  assert (step.verdict, step.decided_by, kinds(step.doubts)) == ('better', 'alpaca', ['not_paired'])
  assert step.differences[0].change.low == pytest.approx(5 - width)


def test_a_judge_that_only_learned_the_format_is_doubted():
  ranked = [make.ranked(f'r{i}', (0, 1), 'eval') for i in range(120)]
  replies = [(f'r{i}/0', f'r{i}/1') for i in range(120)]
  scored = {name: [5.0 - j] for pair in replies for j, name in enumerate(pair)}
  silent = {name: scores if int(name[1:-2]) < 20 else [None] for name, scores in scored.items()}
  found = verdict(evaluated('sft', judged=silent), evaluated('m1', judged=scored), ranked=ranked,
                  parsed=dict(sft=Value(value=1 / 6), m1=Value(value=1.0)))['m1', 'sft', 'judge']
  assert (found.verdict, kinds(found.doubts)) == ('better', ['parse_rate', 'only_unscored'])
  assert found.differences[0].change.value == pytest.approx(100 / 120)


def test_doubts_of_a_run():
  facts = doubts.Facts(has_outside=True, judges=frozenset({'random'}), has_control=True, seeds=3,
                       is_sandbox=True, stopped='no pairs', unfinished=('m3/judge',), warnings=2)
  assert kinds(doubts.of_run(facts)) == ['is_control', 'sandbox', 'stopped', 'unfinished',
                                         'warnings']
  alone = dataclasses.replace(facts, judges=frozenset({'m1'}), has_control=False)
  assert kinds(doubts.of_run(alone))[0] == 'no_control'


# The data of a round, and samples


@pytest.fixture
def workdir(tmp_path):
  """The models sft, m1 and m2, and the data of m2 and m3; that of m3 is not finished."""
  workdir = tmp_path / 'run'
  ranked = [make.ranked(f'r{i}', (0, 1), 'eval') for i in range(4)]
  seeds = write(workdir / 'data', 'seeds', {}, seed=3)
  records.write(seeds / 'ranked.jsonl', ranked)
  judged = {f'r{i}/{n}': [float(4 - n), 3.0 - n] for i in range(4) for n in range(2)}
  model(workdir, 'sft', [1, 2, 3, 4, 2] * 2, [10, 20, 30, 40, 50] * 2,
        {k: [None, 1.0] for k in judged})
  model(workdir, 'm1', [2, 2, 3, 5, 3] * 2, judged=judged)
  model(workdir, 'm2', [3, 3, 4, 5, 5] * 2, judged=judged)
  data(workdir, 'm2', 'hash of m1')
  data(workdir, 'm3', 'hash of m2', done=False)
  stage.write_json(workdir / 'results.json', dict(size='tiny', models=[
      dict(model=m) for m in ('sft', 'm1', 'm2')], stopped='too few pairs'))
  return workdir


def data(workdir, name: str, writer: str, done: bool = True):
  """Three prompts with two candidates each, judged twice; of the last candidate one judgement."""
  folder = workdir / name
  prompts = schema.PromptsSummary(prompts=3, wanted=4, attempts=9, near_held_out=0, shortened=0,
                                  dropped={'seen before': 6})
  attempts = write(folder, 'prompts', dataclasses.asdict(prompts) if done else None,
                   prompts__count=4)
  records.write(attempts / 'attempts.jsonl', [
      schema.Attempt(id=str(i), text='', finish='eos', reason='' if i < 3 else 'seen before')
      for i in range(9)])
  responses = [make.response(f'p{i}/{n}', prompt=f'prompt {i}', n_tokens=2 + n, finish=finish)
               for i, n, finish in [(0, 0, 'eos'), (0, 1, 'eos'), (1, 0, 'length'), (1, 1, 'eos'),
                                    (2, 0, 'eos'), (2, 1, 'too_long')]]
  records.write(write(folder, 'respond', {}, writer) / 'responses-00000-of-00001.jsonl', responses)
  scored = {'p0/0': (5, 4), 'p0/1': (1, 1), 'p1/0': (3, 3), 'p1/1': (3, 3), 'p2/0': (2, 2),
            'p2/1': (None, 4)}
  summary = schema.JudgeSummary(judgements=12, parsed=11, lowest=0.0, highest=5.0,
                                unparsed={'no score': 1})
  judge = write(folder, 'judge', dataclasses.asdict(summary), writer, judge__n=2,
                judge__template='additive')
  records.write(judge / 'judgements-00000-of-00001.jsonl', [
      make.judgement(name, j, None if score is None else float(score), text=f'{name} {j}')
      for name, scores in scored.items() for j, score in enumerate(scores)])
  numbers = {field.name: None for field in dataclasses.fields(schema.PairsSummary)}
  made = schema.PairsSummary(**numbers | dict(
      strategy='max_min', pairs=1, positives=0, prompts=3, pairs_per_1000_prompts=333.3,
      judgements=12, parsed=11, score_histogram={}, all_scores_equal=1,
      dropped={'all scores equal': 1, 'one candidate': 1}))
  folder = write(folder, 'pairs', dataclasses.asdict(made) if done else None, judge__quorum=2)
  records.write(folder / 'pairs.jsonl', [
      make.pair('p0', chosen='x' * 30, rejected='y' * 10)])


def of_round(workdir, name: str) -> tuple[rounds.Data, rounds.Round]:
  stages = {(path.parent.name, path.name): started for path in workdir.glob('*/*')
            if (started := summaries.started(path))}
  found = rounds.read(workdir, name, {part: s for (owner, part), s in stages.items()
                                      if owner == name})
  return found, rounds.of(found, workdir, rounds.names(stages))


def test_a_round_by_hand(workdir):
  found = of_round(workdir, 'm2')[1]
  assert (found.writer, found.judge, found.scale) == ('m1', 'm1', (0.0, 5.0))
  assert [(y.label, y.count, y.lost) for y in found.funnel] == [
      ('prompts wanted', 4, {}), ('attempts', 9, {}), ('accepted prompts', 3, {'seen before': 6}),
      ('responses', 6, {}),
      ('finished responses', 4, {'cut at the length limit': 1, 'prompt too long': 1}),
      ('judgements', 12, {}), ('parsed judgements', 11, {'no score': 1}),
      ('scored candidates', 5, {'fewer than 2 scores': 1}),
      ('pairs', 1, {'all scores equal': 1, 'one candidate': 1})]
  assert found.judge_scores == {'0': 0, '1': 2, '2': 2, '3': 4, '4': 2, '5': 1}
  means = [[4.5, 1.0], [3.0, 3.0], [2.0]]
  assert found.judge_mean == estimates.mean(means) and found.judge_mean.value == 2.7
  assert (found.tokens.mean, found.tokens.count) == (2.5, 6)
  assert (found.chosen.mean, found.rejected.mean) == (30, 10)
  assert found.parsed.value == 11 / 12 and found.right is None and found.oracle_mean is None
  assert any('chosen responses have 30 characters' in w for w in found.warnings)
  path = workdir / 'm1' / 'answers' / 'manifest.json'  # of a checkpoint that was selected
  stage.write_json(path, json.loads(path.read_text()) | dict(params='selected'))
  path = workdir / 'm2' / 'respond' / 'manifest.json'
  stage.write_json(path, json.loads(path.read_text()) | dict(params='selected'))
  assert of_round(workdir, 'm2')[1].writer == 'm1'
  unfinished = of_round(workdir, 'm3')[1]
  assert [(y.label, y.count) for y in unfinished.funnel][:3] == [
      ('prompts wanted', 4), ('attempts', 9), ('accepted prompts', 3)]
  assert unfinished.funnel[-1].label == 'scored candidates' and unfinished.writer == 'm2'


def test_the_audit_gives_the_means_of_the_same_candidates(workdir):
  stage.write_json(write(workdir / 'm2', 'audit', {}) / 'audit.json', dict(
      judged=5, prompts=3, pairs=40, right=0.75, wrong=0.125, judge_mean=2.7, oracle_mean=2.5,
      intervals=dict(judge_mean=[2.0, 3.0], oracle_mean=None), oracle_histogram={'2': 5}))
  found = of_round(workdir, 'm2')[1]
  assert found.judge_mean == Value(value=2.7, low=2.0, high=3.0, count=3)
  assert found.oracle_mean == Value(value=2.5, count=3) and found.oracle_scores == {'2': 5}
  expected = stats.binomtest(30, 40).proportion_ci(method='wilson')
  assert (found.right.low, found.right.high) == pytest.approx((expected.low, expected.high))


def test_samples_have_all_candidates_and_judgements_of_a_prompt(workdir):
  found = of_round(workdir, 'm2')[0].samples
  assert (found.rule, found.total) == ('All 3 prompts.', 3)
  by_id = {p.id: p for p in found.prompts}
  first = by_id['p0']
  assert [(c.id, c.role, c.score, c.spread) for c in first.candidates] == [
      ('p0/0', 'chosen', 4.5, 0.5), ('p0/1', 'rejected', 1.0, 0.0)]
  assert [(j.text, j.score) for j in first.candidates[0].judgements] == [
      ('p0/0 0', 5.0), ('p0/0 1', 4.0)]
  assert (first.paired, by_id['p1'].paired) == (True, False)
  last = by_id['p2'].candidates[1]
  assert (last.score, [j.score for j in last.judgements]) == (None, [None, 4.0])


def test_samples_are_chosen_by_hash_and_bounded(workdir, monkeypatch):
  monkeypatch.setattr(samples, 'PROMPTS', 2)
  made = of_round(workdir, 'm2')[0].samples
  first = sorted(('p0', 'p1', 'p2'), key=records.digest)[:2]
  assert [p.id for p in made.prompts] == first and made.rule.startswith('2 of 3 prompts: those')
  assert [len(p.candidates) for p in made.prompts] == [2, 2]
  monkeypatch.setattr(samples, 'CHARACTERS', 10)
  assert [p.id for p in of_round(workdir, 'm2')[0].samples.prompts] == first[:1]


def test_a_held_out_answer_is_cut_and_has_its_oracle_score():
  long, other = samples.OfAnswers(), samples.OfAnswers()
  assert len([*long.answers([make.response('h/0', response='x' * 7000)])]) == 1
  assert len([*other.answers([make.response('h/0', response=x) for x in ('first', 'last')])]) == 2
  made = samples.held_out(dict(m1=long, m2=other), lambda model, name: {
      ('m1', 'h'): 4.0}.get((model, name)), 1)
  answer = made.prompts[0].answers['m1']
  assert answer.text == 'x' * 6000 + ' [.. 1,000 more characters]' and answer.oracle == 4.0
  assert made.prompts[0].answers['m2'].oracle is None
  assert made.prompts[0].answers['m2'].text == 'last'


@pytest.mark.parametrize('candidates, judgements', [(3000, 1), (1, 3000), (60, 60)])
def test_a_prompt_with_many_candidates_or_judgements_is_bounded_too(candidates, judgements):
  texts = samples.OfRound()
  responses = [make.response(f'p/{n}', response='x' * 500) for n in range(candidates)]
  judged = [make.judgement(r.id, j, float(j % 3), text='y' * 500) for r in responses
            for j in range(judgements)]
  pair = make.pair('p', chosen_id=f'p/{candidates - 1}', rejected_id='absent')
  for passed, records_ in ((texts.responses, responses), (texts.judgements, judged),
                           (texts.pairs, [pair])):
    assert [*passed(records_)] == records_
  prompt, = texts.made('m2', 1, 1).prompts
  shown = [j for c in prompt.candidates for j in c.judgements]
  assert 200_000 < sum(len(x.text) for x in (*prompt.candidates, *shown)) <= samples.CHARACTERS
  assert len(prompt.candidates) + prompt.left_out == candidates and prompt.paired
  for candidate in prompt.candidates:
    assert len(candidate.judgements) + candidate.left_out == judgements
    assert candidate.score == np.mean([j % 3 for j in range(judgements)])  # of all judgements


# Runs


def read(workdir) -> runs.Run:
  return contents.read([workdir]).runs[0]


def test_a_run_by_hand(workdir):
  found = read(workdir)
  assert (found.models, found.size, found.seed) == (('sft', 'm1', 'm2'), 'tiny', 0)
  assert found.facts == (
      'A run of self-rewarding training, size tiny, model sandbox. It contains the models sft, m1, '
      'm2.', 'Judge: template additive, scores 0 to 5; 2 judgements per response, of which 2 must '
      'have a score.')
  assert found.answer == (
      'Yes: m2 answers better than sft: +1.60 '
      f'{interval([3, 3, 4, 5, 5] * 2, [1, 2, 3, 4, 2] * 2)} points in the oracle score, on 10 '
      'prompts.')
  assert kinds(found.doubts) == ['no_control', 'one_seed', 'sandbox', 'stopped', 'unfinished',
                                 'warnings']
  assert found.unfinished == ('sft/judge_eval', 'm1/judge_eval', 'm2/judge_eval', 'm3/prompts',
                              'm3/pairs')
  assert 'model m3' in found.missing and 'AlpacaEval (eval/alpaca_MODEL.json)' in found.missing
  assert found.characters['sft'].mean == 30 and found.tokens['sft'].mean == 15
  assert found.oracle_scores['m2'] == {'3': 4, '4': 2, '5': 4}
  assert [w.wins for w in found.wins] == [6, 10, 8]
  costs = {(c.owner, c.stage): c for c in found.costs}
  assert costs['m2', 'model'].tokens == 10 * 2 * 30 * 0.5  # steps, rows, width, not padding
  assert costs['m2', 'respond'].tokens == 15 and costs['sft', 'answers'].tokens == 150
  assert costs['m3', 'pairs'].seconds is None and costs['m2', 'pairs'].seconds == 2.5
  assert [m.chosen_reward for m in found.curves['m1']] == [0.0, 0.1, 0.2]
  assert found.values['sft']['parsed'].value == 0.5
  assert found.warnings[-1].startswith('m2/model: at the end the chosen responses are less likely')
  assert not any(warning.startswith('m1/model') for warning in found.warnings)
  judge = next(s for s in found.steps if (s.model, s.about) == ('m1', 'judge'))
  assert (judge.differences[0].ours, judge.differences[0].theirs) == (1.0, 0.0)


def interval(a, b) -> str:
  found = stats.ttest_rel(a, b).confidence_interval(0.95)
  return f'[{found.low:+.2f}, {found.high:+.2f}]'


@pytest.mark.parametrize('missing', ['seeds', 'model/metrics.jsonl', 'answers', 'oracle', 'respond',
                                     'judge', 'judge_eval', 'agreement', 'pairs', 'prompts',
                                     'results.json', 'rows.json'])
def test_a_partial_run_is_read_and_what_is_missing_is_named(workdir, missing):
  for path in [*workdir.rglob(missing)]:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  found = read(workdir)
  named = dict(answers='m2: answers to held-out prompts (m2/answers)',
               agreement='m2: agreement with human ranks (m2/agreement)')
  named['model/metrics.jsonl'] = 'm2: training curves (m2/model/metrics.jsonl)'
  for file, sentence in named.items():
    assert (sentence in found.missing) == (file == missing)


def test_external_results_appear_when_their_files_are_in_the_run(workdir):
  folder = workdir / 'eval'
  annotations = [alpaca.Annotation(instruction=str(i), preference=p, generator_2='m2',
                                   output_2='x') for i, p in enumerate((2.0, 1.2, 1.5))]
  stage.write_json(folder / 'alpaca_m2.json', dataclasses.asdict(alpaca.win_rate(annotations)))
  for a, b in (('m2', 'm1'), ('m2', 'sft')):
    stage.write_json(folder / f'{a}_{b}' / 'head_to_head.json',
                     dataclasses.asdict(head_to_head(a, b, 60, 30, 10)))
  found = read(workdir)
  rate = found.values['m2']['alpaca']
  error = stats.sem([1.0, 0.2, 0.5]) * 100
  assert rate.value == pytest.approx(170 / 3) and rate.count == 3
  assert rate.high - rate.value == pytest.approx(stats.norm.ppf(0.975) * error)
  assert [(w.a, w.b, w.wins, w.source) for w in found.wins if w.by == 'gpt'] == [
      ('m2', 'm1', 60, 'm2_m1/head_to_head.json'), ('m2', 'sft', 60, 'm2_sft/head_to_head.json')]
  assert not any('AlpacaEval' in m or 'head to head' in m for m in found.missing)
  (folder / 'alpaca_m2.json').write_text('{"generator": "m2"}')
  with pytest.raises(InputError, match='eval/alpaca_m2.json: .*missing required field'):
    read(workdir)


def test_models_of_another_run_decide_nothing(workdir):
  def write_files(run):
    file = head_to_head(f'{run}/m2/answers', f'{run}/sft/answers', 300, 0, 100)
    stage.write_json(workdir / 'eval' / 'x' / 'head_to_head.json', dataclasses.asdict(file))
    score = schema.MtBench(overall=7.0, math_code_reasoning=None, other=None, turn_1=None,
                           turn_2=None, scored=160, no_score=0, absent=0)
    stage.write_json(workdir / 'eval' / 'mt_bench.json', {f'{run}/m2': dataclasses.asdict(score)})
    found = read(workdir)
    return (found.external.head_to_head['x/head_to_head.json'].a,
            [d.measure for d in found.differences['m2', 'sft']], found.values['m2'].get('mt_bench'),
            [row.values.get('m2') for row in found.external.win_rates])
  a, measured, score, rates = write_files('/runs/random_judge')
  assert a == 'random_judge/m2' and not rates and score is None
  assert 'head_to_head' not in measured
  for own in ('run', '/moved/from/run', str(workdir)):
    a, measured, score, rates = write_files(own)
    assert a == 'm2' and score.value == 7 and 'head_to_head' in measured
    assert [rate.value for rate in rates] == [0.75]


def test_win_rates_against_sft_and_tasks_are_rows_of_models():
  files = (head_to_head('m1', 'sft', 60, 0, 40), head_to_head('sft', 'm2', 20, 0, 80),
           head_to_head('m2', 'sft', 50, 0, 50, judge='claude'), head_to_head('m2', 'm1', 1, 0, 1),
           head_to_head('m1', 'sft', 1, 0, 3, judge=''))
  harness = schema.Harness(scores={'m1': {'a': 50.0}, 'gpt': {'a': 9.0}}, differences={},
                           missing={}, metrics={}, standard_errors={'m1': {'a': 2.0}})
  found = external.External(head_to_head=dict(enumerate(files)), harness=dict(x=harness))
  assert [(row.by, {m: v.value for m, v in row.values.items()}) for row in found.win_rates] == [
      ('outside judge gpt', dict(m1=0.6, m2=0.8)), ('outside judge claude', dict(m2=0.5))]
  task, = found.tasks
  assert task.values.keys() == {'m1'}
  assert task.values['m1'].high == pytest.approx(50 + 2 * stats.norm.ppf(0.975))


def test_every_shard_is_read_once(workdir, monkeypatch):
  opened = []
  each = runs.results.each
  monkeypatch.setattr(runs.results, 'each', lambda path, kind: (
      opened.append(str(path)) or each(path, kind)))
  read(workdir)
  opened = [path for path in opened if '-of-00001' in path]
  assert len(opened) == len({*opened}) == 10


def test_grades_of_different_prompts_are_refused(workdir):
  path = workdir / 'm2' / 'oracle' / 'graded.jsonl'
  records.write(path, [r for _, r in records.read_any(path)][1:])
  with pytest.raises(InputError, match='m2/oracle/graded.jsonl and that of an earlier model grade'):
    read(workdir)
  with pytest.raises(InputError, match='have graded answers to different prompts; compare runs'):
    study.paired([workdir], 'm2', [workdir], 'm1')
  other = workdir.parent / 'other'
  shutil.copytree(workdir, other)
  (other / 'm1').rename(other / 'm0')
  shutil.copytree(other / 'm2', other / 'm1')
  with pytest.raises(InputError, match='and the runs with other seeds have graded answers to'):
    study.paired([workdir, other], 'm1', [workdir, other], 'm1')


# Several runs


def test_two_runs_are_paired_by_prompt(workdir, tmp_path):
  other = tmp_path / 'other' / 'run'
  shutil.copytree(workdir, other)
  graded = other / 'm2' / 'oracle' / 'graded.jsonl'
  lines = [dict(r, score=x) for (_, r), x in zip(
      records.read_any(graded), (2.0, 3.0, 4.0, 4.0, 5.0) * 2, strict=True)]
  records.write(graded, lines)
  found = contents.read([workdir, other])
  assert [run.name for run in found.runs] == [str(workdir), str(other)] and not found.refused
  across = {(x.model, x.measure): x for x in found.across}
  change = across['m2', 'oracle'].change
  expected = stats.ttest_1samp([-1, 0, 0, -1, 0] * 2, 0).confidence_interval(0.95)
  assert (change.value, change.low, change.high) == pytest.approx(
      (-0.4, expected.low, expected.high))
  assert across['m1', 'oracle'].change.value == 0 and across['m1', 'pairwise_all'].change.value == 0
  with pytest.raises(InputError, match='is given twice'):
    contents.read([workdir, workdir])
  with pytest.raises(InputError, match='contains no model'):
    contents.read([workdir, tmp_path / 'absent'])


def test_runs_on_other_prompts_are_not_compared(workdir, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(workdir, other)
  path = other / 'm1' / 'answers' / 'responses-00000-of-00001.jsonl'
  path.write_text(path.read_text().replace('"prompt 0"', '"another prompt"'))
  found = contents.read([workdir, other])
  assert found.refused == ('other and run: m1 answered other held-out prompts (10 and 10, of which '
                           '9 are the same), so no difference is paired by prompt; make both runs '
                           'from the same data',)
  assert {x.model for x in found.across} == {'sft'}


def test_a_control_beside_a_run_removes_that_doubt(workdir, tmp_path):
  control = tmp_path / 'control'
  shutil.copytree(workdir, control)
  path = control / 'm2' / 'judge' / 'manifest.json'
  manifest = json.loads(path.read_text())
  stage.write_json(path, manifest | dict(params='', config={'judge.by': 'random'}))
  first, second = contents.read([workdir, control]).runs
  assert 'no_control' in kinds(read(workdir).doubts)
  assert 'no_control' not in kinds(first.doubts) and 'is_control' in kinds(second.doubts)


def test_the_seeds_of_a_study_are_one(tmp_path):
  """Against study.table, which reads the runs in another way."""
  rng = np.random.default_rng(0)
  base = rng.integers(0, 4, 40)
  for name in ('loop', 'blind'):
    for seed in range(4 if name == 'loop' else 3):
      workdir = tmp_path / f'{name}-{seed}'
      model(workdir, 'sft', base + rng.integers(0, 2, 40))
      model(workdir, 'm1', base + rng.integers(0, 3, 40))
  model(tmp_path / 'loop-4', 'sft', base)  # not finished: it has no m1
  stage.write_json(tmp_path / 'blind.json', dict(changes=['m2:judge.by=random']))
  found = contents.read([tmp_path])
  assert not found.runs and not found.refused
  loop, blind = found.arms
  assert (loop.changes, blind.changes) == ((), ('m2:judge.by=random',))
  with pytest.raises(InputError, match='is the folder of a study; give it alone'):
    contents.read([tmp_path / 'loop-0', tmp_path])
  assert (loop.name, loop.seeds, blind.seeds) == ('loop', (0, 1, 2, 3, 4), (0, 1, 2))
  loops = [tmp_path / f'loop-{seed}' for seed in range(4)]
  blinds = [tmp_path / f'blind-{seed}' for seed in range(3)]
  gain = {row['model']: row for row in study.table(loops, loops)}['m1']['gain']
  step = next(s for s in loop.steps if s.about == 'answers')
  change = step.differences[0].change
  assert (change.value, change.low, change.high) == pytest.approx(
      (gain['mean'], *gain['interval']))
  assert (change.count, change.of) == (4, 'seeds') and step.sentence.endswith('on 4 seeds.')
  against = {row['model']: row for row in study.table(blinds, loops[:3])}['m1']['against']
  across = {(x.model, x.measure): x for x in found.across}['m1', 'oracle']
  assert (across.run, across.against) == ('blind', 'loop')
  assert (across.change.value, across.change.low, across.change.high) == pytest.approx(
      (against['mean'], *against['interval']))
  assert 'one_seed' not in kinds(loop.doubts) and 'no_control' in kinds(loop.doubts)
  assert loop.values['m1']['oracle'].count == 4 and loop.values['sft']['oracle'].count == 5


def test_the_seeds_of_a_study_keep_the_doubts_on_their_outside_judge(tmp_path):
  for seed, wins in enumerate((300, 320)):
    folder = tmp_path / f'loop-{seed}'
    model(folder, 'sft')
    model(folder, 'm1')
    file = head_to_head('m1', 'sft', wins, 0, 400 - wins, inconsistent=200 * seed, left_out=90)
    stage.write_json(folder / 'eval' / 'x' / 'head_to_head.json', dataclasses.asdict(file))
  step = next(s for s in contents.read([tmp_path]).arms[0].steps if s.about == 'answers')
  assert [(d.kind, d.sentence[:7]) for d in step.doubts[2:]] == [
      ('left_out', 'loop-0:'), ('inconsistent', 'loop-1:'), ('left_out', 'loop-1:')]


def test_a_folder_of_a_run_is_no_study(workdir):
  assert compare.study(workdir) == {} and compare.study(workdir / 'absent') == {}
  assert [*compare.study(workdir.parent)] == []  # `run` is not NAME-SEED


# The paper


def test_the_tables_of_the_paper_are_whole():
  by_title = {table.title: table for table in paper.tables()}
  shares = by_title['Head to head on 256 prompts, both orders']
  assert shares.label == 'Llama-2-70B, judged by GPT-4'
  for name, cells in shares.rows.items():
    assert sum(cells) == pytest.approx(100, abs=0.2), name
    counts = [round(share * 2.56) for share in cells]  # of 256 prompts
    assert [round(100 * n / 256, 1) for n in counts] == pytest.approx(cells, abs=0.06), name
  for table in paper.tables():
    assert 'Llama-2-70B' in table.label
    assert all(key in measures.MEASURES or key == 'harness' for key in table.measures)
    assert all(len(cells) == len(table.columns) for cells in table.rows.values())
  assert by_title['Agreement of the judge with human ranks'].rows['m3'][0] == 81.7
