"""Losses: log-probs in, losses out. `objectives.py` selects one by the config."""
import jax
import jax.numpy as jnp

from srlm_jax import config as configs


def sft_loss(token_logps):
  """token_logps [B, N], 0 where there is no target -> their negative sum []."""
  return -token_logps.sum()


def dpo(config, policy, reference, lengths, soft_labels):
  """logps [..., 2] of chosen and rejected, under policy and reference -> losses [...] and metrics.

  `config`: the `train` section. lengths [..., 2]: tokens of the responses. soft_labels [...]: see
  `dpo_loss`. Metrics are {name: [...]}.

  A demonstration, whose second length is 0, has the loss of SFT per token times `sft_weight`. Where
  the config trains on some, the metrics of a demonstration are 0, and `pair_share` is 1 for a pair.
  """
  is_pair, lengths = lengths[..., 1] > 0, jnp.maximum(lengths, 1)
  log_ratios = policy - reference
  if config.length_normalize:
    log_ratios /= lengths
  reward = config.beta * log_ratios
  loss, margin = dpo_loss(log_ratios, config.beta, soft_labels)
  if config.nll_weight:
    loss += config.nll_weight * nll(policy[..., 0], lengths[..., 0])
  metrics = dict(margin=margin, accuracy=(margin > 0).astype(jnp.float32),
                 chosen_logp=policy[..., 0], rejected_logp=policy[..., 1],
                 chosen_reward=reward[..., 0], rejected_reward=reward[..., 1])
  if configs.mixes_demonstrations(config):
    loss = jnp.where(is_pair, loss, config.sft_weight * nll(policy[..., 0], lengths[..., 0]))
    metrics = {name: jnp.where(is_pair, x, 0) for name, x in dict(metrics, pair_share=1.0).items()}
  return loss, metrics


def dpo_loss(log_ratios, beta, soft_label):
  """log_ratios [..., 2], soft_label [...] -> losses [...] and margins [...].

  `log_ratios` are log-probs under the policy minus those under the reference, of chosen and
  rejected. As sums over tokens they give DPO (Rafailov et al. 2023, eq. 7); each divided by the
  response's number of tokens they give length-normalized DPO (Tulu 3, Lambert et al. 2024,
  2411.15124, section 5).

  `soft_label` is the probability that chosen is better; 1 gives eq. 7. It weights the losses of
  both orders (CREAM, Wang et al. 2024, 2410.12735): -c log s(m) - (1 - c) log s(-m), where
  log s(-m) = log s(m) - m.
  """
  margin = beta * (log_ratios[..., 0] - log_ratios[..., 1])
  return -jax.nn.log_sigmoid(margin) + (1 - soft_label) * margin, margin


def nll(logps, lengths):
  """Log-probs [...] of the chosen responses and their numbers of tokens [...] -> [...].

  The negative log-likelihood per token that Iterative RPO adds to DPO (Pang et al. 2024,
  2404.19733, section 2). There it has weight 1 and DPO has alpha, which equals a weight of
  1 / alpha here up to the learning rate.
  """
  return -logps / lengths
