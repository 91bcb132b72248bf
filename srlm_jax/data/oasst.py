"""Seed data from Open Assistant (OASST1): first turns, with the replies and their ranks by people, divided.

Reads the published files of both formats, one tree a line or one message a line, and writes ift.jsonl,
heldout.jsonl and ranked.jsonl, which share no prompt; counts.json says why the rest was left out.
"""
from collections import Counter
from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
from fractions import Fraction
import hashlib
import io
import os
from types import NoneType
import unicodedata

from absl import logging
from etils import epath
import numpy as np
import tensorflow_datasets as tfds

from srlm_jax import InputError
from srlm_jax.data import records

# The sets that share the prompts, by the name of their asked size in config.data.
BEST_SETS = ('ift', 'test_prompts', 'valid_prompts')  # need the reply that people ranked best
RANKED_SETS = ('ranked_train', 'ranked_eval')  # need two ranked replies


def run(config, workdir):
  """The stage data/seeds: `make`, once."""
  from srlm_jax import stage  # here, for stage knows JAX and data does not
  s = stage.Stage(config, workdir, 'seeds', ('data',), find_files(config.data.path), model='data')
  if s.done:
    return
  if not stage.is_first_host():
    s.begin()
    return s.finish()
  s.finish(**make(config, workdir, s.begin)['kept'])


def make(config, workdir, begin=lambda: None) -> dict:
  """Writes ift.jsonl, heldout.jsonl, ranked.jsonl and counts.json into workdir/data/seeds; returns the counts.

  `begin` is called when everything has been computed and before anything is written.
  """
  workdir = epath.Path(workdir)
  # ArrayRecord writes to a local disk only: for a workdir in a bucket, TFDS picks its own default folder.
  data_dir = None if '://' in os.fspath(workdir) else workdir / 'data' / 'tfds'
  asked = {name: config.data[name] for name in BEST_SETS + RANKED_SETS}
  turns = prepared_turns(find_files(config.data.path), data_dir)
  files, counts = seeds(turns, asked, config.seed, config.data.synthetic)
  print(table(counts))
  for names in (('ift',), RANKED_SETS):
    if any(asked[name] for name in names) and not any(counts['kept'][name] for name in names):
      raise InputError(f'{config.data.path} yields no {" or ".join(names)}; the table above says why')
  begin()
  for name, rows in (files | {'counts.json': [counts]}).items():
    records.write(workdir / 'data' / 'seeds' / name, rows)
  return counts


@dataclasses.dataclass(eq=False)
class Files(tfds.core.BuilderConfig):
  """Published files, named by a hash of their content, so that other files never meet an old preparation."""
  name: str = dataclasses.field(init=False)
  paths: tuple[str, ...] = ()

  def __post_init__(self):
    hashes = (hashlib.sha256(epath.Path(path).read_bytes()).hexdigest() for path in self.paths)
    self.name = records.digest(*sorted(hashes))

  def __str__(self):
    return f'OASST1 files {self.name}'  # for the log


class Oasst1(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # no name loads files that are given
  """The first turn of every conversation: a prompt and the replies to it; -1 is no rank or no review."""
  VERSION = tfds.core.Version('1.0.0')
  url_infos = {}  # nothing to download; TFDS 4.9.10 looks for a list with a package that it does not require

  def _info(self):
    text, flag, number = tfds.features.Text(), np.bool_, np.int64
    message = {'id': text, 'text': text, 'lang': text, 'rank': number, 'review_result': number,
               'deleted': flag, 'synthetic': flag}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
        {'tree_state': text, 'prompt': message, 'replies': tfds.features.Sequence(message)}))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    turn = None
    for turn in read_turns(self.builder_config.paths):
      name, replies = turn['prompt']['id'], {reply['id'] for reply in turn['replies']}
      if len(replies) < len(turn['replies']):
        raise InputError(f'prompt {name}: a reply to it was read twice; give each conversation once')
      yield name, turn
    if turn is None:
      raise InputError(f'{", ".join(self.builder_config.paths)}: no conversation in there; fetch it again')


def prepared_turns(paths: tuple[str, ...], data_dir) -> Iterator[dict]:
  """Yields the turns of `read_turns` from their ArrayRecord copy in data_dir, which is made on first use."""
  tfds.disable_progress_bar()
  logging.set_verbosity(logging.ERROR)  # TFDS warns that the configuration is not one of its own
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download, and nothing is downloaded
    builder = Oasst1(config=Files(paths=paths), data_dir=data_dir, file_format='array_record')
    builder.download_and_prepare()
  source = builder.as_data_source('train')
  for i in range(len(source)):
    turn = _plain(source[i])
    columns = turn['replies']  # a field at a time, as TFDS keeps a sequence of dictionaries
    yield turn | {'replies': [dict(zip(columns, row, strict=True))
                              for row in zip(*columns.values(), strict=True)]}


def read_turns(paths: tuple[str, ...]) -> Iterator[dict]:
  """Yields the first turns of published files: a tree as it comes, flat messages after all have been seen."""
  seen, flat = set(), {}
  for where, record in _numbered(paths):
    if 'prompt' in record:
      prompt = _field(record, 'prompt', where, dict)
      replies = _field(prompt, 'replies', where, list, NoneType) or []
    elif 'message_id' in record:
      if _field(record, 'parent_id', where, str, NoneType) is not None:
        continue  # a reply may come before its prompt: the second reading takes them
      prompt, replies = record, []
    else:
      raise InputError(f'{where}: neither a tree ("prompt") nor a message ("message_id") of OASST1')
    turn = {'tree_state': _field(record, 'tree_state', where, str),
            'prompt': _message(prompt, 'prompter', where),
            'replies': [_message(reply, 'assistant', where) for reply in replies]}
    name = turn['prompt']['id']
    if name in seen:
      raise InputError(f'{where}: prompt {name} was read before; give each conversation once')
    seen.add(name)
    if 'prompt' in record:
      yield turn
    else:
      flat[name] = turn
  for where, record in _numbered(paths) if flat else ():
    if 'prompt' not in record and record.get('parent_id') in flat:
      flat[record['parent_id']]['replies'].append(_message(record, 'assistant', where))
  yield from flat.values()


def seeds(turns: Iterable[dict], asked: dict[str, int], seed: int, synthetic: bool) -> tuple[dict, dict]:
  """Returns the records of each file, and counts in which every prompt and reply is kept or dropped once."""
  prompts, read, lost = sift(turns, seed, synthetic)
  sets = divide(prompts, asked)
  ift = sets['ift']
  heldout = [(p, name.removesuffix('_prompts')) for name in BEST_SETS[1:] for p in sets[name]]
  ranked = [(p, name.removeprefix('ranked_')) for name in RANKED_SETS for p in sets[name]]
  placed = [p for members in sets.values() for p in members]
  lost['prompts']['more than asked for'] = len(prompts) - len(placed)
  lost['replies']['prompt dropped'] += _replies(prompts) - _replies(placed)
  lost['replies']['prompt held out'] = _replies(p for p, _ in heldout)
  lost['replies']['not the best of its ift prompt'] = _replies(ift) - len(ift)
  counts = {
      'read': read, 'asked': asked, 'kept': {name: len(members) for name, members in sets.items()},
      'kept_replies': {'ift': len(ift)} | {name: _replies(sets[name]) for name in RANKED_SETS},
      'dropped': {what: dict(sorted((+reasons).items())) for what, reasons in lost.items()}}
  return {
      'ift.jsonl': [{'id': p['id'], 'prompt': p['prompt'], 'response': p['ranked'][0]['text'],
                     'source': 'oasst1'} for p in ift],
      'heldout.jsonl': [{'id': p['id'], 'prompt': p['prompt'], 'split': split} for p, split in heldout],
      'ranked.jsonl': [{'id': p['id'], 'prompt': p['prompt'], 'split': split,
                        'replies': [{'id': reply['id'], 'text': reply['text'], 'rank': rank}
                                    for rank, reply in enumerate(p['ranked'])],
                        'source': 'oasst1'} for p, split in ranked],
  }, counts


def sift(turns: Iterable[dict], seed: int, synthetic: bool) -> tuple[list[dict], Counter, dict]:
  """Returns the prompts that can serve, in the seed's order, replies best first; the read; the dropped."""
  read, prompts, replies, kept = Counter(), Counter(), Counter(), []  # prompts, replies: dropped, by reason
  for turn in turns:
    prompt = turn['prompt']
    read.update(prompts=1, replies=len(turn['replies']))
    flaws = [_flaw(r, synthetic) or ('unranked' if r['rank'] < 0 else None) for r in turn['replies']]
    ranked = sorted((r for r, flaw in zip(turn['replies'], flaws, strict=True) if not flaw),
                    key=lambda r: r['rank'])
    ranks = [r['rank'] for r in ranked]
    reason = _flaw(prompt, synthetic)
    if turn['tree_state'] != 'ready_for_export':
      reason = 'tree not ready for export'  # spam, given up, or still growing
    elif not reason and len(set(ranks)) < len(ranks):
      reason = 'ranks repeat'
    elif not reason and 0 not in ranks and len(ranks) < 2:
      reason = 'no best reply, nor two ranked'
    if reason:
      prompts[reason] += 1
      replies['prompt dropped'] += len(flaws)
    else:
      replies.update(filter(None, flaws))
      kept.append({'id': prompt['id'], 'prompt': prompt['text'], 'ranked': ranked})
  kept.sort(key=lambda p: (records.digest(str(seed), p['id']), p['id']))  # whatever the order of the files
  first = {}
  for p in kept:
    if first.setdefault(normalise(p['prompt']), p) is not p:
      prompts['same text as another'] += 1
      replies['prompt dropped'] += len(p['ranked'])
  return list(first.values()), read, {'prompts': prompts, 'replies': replies}


def divide(prompts: list[dict], asked: dict[str, int]) -> dict[str, list[dict]]:
  """Gives each prompt to one set at most; too few prompts are divided in the asked proportions."""
  best = [p for p in prompts if p['ranked'][0]['rank'] == 0]
  several = [p for p in prompts if len(p['ranked']) > 1]
  ask_best, ask_several = (sum(asked[name] for name in names) for names in (BEST_SETS, RANKED_SETS))
  share = min(Fraction(have, max(1, ask)) for have, ask in (
      (len(best), ask_best), (len(several), ask_several), (len(prompts), ask_best + ask_several)))
  take_several = min(ask_several, int(share * ask_several))
  take_best = min(ask_best, len(best), len(prompts) - take_several)
  take_several = min(ask_several, len(several), len(prompts) - take_best)  # what the best sets cannot use
  # Prompts without a best reply go first: they can serve in no other set.
  taken = {p['id'] for p in sorted(several, key=lambda p: p['ranked'][0]['rank'] == 0)[:take_several]}
  sets = {}
  for names, members in ((BEST_SETS, [p for p in best if p['id'] not in taken][:take_best]),
                         (RANKED_SETS, [p for p in several if p['id'] in taken])):
    start = 0
    for name, size in zip(names, apportion(len(members), [asked[name] for name in names]), strict=True):
      sets[name] = members[start:start + size]
      start += size
  return sets


def apportion(total: int, asked: list[int]) -> list[int]:
  """Divides at most sum(asked) things in the asked proportions, by the largest remainder.

  >>> apportion(22, [3200, 256, 253])
  [19, 2, 1]
  """
  whole = max(1, sum(asked))
  sizes = [total * ask // whole for ask in asked]
  by_remainder = sorted(range(len(asked)), key=lambda i: -(total * asked[i] % whole))
  for i in by_remainder[:total - sum(sizes)]:
    sizes[i] += 1
  return sizes


def normalise(text: str) -> str:
  """Makes equal what differs in case, white space and the width of characters alone."""
  return ' '.join(unicodedata.normalize('NFKC', text).casefold().split())


def table(counts: dict) -> str:
  """Lays counts.json out for reading."""
  read, kept, asked, replies = (counts[name] for name in ('read', 'kept', 'asked', 'kept_replies'))
  lines = [f'OASST1: {read["prompts"]} prompts with {read["replies"]} first replies',
           f'  {"kept":32}{"prompts":>8}{"asked":>8}{"replies":>8}']
  lines += [f'  {name:32}{kept[name]:8}{asked[name]:8}{replies.get(name, 0):8}' for name in kept]
  for what, reasons in counts['dropped'].items():
    lines += [f'  {"dropped " + what:32}{sum(reasons.values()):8}']
    lines += [f'    {reason:30}{number:8}' for reason, number in reasons.items()]
  if kept != asked:
    lines += [f'  Fewer than asked, {sum(kept.values())} of {sum(asked.values())}: divided in proportion.']
  return '\n'.join(lines)


def find_files(spec: str) -> tuple[str, ...]:
  """Resolves a path, a glob of file names, or several with commas between them."""
  paths = []
  for part in map(str.strip, spec.split(',')):
    path = epath.Path(part).expanduser()
    found = [path] if path.exists() else sorted(path.parent.glob(path.name))
    if not found or any(p.is_dir() for p in found):
      raise InputError(f'data.path: "{part}" is no file; give, say, 2023-04-12_oasst_ready.trees.jsonl.gz')
    paths += map(os.fspath, found)
  return tuple(dict.fromkeys(paths))


def _numbered(paths) -> Iterator[tuple[str, dict]]:
  for path in paths:
    for number, record in enumerate(records.read(path), 1):
      yield f'{path}:{number}', record


def _message(raw: dict, role: str, where: str) -> dict:
  """Checks a published message; absent is null, as one format leaves out what the other writes as null."""
  if not isinstance(raw, dict) or raw.get('role') != role:
    raise InputError(f'{where}: no message with role "{role}" where one belongs; this is not OASST1')
  rank = _field(raw, 'rank', where, int, NoneType)
  return {'id': _field(raw, 'message_id', where, str), 'text': _field(raw, 'text', where, str),
          'lang': _field(raw, 'lang', where, str), 'rank': -1 if rank is None else rank,
          'review_result': {None: -1, False: 0, True: 1}[_field(raw, 'review_result', where, bool, NoneType)],
          'deleted': bool(_field(raw, 'deleted', where, bool, NoneType)),
          'synthetic': bool(_field(raw, 'synthetic', where, bool, NoneType))}


def _field(raw: dict, name: str, where: str, *types):
  value = raw.get(name)
  if type(value) not in types or (name == 'rank' and value is not None and value < 0):
    raise InputError(f'{where}: "{name}" is {str(value)[:40]!r}, which OASST1 never has; mend the line')
  return value


def _flaw(message: dict, synthetic: bool) -> str | None:
  flaws = {'deleted': message['deleted'], 'synthetic': message['synthetic'] and not synthetic,
           'not English': message['lang'] != 'en', 'empty': not message['text'].strip()}
  return next((name for name, found in flaws.items() if found), None)


def _replies(prompts: Iterable[dict]) -> int:
  return sum(len(p['ranked']) for p in prompts)


def _plain(value):
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_plain(v) for v in value]
  return value.decode() if isinstance(value, bytes) else np.asarray(value).item()


if __name__ == '__main__':
  from srlm_jax import stage
  stage.main(run)
