"""One-sided tests for harm, with margins that were fixed beforehand."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

PAIR_MARGIN, ALL_MARGIN = 1.0, 0.3  # percentage points
CONFIDENCE = 0.95


class Bound(NamedTuple):
    """A mean difference and its lower confidence bound."""

    mean: float
    low: float  # one-sided, of a t-test over seeds
    margin: float

    @property
    def is_shown(self) -> bool:
        """Whether a loss of more than the margin is ruled out."""
        return bool(self.low > -self.margin)


def bound(differences: Float[np.ndarray, " seeds"], margin: float) -> Bound:
    """Returns the mean of paired differences and its lower confidence bound.

    Args:
      differences: accuracy minus that of plain fine-tuning, in points, for each seed.
      margin: the largest loss that would not matter, in points.
    """
    mean, count = float(np.mean(differences)), len(differences)
    error = float(np.std(differences, ddof=1)) / np.sqrt(count)
    return Bound(mean, mean - float(stats.t.ppf(CONFIDENCE, count - 1)) * error, margin)
