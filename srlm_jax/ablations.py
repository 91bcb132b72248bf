"""The paper's ablations and our controls: `python -m srlm_jax.loop --ablation=NAME ...`.

Each ablation is a tuple of --set changes to the loop. `SIZES` replaces some of them at one size.
"""
from srlm_jax.config import MODELS

_DPO = ','.join(MODELS[3:])  # the models of the rounds: m2, m3, ..
_POSITIVES = (f'{_DPO}:pairs.strategy=positives_only',
              f'{_DPO}:train.data=ift,eft,positives',
              f'{_DPO}:train.loss=sft',
              f'{_DPO}:train.init=m0')

ABLATIONS = dict(
    # PAPER 3.2: without EFT, 541 and 429 pairs are left instead of 3,964 and 6,942. Scores
    # concentrate on few values, and fewer judgements can be parsed.
    without_eft=('m1:train.data=ift',),
    # PAPER 3.2: a multiple-choice judge agrees with human ranks on 26.6 % of the pairs, the
    # additive one on 65.1 %.
    multiple_choice=('judge.template=multiple_choice',),
    # PAPER 3.3: SFT on the seed data and the responses that scored 5 gains nothing over M1.
    positives_only=(*_POSITIVES,
                    f'{_DPO}:train.learning_rate=5.5e-6',
                    f'{_DPO}:train.learning_rate_end=1.1e-6'),
    # PAPER appendix: M_t writes the prompts, instead of one fixed author.
    own_prompts=(f'{_DPO}:prompts.author=sampler',),
    # NLL on the chosen response: the part of the gain that imitation of the best of N gives.
    nll_chosen=(f'{_DPO}:train.loss=sft',),
    # The sandbox's oracle as the judge: an upper bound on the effect of judging.
    oracle_judge=(f'{_DPO}:judge.by=oracle',),
    # Random scores: the gain must vanish.
    random_judge=(f'{_DPO}:judge.by=random',),
    # PAPER 2.2 averages three judgements per candidate.
    one_judgement=(f'{_DPO}:judge.n=1', f'{_DPO}:judge.quorum=1'),
    # Ways in which the judge learns from itself, compared in docs/judge.md.
    # Pairs of judgements by a meta-judge: Meta-Rewarding, Wu et al. 2024.
    judge_meta=(f'{_DPO}:train.data=pairs,judge_pairs',),
    # The majority of its judgements against a dissenting one: Prasad et al. 2024, there of answers.
    judge_majority=(f'{_DPO}:train.data=pairs,majority_pairs',),
    # Judgements of responses to another prompt, which are usually worse: Wang et al. 2024.
    judge_swapped=(f'{_DPO}:train.data=pairs,swapped_pairs',),
    # The same once, for M2, and of the swapped responses only.
    judge_swapped_once=('m2:train.data=pairs,swapped_pairs', 'm2:judge_pairs.of=swapped'),
    # EFT examples, which taught M1 to judge, again in every round.
    judge_eft=(f'{_DPO}:train.data=pairs,eft',),
)
SIZES = dict(
    auto=dict(positives_only=_POSITIVES),  # the learning rate is chosen for the loss
    **dict.fromkeys(('tiny', 'hard'), dict(
        multiple_choice=('judge.template=sandbox_choice',),
        positives_only=(*_POSITIVES,
                        f'{_DPO}:train.learning_rate=3e-4',
                        f'{_DPO}:train.learning_rate_end=3e-5',
                        f'{_DPO}:train.epochs=2'))),
    stories=dict(
        multiple_choice=('judge.template=short_choice',),
        positives_only=(*_POSITIVES,
                        f'{_DPO}:train.learning_rate=1e-4',
                        f'{_DPO}:train.learning_rate_end=1e-5')))


def changes(name: str, size: str) -> tuple[str, ...]:
  """-> the --set changes of an ablation at a size; none for the empty name."""
  return SIZES.get(size, {}).get(name, ABLATIONS[name]) if name else ()
