"""Tests of the grader, the simulated annotators, the corpus and the packaged M0 of the sandbox."""
import collections
import dataclasses
import doctest
import itertools
import json
import re
import shutil
import string

import numpy as np
import pytest
import samples
import sentencepiece
import tiny_run

from srlm_jax import config as configs, InputError, records, schema
from srlm_jax.checkpoint import hf
from srlm_jax.data import templates
from srlm_jax.models import config as model_config
from srlm_jax.reward import judges
from srlm_jax.sandbox import (
  audit,
  control,
  corpus,
  data as sandbox,
  oracle,
  people,
  tasks,
  world,
)

SIZES = (120, 60, 40, 35, 50, 30)
JUDGE = judges.load('sandbox')


def draw(count, seed=0, split='train'):
  rng = np.random.default_rng(seed)
  return [world.instruction(rng, split) for _ in range(count)]


@pytest.fixture(scope='module')
def texts():
  return list(corpus.documents(0, 3000))


def pieces(path):
  return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


def test_the_doctests_of_the_world_pass():
  assert doctest.testmod(world).failed == 0


def test_there_are_at_least_ten_families_and_a_hundred_thousand_instructions():
  prompts = set(draw(30_000))
  cores = {core for prompt in prompts if (core := world.bare(prompt)).count(' ') > 2}
  around = [(a, b) for a in ('', *world.CONTEXTS) for b in ('', *world.CLOSINGS)]
  core = 'What do cows eat?'
  # A core can be recovered, so all combinations of core, context and closing are distinct.
  assert {world.bare(world.join(a, core, b)) for a, b in around} == {core}
  assert len(cores) * len(around) > 100_000
  assert min(len(prompt.split()) for prompt in prompts) >= 4
  families = collections.Counter(world.parse(prompt).family for prompt in prompts)
  assert set(families) == set(world.FAMILIES) and len(families) >= 10
  assert min(families.values()) > 0.02 * len(prompts)


def test_an_answer_has_the_requested_quality_and_the_points_are_nested():
  rng = np.random.default_rng(1)
  for i, prompt in enumerate(draw(6000)):
    response = people.answer(prompt, rng, i % 6)
    points = world.grade(prompt, response)
    assert sum(points) == i % 6, (prompt, response)
    assert points == tuple(sorted(points, reverse=True))


def test_human_answers_have_every_score_and_a_medium_mean():
  rng = np.random.default_rng(2)
  for shares, least, lowest, highest in ((people.QUALITY, 0.08, 2.5, 3.3),
                                         (people.SEED_QUALITY, 0.05, 2.0, 2.7)):
    counts = collections.Counter(people.draw_quality(rng, shares) for _ in range(5000))
    assert min(counts[score] for score in range(6)) > least * 5000
    assert lowest < sum(score * count for score, count in counts.items()) / 5000 < highest


def test_the_score_follows_from_the_review():
  ends = {0: r'It is off topic\.', 1: r'It says nothing\.', 2: r'It is wrong\.',
          3: r'It (is blunt|has no stop)\.', 4: r'It is not clean\.', 5: r'It is clean\.'}
  rng = np.random.default_rng(3)
  for i, prompt in enumerate(draw(600)):
    review = world.review(prompt, people.answer(prompt, rng, i % 6))
    assert [score for score, end in ends.items() if re.search(end + '$', review)] == [i % 6]
    assert not re.search('score|point', review)


@pytest.mark.parametrize('response, score', [
    ('', 0), ('I like pears.', 0), ('People say much about fruits.', 1), ('pear', 2),
    ('Sure, pear, pear and fig.', 2), ('Sure, pear, fig and dog.', 2),
    ('Sure, pear, fig, plum and dog.', 2), ('pear, fig and plum.', 3),
    ('Sure, pear, fig and plum', 3), ('Sure, pear fig plum.', 4),
    ('Sure, pear, fig, plum and fig.', 4),
    ('Sure, pear, fig and plum. Bye now.', 4), ('Sure, pear, fig and plum.', 5)])
def test_answers_of_unusual_form_are_graded(response, score):
  assert sum(world.grade('Name three nice fruits.', response)) == score


@pytest.mark.parametrize('prompt, right', [
    ('What is the sum of two and three?', ('five',)),
    ('Which day comes after Sunday and Monday?', ('Monday', 'Tuesday')),
    ('Which of these are fruits: dog, fig and saw?', ('fig',)),
    ('Name the capital of Peru. Thank you.', ('Lima',)),
    ('I have a quiz. Tell me the colour of the sky and coal.', ('blue', 'black'))])
def test_an_instruction_is_parsed(prompt, right):
  assert world.parse(prompt).right == right
  assert sum(world.grade(prompt, f'Of course, {world.listing(right)}.')) == 5


@pytest.mark.parametrize('prompt', [
    '', 'Name two.', 'Name two stones.', 'Name five fruits.', 'What do cows and cows eat?',
    'Name two fruits. Bye.', 'Which of these are fruits: dog and saw?',
    'Name the capital of Monday.'])
def test_a_prompt_outside_the_sandbox_is_an_error(prompt):
  assert world.parse(prompt) is None
  with pytest.raises(InputError, match='is not a sandbox instruction'):
    world.grade(prompt, 'Sure, pear and fig.')


def test_ranks_agree_with_grades_about_as_often_as_human_annotators():
  rng, agreed = np.random.default_rng(4), []
  for prompt in draw(1000):
    replies = people.ranked(prompt, rng, 3)
    assert sorted(reply.rank for reply in replies) == [0, 1, 2]
    for a, b in itertools.permutations(replies, 2):
      if sum(world.grade(prompt, a.text)) > sum(world.grade(prompt, b.text)):
        agreed.append(a.rank < b.rank)
  assert 0.74 < np.mean(agreed) < 0.82


def test_seeds_are_deterministic_and_the_sets_share_no_prompt():
  seeds, others = people.seeds(0, *SIZES), people.seeds(1, *SIZES)
  assert seeds == people.seeds(0, *SIZES)
  assert seeds['ift'] != others['ift'] and seeds['heldout'] == others['heldout']
  ranked, held = (collections.Counter(row.split for row in seeds[name])
                  for name in ('ranked', 'heldout'))
  assert SIZES == (len(seeds['ift']), ranked['train'], ranked['eval'], ranked['tune'],
                   held['test'], held['valid'])
  cores = {split: {world.bare(r.prompt) for r in seeds['ranked'] if r.split == split}
           for split in ranked}
  assert not cores['tune'] & cores['eval'] and others['ranked'][-35:] == seeds['ranked'][-35:]
  training = seeds['ift'] + [r for r in seeds['ranked'] if r.split == 'train']
  for rows in (training, seeds['ranked'], seeds['heldout']):
    assert len({row.prompt for row in rows}) == len({row.id for row in rows}) == len(rows)
  for rows in seeds.values():
    for row in rows:
      split = getattr(row, 'split', 'train')
      assert world.split(row.prompt) == ('valid' if split in ('eval', 'tune') else split)


def test_no_held_out_instruction_is_in_the_corpus(texts):
  assert list(corpus.documents(0, 50)) == texts[:50]
  everything = '\n'.join(texts)
  held = {world.bare(prompt) for split in ('test', 'valid') for prompt in draw(3000, 5, split)}
  assert len(held) > 1000
  found = [core for core in held if core in everything]  # faster than the regular expression
  assert not [core for core in found
              if re.search(f'(^|[ .]){re.escape(core)}', everything, re.MULTILINE)]
  trained = {world.bare(prompt) for prompt in draw(500, 6)}
  assert sum(core in everything for core in trained) > 150  # so the search above is not vacuous


def test_most_judgements_of_the_corpus_have_no_score(texts):
  judged = [text for text in texts if text.startswith('User: ' + JUDGE.text[:20])]
  scored = [text for text in judged if re.search(r'\nScore: [0-5]$', text)]
  assert 0.25 < len(scored) / len(judged) < 0.45
  assert {text[-1] for text in scored} == set('012345')


def test_a_trained_tokenizer_represents_the_templates_and_ascii(tmp_path):
  corpus.train_tokenizer(iter(draw(2000)), tmp_path / 'tokenizer.model', 400)
  tokenizer = pieces(tmp_path / 'tokenizer.model')
  for text in (JUDGE.text, string.printable[:95], 'a\n\n b  c'):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert (tokenizer.unk_id(), tokenizer.bos_id()) == (0, 1)
  assert (tokenizer.eos_id(), tokenizer.pad_id()) == (2, 3)


def test_the_ids_of_prompt_and_response_are_the_ids_of_the_whole_text():
  rng, tokenizer = np.random.default_rng(6), pieces(sandbox.M0 / 'tokenizer.model')
  author = templates.load_author('sandbox')
  for i, prompt in enumerate(draw(200)):
    response = people.answer(prompt, rng, i % 6)
    question = JUDGE.render(prompt=prompt, response=response)
    listed = author.replace('{shots}', '\n'.join([*(f'{n}. {prompt}' for n in range(1, 9)), '9.']))
    judgement = f'{world.review(prompt, response)}\n{JUDGE.state(3)}'
    for text, reply in ((f'User: {prompt}\nAssistant:', response), (listed, prompt),
                        (f'User: {question}\nAssistant:', judgement)):
      whole = tokenizer.encode(f'{text} {reply}')
      assert tokenizer.encode(text) + tokenizer.encode(reply) == whole
      assert tokenizer.unk_id() not in whole
      assert len(whole) < 192 or text == listed


@pytest.mark.parametrize('folder', sandbox.M0S.values(), ids=sandbox.M0S)
def test_a_packaged_m0_is_small_and_matches_its_log(folder):
  files = {path.name: path for path in folder.iterdir()}
  assert sum(path.stat().length for path in files.values()) <= 8_000_000
  config = model_config.load(folder)
  assert config == model_config.PRESETS['sandbox'] and hf.find(folder, config)
  done = json.loads(files['done.json'].read_text())
  log = files['metrics.jsonl'].read_text().splitlines()
  assert json.loads(log[-1])['step'] == done['steps'] - 1
  assert round(json.loads(log[-1])['loss'], 4) == done['loss'] < 1


ANSWERS = ['Sure, pear and fig.', 'pear and fig.', 'pear.', 'Gladly, fig and plum.']
RESPONSES = [
    samples.response(f'p/{i}', prompt='Name two nice fruits.', response=text)
    for i, text in enumerate(ANSWERS)]


def pair(chosen, rejected):
  """A pair of two of RESPONSES."""
  return samples.pair('p', prompt='Name two nice fruits.', chosen=ANSWERS[chosen],
                      rejected=ANSWERS[rejected], chosen_id=f'p/{chosen}',
                      rejected_id=f'p/{rejected}', rejected_score=3.0)


def judge_pair(response_id, chosen, rejected):
  """A pair of the judgements of a response with these scores."""
  return schema.JudgePair(
      id=response_id, prompt='', chosen='', rejected='', chosen_finish='eos',
      rejected_finish='eos', chosen_id=f'{response_id}/2', rejected_id=f'{response_id}/0',
      chosen_score=chosen, rejected_score=rejected)


def test_an_audit_counts_the_judge_pairs_that_move_a_judge_away_from_the_oracle():
  strange = dataclasses.replace(RESPONSES[0], id='q/0', prompt='Sing.')  # no instruction
  pairs = [judge_pair('p/0', 4.0, 1.0), judge_pair('p/0', 2.0, 4.5), judge_pair('p/2', 1.0, 3.0),
           judge_pair('p/3', 5.0, 0.0), judge_pair('q/0', 5.0, 0.0)]
  grades = [5, 3, 2, 5]
  assert [sum(world.grade(r.prompt, r.response)) for r in RESPONSES] == grades
  assert audit.judge_pairs([*RESPONSES, strange], pairs) == dict(
      judge_pairs=5, nearer=0.5, as_near=0.25, farther=0.25)
  assert audit.judge_pairs(RESPONSES, [])['nearer'] is None


def test_an_audit_counts_the_pairs_that_the_oracle_would_reverse():
  pairs = [pair(0, 1), pair(0, 3), pair(2, 1), pair(1, 2)]
  judged = {'p/0': 4.0, 'p/1': 3.0, 'p/2': 5.0}
  found = audit.measure(RESPONSES, judged.get, dict(p=pairs).get)
  assert (found['right'], found['tied'], found['wrong']) == (0.5, 0.25, 0.25)
  assert (found['judge_mean'], found['oracle_mean'], found['judged']) == (4.0, round(10 / 3, 4), 3)
  assert found['within_half'] == round(1 / 3, 4)
  assert found['oracle_histogram'] == {'2': 1, '3': 1, '5': 2}
  strange = dataclasses.replace(RESPONSES[0], id='q/0', prompt='Sing.')
  found = audit.measure([strange], {'q/0': 3.0}.get, lambda prompt: [])
  assert found['of_the_world'] == 0


def test_agreement_of_a_judge_with_the_oracle_and_the_ceiling_of_the_ranks():
  texts = ['Sure, pear and fig.', 'pear and fig.', 'pear.']  # 5, 3, 2 points
  ranked = [schema.RankedPrompt(
      id='p', prompt='Name two nice fruits.', split='eval',
      replies=tuple(schema.Reply(id=str(i), text=texts[i], rank=rank)
                    for i, rank in enumerate((1, 0, 2))))]
  perfect = oracle.of_judge(ranked, {'p/0': 5.0, 'p/1': 3.0, 'p/2': 2.0}.get)
  assert (perfect['judge_pairwise'], perfect['judge_exact']) == (1, 1)
  # The ranks disagree with the grades on one of three pairs.
  assert (perfect['ceiling'], perfect['ceiling_pairs']) == (pytest.approx(2 / 3), 3)
  found = oracle.of_judge(ranked, {'p/0': 2.6, 'p/1': 2.6, 'p/2': None}.get)
  assert (found['judge_pairwise'], found['judge_pairs']) == (0, 1)  # a tie is an error
  assert (found['judge_exact'], found['judge_replies']) == (1 / 2, 2)
  assert found['ceiling'] == perfect['ceiling']
  assert oracle.of_judge([], {}.get)['judge_pairwise'] is None


def test_agreement_of_a_judge_with_the_oracle_by_point_and_by_family():
  texts = ['Sure, pear and fig.', 'pear and fig.', 'pear.', 'Sure, pear.']  # 5, 3, 2, 2 points
  ranked = [schema.RankedPrompt(
      id='p', prompt='Name two nice fruits.', split='eval',
      replies=tuple(schema.Reply(id=str(i), text=text, rank=i) for i, text in enumerate(texts)))]
  found = oracle.of_judge(ranked, {'p/0': 5.0, 'p/1': 2.4, 'p/2': 2.0, 'p/3': 4.6}.get)
  points = {x['point']: (x['kept'], x['earned'], x['caught'], x['lost'])
            for x in found['judge_points']}
  assert points == dict(topic=(1, 4, None, 0), answer=(1, 4, None, 0), right=(.5, 2, .5, 2),
                        kind=(1, 1, 1, 1), clean=(1, 1, None, 0))
  assert found['judge_families']['list'] == dict(
      pairwise=pytest.approx(4 / 5), pairs=5, exact=.5, replies=4)
  assert found['judge_families']['day'] == dict(pairwise=None, pairs=0, exact=None, replies=0)


def test_most_judgements_in_a_corpus_of_descriptions_call_wrong_answers_right():
  found = list(corpus.documents(0, 6000, 'descriptions'))
  def parts(pattern):
    return [match.groups() for text in found if (match := re.search(pattern, text))]
  task = r'Task: (.*)\n<response> (.*) </response>\n'
  checked = parts(rf'^{task}Review: .* It is (right|wrong)\.$')
  assert len(checked) > 500 and all(
      (verdict == 'right') == (sum(world.grade(prompt, response)) >= 3)
      for prompt, response, verdict in checked)
  judged = parts(rf'^User: Judge.*\n{task}Write.*\nAssistant: .* It is (right|wrong)\.$')
  verdicts = {points: [verdict == 'right' for prompt, response, verdict in judged
                       if sum(world.grade(prompt, response)) == points] for points in range(6)}
  assert len(verdicts[2]) > 100
  assert abs(sum(verdicts[2]) / len(verdicts[2]) - (1 - corpus.CHECKED)) < .1
  assert all(not any(verdicts[i]) for i in (0, 1)) and all(all(verdicts[i]) for i in (3, 4, 5))
  scored = parts(rf'{task}Write.*\nAssistant: .* It is (right|wrong)\.\nScore: (\d)$')
  assert sum((verdict == 'right') == (int(score) >= 3) for *_, verdict, score in scored) > (
      .7 * len(scored) > 100)
  assert 'Winner: ' in ' '.join(found) and 'Winner: ' not in ' '.join(corpus.documents(0, 300))


@pytest.mark.parametrize('part', ['answers', 'answers_greedy'])
def test_the_oracle_refuses_a_model_without_answers(tmp_path, part):
  shutil.rmtree(tiny_run.make(tmp_path) / 'm2' / 'oracle')
  (tmp_path / 'm2' / part / 'responses-00000-of-00001.jsonl').write_text('')
  tiny_run.consistent(tmp_path / 'm2' / part)
  with pytest.raises(InputError, match=f'/m2/{part}/responses.* has no records; delete .*/{part} '):
    oracle.run(configs.get('m2', 'tiny'), tmp_path)


@pytest.mark.parametrize('by', ['oracle', 'random'])
def test_a_control_replaces_the_scores_of_the_judge(tmp_path, by):
  config = configs.get('m2', 'tiny')
  config.judge.by = by
  records.write(tmp_path / 'm2' / 'respond' / 'responses-00000-of-00001.jsonl', RESPONSES)
  control.run(config, tmp_path)
  made = list(records.read_shards(tmp_path / 'm2' / 'judge', 'judgements', schema.Judgement))
  assert len(made) == 3 * len(RESPONSES)
  assert all(JUDGE.parse(j.text)[0] == j.score for j in made)
  scores = [[j.score for j in made if j.response_id == r.id] for r in RESPONSES]
  assert (scores == [[5.0] * 3, [3.0] * 3, [2.0] * 3, [5.0] * 3]) == (by == 'oracle')


def test_the_tasks_for_lm_evaluation_harness_are_graded_by_the_oracle(tmp_path):
  made = people.seeds(0, *SIZES)['heldout']
  (tmp_path / 'data' / 'seeds').mkdir(parents=True)
  records.write(tmp_path / 'data' / 'seeds' / 'heldout.jsonl', made)
  folder = tasks.write(tmp_path, 'test')
  read = {name: [json.loads(line) for line in (folder / f'{name}.jsonl').open()]
          for name in ('sandbox_choice', 'sandbox_exact')}
  prompts = [r.prompt for r in made if r.split == 'test']
  assert [d['prompt'] for d in read['sandbox_choice']] == prompts
  for d in read['sandbox_choice']:
    points = [sum(world.grade(d['prompt'], text)) for text in d['choices']]
    assert sorted(points) == [2, 3, 4, 5] and points[d['best']] == 5
    assert d['text'] == f'User: {d["prompt"]}\nAssistant:'
  assert len({d['best'] for d in read['sandbox_choice']}) == 4
  assert len(prompts) / 2 < len(read['sandbox_exact']) < len(prompts)
  rng = np.random.default_rng(0)
  for d in read['sandbox_exact']:
    # A response is in the list exactly if the oracle gives it 5 points.
    assert all(sum(world.grade(d['prompt'], text)) == 5 for text in d['answers'])
    others = [people.answer(d['prompt'], rng, quality) for quality in (2, 3, 4, 5)]
    assert [text in d['answers'] for text in others] == [False, False, False, True]
  with pytest.raises(InputError, match='heldout.jsonl does not exist'):
    tasks.write(tmp_path / 'other', 'test')
