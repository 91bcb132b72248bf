"""The health of one iteration's data: its numbers, and a sentence for each that looks like a known failure.

Scores can rise while agreement with people falls, so none of these numbers says that a model got better; they say
when it cannot have.
"""
from collections import Counter
from collections.abc import Iterable
import statistics

from etils import epath

from srlm_jax import catalog, cli, hosts, InputError, records, stage
from srlm_jax.reward import scores as scoring

PARSED = 0.9      # share of judgements that should have a score
ONE_SCORE = 0.5   # share of scores that one value may take
LONGER = 1.5      # characters of the chosen by those of the rejected
TIED = 0.5        # share of prompts whose scores may all be equal
FEW = 100         # pairs that 1,000 prompts should give at least
REPEATED = 0.5    # share of candidates that may repeat another of their prompt


def run(config, workdir):
  """MODEL/prompts, respond, judge, pairs, those that there are -> MODEL/health/health.json, and its warnings."""
  spec = catalog.find('reward.health')
  config = spec.view(config)
  folder = spec.folder(workdir, config).parent
  s = stage.Stage(spec, config, workdir)
  if not s.inputs:
    raise InputError(f'{folder} holds no prompts, responses, judgements or pairs; run the stages '
                     f'that write them first')
  if s.done:
    return
  found = measure(folder, config.judge.quorum)
  s.begin()
  if hosts.is_first_host():
    stage.write_json(s.folder / 'health.json', found)
  for sentence in found['warnings']:
    hosts.say(f'warning: {sentence}')
  s.finish(warnings=len(found['warnings']))


def measure(folder, quorum: int) -> dict:
  """The numbers of the files that there are in the folder of a model; shares are of 1, lengths in characters."""
  folder = epath.Path(folder)
  responses = _shards(folder / 'respond', 'responses', 'id', 'prompt_id', 'response', 'finish')
  judgements = _shards(folder / 'judge', 'judgements', 'response_id', 'score', 'reason')
  pairs = _lines(folder / 'pairs' / 'pairs.jsonl', 'chosen', 'rejected', 'chosen_score',
                 'rejected_score')
  found, sentences = {}, []
  if attempts := _lines(folder / 'prompts' / 'attempts.jsonl', 'dropped'):
    fates = Counter(a['dropped'] for a in attempts)
    kept, passed = len(_lines(folder / 'prompts' / 'prompts.jsonl')), fates.pop('', 0)
    fates['more than wanted'] = passed - kept
    found['prompts'] = dict(attempts=len(attempts), accepted=kept, dropped=dict(sorted((+fates).items())))
  if responses:
    found['responses'] = of_responses(responses)
    sentences += warn_responses(f'{folder.name}/respond', responses)
  if judgements:
    found['judgements'] = of_judgements(judgements)
    sentences += warn_judgements(f'{folder.name}/judge', judgements)
  if responses and judgements:
    found['ties'] = of_ties(responses, judgements, quorum)
    sentences += warn_ties(f'{folder.name}/judge', responses, judgements, quorum)
  prompts = len({r['prompt_id'] for r in responses})
  if (folder / 'pairs' / 'positives.jsonl').exists():
    found['positives'] = len(_lines(folder / 'pairs' / 'positives.jsonl'))
  elif (folder / 'pairs' / 'pairs.jsonl').exists():
    found['pairs'] = of_pairs(pairs, prompts)
    sentences += warn_pairs(f'{folder.name}/pairs', pairs, prompts)
  return dict(found, warnings=sentences)


def of_responses(responses: list[dict]) -> dict:
  """Counts, the share that is not finished, the share that repeats another of its prompt, the mean length."""
  finish = Counter(r['finish'] for r in responses)
  return dict(count=len(responses), unfinished=round(1 - finish['eos'] / len(responses), 4),
              cut=finish['length'], too_long=finish['too_long'], repeated=round(_repeated(responses), 4),
              empty=sum(not r['response'].strip() for r in responses), characters=_length(responses, 'response'))


def of_judgements(judgements: list[dict]) -> dict:
  """Counts, the share that has a score, why the others have none, the scores, the share of the commonest one."""
  parsed = [j['score'] for j in judgements if j['score'] is not None]
  histogram = scoring.histogram(parsed)
  return dict(count=len(judgements), parse_rate=round(len(parsed) / len(judgements), 4),
              unparsed=dict(sorted(unparsed(judgements).items())), score_histogram=histogram,
              commonest=round(max(histogram.values()) / len(parsed), 4) if parsed else None)


def of_ties(responses: list[dict], judgements: list[dict], quorum: int) -> dict:
  """Of the prompts with two scored candidates or more, the share on which all of them score the same."""
  scores, groups = scoring.by_response(judgements, quorum), {}
  for r in responses:
    if (score := scores.get(r['id'])) and score.mean is not None:
      groups.setdefault(r['prompt_id'], []).append(score.mean)
  groups = [means for means in groups.values() if len(means) > 1]
  return dict(prompts=len(groups), all_equal=round(sum(len(set(m)) == 1 for m in groups) / max(len(groups), 1), 4))


def of_pairs(pairs: list[dict], prompts: int) -> dict:
  """The yield, and the lengths of chosen and rejected."""
  chosen, rejected = _length(pairs, 'chosen'), _length(pairs, 'rejected')
  margins = [p['chosen_score'] - p['rejected_score'] for p in pairs]
  return dict(count=len(pairs), per_1000_prompts=round(1000 * len(pairs) / max(prompts, 1), 1),
              chosen_characters=chosen, rejected_characters=rejected, length_gap=round(chosen - rejected, 1),
              margin=round(statistics.fmean(margins), 3) if margins else None)


def warn_judgements(title: str, judgements: list[dict]) -> list[str]:
  """A sentence where too few have a score, and one where most scores are one value."""
  scores, sentences = [scoring.whole(j['score']) for j in judgements if j['score'] is not None], []
  if len(scores) < PARSED * len(judgements):
    why = ', '.join(f'{n} {reason}' for reason, n in unparsed(judgements).items())
    sentences.append(f'{title}: {len(scores):,} of {len(judgements):,} judgements have a score (the others: {why}), '
                     f'fewer than {PARSED:.0%}.')
  for value, count in Counter(scores).items():
    if count > ONE_SCORE * len(scores):
      sentences.append(f'{title}: {count / len(scores):.0%} of the scores are {value}; such a judge hardly tells one '
                       'response from another.')
  return sentences


def warn_responses(title: str, responses: Iterable[dict]) -> list[str]:
  """A sentence where most are cut, and one where most repeat another candidate of their prompt."""
  responses = list(responses)
  finish, sentences = Counter(r['finish'] for r in responses), []
  if finish['length'] > finish['eos']:
    sentences.append(f'{title}: {finish["length"]:,} responses are cut at the length limit, {finish["eos"]:,} are '
                     'finished; the model does not end its answers, or the limit is too low.')
  if _repeated(responses) > REPEATED:
    sentences.append(f'{title}: {_repeated(responses):.0%} of the candidates repeat another one of their prompt; a '
                     'higher temperature makes them differ.')
  return sentences


def warn_ties(title: str, responses: list[dict], judgements: list[dict], quorum: int) -> list[str]:
  """A sentence where for most prompts all candidates score the same."""
  share = of_ties(responses, judgements, quorum)['all_equal']
  return [f'{title}: for {share:.0%} of the prompts all candidates score the same; such prompts give no '
          'pair.'] if share > TIED else []


def warn_pairs(title: str, pairs: list[dict], prompts: int) -> list[str]:
  """A sentence where the prompts gave few pairs, and one where the chosen are longer than the rejected by half."""
  chosen, rejected = _length(pairs, 'chosen'), _length(pairs, 'rejected')
  few = [f'{title}: {len(pairs):,} pairs from {prompts:,} prompts, fewer than {FEW} of 1,000.'] * (
      1000 * len(pairs) < FEW * prompts)
  return few + [f'{title}: a chosen response has {chosen:,.0f} characters, a rejected one {rejected:,.0f}; the model '
                'may learn length alone.'] * (bool(pairs) and chosen > LONGER * rejected)


def unparsed(judgements: list[dict]) -> Counter:
  """How many judgements have no score, by reason."""
  return Counter(j['reason'] for j in judgements if j['score'] is None)


def _repeated(responses: list[dict]) -> float:
  different = {(r['prompt_id'], r['response'].strip()) for r in responses}
  return 1 - len(different) / len(responses) if responses else 0.0


def _length(rows: list[dict], side: str) -> float:
  return round(statistics.fmean(len(r[side]) for r in rows), 1) if rows else 0.0


def _shards(folder, stem: str, *fields: str) -> list[dict]:
  return list(records.read_shards(folder, stem, *fields)) if list(folder.glob(f'{stem}-*')) else []


def _lines(path, *fields: str) -> list[dict]:
  return list(records.read(path, *fields)) if path.exists() else []


if __name__ == '__main__':
  cli.main(run)
