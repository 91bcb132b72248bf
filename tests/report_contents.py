"""Contents of a report that fill every section of the page, with hostile texts."""
from srlm_jax import schema
from srlm_jax.report import compare, contents, differences, external, paper, run as runs, samples
from srlm_jax.report.doubts import Doubt
from srlm_jax.report.estimates import Value
from srlm_jax.report.measures import Lengths
from srlm_jax.report.rounds import Round, Yield
from srlm_jax.report.steps import Step

HOSTILE = {
    'script': '<script>document.title = "run by a script"</script>',
    'handler': '<img src="http://evil.example/x" onerror="document.title=1"> & "quotes" \'too\'',
    'closing': '</div></details></script></style></textarea><!-- ]]> {{ 7 * 7 }} {% raw %}',
    'long': 'antidisestablishmentarianism' * 40,
    'arabic': 'مرحبا بالعالم \u202e reversed by an override',
    'nul': 'before\0after \x1b[31mred',
    'lines': '\n\n  indented\n\ttabbed\n' + 'many lines\n' * 60}
MODELS = ('m0', 'sft', 'm1', 'm2', 'm3')


def value(x, width=0.1, count=400, of='prompts'):
  return Value(value=x, low=x - width, high=x + width, count=count, of=of)


def lengths(mean):
  return Lengths(count=400, mean=mean, low=mean / 4, quarter=mean / 2, median=0.9 * mean,
                 three_quarters=1.3 * mean, high=2.2 * mean, most=4.0 * mean)


def step(model, against, verdict, change, doubts=()):
  difference = differences.Difference(measure='oracle', model=model, against=against, paired=True,
                                change=change, ours=3.0, theirs=3.0 - change.value)
  sentence = f'{model} against {against}: oracle score {change.value:+.2f}.'
  return Step(model=model, against=against, about='answers', verdict=verdict,
                    sentence=sentence, decided_by='oracle', differences=(difference,),
                    doubts=tuple(Doubt(kind='made', sentence=s) for s in doubts))


def iteration(model, writer):
  funnel = (Yield(label='attempts', count=896),
            Yield(label='prompts', count=600, lost={'held out': 232, 'seen before': 64}),
            Yield(label='responses', count=2400),
            Yield(label='judgements', count=7200),
            Yield(label='pairs', count=591, lost={'all scores equal': 9}))
  histogram = {'0': 662, '1': 1026, '2': 1822, '3': 1841, '4': 996, '5': 853}
  return Round(
      model=model, writer=writer, judge=writer, funnel=funnel, scale=(0.0, 5.0),
      judge_mean=value(2.6), oracle_mean=value(2.4), judge_scores=histogram,
      oracle_scores={'0': 400, '5': 200}, right=value(0.93, 0.02), wrong=value(0.02, 0.01),
      parsed=value(0.98, 0.01, 7200, 'judgements'), characters=lengths(21), tokens=lengths(6),
      chosen=lengths(22), rejected=lengths(20), pairs=None, warnings=())


def sampled(model):
  def candidate(i, text, role):
    judged = tuple(samples.Judged(text=f'Judged: {text}', score=score, reason=reason, finish='eos',
                                  thinking=f'I think {text}' if score else '')
                   for score, reason in ((float(i), ''), (None, 'no score')))
    return samples.Candidate(
        id=f'{i}', text=text, thinking='', finish='length' if i == 3 else 'eos', n_tokens=9,
        score=float(i) if i else None, spread=0.1, role=role, judgements=judged)
  prompts = tuple(
      samples.Prompt(id=name, prompt=f'{name} prompt {text}', paired=True, candidates=tuple(
          candidate(i, text, role) for i, role in enumerate(('', 'rejected', '', 'chosen'))))
      for name, text in HOSTILE.items())
  plain = samples.Candidate(id='p', text='Of course, ears.', thinking='', finish='eos', n_tokens=4,
                            score=4.5, spread=0.0, role='', judgements=(samples.Judged(
                                text='Fine. Score: 4', score=4.5, reason='', finish='eos',
                                thinking=''),))
  prompts += (samples.Prompt(id='plain', prompt='Where do I wear earrings?', paired=False,
                             candidates=(plain,)),)
  return samples.Samples(model=model, rule='The first ones.', prompts=prompts, total=600)


def held_out():
  return samples.HeldOut(rule='The first ones.', total=400, prompts=tuple(
      samples.HeldOutPrompt(id=name, prompt=f'held-out prompt, {name}', answers={
          model: samples.Answer(text=f'{model} says {text}', thinking='', finish='eos', n_tokens=7,
                                oracle=3.5) for model in MODELS[1:]})
      for name, text in HOSTILE.items()))


def outside():
  return external.External(
      head_to_head={'m3_sft/head_to_head.json': schema.HeadToHead(
          a='m3', b='sft', count=256, wins=160, ties=71, losses=25, win_share=0.62, tie_share=0.28,
          loss_share=0.1, win_rate=0.76,
          win_rate_low=0.7, win_rate_high=0.82, p_value=1e-9, first_wins=250, second_wins=180,
          inconsistent=71, left_out=0, unparsed=3, missing=0, characters_a=812.5,
          characters_b=640.25, judge=HOSTILE['script'], cost=1.25)},
      alpaca={'alpaca_m3.json': schema.AlpacaEval(
          generator='m3', win_rate=20.44, standard_error=1.4, wins=160, draws=5, losses=640,
          count=805, missing=0, characters=2552.0, length_controlled=18.2)},
      mt_bench={'mt_bench.json': {model: schema.MtBench(
          overall=7.0, math_code_reasoning=4.1, other=9.0, turn_1=7.5, turn_2=6.5, scored=160,
          no_score=0, absent=0) for model in MODELS[1:]}},
      harness={'harness.json': schema.Harness(
          scores={model: {f'task_{i}': 50.0 + i for i in range(9)} for model in MODELS},
          standard_errors={'m3': {'task_1': 1.25}}, differences={}, missing={}, metrics={})},
      distributions={'distributions.json': distributions()})


def distributions():
  sets = tuple(schema.PromptSet(
      name=name, title=title, count=600, used=200, words=schema.Spread(mean=8.5),
      word_shares=(0.25, 0.5, 0.25), distinct=(schema.Diversity(n=2, mean=0.8, deviation=0.01),))
      for name, title in (('ift', 'IFT'), ('m2', 'prompts of m2')))
  points = tuple(schema.MapPoint(set=s.name, id=str(i), text=HOSTILE['script'], x=(i * 7) % 23,
                                 y=(i * 5) % 19 - k) for k, s in enumerate(sets) for i in range(60))
  return schema.Distributions(
      model='m1', limit=200, missing=('The run has no EFT prompts.',), findings=('Far apart.',),
      sets=sets, points=points, explained_variance=(0.31, 0.12), word_bins=(0, 8, 16),
      distances=(schema.SetDistance(a='ift', b='m2', energy=0.012, low=0.01, high=0.02),),
      nearest=(schema.Nearest(set='m2', rouge_l=schema.Spread(mean=0.4), nearest=(
          schema.Neighbour(text=HOSTILE['arabic'], seed=HOSTILE['long'], rouge_l=0.9),)),))


def compared(a, b):
  return differences.WinTieLoss(a=a, b=b, by='oracle', count=400, wins=200, ties=120, losses=80,
                                rate=value(0.65))


def run(name='demo'):
  """A run with all that a run can have."""
  measured = dict(
      oracle=value(3.3), greedy=value(3.4), characters=value(23.1, 1), finished=value(0.99, 0.005),
      pairwise=value(0.69, 0.03, 971, 'pairs'), pairwise_all=value(0.68, 0.03, 971, 'pairs'),
      oracle_pairwise=value(0.98, 0.01, 825, 'pairs'), parsed=value(0.99, 0.01, 2664, 'judgements'))
  curves = [runs.Metrics(
      step=10 * i, loss=0.69 / (i + 1), margin=0.1 * i, accuracy=0.5 + 0.03 * i,
      chosen_reward=0.05 * i, rejected_reward=-0.05 * i, chosen_logp=-5.0 + 0.1 * i,
      rejected_logp=-5.0 - 0.1 * i, grad_norm=16.0 / (i + 1), tokens_per_second=9e3)
      for i in range(12)]
  trained = schema.TrainingSummary(steps=113, loss=0.2, params='', examples=591, padding_free=0.9,
                                   dropped={'longer than 512 tokens': 3})
  eft = schema.EftSummary(
      examples=283, prompts=300, replies=900, judgements=2700, parsed=2600,
      dropped={'scores against the ranks': 500}, scores_judged={}, scores_before={'0': 40, '4': 67},
      scores={'0': 40, '4': 50})
  return runs.Run(
      name=name, size='tiny', seed=0, facts=('A run of the test.',), stopped='Too few pairs',
      is_sandbox=True, models=MODELS, rows=[],
      values={model: measured for model in MODELS[1:]},
      answer='M3 answers better than the SFT baseline: oracle score +1.22 [1.10, 1.34] on 400 '
             'held-out prompts.',
      steps=(step('m1', 'sft', 'no difference seen', value(0.05)),
             step('m2', 'm1', 'better', value(0.4), ['Answers are 60 % longer.']),
             step('m3', 'm2', 'worse', value(-0.3)), step('m3', 'sft', 'better', value(1.22))),
      doubts=(Doubt(kind='seed', sentence='One seed: other training runs may differ.'),),
      wins=(compared('m2', 'm1'), compared('m3', 'm2')),
      rounds=(iteration('m2', 'm1'), iteration('m3', 'm2')), eft={'m1': eft},
      training={'m2': trained}, curves={'m2': curves, 'm3': curves},
      characters={model: lengths(23) for model in MODELS[1:]},
      tokens={model: lengths(7) for model in MODELS[1:]},
      oracle_scores={model: {'0': 14, '3': 118, '5': 156} for model in MODELS[1:]},
      costs=tuple(runs.StageCost(owner=owner, stage=stage, seconds=seconds, tokens=tokens)
                  for owner in MODELS[3:] for stage, seconds, tokens in (
                      ('prompts', 9.0, None), ('respond', 3.4, 14000), ('judge', 18.9, 310000),
                      ('model', 10.0, None), ('answers', None, None))),
      stopping={'m2': runs.Stopping(step=40, wins=(schema.StepWins(
          step=40, before=0, wins=85, ties=284, losses=31, left_out=0),))},
      unfinished=('m3/answers',), missing=('The run has no m4.',), external=outside(),
      samples=(sampled('m2'), sampled('m3')), held_out=held_out(),
      warnings=('m3/judge: 51% of the scores are 4.',), evaluated={}, ranked=None, differences={})


def one():
  return contents.Contents(title='demo', runs=(run(),), arms=(), across=(), refused=(),
                           paper=paper.tables())


def several():
  """Two runs side by side, and a study's seeds as one."""
  measured = dict(oracle=value(3.2, 0.2, 3, 'seeds'))
  arm = compare.Arm(name='loop', seeds=(0, 1, 2), models=('sft', 'm1'), judges=frozenset(['m1']),
                    changes=('m2:train.beta=0.5',),
                    values={'sft': measured, 'm1': measured}, answer='Yes: it did.',
                    steps=(step('m1', 'sft', 'better', value(0.3, 0.2, 3, 'seeds')),),
                    doubts=(Doubt(kind='seeds', sentence='Only 3 seeds.'),))
  across = compare.Across(model='m3', measure='oracle', run='loop-0', against=HOSTILE['script'],
                          change=value(0.12), ours=3.3, theirs=3.18)
  return contents.Contents(
      title='loop-0, other', runs=(run('loop-0'), run(HOSTILE['script'])), arms=(arm,),
      across=(across,), refused=('The sizes differ.',), paper=paper.tables())


def empty():
  """A run of which only M0 exists."""
  nothing = runs.Run(
      name='empty', size='', seed=None, facts=('A run of one model.',), stopped='',
      is_sandbox=False, models=('m0',), rows=[], values={'m0': {}},
      answer='There are no two models to compare.', steps=(), doubts=(), wins=(), rounds=(), eft={},
      training={}, curves={}, characters={}, tokens={}, oracle_scores={}, costs=(), unfinished=(),
      missing=('model sft', 'model m1'), external=external.External(), samples=(),
      held_out=samples.HeldOut(rule='', prompts=(), total=0), warnings=(), evaluated={},
      ranked=None, differences={})
  return contents.Contents(title='empty', runs=(nothing,), arms=(), across=(), refused=(),
                           paper=paper.tables())
