import copy
import gzip
import json
import random

from conftest import DATA
import pytest
import test_seeds
from test_seeds import check, FILES, PAPER, raw

from srlm_jax import InputError
from srlm_jax.data import oasst, records


def message(name, text, **fields):
  return {'message_id': name, 'text': text, 'role': 'prompter', 'lang': 'en', 'review_result': True,
          'deleted': False, 'synthetic': False} | fields


def tree(name, *ranks, text=None, state='ready_for_export', **fields):
  """One published tree: a reply for each rank, and a second turn under the first reply."""
  replies = [message(f'{name}-{i}', f'Reply {i} to {name}', role='assistant', parent_id=name, rank=rank,
                     replies=[]) for i, rank in enumerate(ranks)]
  if replies:
    replies[0]['replies'] = [message(f'{name}-0-0', 'And then?', parent_id=f'{name}-0', replies=[])]
  prompt = message(name, text or f'Prompt {name}?', replies=replies) | fields
  return {'message_tree_id': name, 'tree_state': state, 'prompt': prompt}


def flat(trees):
  """The same conversations in the flat format, which writes as null what trees leave out."""
  rows, queue = [], [(t['prompt'], t) for t in trees]
  while queue:
    m, t = queue.pop(0)
    rows.append({'parent_id': None, 'rank': None, 'model_name': None} | {k: m[k] for k in m if k != 'replies'}
                | {'message_tree_id': t['message_tree_id'], 'tree_state': t['tree_state']})
    queue += [(reply, t) for reply in m['replies']]
  return rows


def write(path, rows):
  data = ''.join(json.dumps(row) + '\n' for row in rows).encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def run(path, workdir, **asked):
  out = test_seeds.run(path, workdir, source='oasst', **asked)
  for r in out['ranked.jsonl']:
    assert [reply['rank'] for reply in r['replies']] == list(range(len(r['replies'])))
  assert {r['source'] for name in ('ift.jsonl', 'ranked.jsonl') for r in out[name]} == {'oasst1'}
  return out


def mixed():
  """Twenty good trees, and one tree or reply for each reason to drop."""
  trees = [tree(f'good{i:02d}', 1, 0, 2) for i in range(20)]
  trees += [
      tree('deleted', 0, 1, deleted=True), tree('foreign', 0, 1, lang='pt-BR'), tree('tie', 0, 1, 1),
      tree('robot', 0, 1, synthetic=True), tree('spam', 0, 1, state='spam'), tree('blank', 0, 1, text=' \n'),
      tree('unranked', None, None), tree('second', 1), tree('silent'),
      tree('twin', 0, 1, text='  prompt GOOD00? '),
      tree('holes', 4, 0, 1, 2, 3, None),
  ]
  for reply, fields in zip(trees[-1]['prompt']['replies'], (
      {}, {'deleted': True}, {'lang': 'de'}, {'synthetic': True}, {'text': ''}, {}), strict=True):
    reply.update(fields)
  return trees


def test_both_formats_and_any_order_give_the_same_bytes(tmp_path):
  trees = mixed()
  shuffled = copy.deepcopy(trees)
  random.Random(1).shuffle(shuffled)
  rows = flat(trees)
  random.Random(2).shuffle(rows)
  paths = [write(tmp_path / 'a.trees.jsonl', trees), write(tmp_path / 'b.trees.jsonl.gz', shuffled),
           write(tmp_path / 'c.messages.jsonl.gz', flat(trees)), write(tmp_path / 'd.messages.jsonl', rows)]
  for name, part in (('e1', rows[:30]), ('e2', rows[30:]), ('f', trees[:9]), ('g', flat(trees[9:]))):
    write(tmp_path / f'{name}.jsonl', part)
  paths += [tmp_path / 'e?.jsonl', f'{tmp_path}/f.jsonl, {tmp_path}/g.jsonl']
  outputs = []
  for i, path in enumerate(paths):
    check(out := run(path, tmp_path / f'run{i}', seed=3))
    assert all(r['response'] == f'Reply 1 to {r["id"]}' for r in out['ift.jsonl'] if r['id'] != 'twin')
    outputs.append(raw(tmp_path / f'run{i}'))
  assert all(output == outputs[0] for output in outputs)
  run(paths[0], tmp_path / 'other', seed=4)
  assert raw(tmp_path / 'other')['ift.jsonl'] != outputs[0]['ift.jsonl']


def test_each_reason_to_drop_is_counted(tmp_path, capsys):
  path = write(tmp_path / 'x.jsonl', mixed())
  asked = {'ift': 8, 'test_prompts': 2, 'valid_prompts': 1, 'ranked_train': 6, 'ranked_eval': 2}
  counts = check(run(path, tmp_path / 'all', **asked))
  assert counts['dropped']['prompts'] == {
      'deleted': 1, 'empty': 1, 'more than asked for': 1, 'no best reply, nor two ranked': 4,
      'not English': 1, 'ranks repeat': 1, 'same text as another': 1, 'synthetic': 1,
      'tree not ready for export': 1}
  assert counts['kept'] == counts['asked'] == asked
  printed = capsys.readouterr().out
  assert 'ranks repeat' in printed and 'Fewer than asked' not in printed
  # Alone, so that the tree with holes is not dropped whole: its last rank stays, without a best reply.
  holes = mixed()[-1]
  holes['prompt']['replies'].append(message('more', 'One more', role='assistant', rank=7, replies=[]))
  out = run(write(tmp_path / 'y.jsonl', [tree('good', 0), holes]), tmp_path / 'holes', ift=1, test_prompts=0,
            valid_prompts=0, ranked_eval=0)
  assert check(out)['dropped'] == {'prompts': {}, 'replies': {
      'deleted': 1, 'empty': 1, 'not English': 1, 'synthetic': 1, 'unranked': 1}}
  assert 'Fewer than asked, 2 of 1631' in capsys.readouterr().out
  assert out['ift.jsonl'] == [{'id': 'good', 'prompt': 'Prompt good?', 'response': 'Reply 0 to good',
                               'source': 'oasst1'}]
  assert out['ranked.jsonl'] == [{
      'id': 'holes', 'prompt': 'Prompt holes?', 'split': 'train', 'replies': [
          {'id': 'holes-0', 'text': 'Reply 0 to holes', 'rank': 0},
          {'id': 'more', 'text': 'One more', 'rank': 1}],
      'source': 'oasst1'}]


def test_synthetic_texts_are_kept_on_request(tmp_path):
  path = write(tmp_path / 'x.jsonl', mixed())
  without, kept = (check(run(path, tmp_path / str(flag), synthetic=flag)) for flag in (False, True))
  assert 'synthetic' in without['dropped']['prompts'] and 'synthetic' not in kept['dropped']['prompts']
  # robot, and holes with two ranks left
  assert sum(kept['kept'].values()) == sum(without['kept'].values()) + 2


def test_a_turn_says_what_is_dropped_and_why(tmp_path):
  trees = [mixed()[0], mixed()[-1]]
  trees[0]['prompt']['text'] = 'Ünï\x00çødé 🙂\n\n'
  trees[0]['prompt']['replies'][0] |= {'review_result': None, 'text': ''}
  for rows in (trees, flat(trees)[::-1]):
    path = write(tmp_path / 'x.jsonl', rows)
    good, holes = sorted((turn for _, turn in oasst.turns(records.numbered(path), False)), key=lambda t: t['id'])
    good['replies'].sort(key=lambda reply: reply['id'])
    assert good == {'id': 'good00', 'prompt': 'Ünï\x00çødé 🙂\n\n', 'dropped': '', 'replies': [
        {'id': 'good00-0', 'text': '', 'rank': 1, 'dropped': 'empty'},
        {'id': 'good00-1', 'text': 'Reply 1 to good00', 'rank': 0, 'dropped': ''},
        {'id': 'good00-2', 'text': 'Reply 2 to good00', 'rank': 2, 'dropped': ''}]}
    assert holes['dropped'] == '' and {reply['id']: reply['dropped'] for reply in holes['replies']} == {
        'holes-0': '', 'holes-1': 'deleted', 'holes-2': 'not English', 'holes-3': 'synthetic', 'holes-4': 'empty',
        'holes-5': 'unranked'}
    assert {reply['id']: reply['rank'] for reply in holes['replies']}['holes-5'] == -1


def broken(**fields):
  bad = tree('bad', 0, 1)
  bad['prompt']['replies'][1] |= fields
  return bad


@pytest.mark.parametrize('row, word', [
    ('{"message_id": "cut', r'x\.jsonl:2: not a JSON object'),
    ({'instruction': 'Say hello', 'output': 'Hello'}, r'x\.jsonl:2: neither a tree .* nor a message'),
    (broken(rank='best'), r'x\.jsonl:2: "rank" is \'best\''),
    (broken(rank=-3), r'x\.jsonl:2: "rank" is \'-3\''),
    (broken(rank=True), r'x\.jsonl:2: "rank" is \'True\''),
    (broken(text=None), r'x\.jsonl:2: "text" is \'None\''),
    (broken(role='prompter'), r'x\.jsonl:2: no message with role "assistant"'),
    (broken(message_id='bad-0'), 'prompt bad: a reply to it was read twice'),
    (tree('good', 0), r'x\.jsonl:2: prompt good was read before'),
    ({'prompt': 'Say hello', 'response': 'Hello'}, r'x\.jsonl:2: "prompt" is \'Say hello\''),
])
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, row, word):
  cases = [([tree('good', 0, 1), row], word)]
  if 'tree_state' in row:
    cases += [(flat([tree('good'), row]), word.replace(':2:', r':\d:'))]
  for i, (rows, match) in enumerate(cases):
    path = tmp_path / str(i) / 'x.jsonl'
    path.parent.mkdir()
    path.write_text(''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows))
    with pytest.raises(InputError, match=match):
      run(path, tmp_path / 'run')
    assert not [p for p in (tmp_path / 'run').rglob('*') if p.is_file()]


def test_files_without_a_use_are_an_error(tmp_path):
  spam = write(tmp_path / 'spam.jsonl', [tree('a', 0, 1, state='spam')])
  alone = write(tmp_path / 'alone.jsonl', [tree('a', 0)])
  empty = write(tmp_path / 'empty.jsonl.gz', [])
  for path, word in ((empty, 'no conversation'), (spam, 'yields no ift'), (alone, 'yields no ranked')):
    with pytest.raises(InputError, match=word):
      run(path, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'data' / 'seeds').exists()


def real(name):
  path = DATA / 'oasst1' / name
  if not path.exists():
    pytest.skip(f'no real data: {path} is absent; set SRLM_TEST_DATA')
  with gzip.open(path) as f:
    return path, [json.loads(line) for line in f]


def test_real_messages(tmp_path):
  path, rows = real('validation.en.messages.jsonl.gz')
  roots = {m['message_id']: m for m in rows if m['parent_id'] is None}
  replies = {name: [m for m in rows if m['parent_id'] == name] for name in roots}
  complete = [r for r in replies.values() if len(r) > 1 and all(m['rank'] is not None for m in r)]
  assert (len(roots), len(complete), sum(map(len, complete))) == (188, 163, 477)
  ranks = {name: sorted(m['rank'] for m in r if m['rank'] is not None and not m['deleted'])
           for name, r in replies.items()}
  assert sum(len(r) > 1 for r in ranks.values()) == sum(0 in r for r in ranks.values()) == 186
  assert sum(len(r) for r in ranks.values()) == 542

  counts = check(run(path, tmp_path))
  assert counts['read'] == {'prompts': 188, 'replies': 568}
  assert tuple(counts['kept'].values()) == (102, 8, 8, 51, 17)
  assert counts['dropped']['prompts'] == {'no best reply, nor two ranked': 2}
  assert counts['dropped']['replies'] == {
      'deleted': sum(m['deleted'] for r in replies.values() for m in r), 'prompt held out': 47,
      'not the best of its ift prompt': 196, 'prompt dropped': 2, 'unranked': 15}

  alone = {name: 0 for name in PAPER}
  out = run(path, tmp_path / 'ranked', **alone | {'ranked_train': 150, 'ranked_eval': 36})
  order = {name: sorted((m for m in r if m['rank'] is not None), key=lambda m: m['rank'])
           for name, r in replies.items()}
  assert {r['id']: [reply['id'] for reply in r['replies']] for r in out['ranked.jsonl']} == {
      name: [m['message_id'] for m in r] for name, r in order.items() if len(r) > 1}
  out = run(path, tmp_path / 'ift', **alone | {'ift': 186})
  best = {m['parent_id']: m['text'] for r in replies.values() for m in r if m['rank'] == 0}
  assert {r['id']: r['response'] for r in out['ift.jsonl']} == best and len(best) == 186


def test_real_trees(tmp_path):
  path, trees = real('sample50.trees.jsonl.gz')
  human = [t['prompt'] for t in trees if not t['prompt']['synthetic']]
  assert (len(trees), len(human), sum(len(t['prompt']['replies']) for t in trees)) == (50, 46, 166)
  assert all(sorted(m['rank'] for m in p['replies']) == list(range(len(p['replies']))) for p in human)
  counts = check(out := run(path, tmp_path))
  assert counts['read'] == {'prompts': 50, 'replies': 166}
  assert tuple(counts['kept'].values()) == (26, 2, 2, 12, 4)
  assert counts['dropped']['prompts'] == {'synthetic': 4}
  assert {r['id'] for name in FILES[:3] for r in out[name]} == {p['message_id'] for p in human}
  everything = check(run(path, tmp_path / 'all', synthetic=True))
  assert sum(everything['kept'].values()) == 50 and everything['dropped']['prompts'] == {}

  # The flat format of the same trees, whole and shuffled.
  rows = flat(trees)
  random.Random(0).shuffle(rows)
  run(write(tmp_path / 'flat.jsonl.gz', rows), tmp_path / 'flat')
  assert raw(tmp_path / 'flat') == raw(tmp_path)
