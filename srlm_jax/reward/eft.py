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
from collections import Counter

from srlm_jax import catalog, cli, conversation, hosts, records, schema, stage
from srlm_jax.data import ranked as ranking
from srlm_jax.reward import judges, scores as scoring


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
  ranked = ranking.of_split(s, 'train')
  judgements = []
  if config.eft.targets == 'baseline':
    judgements = list(s.read('judge/judgements-*.jsonl'))
    scores = scoring.by_response(judgements, config.eft.quorum)
    agreed, dropped = from_baseline(ranked, scores, judge)
  else:
    agreed, dropped = from_ranks(ranked, judge)
  kept = balance(agreed)
  kept_ids = {e.id for e in kept}
  dropped |= {e.id: 'downsampled: most frequent score'
              for e in agreed if e.id not in kept_ids}
  found = _summary(ranked, judgements, agreed, kept, dropped)
  hosts.log(f'{s.title}: {table(found)}')
  if not kept:
    hosts.log(f'{s.title}: no judgement of the SFT baseline agrees with the human ranks on any of '
              f'{len(ranked)} prompts; the model is too weak to write EFT data, use '
              f'eft.targets=ranks instead')
  s.begin()
  if hosts.is_first_host():
    records.write(s.folder / 'dropped.jsonl',
                  (schema.DroppedReply(id=name, reason=reason)
                   for name, reason in sorted(dropped.items())))
    records.write(s.folder / 'eft.jsonl', kept)
  s.finish(found)


def _summary(ranked: list[schema.RankedPrompt], judgements: list[schema.Judgement],
             agreed: list[schema.EftExample], kept: list[schema.EftExample],
             dropped: dict[str, str]) -> schema.EftSummary:
  """The counts and score histograms that go to done.json."""
  parsed = [j.score for j in judgements if j.score is not None]
  return schema.EftSummary(
      examples=len(kept), prompts=len(ranked), replies=sum(len(r.replies) for r in ranked),
      judgements=len(judgements), parsed=len(parsed),
      dropped=dict(sorted(Counter(dropped.values()).items())),
      scores_judged=scoring.histogram(parsed),
      scores_before=scoring.histogram(e.score for e in agreed),
      scores=scoring.histogram(e.score for e in kept))


def from_baseline(
    ranked: list[schema.RankedPrompt], scores: dict[str, scoring.Score],
    judge: judges.Judge) -> tuple[list[schema.EftExample], dict[str, str]]:
  """-> the examples that satisfy the rules above, and {reply id: reason} of the dropped replies."""
  examples, dropped = [], {}
  for r in ranked:
    replies = [(reply, scores.get(_reply_id(r, reply))) for reply in r.replies]
    why = _disagreement([(reply.rank, score.mean if score else None)
                         for reply, score in replies])
    if why:
      dropped |= {_reply_id(r, reply): why for reply, _ in replies}
      continue
    targets = []
    for reply, score in replies:
      if target := _nearest_to_mean(score):
        targets.append((reply, target))
      else:
        dropped[_reply_id(r, reply)] = 'no finished judgement'
    # Means in the order of the ranks may have nearest judgements that are not in that order: the
    # judgements nearest to 3.5 and 3.3 may be 3 and 4.
    orders = scoring.orders([(reply.rank, target.score) for reply, target in targets])
    if min(orders, default=0) < 0:
      dropped |= {_reply_id(r, reply): 'targets contradict the human ranks' for reply, _ in targets}
    else:
      examples += [_example(r, reply, target.text, target.score, judge, target.token_ids)
                   for reply, target in targets]
  return examples, dropped


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


def from_ranks(ranked: list[schema.RankedPrompt],
               judge: judges.Judge) -> tuple[list[schema.EftExample], dict[str, str]]:
  """Human ranks as scores: the best rank gets the highest score, the worst rank the lowest.

  The ranks between are spaced evenly. The justification only states the rank. Returns what
  `from_baseline` returns.
  """
  examples, dropped = [], {}
  for r in ranked:
    worst = max(reply.rank for reply in r.replies)
    for reply in r.replies:
      if worst == 0:
        dropped[_reply_id(r, reply)] = 'all replies have the same human rank'
        continue
      score = judge.nearest(judge.highest - (judge.highest - judge.lowest) * reply.rank / worst)
      text = f'People ranked it {reply.rank + 1} of {len(r.replies)}.\n{judge.state(score)}'
      examples.append(_example(r, reply, text, score, judge))
  return examples, dropped


def balance(examples: list[schema.EftExample]) -> list[schema.EftExample]:
  """Downsamples the most frequent score to the runner-up's count (PAPER 3.1).

  A hash of the ids selects the examples, so that the selection is reproducible.
  """
  counts = Counter(scoring.whole(e.score) for e in examples).most_common()
  if len(counts) < 2:
    return examples
  (most_frequent, _), (_, limit) = counts[:2]
  ids = [e.id for e in examples if scoring.whole(e.score) == most_frequent]
  removed = set(sorted(ids, key=records.digest)[limit:])
  return [e for e in examples if e.id not in removed]


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
