import dataclasses
import doctest
import json
import pathlib
import random
import subprocess
import sys

from conftest import run_main
import ml_collections
import pytest

from srlm_jax import InputError
from srlm_jax.data import seeds, splits

PAPER = {'ift': 3200, 'test_prompts': 256, 'valid_prompts': 253, 'ranked_train': 1630,
         'ranked_eval': 541}
FILES = ('ift.jsonl', 'heldout.jsonl', 'ranked.jsonl', 'counts.json')


def record(name, *ranks, prompt=None):
  """A prompt with one reply per rank."""
  replies = [{'id': f'{name}-{i}', 'text': f'Reply {i} to {name}', 'rank': rank}
             for i, rank in enumerate(ranks)]
  return {'id': name, 'prompt': prompt or f'Prompt {name}?', 'replies': replies}


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def run(path, workdir, seed=0, source='ranked', synthetic=False, **asked):
  data = PAPER | {'source': source, 'path': str(path), 'synthetic': synthetic} | asked
  seeds.make(ml_collections.ConfigDict({'seed': seed, 'data': data}), workdir)
  folder = pathlib.Path(workdir) / 'data' / 'seeds'
  assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
  return {name: [json.loads(line) for line in (folder / name).open()] for name in FILES}


def raw(workdir):
  return {name: (pathlib.Path(workdir) / 'data' / 'seeds' / name).read_bytes() for name in FILES}


def check(out):
  """Checks that no prompt is used twice and that each prompt and reply is kept or dropped once."""
  rows = [r for name in FILES[:3] for r in out[name]]
  assert len(rows) == len({r['id'] for r in rows})
  assert len(rows) == len({seeds.normalize(r['prompt']) for r in rows})
  for r in out['ranked.jsonl']:
    ranks = [reply['rank'] for reply in r['replies']]
    assert ranks == [sum(other < rank for other in ranks) for rank in ranks] == sorted(ranks)
    assert len(r['replies']) > 1 and ranks[-1] > 0 and r['split'] in ('train', 'eval')
  assert {r['split'] for r in out['heldout.jsonl']} <= {'test', 'valid'}
  [counts] = out['counts.json']
  dropped = {what: sum(reasons.values()) for what, reasons in counts['dropped'].items()}
  assert counts['read']['prompts'] == len(rows) + dropped['prompts']
  kept_replies = sum(counts['kept_replies'].values())
  assert kept_replies == len(out['ift.jsonl']) + sum(len(r['replies']) for r in out['ranked.jsonl'])
  assert counts['read']['replies'] == kept_replies + dropped['replies']
  return counts


def various():
  """Prompts usable in every set, in some sets and in none; and two pairs with the same text."""
  rows = [record(f'both{i:02d}', 1, 0, 2) for i in range(30)]
  rows += [record(f'tie{i}', 0, 0, 2) for i in range(6)]
  rows += [record(f'alone{i}', *((0, 0) if i % 2 else (0,))) for i in range(6)]
  return rows + [record('none'), record('twin', 0, 1, prompt='  prompt BOTH00? '),
                 record('twins', 0, 1, prompt='Ｐrompt tie0?')]


def test_sets_are_disjoint_and_filled_with_suitable_prompts(tmp_path):
  out = run(write(tmp_path / 'x.jsonl', various()), tmp_path, ift=20, test_prompts=4,
            valid_prompts=2, ranked_train=10, ranked_eval=4)
  counts = check(out)
  assert counts['kept'] == counts['asked']
  assert counts['dropped']['prompts'] == {
      'duplicate prompt': 2, 'more than requested': 2, 'no best reply and no ranking': 1}
  for r in out['ift.jsonl']:
    # The first of equally good replies.
    assert r['source'] == 'ranked' and (r['id'].startswith('twin') or r['response'] == (
        f'Reply {int(r["id"].startswith("both"))} to {r["id"]}'))
  order = {'both': [1, 0, 2], 'tie': [0, 1, 2], 'twin': [0, 1]}
  for r in out['ranked.jsonl']:
    kind = r['id'].rstrip('s0123456789')
    assert [reply['id'] for reply in r['replies']] == [f'{r["id"]}-{i}' for i in order[kind]]
    ranks = [0, 0, 2] if kind == 'tie' else list(range(len(order[kind])))
    assert [reply['rank'] for reply in r['replies']] == ranks


def test_the_division_depends_on_the_seed_and_not_on_the_order_of_files_and_lines(tmp_path):
  rows = various()
  shuffled = random.Random(0).sample(rows, len(rows))
  paths = [write(tmp_path / 'a.jsonl', rows), write(tmp_path / 'b.jsonl', shuffled)]
  write(tmp_path / 'c2.jsonl', rows[:20]), write(tmp_path / 'c1.jsonl', rows[20:])
  paths += [tmp_path / 'c?.jsonl', f'{tmp_path}/c2.jsonl, {tmp_path}/c1.jsonl', paths[0]]
  outputs = []
  for i, path in enumerate(paths):
    check(run(path, tmp_path / str(i), seed=3))
    outputs.append(raw(tmp_path / str(i)))
  assert all(output == outputs[0] for output in outputs)
  check(run(paths[0], tmp_path / 'other', seed=4))
  assert raw(tmp_path / 'other')['ift.jsonl'] != outputs[0]['ift.jsonl']


def test_too_few_prompts_are_divided_in_the_requested_proportions(tmp_path, capsys):
  path = write(tmp_path / 'x.jsonl', [record(str(i), 0, 1) for i in range(588)])
  assert tuple(check(run(path, tmp_path))['kept'].values()) == (320, 26, 25, 163, 54)
  short = [line for line in capsys.readouterr().out.splitlines() if 'Short' in line]
  assert short == [
      '  Short: ift 320 of 3,200', '  Short: test_prompts 26 of 256',
      '  Short: valid_prompts 25 of 253', '  Short: ranked_train 163 of 1,630',
      '  Short: ranked_eval 54 of 541']


def turn(name, *ranks, said=()):
  """The input of `divide` for a turn; `said` are the earlier user messages of a later turn."""
  return splits.SeedPrompt(
      later=bool(said), order=name, id=name, index=0, text=name, messages=(*said, name),
      replies=len(ranks), best=not said and 0 in ranks, ordered=len(set(ranks)) > 1)


def test_the_division_wastes_nothing_and_keeps_the_proportions():
  def prompts(kinds):
    return [turn(str(i), *ranks) for i, ranks in enumerate(kinds)]

  rng = random.Random(0)
  for _ in range(300):
    kinds = [rng.choice(((0,), (0, 1), (1, 2))) for _ in range(rng.randrange(40))]
    asked = {name: rng.randrange(15) for name in PAPER}
    sets = splits.divide(prompts(kinds), asked)
    used = [p.id for members in sets.values() for p in members]
    assert len(used) == len(set(used)) and all(len(sets[name]) <= asked[name] for name in asked)
    assert all(p.best for name in splits.BEST_SETS for p in sets[name])
    assert all(p.replies > 1 for name in splits.RANKED_SETS for p in sets[name])
    best = kinds.count((0,)) + kinds.count((0, 1))
    ranked = kinds.count((1, 2)) + kinds.count((0, 1))
    want_best = sum(asked[name] for name in splits.BEST_SETS)
    want_ranked = sum(asked[name] for name in splits.RANKED_SETS)
    assert len(used) == min(len(kinds), best + want_ranked, want_best + ranked,
                            want_best + want_ranked,
                            min(best, want_best) + min(ranked, want_ranked))
  sets = splits.divide(prompts([(0, 1)] * 588), PAPER)
  assert [len(members) for members in sets.values()] == [320, 26, 25, 163, 54]
  assert doctest.testmod(splits).failed == 0


def sizes(sets):
  return tuple(len(members) for members in sets.values())


def conversations(number, *later):
  """The prompts of `number` conversations: a first turn and later[i % len(later)] later ones."""
  rows = []
  for i in range(number):
    rows.append(turn(f'{i:04d}', 0, 1, 2))
    size = later[i % len(later)] if later else 0
    rows += [turn(f'{i:04d}/{j}', 0, 1, said=(f'{i:04d}',)) for j in range(size)]
  return sorted(rows)


@pytest.mark.parametrize('number, later, expected', [
    (6000, (), (3200, 256, 253, 2000, 190)),         # enough of everything
    (3800, (1, 2, 0, 2), (3200, 256, 253, 2000, 190)),  # the published size
    (3760, (1, 2, 0, 2), (3200, 256, 253, 2000, 153)),  # 51 conversations left, with 3 prompts
    (3730, (1, 6, 0, 2), (3200, 256, 253, 2000, 147)),  # 21 left, with 7 prompts
    (3709, (1, 2, 0, 2), (3154, 252, 250, 2000, 119)),  # the minimum: 190 x 3709 / 5899
    (3800, (0, 0, 1), (3200, 256, 253, 1006, 182)),  # few later turns
    (3800, (), (2062, 165, 163, 1288, 122)),         # no later turn: the requested proportions
    (186, (1, 2, 0, 2), (158, 13, 12, 198, 6)),
    (186, (), (101, 8, 8, 63, 6)),
    (12, (), (7, 1, 0, 4, 0)),
])
def test_ift_test_and_validation_are_filled_first_and_no_set_is_left_empty(number, later, expected):
  asked = PAPER | {'ranked_train': 2000, 'ranked_eval': 190}
  assert sizes(splits.divide(conversations(number, *later), asked)) == expected


def test_held_out_and_evaluation_conversations_are_in_no_other_set():
  rng = random.Random(0)
  for _ in range(200):
    rows = [turn(f'{i}', *range(rng.randrange(1, 4))) for i in range(rng.randrange(1, 40))]
    for i in range(rng.randrange(60)):
      # The first turn may be unusable. A user may repeat the first message of another conversation.
      said = [str(rng.randrange(40)), str(rng.randrange(40))]
      if rng.random() >= 0.2:
        said = said[:1]
      rows.append(turn(f'later{i}', 0, 1, said=said))
    asked = {name: rng.randrange(15) for name in PAPER}
    sets = splits.divide(sorted(rows), asked)
    assert list(sets) == list(asked) and all(len(sets[name]) <= asked[name] for name in asked)
    used = [p.id for members in sets.values() for p in members]
    assert len(used) == len(set(used))
    assert all(p.best and not p.later for name in splits.BEST_SETS for p in sets[name])
    assert all(p.ordered for name in splits.RANKED_SETS for p in sets[name])
    for name in ('test_prompts', 'valid_prompts', 'ranked_eval'):
      first = {p.messages[0] for p in sets[name]}
      others = {message for other in sets if other != name
                for p in sets[other] for message in p.messages}
      assert first.isdisjoint(others)


def test_changed_files_of_the_same_name_are_read_again(tmp_path):
  path = write(tmp_path / 'x.jsonl', [record(f'a{i}', 0, 1) for i in range(4)])
  assert {r['id'][0] for r in run(path, tmp_path)['ift.jsonl']} == {'a'}
  assert len(list((tmp_path / 'data' / 'tfds' / 'seed_turns').iterdir())) == 1
  write(path, [record(f'b{i}', 0, 1) for i in range(4)])
  assert {r['id'][0] for r in run(path, tmp_path)['ift.jsonl']} == {'b'}


def test_the_copy_keeps_every_field_over_several_shards(tmp_path, monkeypatch):
  monkeypatch.setattr(seeds, 'SHARD', 4)
  rows = [record(str(i), 0, 1) for i in range(9)] + [record('none')]
  rows[0]['prompt'] = rows[0]['replies'][0]['text'] = 'Ünï\x00çødé 🙂\n\n'
  files = seeds.Files(source='ranked', paths=(str(write(tmp_path / 'x.jsonl', rows)),))
  turns = seeds.Turns(files, tmp_path)
  assert len(list(tmp_path.rglob('*.array_record-*'))) == 3
  back = [turns[i] for i in (9, *range(9))]
  assert back == [*files.turns()][9:] + [*files.turns()][:9] and len(turns) == 10
  assert dataclasses.asdict(back[1]) == {
      'id': '0', 'turn': 0, 'prompt': 'Ünï\x00çødé 🙂\n\n', 'dropped': '', 'messages': (),
      'replies': [
          {'id': '0-0', 'text': 'Ünï\x00çødé 🙂\n\n', 'rank': 0, 'dropped': ''},
          {'id': '0-1', 'text': 'Reply 1 to 0', 'rank': 1, 'dropped': ''}]}


def test_files_without_usable_prompts_are_an_error(tmp_path):
  empty = write(tmp_path / 'empty.jsonl', [])
  bare = write(tmp_path / 'bare.jsonl', [record('a')])
  alone = write(tmp_path / 'alone.jsonl', [record('a', 0)])
  for path, word in (
      ('', 'data.path'), (tmp_path / 'no*.jsonl', 'is not a file'), (tmp_path, 'is not a file'),
      (empty, 'no conversation'), (bare, 'yields no ift'), (alone, 'yields no ranked')):
    with pytest.raises(InputError, match=word):
      run(path, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'data' / 'seeds').exists()


def test_a_wrong_source_is_an_error(tmp_path):
  flags = ['--config=configs/sft.py:stories', f'--workdir={tmp_path}/run',
           '--config.data.path=x.jsonl']
  for source, word in (('sandbox', 'python -m srlm_jax.sandbox'),
                       ('oast', "'oast'; choose oasst, ranked or sandbox")):
    with pytest.raises(InputError, match=word):
      run('x.jsonl', tmp_path / 'run', source=source)
  code, said, wrong = run_main('data.seeds', *flags, '--config.data.source=sandbox')
  assert code == 1 and wrong.startswith('error: ') and wrong.count('\n') == 1
  assert 'srlm_jax.sandbox' in wrong
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('modules, unneeded', [
    ('seeds', ['tensorflow']), ('oasst, ranked, splits, turns', ['jax', 'tensorflow'])])
def test_modules_import_without_heavy_packages(modules, unneeded):
  code = (f'import sys; from srlm_jax.data import {modules}; '
          f'sys.exit(len(set({unneeded}) & set(sys.modules)))')
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def published(path, trees, flat):
  """Writes synthetic OASST1 trees; 10,000 trees have about the published size.

  A tree has 9 messages of 680 characters on average; 10,000 trees have 60 MB of text.
  """
  rng = random.Random(0)
  words = ' '.join(''.join(rng.choices('etaoinshrdlu', k=rng.randint(2, 9)))
                   for _ in range(100_000))

  def message(name, parent, role, rank=None):
    start = rng.randrange(len(words) - 1360)
    return {'message_id': f'{name:036d}', 'parent_id': parent and f'{parent:036d}', 'role': role,
            'lang': 'en', 'text': words[start:start + rng.randrange(1360)] + '.', 'rank': rank,
            'deleted': False, 'synthetic': False, 'review_result': True,
            'tree_state': 'ready_for_export'}

  with path.open('w') as f:
    for i in range(0, trees * 10, 10):
      prompt = message(i + 1, None, 'prompter')
      replies = [message(i + 2 + rank, i + 1, 'assistant', rank) for rank in range(3)]
      deeper = [message(i + 5 + j, i + 2, 'prompter') for j in range(5)]
      if flat:
        rows = [*deeper, *replies, prompt]  # every reply before its prompt
      else:
        rows = [{'tree_state': 'ready_for_export', 'prompt': prompt | {'replies': replies}}]
        replies[0]['replies'] = deeper
      f.writelines(json.dumps(row) + '\n' for row in rows)
  return path


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path):
  # A small process launches the program, because a child inherits the peak of its parent.
  launch = ('import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); '
            'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)')

  def peak(path, workdir, *flags):
    """Peak memory in MB of `python -m srlm_jax.data.seeds` on a file."""
    command = [sys.executable, '-m', 'srlm_jax.data.seeds', f'--workdir={tmp_path / workdir}',
               '--config=configs/sft.py:70b', f'--config.data.path={path}', *flags]
    return int(subprocess.check_output([sys.executable, '-c', launch, *command])) * 1024 / 1e6

  floor = peak(write(tmp_path / 'few.jsonl', various()), 'few', '--config.data.source=ranked')
  for kind in ('trees', 'flat'):
    sizes = [published(tmp_path / f'{kind}{n}.jsonl', n, kind == 'flat') for n in (10_000, 40_000)]
    once, four_times = (peak(path, path.stem) for path in sizes)
    print(f'{kind}: {[round(path.stat().st_size / 1e6) for path in sizes]} MB of file; peak '
          f'{floor:.0f} MB on 45 prompts, {once:.0f} on 10,000 trees, {four_times:.0f} on 40,000')
    assert once < floor + 50 and four_times < once + 50
