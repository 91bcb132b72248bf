"""The paper's ablations and our controls: `python -m srlm_jax.loop --ablation=NAME ...`.

Each ablation is a tuple of --set changes to the loop. `SIZES` replaces some of them at one size.
"""

_POSITIVES = ('m2,m3,m4:pairs.strategy=positives_only',
              'm2,m3,m4:train.data=ift,eft,positives',
              'm2,m3,m4:train.loss=sft',
              'm2,m3,m4:train.init=m0')

ABLATIONS = dict(
    # PAPER 3.2: without EFT, 541 and 429 pairs are left instead of 3,964 and 6,942. Scores
    # concentrate on few values, and fewer judgements can be parsed.
    without_eft=('m1:train.data=ift',),
    # PAPER 3.2: a multiple-choice judge agrees with human ranks on 26.6 % of the pairs, the
    # additive one on 65.1 %.
    multiple_choice=('judge.template=multiple_choice',),
    # PAPER 3.3: SFT on the seed data and the responses that scored 5 gains nothing over M1.
    positives_only=(*_POSITIVES,
                    'm2,m3,m4:train.learning_rate=5.5e-6',
                    'm2,m3,m4:train.learning_rate_end=1.1e-6'),
    # PAPER appendix: M_t writes the prompts, instead of one fixed author.
    own_prompts=('m2,m3,m4:prompts.author=sampler',),
    # NLL on the chosen response: the part of the gain that imitation of the best of N gives.
    nll_chosen=('m2,m3,m4:train.loss=sft',),
    # The sandbox's oracle as the judge: an upper bound on the effect of judging.
    oracle_judge=('m2,m3,m4:judge.by=oracle',),
    # Random scores: the gain must vanish.
    random_judge=('m2,m3,m4:judge.by=random',),
    # PAPER 2.2 averages three judgements per candidate.
    one_judgement=('m2,m3,m4:judge.n=1', 'm2,m3,m4:judge.quorum=1'),
)
SIZES = dict(
    auto=dict(positives_only=_POSITIVES),  # the learning rate is chosen for the loss
    **dict.fromkeys(('tiny', 'hard'), dict(
        multiple_choice=('judge.template=sandbox_choice',),
        positives_only=(*_POSITIVES,
                        'm2,m3,m4:train.learning_rate=3e-4',
                        'm2,m3,m4:train.learning_rate_end=3e-5',
                        'm2,m3,m4:train.epochs=2'))),
    stories=dict(
        multiple_choice=('judge.template=short_choice',),
        positives_only=(*_POSITIVES,
                        'm2,m3,m4:train.learning_rate=1e-4',
                        'm2,m3,m4:train.learning_rate_end=1e-5')))


def changes(name: str, size: str) -> tuple[str, ...]:
  """-> the --set changes of an ablation at a size; none for the empty name."""
  return SIZES.get(size, {}).get(name, ABLATIONS[name]) if name else ()
