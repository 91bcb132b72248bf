"""Records with default values, for tests that need only some of their fields."""
from srlm_jax import schema


def response(name: str, **fields) -> schema.Response:
  """name: PROMPT/N."""
  prompt_id, _, n = name.rpartition('/')
  number = int(n) if n.isdigit() else 0
  return schema.Response(**dict(
      id=name, prompt_id=prompt_id, index=number, prompt='Why?', response=f'answer {n}',
      finish='eos', n_tokens=3, logp=-1.0) | fields)


def judgement(response_id: str, j: int, score: float | None, **fields) -> schema.Judgement:
  return schema.Judgement(**dict(
      id=f'{response_id}/{j}', prompt_id=response_id.rpartition('/')[0], response_id=response_id,
      index=j, text=f'{response_id} {j}', score=score, reason='no score' if score is None else '',
      finish='eos') | fields)


def pair(name: str, **fields) -> schema.Pair:
  return schema.Pair(**dict(
      id=name, prompt='Why?', chosen='good', rejected='bad', chosen_finish='eos',
      rejected_finish='eos', chosen_id=f'{name}/0', rejected_id=f'{name}/1', chosen_score=4.0,
      rejected_score=2.0, chosen_spread=0.0, rejected_spread=0.0) | fields)


def ranked(name: str, ranks, split: str = 'train', **fields) -> schema.RankedPrompt:
  """One reply per rank, with the texts t0, t1, .."""
  replies = tuple(schema.Reply(id=str(i), text=f't{i}', rank=rank) for i, rank in enumerate(ranks))
  return schema.RankedPrompt(**dict(id=name, prompt='Why?', split=split, replies=replies) | fields)
