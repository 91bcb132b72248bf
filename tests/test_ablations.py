"""The loop checks all configs, with their changes, before the first stage."""
import pytest

from srlm_jax import ablations, config as configs, InputError, loop
from srlm_jax.data import tokenizer
from srlm_jax.reward import judges


def changes_model(change: str, model: str) -> bool:
  """Whether a --set change applies to a model: MODELS:KEY=VALUE, or KEY=VALUE for all."""
  models, colon, _ = change.partition('=')[0].partition(':')
  return not colon or model in models.split(',')


@pytest.mark.parametrize('size', configs.SIZES)
@pytest.mark.parametrize('name', ['', *ablations.ABLATIONS])
def test_every_ablation_is_a_valid_config_at_every_size(name, size):
  changes = list(ablations.changes(name, size))
  if name in ('oracle_judge', 'random_judge') and configs.get('m2', size).data.source != 'sandbox':
    with pytest.raises(InputError, match='in the sandbox also oracle or random'):
      loop.load_config('m2', size, '', '', changes)
    return
  for model in configs.MODELS:
    changed = loop.load_config(model, size, '', '', changes)
    loop.refuse_mistakes(changed)
    own = [c for c in changes if changes_model(c, model)]
    assert (changed == loop.load_config(model, size, '', '', [])) == (not own)


@pytest.mark.parametrize('change, message', [
    ('pairs.strategy=maxmin', r'did you mean "max_min"'),
    ('judge.template=nothing', 'judge_nothing.txt does not exist'),
    ('prompts.template=nothing', 'author_nothing.txt does not exist'),
    ('eft.targets=rank', 'it is baseline or ranks'),
    ('meta_judge.template=additive', r'contains the slot \{request\} 0 times'),
    ('chat=alpaca', 'config.chat is'),
    ('pairs.strategy=positives_only',
     'makes positives for m2, which trains on pairs with the loss dpo'),
    ('train.data=eft', 'makes pairs for m2'),
    ('pairs.rho=0.7', 'config.pairs.rho is 0.7; it must be 0 to 0.5'),
    ('data.source=ranks', 'config.data.source'),
    ('eval.quorum=4', 'more than the 3 of eval.judgements')])
def test_mistakes_are_refused_before_any_stage(change, message):
  with pytest.raises(InputError, match=message):
    loop.refuse_mistakes(loop.load_config('m2', 'tiny', '', '', [change]))


@pytest.mark.parametrize('name', [
    '', *sorted({*ablations.ABLATIONS} - {'oracle_judge', 'random_judge'})])
def test_every_rubric_of_size_stories_leaves_room_for_a_response(name, stories):
  config = loop.load_config('m2', 'stories', '', '', list(ablations.changes(name, 'stories')))
  rubric = judges.load(config.judge.template).render(prompt='', response='')
  room = 512 - config.judge.max_tokens - config.respond.max_tokens
  assert len(tokenizer.load(stories).encode(rubric)) < room
