import contextlib
import copy
import dataclasses
import doctest
import gzip
import io
import itertools
import json
import random
import re

from conftest import real_data
import pytest
from test_judges import NAMES
import test_seeds
from test_seeds import check, FILES, PAPER, raw

from srlm_jax import config as configs, conversation, InputError, records
from srlm_jax.data import oasst, templates
from srlm_jax.reward import judges


def message(name, text, **fields):
  return {'message_id': name, 'text': text, 'role': 'prompter', 'lang': 'en', 'review_result': True,
          'deleted': False, 'synthetic': False} | fields


def tree(name, *ranks, text=None, state='ready_for_export', **fields):
  """A tree in the published format: a reply per rank, and a second turn under the first reply."""
  replies = [message(f'{name}-{i}', f'Reply {i} to {name}', role='assistant', parent_id=name,
                     rank=rank, replies=[]) for i, rank in enumerate(ranks)]
  if replies:
    later = message(f'{name}-0-0', 'And then?', parent_id=f'{name}-0', replies=[])
    replies[0]['replies'] = [later]
  prompt = message(name, text or f'Prompt {name}?', replies=replies) | fields
  return {'message_tree_id': name, 'tree_state': state, 'prompt': prompt}


def flat(trees):
  """The same conversations in the flat format, which writes absent fields as null."""
  rows, queue = [], [(t['prompt'], t) for t in trees]
  while queue:
    m, t = queue.pop(0)
    rows.append({'parent_id': None, 'rank': None, 'model_name': None}
                | {k: m[k] for k in m if k != 'replies'}
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
  """Twenty usable trees, and one tree or reply for each reason to drop."""
  trees = [tree(f'good{i:02d}', 1, 0, 2) for i in range(20)]
  trees += [
      tree('deleted', 0, 1, deleted=True), tree('foreign', 0, 1, lang='pt-BR'),
      tree('tie', 0, 1, 1), tree('robot', 0, 1, synthetic=True),
      tree('spam', 0, 1, state='spam'), tree('blank', 0, 1, text=' \n'),
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
           write(tmp_path / 'c.messages.jsonl.gz', flat(trees)),
           write(tmp_path / 'd.messages.jsonl', rows)]
  for name, part in (('e1', rows[:30]), ('e2', rows[30:]), ('f', trees[:9]),
                     ('g', flat(trees[9:]))):
    write(tmp_path / f'{name}.jsonl', part)
  paths += [tmp_path / 'e?.jsonl', f'{tmp_path}/f.jsonl, {tmp_path}/g.jsonl']
  outputs = []
  for i, path in enumerate(paths):
    check(out := run(path, tmp_path / f'run{i}', seed=3))
    assert all(r['response'] == f'Reply 1 to {r["id"]}'
               for r in out['ift.jsonl'] if r['id'] != 'twin')
    outputs.append(raw(tmp_path / f'run{i}'))
  assert all(output == outputs[0] for output in outputs)
  run(paths[0], tmp_path / 'other', seed=4)
  assert raw(tmp_path / 'other')['ift.jsonl'] != outputs[0]['ift.jsonl']


def test_each_reason_to_drop_is_counted(tmp_path, capsys):
  path = write(tmp_path / 'x.jsonl', mixed())
  asked = {'ift': 8, 'test_prompts': 2, 'valid_prompts': 1, 'ranked_train': 6, 'ranked_eval': 2}
  counts = check(run(path, tmp_path / 'all', **asked))
  assert counts['dropped']['prompts'] == {
      'after a dropped message': 4, 'deleted': 1, 'duplicate prompt': 1, 'empty': 1,
      'later turn without a ranking': 25, 'more than requested': 1,
      'no best reply and no ranking': 4, 'not English': 1, 'ranks repeat': 1, 'synthetic': 1,
      'tree not ready for export': 2}
  assert counts['kept'] == counts['asked'] == asked
  printed = capsys.readouterr().out
  assert 'ranks repeat' in printed and 'Short' not in printed
  # The tree `holes` has no best reply. A second valid rank makes it usable for ranked_train.
  holes = mixed()[-1]
  holes['prompt']['replies'].append(
      message('more', 'One more', role='assistant', rank=7, replies=[]))
  out = run(write(tmp_path / 'y.jsonl', [tree('good', 0), holes]), tmp_path / 'holes', ift=1,
            test_prompts=0, valid_prompts=0, ranked_eval=0)
  assert check(out)['dropped'] == {'prompts': {'later turn without a ranking': 2}, 'replies': {
      'deleted': 1, 'empty': 1, 'not English': 1, 'synthetic': 1, 'unranked': 1}}
  assert capsys.readouterr().out.endswith('\n  Short: ranked_train 1 of 1,630\n')
  assert out['ift.jsonl'] == [{'id': 'good', 'prompt': 'Prompt good?',
                               'response': 'Reply 0 to good', 'source': 'oasst1'}]
  assert out['ranked.jsonl'] == [{
      'id': 'holes', 'prompt': 'Prompt holes?', 'split': 'train', 'replies': [
          {'id': 'holes-0', 'text': 'Reply 0 to holes', 'rank': 0},
          {'id': 'more', 'text': 'One more', 'rank': 1}],
      'source': 'oasst1'}]


def test_synthetic_texts_are_kept_on_request(tmp_path):
  path = write(tmp_path / 'x.jsonl', mixed())
  without, kept = (check(run(path, tmp_path / str(flag), synthetic=flag)) for flag in (False, True))
  assert 'synthetic' in without['dropped']['prompts']
  assert 'synthetic' not in kept['dropped']['prompts']
  # robot, and holes with two ranks left
  assert sum(kept['kept'].values()) == sum(without['kept'].values()) + 2


def test_a_turn_has_the_reasons_to_drop_it_and_its_replies(tmp_path):
  trees = [mixed()[0], mixed()[-1]]
  trees[0]['prompt']['text'] = 'Ünï\x00çødé 🙂\n\n'
  trees[0]['prompt']['replies'][0] |= {'review_result': None, 'text': ''}
  for rows in (trees, flat(trees)[::-1]):
    path = write(tmp_path / 'x.jsonl', rows)
    good, then, holes, more = sorted(
        (turn for _, turn in oasst.turns(records.read_any(path), False)), key=lambda t: t.id)
    assert then.dropped == 'after a dropped message' and then.id == 'good00-0-0'
    assert dataclasses.asdict(more) == {
        'id': 'holes-0-0', 'turn': 1, 'dropped': '', 'replies': [], 'messages': (
            dict(role='user', content='Prompt holes?'),
            dict(role='assistant', content='Reply 0 to holes'),
            dict(role='user', content='And then?')), 'prompt':
        '[user]\nPrompt holes?\n\n[assistant]\nReply 0 to holes\n\n[user]\nAnd then?'}
    good.replies.sort(key=lambda reply: reply.id)
    assert dataclasses.asdict(good) == {
        'id': 'good00', 'turn': 0, 'prompt': 'Ünï\x00çødé 🙂\n\n', 'dropped': '', 'messages': (),
        'replies': [
            {'id': 'good00-0', 'text': '', 'rank': 1, 'dropped': 'empty'},
            {'id': 'good00-1', 'text': 'Reply 1 to good00', 'rank': 0, 'dropped': ''},
            {'id': 'good00-2', 'text': 'Reply 2 to good00', 'rank': 2, 'dropped': ''}]}
    assert holes.dropped == '' and {reply.id: reply.dropped for reply in holes.replies} == {
        'holes-0': '', 'holes-1': 'deleted', 'holes-2': 'not English', 'holes-3': 'synthetic',
        'holes-4': 'empty', 'holes-5': 'unranked'}
    assert {reply.id: reply.rank for reply in holes.replies}['holes-5'] == -1


def deep():
  """A tree with two ranked branches; the second has a third turn."""
  def asked(name, *replies, **fields):
    return message(name, f'Prompt {name}?', replies=list(replies)) | fields

  def reply(name, rank, *below, **fields):
    return message(name, f'Reply {name}.', role='assistant', rank=rank,
                   replies=list(below)) | fields

  third = asked('a.1.0.0.0', reply('a.1.0.0.0.0', 1), reply('a.1.0.0.0.1', 0))
  second = asked('a.1.0', reply('a.1.0.0', 0, third), reply('a.1.0.1', 1),
                 reply('a.1.0.2', 2, deleted=True))
  other = asked('a.0.0', reply('a.0.0.0', 0), reply('a.0.0.1', 1))
  first = asked('a', reply('a.0', 1, other), reply('a.1', 0, second))
  return {'message_tree_id': 'a', 'tree_state': 'ready_for_export', 'prompt': first}


def linked(t):
  """The tree in the flat format, in which each message has the id of its parent."""
  queue = [t['prompt']]
  while queue:
    m = queue.pop()
    for reply in m['replies']:
      reply['parent_id'] = m['message_id']
      queue.append(reply)
  return flat([t])


def test_the_prompt_of_a_later_turn_contains_the_conversation(tmp_path):
  for rows in ([deep()], linked(deep())[::-1]):
    path = write(tmp_path / 'x.jsonl', rows)
    found = {turn.id: turn for _, turn in oasst.turns(records.read_any(path), False)}
    assert {name: (t.turn, len(t.replies)) for name, t in found.items()} == {
        'a': (0, 2), 'a.0.0': (1, 2), 'a.1.0': (1, 3), 'a.1.0.0.0': (2, 2)}
    assert all(r.id.startswith(f'{name}.') for name, t in found.items() for r in t.replies)
    assert not any(t.dropped for t in found.values())
    assert found['a'].prompt == 'Prompt a?'
    assert found['a.0.0'].prompt.split('\n\n') == [
        '[user]\nPrompt a?', '[assistant]\nReply a.0.', '[user]\nPrompt a.0.0?']
    third = found['a.1.0.0.0'].prompt
    assert third.split('\n\n') == [
        '[user]\nPrompt a?', '[assistant]\nReply a.1.', '[user]\nPrompt a.1.0?',
        '[assistant]\nReply a.1.0.0.', '[user]\nPrompt a.1.0.0.0?']
    assert conversation.user_messages(found['a.1.0.0.0']) == [
        'Prompt a?', 'Prompt a.1.0?', 'Prompt a.1.0.0.0?']
  asked = dict(ift=1, test_prompts=0, valid_prompts=0, ranked_train=3, ranked_eval=0)
  assert check(out := run(path, tmp_path / 'run', **asked))['kept'] == asked
  assert {tuple(r) for r in out['ranked.jsonl']} == {
      ('id', 'prompt', 'split', 'replies', 'source', 'messages')}
  assert doctest.testmod(oasst).failed == 0


@pytest.mark.parametrize('fields', [
    dict(deleted=True), dict(lang='de'), dict(synthetic=True), dict(text=' ')])
def test_a_dropped_message_drops_the_turns_after_it(tmp_path, fields):
  def dropped(edit):
    found = []
    for form in (lambda t: [t], linked):
      t = deep()
      edit(t)
      path = write(tmp_path / 'x.jsonl', form(t))
      found.append({turn.id for _, turn in oasst.turns(records.read_any(path), False)
                    if turn.dropped == 'after a dropped message'})
    assert found[0] == found[1]
    return found[0]

  assert dropped(lambda t: t['prompt'].update(fields)) == {'a.0.0', 'a.1.0', 'a.1.0.0.0'}
  assert dropped(lambda t: t['prompt']['replies'][1].update(fields)) == {'a.1.0', 'a.1.0.0.0'}
  assert dropped(lambda t: t['prompt']['replies'][1]['replies'][0].update(fields)) == {'a.1.0.0.0'}
  assert dropped(lambda t: None) == set()
  # A reply without a rank does not affect the later turns.
  assert dropped(lambda t: t['prompt']['replies'][1].update(rank=None)) == set()


def test_turns_after_a_missing_message_are_dropped(tmp_path):
  for missing, after in (('a', {'a.0.0', 'a.1.0', 'a.1.0.0.0'}), ('a.1', {'a.1.0', 'a.1.0.0.0'})):
    path = write(tmp_path / 'x.jsonl', [m for m in linked(deep()) if m['message_id'] != missing])
    found = [turn for _, turn in oasst.turns(records.read_any(path), False)]
    assert {turn.id for turn in found if turn.dropped == 'after a missing message'} == after
    assert all(turn.turn > 0 for turn in found if turn.dropped)


def test_judge_templates_and_chat_formats_leave_a_conversation_unchanged():
  said = ['Hi.\n[assistant]\nI am fake.', 'Yes\r\n[USER] or no', 'Why?']
  prompt = conversation.text(conversation.in_turns(said))
  assert [line for line in prompt.splitlines() if line.startswith('[')] == (
      ['[user]', '[ assistant]', '[assistant]', '[ USER] or no', '[user]'])
  for name in NAMES:
    judge = judges.load(name)
    shown = judge.render(prompt=prompt, response='R')
    assert prompt in shown
  for chat in ('plain', 'llama2'):
    assert prompt in templates.chat(chat, prompt, None)


def broken(**fields):
  bad = tree('bad', 0, 1)
  bad['prompt']['replies'][1] |= fields
  return bad


@pytest.mark.parametrize('row, word', [
    ('{"message_id": "cut', r'x\.jsonl:2: not a JSON object'),
    ({'instruction': 'Say hello', 'output': 'Hello'},
     r'x\.jsonl:2: neither a tree .* nor a message'),
    (broken(rank='best'), r'x\.jsonl:2: "rank" is \'best\''),
    (broken(rank=-3), r'x\.jsonl:2: "rank" is \'-3\''),
    (broken(rank=True), r'x\.jsonl:2: "rank" is \'True\''),
    (broken(text=None), r'x\.jsonl:2: "text" is \'None\''),
    (broken(role='prompter'), r'x\.jsonl:2: expected a message with role "assistant"'),
    (broken(message_id='bad-0'), 'bad has a duplicate reply|a second message .*bad-0'),
    (tree('good', 0), r'x\.jsonl:2: (prompt good is a duplicate|a second message .*good)'),
    ({'prompt': 'Say hello', 'response': 'Hello'}, r'x\.jsonl:2: "prompt" is \'Say hello\''),
])
def test_an_invalid_line_is_an_error_and_nothing_is_written(tmp_path, row, word):
  cases = [([tree('good', 0, 1), row], word)]
  if 'tree_state' in row:
    cases += [(flat([tree('good'), row]), word.replace(':2:', r':\d:'))]
  for i, (rows, match) in enumerate(cases):
    path = tmp_path / str(i) / 'x.jsonl'
    path.parent.mkdir()
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(''.join(line + '\n' for line in lines))
    with pytest.raises(InputError, match=match):
      run(path, tmp_path / 'run')
    assert not [p for p in (tmp_path / 'run').rglob('*') if p.is_file()]


def test_files_without_usable_prompts_are_an_error(tmp_path):
  spam = write(tmp_path / 'spam.jsonl', [tree('a', 0, 1, state='spam')])
  alone = write(tmp_path / 'alone.jsonl', [tree('a', 0)])
  empty = write(tmp_path / 'empty.jsonl.gz', [])
  for path, word in ((empty, 'no conversation'), (spam, 'yields no ift'),
                     (alone, 'yields no ranked')):
    with pytest.raises(InputError, match=word):
      run(path, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'data' / 'seeds').exists()


def published(usable):
  """Flat messages in the proportions of the validation split, with `usable` usable first turns.

  In the validation split, 186 of 188 first turns are usable and have 2 to 4 ranked replies. 78 % of
  the replies to first turns have a second turn below them. Half of the second turns have 2 to 4
  ranked replies, of which 23 % have a third turn below them. 3 % of the third turns have ranked
  replies. In total there are 226 later turns in 149 trees. An id begins with the id of the tree,
  which is the id of its first prompt.
  """
  rng = random.Random(0)
  rows = []

  def add(name, parent, role, rank=None, **fields):
    rows.append(message(name, f'{role} {name}?', role=role, parent_id=parent, rank=rank,
                        tree_state='ready_for_export') | fields)

  def answer(name, replies, follow, flaw):
    """Adds the replies to a prompt, and a next turn below the fraction `follow[0]` of them."""
    for rank in range(replies):
      reply = f'{name}.{rank}'
      bad = rng.random() < 0.02  # 40 of 2,022 messages are deleted
      add(reply, name, 'assistant', rank, deleted=bad and flaw)
      if follow and rng.random() < follow[0]:
        add(f'{reply}.0', reply, 'prompter')
        weights = (215, 109, 112, 7) if len(follow) == 2 else (143, 3, 1, 0)
        again = rng.choices((0, 2, 3, 4), weights)[0]
        answer(f'{reply}.0', again, follow[1:], True)

  for i in range(usable):
    add(f'tree{i:05d}', None, 'prompter')
    # No reply to a first turn is deleted, so every first turn is usable.
    answer(f'tree{i:05d}', rng.choices((2, 3, 4), (24, 155, 7))[0], (0.78, 0.23), False)
  poor = [dict(lang='de'), dict(deleted=True), dict(tree_state='spam'), dict(synthetic=True)] * 30
  for i, fields in enumerate(poor):
    add(f'poor{i:05d}', None, 'prompter', **fields)
    answer(f'poor{i:05d}', 3, (0.78, 0.23), True)
  for i in range(20):
    add(f'bare{i:05d}', None, 'prompter')
  rng.shuffle(rows)
  return rows


def tree_of(name):
  return name.partition('.')[0]


@pytest.fixture(scope='module')
def full(tmp_path_factory):
  """(seed files, requested sizes, printed text) for OASST1's size and the 70b config."""
  folder = tmp_path_factory.mktemp('full')
  path = write(folder / 'x.messages.jsonl', published(3800))
  asked = {name: configs.get('sft', '70b').data[name] for name in PAPER}
  with contextlib.redirect_stdout(io.StringIO()) as said:
    out = run(path, folder, **asked)
  print(said.getvalue())
  return out, asked, said.getvalue()


def test_the_published_size_fills_every_set(full):
  out, asked, said = full
  assert tuple(asked.values()) == (3200, 256, 253, 2000, 190)
  counts = check(out)
  assert counts['kept'] == asked and 'Short' not in said
  assert all(r['prompt'] == f'prompter {r["id"]}?' for r in out['ift.jsonl'] + out['heldout.jsonl'])
  rows = [r for name in FILES[:3] for r in out[name]]
  assert sum('.' not in r['id'] for r in rows) == 3800  # no first turn is left over
  later = [r['split'] for r in out['ranked.jsonl'] if '.' in r['id']]
  assert counts['kept_later'] == {
      f'ranked_{split}': later.count(split) for split in ('train', 'eval')}


def test_no_conversation_is_in_two_sets_except_ift_and_train(full):
  out, _, _ = full
  trees = {name: {tree_of(r['id']) for r in rows} for name, rows in {
      'ift': out['ift.jsonl'], 'train': [r for r in out['ranked.jsonl'] if r['split'] == 'train'],
      'eval': [r for r in out['ranked.jsonl'] if r['split'] == 'eval'],
      'test': [r for r in out['heldout.jsonl'] if r['split'] == 'test'],
      'valid': [r for r in out['heldout.jsonl'] if r['split'] == 'valid']}.items()}
  for a, b in itertools.combinations(trees, 2):
    assert {a, b} == {'ift', 'train'} or trees[a].isdisjoint(trees[b]), (a, b)
  held = re.compile(r'prompter (\S+)\?')
  # No other prompt contains a held-out prompt, and no training prompt contains an eval prompt.
  shown = {name for r in out['ift.jsonl'] + out['ranked.jsonl']
           for name in held.findall(r['prompt'])}
  assert shown.isdisjoint(r['id'] for r in out['heldout.jsonl'])
  trained = {name for r in out['ift.jsonl'] + out['ranked.jsonl'] if r.get('split') != 'eval'
             for name in held.findall(r['prompt'])}
  assert trained.isdisjoint(name for r in out['ranked.jsonl'] if r['split'] == 'eval'
                            for name in held.findall(r['prompt']))


def test_conversations_with_the_same_first_message_count_as_one(tmp_path):
  trees = [tree(f'good{i}', 0, 1) for i in range(20)]
  trees.append(tree('twin', 0, 1, text='  prompt GOOD0? '))
  trees[-1]['prompt']['replies'][0]['replies'][0]['replies'] = [
      message(f'late{i}', f'Late {i}', role='assistant', rank=i, replies=[]) for i in range(2)]
  asked = {'ift': 0, 'test_prompts': 20, 'valid_prompts': 0, 'ranked_train': 1, 'ranked_eval': 0}
  for seed in range(4):
    # Otherwise ranked_train would contain the later turn of `twin`, which has a held-out prompt.
    with pytest.raises(InputError, match='yields no ranked'):
      run(write(tmp_path / 'x.jsonl', trees), tmp_path / str(seed), seed=seed, **asked)


def real(name):
  path = real_data(f'oasst1/{name}')
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
  asked = [m for m in rows if m['role'] == 'prompter']
  known = {m['message_id'] for m in asked}
  answers = [m for m in rows if m['role'] == 'assistant' and m['parent_id'] in known]
  assert counts['read'] == {'prompts': len(asked), 'replies': len(answers)}
  assert (len(asked), len(answers)) == (779, 1241)
  assert tuple(counts['kept'].values()) == (154, 12, 12, 194, 19)
  assert tuple(counts['kept_later'].values()) == (194, 11)
  assert counts['dropped']['prompts'] == {
      'after a dropped message': 7, 'after a missing message': 1, 'deleted': 5,
      'in a held-out conversation': 25, 'later turn without a ranking': 348,
      'no best reply and no ranking': 2}

  alone = {name: 0 for name in PAPER}
  out = run(path, tmp_path / 'ranked', **alone | {'ranked_train': 186})
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
  assert all(sorted(m['rank'] for m in p['replies']) == list(range(len(p['replies'])))
             for p in human)
  counts = check(out := run(path, tmp_path))
  asked = [m for m in flat(trees) if m['role'] == 'prompter']
  assert counts['read'] == {'prompts': len(asked), 'replies': 319} and len(asked) == 230
  assert tuple(counts['kept'].values()) == (37, 3, 3, 38, 5)
  assert counts['dropped']['prompts'] == {
      'in a held-out conversation': 7, 'later turn without a ranking': 133, 'synthetic': 4}
  used = {r['id'] for name in FILES[:3] for r in out[name]}
  assert used & {t['message_tree_id'] for t in trees} == {p['message_id'] for p in human}
  everything = check(run(path, tmp_path / 'all', synthetic=True))
  assert 'synthetic' not in everything['dropped']['prompts']
  assert sum(everything['kept'].values()) - sum(everything['kept_later'].values()) == 50

  # The flat format of the same trees, whole and shuffled.
  rows = flat(trees)
  random.Random(0).shuffle(rows)
  run(write(tmp_path / 'flat.jsonl.gz', rows), tmp_path / 'flat')
  assert raw(tmp_path / 'flat') == raw(tmp_path)
