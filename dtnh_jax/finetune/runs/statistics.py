"""What several seeds say: means, deviations, and differences with intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special


class Estimate(NamedTuple):
    """A mean over seeds, and the interval that holds the true mean in 95 of 100."""

    mean: float
    std: float  # over seeds, with n - 1; NaN for one seed
    low: float  # NaN for one seed, which says nothing about the others
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and 95% t-interval of the mean.

    Of paired differences this is the paired t-interval, which is what to compare two
    methods by: what the seeds share (images, order, head) cancels.

    Args:
      values: one number for each seed, at least one.

    Returns:
      The estimate; its interval supposes that values are independent and about
      normal, which a handful of seeds can neither show nor refute.

    Raises:
      ValueError: without values.

    Example:
      >>> mean, std, low, high = estimate([0.78, 0.80, 0.82])
      >>> print(f"{mean:.2f} +- {std:.2f}, from {low:.2f} to {high:.2f}")
      0.80 +- 0.02, from 0.75 to 0.85
    """
    if not len(values):
        raise ValueError("`values` must hold at least 1 number, got 0.")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan, math.nan)
    std = float(np.std(values, ddof=1))
    quantile = float(special.stdtrit(len(values) - 1, 0.975))
    half = quantile * std / math.sqrt(len(values))
    return Estimate(mean, std, mean - half, mean + half)


def accuracies(
    labels: Sequence[int] | np.ndarray, predictions: Sequence[int] | np.ndarray
) -> tuple[float, float]:
    """Accuracy, and its mean over classes (balanced accuracy).

    Example:
      >>> accuracies([0, 0, 0, 1], [0, 0, 0, 0])
      (0.75, 0.5)
    """
    truth = np.asarray(labels)
    correct = truth == np.asarray(predictions)
    by_class = [correct[truth == label].mean() for label in np.unique(truth)]
    return float(correct.mean()), float(np.mean(by_class))
