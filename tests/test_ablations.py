"""What the loop is asked for is checked as a whole before it starts."""
import pytest

from srlm_jax import ablations, config as configs, InputError, loop
from srlm_jax.data import tokenizer
from srlm_jax.reward import judges


@pytest.mark.parametrize('size', configs.SIZES)
@pytest.mark.parametrize('name', ['', *ablations.ABLATIONS])
def test_every_ablation_is_a_valid_config_at_every_size(name, size):
  changes = list(ablations.changes(name, size))
  if name in ('oracle_judge', 'random_judge') and size != 'tiny':
    with pytest.raises(InputError, match='in the sandbox also oracle or random'):
      loop.load_config('m2', size, '', '', changes)
    return
  for model in configs.MODELS:
    changed = loop.load_config(model, size, '', '', changes)
    loop.refuse_mistakes(changed)
    assert (changed == loop.load_config(model, size, '', '', [])) == (not any(
        ':' not in c.partition('=')[0] or model in c.partition(':')[0].split(',') for c in changes))


@pytest.mark.parametrize('change, message', [
    ('pairs.strategy=maxmin', r'did you mean "max_min"'),
    ('judge.template=nothing', 'judge_nothing.txt does not exist'),
    ('prompts.template=nothing', 'author_nothing.txt does not exist'), ('eft.targets=rank', 'it is baseline or ranks'),
    ('meta_judge.template=additive', r'holds the slot \{request\} 0 times'), ('chat=alpaca', 'config.chat is'),
    ('pairs.strategy=positives_only', 'makes positives for m2, and it trains on pairs with the loss dpo'),
    ('train.data=eft', 'makes pairs for m2'), ('pairs.rho=0.7', 'config.pairs.rho is 0.7; it is 0 to 0.5'),
    ('data.source=ranks', 'config.data.source'), ('eval.quorum=4', 'more than the 3 judgements')])
def test_mistakes_are_said_before_any_stage(change, message):
  with pytest.raises(InputError, match=message):
    loop.refuse_mistakes(loop.load_config('m2', 'tiny', '', '', [change]))


@pytest.mark.parametrize('name', ['', *sorted({*ablations.ABLATIONS} - {'oracle_judge', 'random_judge'})])
def test_every_rubric_of_size_stories_leaves_room_for_a_response(name, stories):
  config = loop.load_config('m2', 'stories', '', '', list(ablations.changes(name, 'stories')))
  rubric = judges.load(config.judge.template).render(prompt='', response='')
  assert len(tokenizer.load(stories).encode(rubric)) < 512 - config.judge.max_tokens - config.respond.max_tokens
