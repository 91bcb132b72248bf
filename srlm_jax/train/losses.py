"""Losses: log-probabilities in, sums over examples out."""
import jax

from srlm_jax.models import vocab


def token_logps(logits, tokens, loss_mask):
  """log p of every token after the first, 0 where loss_mask is 0.

  logits [B, T, V], tokens and loss_mask [B, T] -> [B, T]; column 0 is 0, nothing predicts it.
  """
  return vocab.next_logps(logits, tokens) * loss_mask


def sft_loss(logps):
  """Token log-probs [B, T], 0 where the loss mask is 0 -> their negative sum."""
  return -logps.sum()


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta, confidence):
  """Sums of log-probs [B] -> losses [B] and margins [B]. Rafailov et al. 2023, eq. 7.

  confidence [B] is the probability that chosen is the better one; 1 gives eq. 7 itself. Wang et al. 2024 (CREAM,
  2410.12735): the loss is that of both orders, weighted by it: -c log s(m) - (1 - c) log s(-m), and log s(-m) is
  log s(m) - m.
  """
  margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
  return -jax.nn.log_sigmoid(margin) + (1 - confidence) * margin, margin
