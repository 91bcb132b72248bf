"""Health checks of one iteration's data: statistics, and a warning for each known failure.

Scores can rise while agreement with the human ranks falls. So these statistics never show that a
model improved. They show when it cannot have improved.
"""
from collections import Counter
from collections.abc import Iterable, Mapping
import statistics

from srlm_jax import catalog, cli, hosts, InputError, schema, stage
from srlm_jax.reward import scores as scoring

# A warning is given when a statistic crosses its limit.
PARSED = 0.9      # minimum fraction of judgements with a score
ONE_SCORE = 0.5   # maximum fraction of scores with the same value
LONGER = 1.5      # maximum ratio of chosen length to rejected length, in characters
TIED = 0.5        # maximum fraction of prompts whose candidates all have the same score
FEW = 100         # minimum number of pairs per 1,000 prompts
REPEATED = 0.5    # maximum fraction of candidates that duplicate another one of their prompt


def run(config, workdir):
  """Writes MODEL/health/health.json and prints its warnings.

  Reads the outputs of the prompts, respond, judge and pairs stages of MODEL, those that exist.
  """
  spec = catalog.find('reward.health')
  config = spec.view(config)
  s = stage.Stage(spec, config, workdir)
  if not s.has_inputs:
    raise InputError(f'{s.folder.parent} has no prompts, responses, judgements or pairs; run the '
                     f'stages that write them first')
  if s.done:
    return
  found = measure(s, config.name, config.judge.quorum)
  s.begin()
  if hosts.is_first_host():
    stage.write_json(s.folder / 'health.json', found)
  for sentence in found['warnings']:
    hosts.log(f'warning: {sentence}')
  s.finish(warnings=len(found['warnings']))


def measure(s: stage.Stage, model: str, quorum: int) -> dict:
  """-> statistics of the files that the stage reads, and warnings.

  Shares are fractions from 0 to 1. Lengths are in characters.
  """
  responses = list(s.read('respond/responses-*.jsonl'))
  judgements = list(s.read('judge/judgements-*.jsonl'))
  found, sentences = {}, []
  if attempts := list(s.read('prompts/attempts.jsonl')):
    found['prompts'] = of_prompts(attempts, list(s.read('prompts/prompts.jsonl')))
  if responses:
    found['responses'] = of_responses(responses)
    sentences += warn_responses(f'{model}/respond', responses)
  if judgements:
    found['judgements'] = of_judgements(judgements)
    sentences += warn_judgements(f'{model}/judge', judgements)
  if responses and judgements:
    found['ties'] = of_ties(responses, judgements, quorum)
    sentences += warn_ties(f'{model}/judge', responses, judgements, quorum)
  prompts = len({r.prompt_id for r in responses})
  if s.has('pairs/positives.jsonl'):
    found['positives'] = sum(1 for _ in s.read('pairs/positives.jsonl'))
  elif s.has('pairs/pairs.jsonl'):
    pairs = list(s.read('pairs/pairs.jsonl'))
    found['pairs'] = of_pairs(pairs, prompts)
    sentences += warn_pairs(f'{model}/pairs', pairs, prompts)
  return dict(found, warnings=sentences)


def of_prompts(attempts: list[schema.Attempt], prompts: list[schema.Prompt]) -> dict:
  """Counts of attempts, accepted prompts and drop reasons."""
  dropped = Counter(a.reason for a in attempts)
  passed = dropped.pop('', 0)
  dropped['more than wanted'] = passed - len(prompts)
  return dict(attempts=len(attempts), accepted=len(prompts),
              dropped=dict(sorted((+dropped).items())))


def of_responses(responses: list[schema.Response]) -> dict:
  """Counts, the unfinished and the duplicated share, the mean length."""
  finish = Counter(r.finish for r in responses)
  return dict(
      count=len(responses), unfinished=round(1 - finish[schema.EOS] / len(responses), 4),
      cut=finish[schema.CUT], too_long=finish[schema.TOO_LONG],
      repeated=round(_repeated(responses), 4),
      empty=sum(not r.response.strip() for r in responses),
      characters=_mean_length(r.response for r in responses))


def of_judgements(judgements: list[schema.Judgement]) -> dict:
  """Counts, the parse rate, parse failures by reason, and the score histogram.

  `largest_share` is the share of the most frequent score.
  """
  parsed = [j.score for j in judgements if j.score is not None]
  histogram = scoring.histogram(parsed)
  return dict(
      count=len(judgements), parse_rate=round(len(parsed) / len(judgements), 4),
      unparsed=dict(sorted(unparsed(judgements).items())), score_histogram=histogram,
      largest_share=round(max(histogram.values()) / len(parsed), 4) if parsed else None)


def of_ties(responses: list[schema.Response], judgements: list[schema.Judgement],
            quorum: int) -> dict:
  """The number of prompts with at least two scored candidates.

  `all_equal` is the fraction of these prompts whose candidates all have the same score.
  """
  scores, groups = scoring.by_response(judgements, quorum), {}
  for r in responses:
    score = scores.get(r.id)
    if score and score.mean is not None:
      groups.setdefault(r.prompt_id, []).append(score.mean)
  groups = [means for means in groups.values() if len(means) > 1]
  equal = sum(len(set(means)) == 1 for means in groups)
  return dict(prompts=len(groups), all_equal=round(equal / max(len(groups), 1), 4))


def of_pairs(pairs: list[schema.Pair], prompts: int) -> dict:
  """The yield, mean lengths of the chosen and rejected responses, the mean score margin."""
  chosen, rejected = _mean_lengths(pairs)
  margins = [p.chosen_score - p.rejected_score for p in pairs]
  return dict(
      count=len(pairs), per_1000_prompts=round(1000 * len(pairs) / max(prompts, 1), 1),
      chosen_characters=chosen, rejected_characters=rejected,
      length_gap=round(chosen - rejected, 1),
      margin=round(statistics.fmean(margins), 3) if margins else None)


def warn_judgements(title: str, judgements: list[schema.Judgement]) -> list[str]:
  """`warn_scores` of judgements."""
  scores = Counter(j.score for j in judgements if j.score is not None)
  return warn_scores(title, scores, unparsed(judgements))


def warn_scores(title: str, scores: Mapping[float, int], unparsed: Mapping[str, int]) -> list[str]:
  """{score: judgements}, {why there is no score: judgements} -> warnings: the parse rate is low;
  most scores have the same value.
  """
  parsed, rounded, sentences = sum(scores.values()), Counter(), []
  if parsed < PARSED * (count := parsed + sum(unparsed.values())):
    why = ', '.join(f'{n:,} {reason}' for reason, n in unparsed.items())
    sentences.append(f'{title}: {parsed:,} of {count:,} judgements have a score '
                     f'(the others: {why}), fewer than {PARSED:.0%}.')
  for score, count in scores.items():
    rounded[scoring.whole(score)] += count
  for value, count in rounded.items():
    if count > ONE_SCORE * parsed:
      sentences.append(f'{title}: {count / parsed:.0%} of the scores are {value}; the judge '
                       f'hardly distinguishes the responses.')
  return sentences


def warn_responses(title: str, responses: Iterable[schema.Response]) -> list[str]:
  """`warn_finishes` of responses."""
  responses = list(responses)
  return warn_finishes(title, Counter(r.finish for r in responses), _repeated(responses))


def warn_finishes(title: str, finish: Mapping[str, int], repeated: float) -> list[str]:
  """{why it ends: responses}, the share of duplicates -> warnings: more responses are cut than
  finished; most candidates duplicate another one.
  """
  cut, finished, sentences = finish.get(schema.CUT, 0), finish.get(schema.EOS, 0), []
  if cut > finished:
    sentences.append(f'{title}: {cut:,} responses are cut at the length limit, {finished:,} are '
                     f'finished; the model does not end its answers, or the limit is too low.')
  if repeated > REPEATED:
    sentences.append(f'{title}: {repeated:.0%} of the candidates duplicate another one '
                     f'of their prompt; raise the temperature to make them differ.')
  return sentences


def warn_ties(title: str, responses: list[schema.Response], judgements: list[schema.Judgement],
              quorum: int) -> list[str]:
  """`warn_equal` of the scores of responses."""
  return warn_equal(title, of_ties(responses, judgements, quorum)['all_equal'])


def warn_equal(title: str, share: float) -> list[str]:
  """The share of the prompts with equal scores only -> warning: most prompts are such."""
  if share <= TIED:
    return []
  return [f'{title}: for {share:.0%} of the prompts all candidates have the same score; these '
          f'prompts give no pair.']


def warn_pairs(title: str, pairs: list[schema.Pair], prompts: int) -> list[str]:
  """`warn_lengths` of pairs."""
  return warn_lengths(title, len(pairs), prompts, *_mean_lengths(pairs))


def warn_lengths(title: str, pairs: int, prompts: int, chosen: float, rejected: float) -> list[str]:
  """The numbers of pairs and prompts, mean characters of the chosen and the rejected responses ->
  warnings: the prompts gave few pairs; chosen responses are much longer than rejected ones.
  """
  sentences = []
  if 1000 * pairs < FEW * prompts:
    sentences.append(f'{title}: {pairs:,} pairs from {prompts:,} prompts, fewer than {FEW} '
                     f'per 1,000.')
  if pairs and chosen > LONGER * rejected:
    sentences.append(f'{title}: chosen responses have {chosen:,.0f} characters on average, '
                     f'rejected ones {rejected:,.0f}; the model may only learn to prefer length.')
  return sentences


def unparsed(judgements: list[schema.Judgement]) -> Counter:
  """The number of judgements without a score, by reason."""
  return Counter(j.reason for j in judgements if j.score is None)


def _repeated(responses: list[schema.Response]) -> float:
  """The fraction of responses that duplicate another response to the same prompt."""
  distinct = {(r.prompt_id, r.response.strip()) for r in responses}
  return 1 - len(distinct) / len(responses) if responses else 0.0


def _mean_lengths(pairs: list[schema.Pair]) -> tuple[float, float]:
  """Of the chosen and of the rejected responses, in characters."""
  return _mean_length(p.chosen for p in pairs), _mean_length(p.rejected for p in pairs)


def _mean_length(texts: Iterable[str]) -> float:
  lengths = [len(text) for text in texts]
  return round(statistics.fmean(lengths), 1) if lengths else 0.0


if __name__ == '__main__':
  cli.main(run)
