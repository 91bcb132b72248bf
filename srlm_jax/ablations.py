"""What the paper changes one at a time, as changes to the loop: `python -m srlm_jax.loop --ablation=NAME ...`.

Each is a list of --set changes; `SIZES` holds those that differ at one size.
"""

_POSITIVES = ('m2,m3,m4:pairs.strategy=positives_only', 'm2,m3,m4:train.data=ift,eft,positives',
              'm2,m3,m4:train.loss=sft', 'm2,m3,m4:train.init=m0')

ABLATIONS = dict(
    # PAPER 3.2: without EFT 541 and 429 pairs survive, against 3,964 and 6,942: scores pile up, formats fail.
    without_eft=('m1:train.data=ift',),
    # PAPER 3.2: a multiple-choice prompt agrees with people on 26.6 % of the pairs, the additive one on 65.1 %.
    multiple_choice=('judge.template=multiple_choice',),
    # PAPER 3.3: SFT on what scored 5, beside the seeds, gains nothing over M1.
    positives_only=(*_POSITIVES, 'm2,m3,m4:train.learning_rate=5.5e-6', 'm2,m3,m4:train.learning_rate_end=1.1e-6'),
    # PAPER appendix: M_t writes the prompts, not one fixed author.
    own_prompts=('m2,m3,m4:prompts.author=sampler',),
    # NLL on the chosen alone: what of a gain is imitation of the best of N, not preference.
    nll_chosen=('m2,m3,m4:train.loss=sft',),
    # The sandbox's program in the judge's place: the most that judging can give. And a blind one: it must give nothing.
    oracle_judge=('m2,m3,m4:judge.by=oracle',),
    random_judge=('m2,m3,m4:judge.by=random',),
    # PAPER 2.2 averages three judgements of a candidate.
    one_judgement=('m2,m3,m4:judge.n=1', 'm2,m3,m4:judge.quorum=1'),
)
SIZES = dict(
    tiny=dict(
        multiple_choice=('judge.template=sandbox_choice',),
        positives_only=(*_POSITIVES, 'm2,m3,m4:train.learning_rate=3e-4', 'm2,m3,m4:train.learning_rate_end=3e-5',
                        'm2,m3,m4:train.epochs=2')),
    stories=dict(
        multiple_choice=('judge.template=short_choice',),
        positives_only=(*_POSITIVES, 'm2,m3,m4:train.learning_rate=1e-4', 'm2,m3,m4:train.learning_rate_end=1e-5')))


def changes(name: str, size: str) -> tuple[str, ...]:
  """The changes of one ablation at one size; none for ''."""
  return SIZES.get(size, {}).get(name, ABLATIONS[name]) if name else ()
