"""Statistics over seeds: means, deviations, and differences with intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special


class Estimate(NamedTuple):
    """A mean over seeds and its 95% confidence interval."""

    mean: float
    std: float  # over seeds, with n - 1; NaN for one seed
    low: float  # NaN for one seed
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Returns mean, standard deviation and 95% t-interval of the mean.

    For paired differences this is the paired t-interval. Use it to compare two methods:
    the effects that methods of one seed share (images, order, head) cancel.

    Args:
      values: one number for each seed, at least one.

    Returns:
      The estimate. Its interval assumes that values are independent and about normal,
      which a few seeds can neither confirm nor refute.

    Raises:
      ValueError: there are no values.

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
    """Returns accuracy, and its mean over classes (balanced accuracy).

    Example:
      >>> accuracies([0, 0, 0, 1], [0, 0, 0, 0])
      (0.75, 0.5)
    """
    truth = np.asarray(labels)
    correct = truth == np.asarray(predictions)
    by_class = [correct[truth == label].mean() for label in np.unique(truth)]
    return float(correct.mean()), float(np.mean(by_class))
