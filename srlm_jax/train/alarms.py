"""Alarms for two failures of DPO that its training curves show but a reader may overlook."""
from collections.abc import Sequence

import numpy as np

WINDOW = 5             # logged steps
STANDARD_ERRORS = 3    # of a difference of means
MIN_MARGIN = 0.1       # mean margin, in nats times beta
MIN_ACCURACY = 0.55    # share of pairs with a positive margin


class Alarms:
  """Each alarm is a scalar, 0 or 1, and a message when it is raised.

  `chosen_falling`: over the last WINDOW logged steps, the chosen responses are less likely than
  over the first WINDOW of the run, by more than STANDARD_ERRORS of them. The comparison is not
  with the reference, because dropout acts on the policy alone and makes every response less likely.
  `margin_without_accuracy`: the mean margin is above MIN_MARGIN, but less than MIN_ACCURACY of the
  pairs have a positive margin, so that a few pairs produce the mean.
  """

  def __init__(self, before: Sequence[dict] = ()):
    """`before`: the metrics of the steps logged before, by a run that is resumed."""
    self._seen, self._on = [scalars for scalars in before if 'margin' in scalars], {}

  def check(self, scalars: dict) -> tuple[dict[str, int], list[str]]:
    """Metrics of a step -> the alarms, and messages of newly raised alarms; empty for SFT."""
    if 'margin' not in scalars:
      return {}, []
    self._seen = [*self._seen, scalars]
    full = len(self._seen) >= 2 * WINDOW
    def values(part, name):
      return np.array([s[name] for s in part])
    last = self._seen[-WINDOW:]
    first, now = (values(part, 'chosen_reward') for part in (self._seen[:WINDOW], last))
    fall = first.mean() - now.mean()
    error = np.sqrt((first.var(ddof=1) + now.var(ddof=1)) / WINDOW) if full else 0
    margin, accuracy = (values(last, name).mean() for name in ('margin', 'accuracy'))
    found = dict(
        chosen_falling=bool(full and fall > STANDARD_ERRORS * error),
        margin_without_accuracy=bool(full and margin > MIN_MARGIN and accuracy < MIN_ACCURACY))
    messages = dict(
        chosen_falling=f'the chosen responses also become less likely (chosen_reward '
                       f'{now.mean():.3g}, at first {first.mean():.3g}); lower the learning rate, '
                       f'or add train.nll_weight',
        margin_without_accuracy=f'the mean margin is {margin:.3g}, but only {accuracy:.0%} of the '
                                f'pairs have a positive margin; a few pairs produce the mean')
    new = [messages[name] for name, on in found.items() if on and not self._on.get(name)]
    self._on = found
    return {f'alarm_{name}': int(on) for name, on in found.items()}, new
