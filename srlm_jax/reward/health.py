"""Health checks of one iteration's data: statistics, and a warning for each known failure.

Scores can rise while agreement with the human ranks falls. So these statistics never show that a
model improved. They show when it cannot have improved.
"""
from collections import Counter
from collections.abc import Iterable, Iterator

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
  found, sentences = {}, []
  if s.has('prompts/attempts.jsonl'):
    attempts = of_prompts(s.read('prompts/attempts.jsonl'), s.read('prompts/prompts.jsonl'))
    found |= dict(prompts=attempts) if attempts['attempts'] else {}
  responses, judgements, ties = Responses(), Judgements(), Ties()
  _count(s, quorum, responses, judgements, ties)
  if responses.count:
    found['responses'] = responses.found()
    sentences += responses.warnings(f'{model}/respond')
  if judgements.count:
    found['judgements'] = judgements.found()
    sentences += judgements.warnings(f'{model}/judge')
  if responses.count and judgements.count:
    found['ties'] = ties.found()
    sentences += ties.warnings(f'{model}/judge')
  if s.has('pairs/positives.jsonl'):
    found['positives'] = sum(1 for _ in s.read('pairs/positives.jsonl'))
  elif s.has('pairs/pairs.jsonl'):
    pairs = Pairs(s.read('pairs/pairs.jsonl'))
    found['pairs'] = pairs.found(responses.prompts)
    sentences += pairs.warnings(f'{model}/pairs', responses.prompts)
  return dict(found, warnings=sentences)


def _count(s: stage.Stage, quorum: int, responses: 'Responses', judgements: 'Judgements',
           ties: 'Ties'):
  """Adds the responses and the judgements of the stage's inputs, prompt by prompt."""
  file, answers = 'judge/judgements-*.jsonl', 'respond/responses-*.jsonl'
  made = judgements.passing(s.read(file))
  if not s.has(answers):
    for _ in made:  # counts them
      pass
    return
  judged = scoring.Judged(made, quorum, s.path(file)) if s.has(file) else None
  for group in scoring.by_prompt(s.read(answers)):
    responses.add(group)
    if judged:
      ties.add(judged.of(r.id).mean for r in group)
  if judged:
    judged.finish(s.path(answers))


def of_prompts(attempts: Iterable[schema.Attempt], prompts: Iterable[schema.Prompt]) -> dict:
  """Counts of attempts, accepted prompts and drop reasons."""
  dropped, accepted = Counter(a.reason for a in attempts), sum(1 for _ in prompts)
  made, passed = dropped.total(), dropped.pop('', 0)
  dropped['more than wanted'] = passed - accepted
  return dict(attempts=made, accepted=accepted, dropped=dict(sorted((+dropped).items())))


class Responses:
  """Statistics of responses. The responses to a prompt must follow each other.

  prompts: those that have a response; finish: {why it ends: responses}
  """

  def __init__(self, responses: Iterable[schema.Response] = ()):
    self.prompts, self._distinct, self._empty = 0, 0, 0
    self.finish, self._characters = Counter(), scoring.Mean()
    for group in scoring.by_prompt(responses):
      self.add(group)

  def add(self, group: list[schema.Response]):
    """Adds all responses to a prompt."""
    texts = [r.response.strip() for r in group]
    self.prompts += 1
    self._distinct += len({*texts})
    self._empty += texts.count('')
    for r in group:
      self.finish[r.finish] += 1
      self._characters.add(len(r.response))

  @property
  def count(self) -> int:
    return self._characters.count

  @property
  def _repeated(self) -> float:
    """The fraction of responses that duplicate another response to the same prompt."""
    return 1 - self._distinct / self.count if self.count else 0.0

  def found(self) -> dict:
    """Counts, the unfinished and the duplicated share, the mean length."""
    finish = self.finish
    return dict(
        count=self.count, unfinished=round(1 - finish[schema.EOS] / self.count, 4),
        cut=finish[schema.CUT], too_long=finish[schema.TOO_LONG],
        repeated=round(self._repeated, 4), empty=self._empty,
        characters=self._characters.rounded(1))

  def warnings(self, title: str) -> list[str]:
    """Warnings: more responses are cut than finished; most candidates duplicate another one."""
    finish, sentences = self.finish, []
    if finish[schema.CUT] > finish[schema.EOS]:
      sentences.append(f'{title}: {finish["length"]:,} responses are cut at the length limit, '
                       f'{finish["eos"]:,} are finished; the model does not end its answers, or '
                       f'the limit is too low.')
    if self._repeated > REPEATED:
      sentences.append(f'{title}: {self._repeated:.0%} of the candidates duplicate another one of '
                       f'their prompt; raise the temperature to make them differ.')
    return sentences


class Judgements:
  """Statistics of judgements.

  unparsed: the number of judgements without a score, by reason
  """

  def __init__(self, judgements: Iterable[schema.Judgement] = ()):
    self.count, self.unparsed, self._scores = 0, Counter(), Counter()
    for judgement in judgements:
      self.add(judgement)

  def add(self, judgement: schema.Judgement):
    self.count += 1
    if judgement.score is None:
      self.unparsed[judgement.reason] += 1
    else:
      self._scores[scoring.whole(judgement.score)] += 1

  def passing(self, judgements: Iterable[schema.Judgement]) -> Iterator[schema.Judgement]:
    """Yields the judgements, and adds each before."""
    for judgement in judgements:
      self.add(judgement)
      yield judgement

  @property
  def histogram(self) -> dict[str, int]:
    """{whole score: judgements}."""
    return scoring.histogram(self._scores)

  def found(self) -> dict:
    """Counts, the parse rate, parse failures by reason, and the score histogram.

    `largest_share` is the share of the most frequent score.
    """
    parsed = self._scores.total()
    return dict(
        count=self.count, parse_rate=round(parsed / self.count, 4),
        unparsed=dict(sorted(self.unparsed.items())),
        score_histogram=self.histogram,
        largest_share=round(max(self._scores.values()) / parsed, 4) if parsed else None)

  def warnings(self, title: str) -> list[str]:
    """Warnings: the parse rate is low; most scores have the same value."""
    parsed, sentences = self._scores.total(), []
    if parsed < PARSED * self.count:
      why = ', '.join(f'{n:,} {reason}' for reason, n in self.unparsed.items())
      sentences.append(f'{title}: {parsed:,} of {self.count:,} judgements have a score '
                       f'(the others: {why}), fewer than {PARSED:.0%}.')
    for value, count in self._scores.items():
      if count > ONE_SCORE * parsed:
        sentences.append(f'{title}: {count / parsed:.0%} of the scores are {value}; the judge '
                         f'hardly distinguishes the responses.')
    return sentences


class Ties:
  """The prompts with at least two scored candidates, and those of them with equal scores only."""

  def __init__(self):
    self._prompts, self._equal = 0, 0

  def add(self, means: Iterable[float | None]):
    """Adds a prompt by the mean scores of its candidates."""
    means = [mean for mean in means if mean is not None]
    self._prompts += len(means) > 1
    self._equal += len(means) > 1 and len({*means}) == 1

  def found(self) -> dict:
    """The number of these prompts; `all_equal` is the fraction with equal scores only."""
    return dict(prompts=self._prompts, all_equal=round(self._equal / max(self._prompts, 1), 4))

  def warnings(self, title: str) -> list[str]:
    """Warning: most prompts have candidates with equal scores only."""
    share = self.found()['all_equal']
    if share <= TIED:
      return []
    return [f'{title}: for {share:.0%} of the prompts all candidates have the same score; these '
            f'prompts give no pair.']


class Pairs:
  """Statistics of pairs. `prompts`: the number of prompts that were answered."""

  def __init__(self, pairs: Iterable[schema.Pair] = ()):
    self._chosen, self._rejected, self._margin = (scoring.Mean() for _ in range(3))
    for pair in pairs:
      self.add(pair)

  def add(self, pair: schema.Pair):
    self._chosen.add(len(pair.chosen))
    self._rejected.add(len(pair.rejected))
    self._margin.add(pair.chosen_score - pair.rejected_score)

  def found(self, prompts: int) -> dict:
    """The yield, mean lengths of the chosen and rejected responses, the mean score margin."""
    count, (chosen, rejected) = self._margin.count, self._lengths()
    return dict(
        count=count, per_1000_prompts=round(1000 * count / max(prompts, 1), 1),
        chosen_characters=chosen, rejected_characters=rejected,
        length_gap=round(chosen - rejected, 1), margin=self._margin.rounded(3))

  def warnings(self, title: str, prompts: int) -> list[str]:
    """Warnings: the prompts gave few pairs; chosen responses are much longer than rejected ones."""
    count, (chosen, rejected) = self._margin.count, self._lengths()
    sentences = []
    if 1000 * count < FEW * prompts:
      sentences.append(f'{title}: {count:,} pairs from {prompts:,} prompts, fewer than {FEW} '
                       f'per 1,000.')
    if count and chosen > LONGER * rejected:
      sentences.append(f'{title}: chosen responses have {chosen:,.0f} characters on average, '
                       f'rejected ones {rejected:,.0f}; the model may only learn to prefer length.')
    return sentences

  def _lengths(self) -> tuple[float, float]:
    """The mean lengths of the chosen and of the rejected responses, in characters; 0 without any.
    """
    return self._chosen.rounded(1) or 0.0, self._rejected.rounded(1) or 0.0


if __name__ == '__main__':
  cli.main(run)
