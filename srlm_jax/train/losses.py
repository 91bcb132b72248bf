"""Losses: log-probabilities in, sums over examples out."""
import jax


def sft_loss(logps):
  """Token log-probs [B, R], 0 where there is none -> their negative sum."""
  return -logps.sum()


def dpo_loss(ratios, beta, confidence):
  """Log-ratios of policy to reference [..., 2], of chosen and rejected -> losses [...] and margins [...].

  Of sums of log-probs it is DPO itself: Rafailov et al. 2023, eq. 7. Each divided by the tokens of its response, it is
  the length-normalised DPO of Tulu 3 (Lambert et al. 2024, 2411.15124, section 5). confidence [...] is the probability
  that chosen is the better one; 1 gives eq. 7. Wang et al. 2024 (CREAM, 2410.12735): the loss is that of both orders,
  weighted by it: -c log s(m) - (1 - c) log s(-m), and log s(-m) is log s(m) - m.
  """
  margin = beta * (ratios[..., 0] - ratios[..., 1])
  return -jax.nn.log_sigmoid(margin) + (1 - confidence) * margin, margin


def nll(logp, length):
  """Sums of log-probs [...] of the chosen responses, and their tokens [...] -> [...]: the term beside DPO in Iterative
  RPO, the negative log-likelihood by token (Pang et al. 2024, 2404.19733, section 2; there it has the weight 1, and DPO
  alpha, which is the same as 1 / alpha here, but for the learning rate)."""
  return -logp / length
