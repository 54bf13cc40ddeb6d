"""How sure it is that a cell is harmed, where many cells are looked at."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special


def chance_of_harm(values: Sequence[float]) -> float | None:
    """How likely differences as low as these are if nothing makes a difference.

    Args:
      values: paired differences, one for each seed.

    Returns:
      The one-sided p-value of the paired t-test; None for a single seed.

    Example:
      >>> print(round(chance_of_harm([-0.01, -0.02, -0.03]), 3))
      0.037
    """
    if len(values) < 2:
        return None
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    if spread == 0:
        return 0.5 if mean == 0 else float(mean > 0)
    return float(special.stdtr(len(values) - 1, mean / spread * math.sqrt(len(values))))


def surely_below(chances: Sequence[float | None], level: float = 0.025) -> int:
    """How many of many tests hold with the chance of one mistake in all at `level`.

    Example:
      >>> surely_below([0.001, 0.02, 0.5])
      1

    References:
      Holm, 1979, "A simple sequentially rejective multiple test procedure",
      https://www.jstor.org/stable/4615733
    """
    known = sorted(chance for chance in chances if chance is not None)
    for rank, chance in enumerate(known):
        if chance > level / (len(known) - rank):
            return rank
    return len(known)
