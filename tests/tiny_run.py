"""Writes a small run: a few records of every stage, without a model, for tests of readers."""
import dataclasses
import pathlib

import samples

from srlm_jax import catalog, config as configs, conversation, records, schema, stage
from srlm_jax.eval import distributions

MODELS = ('sft', 'm1', 'm2')
PROMPTS = ['Name a fruit.', 'Why is the sky blue?', 'Write a word of five letters.']
JUDGED = 'It is relevant.\nScore: {}'


def make(workdir) -> pathlib.Path:
  """A finished run of the models sft, m1 and m2 in the folder `workdir`, with eval/ -> `workdir`.

  The stages that need no model are not run: pairs, health, audit, eft and agreement.
  """
  workdir = pathlib.Path(workdir)
  _seeds(workdir)
  for name in MODELS:
    model(workdir, name)
  config = configs.get('m1', 'tiny')
  _judge(workdir, config, 'judge', [f'q0/{j}' for j in range(3)], n=2)  # q0 is for training
  _round(workdir)
  _evaluations(workdir)
  stage.write_json(workdir / 'results.json', dict(
      size='tiny', models=[dict(model=name) for name in MODELS], stopped='3 pairs are left'))
  return workdir


def finish(workdir):
  """Adds what the stages that `make` leaves out would write."""
  pairs = [samples.pair(f'p{i}', chosen_id=f'p{i}/0', rejected_id=f'p{i}/1') for i in range(3)]
  config = configs.get('m2', 'tiny')
  write(workdir, config, 'pairs', {'pairs.jsonl': pairs, 'scores.jsonl': [
      schema.CandidateScore(id=f'p{i}/{n}', score=3.0, spread=0.5)
      for i in range(3) for n in range(2)]}, schema.PairsSummary(
          strategy='max_min', pairs=3, positives=0, prompts=3, pairs_per_1000_prompts=1000.0,
          judgements=12, parsed=12, score_histogram={'3': 12}, dropped={'all scores equal': 1},
          all_scores_equal=1, spread=0.5, margin=2.0, smallest_margin=1.0, chosen_characters=8.0,
          rejected_characters=8.0, chosen_minus_rejected_characters=0.0, soft_label=None))
  write(workdir, config, 'health', {'health.json': dict(warnings=['m2/judge: few scores.'])})
  write(workdir, config, 'audit', {'audit.json': dict(
      candidates=6, judged=6, pairs=3, prompts=3, right=0.5, tied=0.25, wrong=0.25, judge_mean=2.5,
      oracle_mean=2.0, intervals=dict(judge_mean=[2.0, 3.0], oracle_mean=None),
      oracle_histogram={'0': 2, '3': 4})})
  write(workdir, configs.get('m1', 'tiny'), 'eft', {'eft.jsonl': [
      schema.EftExample(id='q0/0', prompt='Judge.', response=JUDGED.format(3), score=3.0)],
      'dropped.jsonl': [schema.DroppedReply(id='q1/0', reason='no score')]}, schema.EftSummary(
          examples=1, prompts=3, replies=9, judgements=18, parsed=18, dropped={'no score': 8},
          scores_judged={'3': 18}, scores_before={'3': 1, '4': 2}, scores={'3': 1}))
  for name in MODELS:
    numbers = dict(pairwise_accuracy=0.7, pairwise_accuracy_all=0.7, ties=0.1, five_best=None,
                   exact_match=0.3, spearman=0.5, kendall_tau=0.5, pairs=9, pairs_all=9, fives=0,
                   prompts=3, intervals=dict(pairwise_accuracy=[0.6, 0.8], five_best=None),
                   split='eval', replies_without_score=0, parse_rate=1.0)
    write(workdir, configs.get(name, 'tiny'), 'agreement', {'agreement.json': numbers}, numbers)


def write(workdir, config, name: str, files: dict, done=(), params: str = '') -> pathlib.Path:
  """Writes a finished stage: files {name: records, or a JSON object} -> its folder."""
  spec = next(s for s in catalog.STAGES if s.name == name and (
      s.owner or s.program != 'data.seeds') and s.needed(config) or s.name == name == 'model')
  folder = pathlib.Path(spec.folder(workdir, config))
  folder.mkdir(parents=True, exist_ok=True)
  inputs = {str(path.relative_to(workdir)): records.hash_file(path)
            for path in map(pathlib.Path, spec.inputs(workdir, config)) if path.exists()}
  stage.write_json(folder / 'manifest.json', dict(
      format=stage.FORMAT, stage=f'{folder.parent.name}/{name}', params=params, model_files={},
      inputs=inputs, template=EMPTY, config=spec.recorded(config),
      environments=[dict(platform='cpu', devices=1, versions=dict(jax='1'))]))
  for file, content in files.items():
    if file.endswith('.jsonl'):
      records.write(folder / file, content)
    else:
      stage.write_json(folder / file, content)
  if dataclasses.is_dataclass(done):
    done = dataclasses.asdict(done)
  stage.write_json(folder / 'done.json', dict(
      done, files=records.contents(folder), seconds=2.5, generated=100))
  return folder


EMPTY = 'e3b0c44298fc1c14'  # hash of an empty template


def _seeds(workdir):
  said = conversation.in_turns(['Name a fruit.', 'Pear.', 'Another one.'])
  config = configs.get('sft', 'tiny')
  ranked = [samples.ranked(f'q{i}', [0, 1, 1], split, prompt=prompt)
            for i, (prompt, split) in enumerate(zip(PROMPTS, ('train', 'eval', 'tune'),
                                                    strict=True))]
  write(workdir, config, 'seeds', {
      'ift.jsonl': [schema.Demonstration(id=f'i{i}', prompt=prompt, response='Pear.')
                    for i, prompt in enumerate(PROMPTS)] + [schema.Demonstration(
                        id='i9', prompt=conversation.text(said), response='Fig.', messages=said)],
      'ranked.jsonl': ranked,
      'heldout.jsonl': [schema.HeldOutPrompt(id=f'h{i}', prompt=f'Held out {i}?', split='test')
                        for i in range(3)]})


def model(workdir, name):
  """A trained model without its arrays, and its evaluation."""
  config = configs.get(name, 'tiny')
  folder = pathlib.Path(workdir) / name / 'model'
  hashes = folder / 'steps' / '10' / 'hash'
  hashes.mkdir(parents=True)
  stage.write_json(folder / 'config.json', dict(model_type='llama'))
  stage.write_json(folder / 'rows.json', dict(shape=[2, 30]))
  metrics = [dict(step=i, loss=0.5, grad_norm=1.0, chosen_reward=0.1 * i, margin=0.1,
                  tokens_per_second=100.0, alarm_chosen_falling=int(i == 2)) for i in range(3)]
  write(workdir, config, 'model', {'metrics.jsonl': metrics}, schema.TrainingSummary(
      steps=10, loss=0.5, params=f'hash-{name}', examples=8, padding_free=0.5,
      dropped={'too long': 1}), params='hash-m0')
  stage.write_json(hashes / 'metadata', dict(
      format=3, stored=f'hash-{name}', float32='a', bfloat16='b',
      files={'config.json': records.hash_file(folder / 'config.json')}))
  if name == 'm2':
    (folder / 'selected.json').write_text('{"step": 10}')
    stopping = folder.parent / 'stopping'
    stopping.mkdir()
    records.write(stopping / 'wins.jsonl', [
        schema.StepWins(step=10, before=0, wins=2, ties=1, losses=0, left_out=0)])
  answers = [samples.response(f'h{i}/0', prompt=f'Held out {i}?', response='x' * (i + 3))
             for i in range(3)]
  for part in ('answers', 'answers_greedy'):
    write(workdir, config, part, {shard('responses'): answers}, params=f'hash-{name}')
  write(workdir, config, 'oracle', {'oracle.json': dict(
      score=3.5, standard_error=0.1, prompts=3, characters=20.0, finished=1.0, greedy=3.25,
      greedy_standard_error=0.1, judge_pairwise=0.9, judge_pairs=9, judge_exact=0.9,
      judge_replies=9, ceiling=0.7, ceiling_pairs=9, histogram={'3': 3},
      intervals=dict(judge_pairwise=[0.8, 1.0], ceiling=None)),
      'graded.jsonl': [schema.GradedResponse(**dataclasses.asdict(a) | dict(messages=()),
                                             score=float(i)) for i, a in enumerate(answers)]})
  _judge(workdir, config, 'judge_eval', [f'q1/{j}' for j in range(3)], n=2)


def _judge(workdir, config, name, replies, n):
  made = [samples.judgement(reply, j, float((i + j) % 6), text=JUDGED.format((i + j) % 6))
          for i, reply in enumerate(replies) for j in range(n)]
  made[-1] = dataclasses.replace(made[-1], score=None, reason='no score', text='?')
  write(workdir, config, name, {shard('judgements'): made}, schema.JudgeSummary(
      judgements=len(made), parsed=len(made) - 1, lowest=0.0, highest=5.0,
      unparsed={'no score': 1}), params=f'hash-{config.name}')


def _round(workdir):
  """What m2 is trained on, up to the judgements."""
  config = configs.get('m2', 'tiny')
  write(workdir, config, 'prompts', {
      'prompts.jsonl': [schema.Prompt(id=f'p{i}', prompt=PROMPTS[i], author='m1')
                        for i in range(3)],
      'attempts.jsonl': [schema.Attempt(id=f'p{i}', text=PROMPTS[i % 3], finish='eos', reason=why)
                         for i, why in enumerate(('', '', '', 'held out'))]},
        schema.PromptsSummary(prompts=3, wanted=3, attempts=4, near_held_out=1, shortened=0,
                              dropped={'held out': 1}))
  responses = [samples.response(f'p{i}/{n}', prompt=PROMPTS[i], response=f'answer {n}')
               for i in range(3) for n in range(2)]
  write(workdir, config, 'respond', {shard('responses'): responses}, params='hash-m1')
  _judge(workdir, config, 'judge', [r.id for r in responses], n=2)


def _evaluations(workdir):
  folder = pathlib.Path(workdir) / 'eval'
  (folder / 'm2_m1').mkdir(parents=True)
  head_to_head = schema.HeadToHead(
      a='runs/x/m2/answers', b='m1', count=3, wins=2, ties=0, losses=1, win_share=2 / 3,
      tie_share=0.0, loss_share=1 / 3, p_value=1.0, win_rate=2 / 3, win_rate_low=0.0,
      win_rate_high=1.0, first_wins=3, second_wins=3, characters_a=4.0, characters_b=4.0,
      judge='gpt', cost=0.1)
  made = {'m2_m1/head_to_head.json': head_to_head, 'alpaca_m2.json': schema.AlpacaEval(
      generator='m2', win_rate=50.0, standard_error=1.0, wins=2, draws=0, losses=1, count=3,
      missing=0, characters=20.0, length_controlled=40.0, length_controlled_standard_error=1.0),
          'harness.json': schema.Harness(
              scores=dict(m1=dict(arc=30.0), m2=dict(arc=31.0)),
              standard_errors=dict(m1=dict(arc=1.0)), differences=dict(m2=dict(arc=1.0)),
              missing=dict(m1=[]), metrics=dict(arc='acc'), shots=dict(arc=25),
              counts=dict(arc=9), limits=dict(m1=9.0), chats=dict(m1='plain')),
          'distributions.json': _distributions()}
  for name, found in made.items():
    stage.write_json(folder / name, dataclasses.asdict(found))
  stage.write_json(folder / 'mt_bench.json', dict(m2=dataclasses.asdict(schema.MtBench(
      overall=5.0, math_code_reasoning=4.0, other=6.0, turn_1=5.0, turn_2=5.0, scored=4, no_score=0,
      absent=0, judge='gpt'))))


def _distributions() -> schema.Distributions:
  spread = schema.Spread(mean=2.0, quantiles=(1.0,) * len(distributions.QUANTILES))
  return schema.Distributions(
      model='m0', params='p', dtype='float32', limit=10, version=1, missing=('None for m3.',),
      findings=('The distance is small.',), quantiles=distributions.QUANTILES,
      word_bins=distributions.WORD_BINS, explained_variance=(0.5, 0.2),
      sets=tuple(schema.PromptSet(
          name=name, title=name, count=3, used=3, words=spread,
          word_shares=(0.1,) * len(distributions.WORD_BINS),
          distinct=(schema.Diversity(n=1, ngrams=9, mean=0.9, deviation=0.1),))
                 for name in ('ift', 'heldout', 'm2')),
      points=tuple(schema.MapPoint(set=name, id='a', text='Why?', x=x, y=-x)
                   for name, x in (('ift', 0.5), ('m2', -0.25))),
      distances=(schema.SetDistance(a='m2', b='ift', energy=0.1, low=0.0, high=0.2, p_value=0.5),),
      nearest=(schema.Nearest(
          set='m2', rouge_l=spread, rouge_shares=(0.1,) * 10, cosine=spread,
          nearest=(schema.Neighbour(text='a', seed='b', rouge_l=0.5),), farthest=()),))


def shard(stem: str) -> str:
  return records.shard_name(stem, 0, 1)


def consistent(folder):
  """Makes the done.json of a stage that of its files now, if it can be read."""
  path = pathlib.Path(folder) / 'done.json'
  try:
    done = records.read_json(path, '')  # refuses a device
    done['files'] = records.contents(folder)
  except Exception:  # a damaged done.json, or records without sense: they stay as they are
    return
  stage.write_json(path, done)
