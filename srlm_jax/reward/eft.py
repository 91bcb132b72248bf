"""Builds the EFT data, which trains a model to judge (PAPER 3.1).

An EFT example is a judge prompt with a judgement, justification and score, as its response. The SFT
baseline judges every ranked reply `eft.judgements` times. The score of a reply is the mean of its
parsed judgements. The paper keeps the judgements that agree with the human ranking and does not say
how partial agreement counts. Here a prompt is kept if

1. every reply has a score, that is, `eft.quorum` parsed judgements,
2. no pair of replies is discordant: scored against the human ranks, and
3. at least one pair is concordant: scored in the order of the human ranks.

The target of a reply is its judgement whose score is nearest to the mean. The targets of a prompt
must not contain a discordant pair either, or the prompt is dropped. Finally the most frequent score
is downsampled to the count of the runner-up.
"""
import array
from collections import Counter
from collections.abc import Iterator, Sequence
import dataclasses
import functools

from srlm_jax import catalog, cli, conversation, hosts, records, schema, spill, stage
from srlm_jax.data import ranked as ranking
from srlm_jax.reward import judges, scores as scoring

DOWNSAMPLED = 'downsampled: most frequent score'
Agreed = tuple[list[schema.EftExample], dict[str, str]]  # {id of another reply: reason}


def run(config, workdir):
  """Writes MODEL/eft/eft.jsonl and dropped.jsonl, which lists every other reply with the reason.

  Reads the ranked replies of the seeds. With `eft.targets=baseline` it also reads the SFT
  baseline's judgements of them (MODEL/judge).
  """
  spec = catalog.find('reward.eft')
  config = spec.view(config)
  judge = judges.load(config.judge.template)
  s = stage.Stage(spec, config, workdir, str(judge))
  if s.done:
    return
  seen = survey(s, config, judge)
  found = _summary(seen)
  hosts.log(f'{s.title}: {table(found)}')
  if not found.examples:
    hosts.log(f'{s.title}: no judgement of the SFT baseline agrees with the human ranks on any of '
              f'{found.prompts} prompts; the model is too weak to write EFT data, use '
              f'eft.targets=ranks instead')
  s.begin()
  if hosts.is_first_host():
    _write(s, _agreed(s, config, judge), seen.balance)
  s.finish(found)


def _agreed(s: stage.Stage, config, judge: judges.Judge,
            counts: Counter | None = None) -> Iterator[tuple[schema.RankedPrompt, Agreed]]:
  """Yields the ranked prompts with their examples, one by one.

  counts: gets the number of judgements by score, None for those without one
  """
  if config.eft.targets != 'baseline':
    for r in ranking.of_split(s, 'train'):
      yield r, from_ranks(r, judge)
    return
  file = 'judge/judgements-*.jsonl'
  judged = scoring.Judged(s.read(file), config.eft.quorum, s.path(file))
  for r in ranking.of_split(s, 'train'):
    yield r, from_baseline(r, [judged.of(_reply_id(r, reply)) for reply in r.replies], judge)
  judged.finish(s.path(ranking.SEEDS))
  if counts is not None:
    counts.update(judged.counts)


@dataclasses.dataclass
class Survey:
  """The counts of all prompts before the scores are balanced, and the balance."""
  balance: 'Balance'
  prompts: int = 0
  replies: int = 0
  judged: Counter = dataclasses.field(default_factory=Counter)   # judgements by score, or None
  dropped: Counter = dataclasses.field(default_factory=Counter)  # replies by reason


def survey(s: stage.Stage, config, judge: judges.Judge) -> Survey:
  """Reads all inputs once, before anything is written."""
  seen = Survey(Balance())
  for r, (examples, dropped) in _agreed(s, config, judge, seen.judged):
    seen.prompts += 1
    seen.replies += len(r.replies)
    seen.dropped.update(dropped.values())
    for example in examples:
      seen.balance.add(example)
  return seen


def _write(s: stage.Stage, agreed: Iterator[tuple[schema.RankedPrompt, Agreed]],
           balance: 'Balance'):
  """Writes the examples that are kept, and the other replies in the order of their ids."""
  lines = spill.Spill()
  with records.replacing(s.folder / 'eft.jsonl') as out:
    for _, (examples, dropped) in agreed:
      for example in examples:
        if balance.keeps(example):
          out.write(records.dump(example))
        else:
          dropped[example.id] = DOWNSAMPLED
      for name, reason in dropped.items():
        lines.add(name, records.dump(schema.DroppedReply(id=name, reason=reason)))
  with records.replacing(s.folder / 'dropped.jsonl') as out:
    out.writelines(lines.sorted())


def _summary(seen: Survey) -> schema.EftSummary:
  """The counts and score histograms that go to done.json."""
  before, after = seen.balance.before, seen.balance.after
  made, judged = before.total(), +seen.judged
  dropped = seen.dropped + Counter({DOWNSAMPLED: made - after.total()})
  judgements = judged.total()
  del judged[None]
  return schema.EftSummary(
      examples=after.total(), prompts=seen.prompts, replies=seen.replies, judgements=judgements,
      parsed=judged.total(), dropped=dict(sorted(dropped.items())),
      scores_judged=scoring.histogram(judged),
      scores_before=scoring.histogram(before),
      scores=scoring.histogram(after))


def from_baseline(r: schema.RankedPrompt, scores: Sequence[scoring.Score],
                  judge: judges.Judge) -> Agreed:
  """A prompt and the scores of its replies -> its examples, which satisfy the rules above.

  Returns them with {reply id: reason} of the other replies.
  """
  replies = list(zip(r.replies, scores, strict=True))
  why = _disagreement([(reply.rank, score.mean) for reply, score in replies])
  if why:
    return [], {_reply_id(r, reply): why for reply in r.replies}
  targets, dropped = [], {}
  for reply, score in replies:
    if target := _nearest_to_mean(score):
      targets.append((reply, target))
    else:
      dropped[_reply_id(r, reply)] = 'no finished judgement'
  # Means in the order of the ranks may have nearest judgements that are not in that order: the
  # judgements nearest to 3.5 and 3.3 may be 3 and 4.
  orders = scoring.orders([(reply.rank, target.score) for reply, target in targets])
  if min(orders, default=0) < 0:
    return [], dropped | {_reply_id(r, reply): 'targets contradict the human ranks'
                          for reply, _ in targets}
  return [_example(r, reply, target.text, target.score, judge, target.token_ids)
          for reply, target in targets], dropped


def _nearest_to_mean(score: scoring.Score) -> schema.Judgement | None:
  """The first of the finished judgements whose score is nearest to the mean; None without any."""
  finished = [j for j in score.judgements if j.score is not None and j.finish == schema.EOS]
  return min(finished, key=lambda j: abs(j.score - score.mean), default=None)


def _disagreement(replies: list[tuple[int, float | None]]) -> str:
  """(rank, score) per reply of one prompt -> why the prompt is dropped, or '' if it is kept."""
  if any(score is None for _, score in replies):
    return 'a reply of the prompt has no score'
  orders = scoring.orders(replies)
  if min(orders, default=0) < 0:
    return 'scores contradict the human ranks'
  return '' if max(orders, default=0) > 0 else 'no pair agrees with the human ranks'


def from_ranks(r: schema.RankedPrompt, judge: judges.Judge) -> Agreed:
  """Human ranks as scores: the best rank gets the highest score, the worst rank the lowest.

  The ranks between are spaced evenly. The justification only states the rank. Returns what
  `from_baseline` returns.
  """
  worst, examples = max(reply.rank for reply in r.replies), []
  if worst == 0:
    return [], {_reply_id(r, reply): 'all replies have the same human rank' for reply in r.replies}
  for reply in r.replies:
    score = judge.nearest(judge.highest - (judge.highest - judge.lowest) * reply.rank / worst)
    text = f'People ranked it {reply.rank + 1} of {len(r.replies)}.\n{judge.state(score)}'
    examples.append(_example(r, reply, text, score, judge))
  return examples, {}


class Balance:
  """Downsamples the most frequent score to the runner-up's count (PAPER 3.1).

  A hash of the ids selects the examples, so that the selection is reproducible. All examples are
  added before any is kept.
  """

  def __init__(self):
    self._hashes = {}  # {whole score: hashes of the ids}

  def add(self, example: schema.EftExample):
    hashes = self._hashes.setdefault(scoring.whole(example.score), array.array('Q'))
    hashes.append(_hash(example))

  @property
  def before(self) -> Counter:
    """{whole score: examples}."""
    return Counter({score: len(hashes) for score, hashes in self._hashes.items()})

  @property
  def after(self) -> Counter:
    """The same of those that are kept."""
    return Counter({score: min(count, self._limit[1]) if score == self._limit[0] else count
                    for score, count in self.before.items()})

  def keeps(self, example: schema.EftExample) -> bool:
    """Whether an example that was added is kept."""
    return scoring.whole(example.score) != self._limit[0] or _hash(example) <= self._last

  @functools.cached_property
  def _limit(self) -> tuple[int | None, int]:
    """The most frequent score, None without another one, and how many examples of it are kept."""
    counts = self.before.most_common(2)
    return (counts[0][0], counts[1][1]) if len(counts) > 1 else (None, 0)

  @functools.cached_property
  def _last(self) -> int:
    """The largest hash of the examples with that score that are kept."""
    score, limit = self._limit
    return sorted(self._hashes[score])[limit - 1]


def _hash(example: schema.EftExample) -> int:
  return int(records.digest(example.id), 16)


def table(found: schema.EftSummary) -> str:
  """Formats the yield, the drop reasons, and the score histograms before and after selection."""
  lines = [f'{found.examples} examples from {found.replies} ranked replies of '
           f'{found.prompts} prompts',
           f'  {"judgements parsed":46}{found.parsed:8} of {found.judgements}']
  lines += [f'  {"dropped, " + why:46}{count:8}' for why, count in found.dropped.items()]
  columns = dict(judged=found.scores_judged, agreed=found.scores_before, kept=found.scores)
  lines.append(f'  {"score":>5}' + ''.join(f'{name:>8}' for name in columns))
  for score in sorted({key for column in columns.values() for key in column}, key=float):
    counts = ''.join(f'{column.get(score, 0):8}' for column in columns.values())
    lines.append(f'  {score:>5}{counts}')
  return '\n'.join(lines)


def _example(ranked: schema.RankedPrompt, reply: schema.Reply, text: str, score: float,
             judge: judges.Judge, token_ids: tuple[int, ...] = ()) -> schema.EftExample:
  prompt = judge.render(prompt=conversation.shown(ranked), response=reply.text)
  return schema.EftExample(id=_reply_id(ranked, reply), prompt=prompt, response=text, score=score,
                           token_ids=token_ids)


def _reply_id(ranked: schema.RankedPrompt, reply: schema.Reply) -> str:
  return records.join(ranked.id, reply.id)


if __name__ == '__main__':
  cli.main(run)
