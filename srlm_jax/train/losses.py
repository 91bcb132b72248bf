"""Losses: log-probabilities in, sums over examples out."""
import jax


def sft_loss(logps):
  """Token log-probs [B, R], 0 where there is none -> their negative sum."""
  return -logps.sum()


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta, confidence):
  """Sums of log-probs [...] -> losses [...] and margins [...]. Rafailov et al. 2023, eq. 7.

  confidence [...] is the probability that chosen is the better one; 1 gives eq. 7 itself. Wang et al. 2024 (CREAM,
  2410.12735): the loss is that of both orders, weighted by it: -c log s(m) - (1 - c) log s(-m), and log s(-m) is
  log s(m) - m.
  """
  margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
  return -jax.nn.log_sigmoid(margin) + (1 - confidence) * margin, margin
