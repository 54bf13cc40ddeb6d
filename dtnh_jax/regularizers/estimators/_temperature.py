"""The temperature at which a network's probabilities are calibrated."""

import math

import numpy as np
from jaxtyping import Array, Float, Integer

from dtnh_jax.regularizers.estimators._labelled import checked, log_softmax

_RANGE = (0.01, 100.0)  # of temperatures


def calibration_temperature(
    logits: Float[Array | np.ndarray, "n s"],
    labels: Integer[Array | np.ndarray, " _"],
) -> float:
    """Returns the temperature at which a network's probabilities are calibrated.

    It minimises the mean of `-log softmax(logits / T)[label]` over the examples. They
    must be held out, because a network is too confident on its training examples.

    Args:
      logits: `[n, classes]`, logits of the pretrained network on data of its own task.
      labels: `[n]`, labels of that task.

    Returns:
      The temperature, from 0.01 to 100, to a relative error of 1e-6. It is the lower
      bound if every prediction is right, and the upper bound if logits are no better
      than chance. It is 1 if each example's logits are all equal, because then the
      temperature has no effect.

    Raises:
      ValueError: shapes do not match, a label is out of range, there are no examples,
        or a logit is not finite.

    Example:
      >>> logits = np.array([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
      >>> temperature = calibration_temperature(logits, np.array([0, 0, 0, 1]))
      >>> print(f"{1 / (1 + np.exp(-2 / temperature)):.4f}")  # right 3 times in 4
      0.7500

    References:
      Guo et al., 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """
    values, targets = checked(logits, labels, logits.shape[1], "logits")
    values = values - values[np.arange(len(values)), targets][:, None]
    if not values.any():
        return 1.0

    def slope(log_scale: float) -> tuple[float, float]:
        """Returns the derivative with respect to `1/T`, and its own to `log(1/T)`."""
        scale = math.exp(log_scale)
        weights = np.exp(log_softmax(values * scale))
        mean = np.sum(weights * values, axis=1)
        variance = np.sum(weights * (values - mean[:, None]) ** 2, axis=1)
        return float(mean.mean()), scale * float(variance.mean())

    # The loss is convex in 1/T, so its slope is negative below the minimum and positive
    # above it: the root stays between `low` and `high`.
    least, most = _RANGE
    low, high = -math.log(most), -math.log(least)
    if slope(low)[0] >= 0:
        return most
    if slope(high)[0] <= 0:
        return least
    at, step = 0.0, high - low
    while abs(step) > 1e-7:
        value, derivative = slope(at)
        low, high = (at, high) if value < 0 else (low, at)
        newton = -value / derivative if derivative > 0 else math.inf
        # Take Newton's step if it stays inside and is at most half as long as the last
        # one, so that steps vanish; else take the middle.
        is_safe = low < at + newton < high and abs(newton) <= abs(step) / 2
        step = newton if is_safe else (low + high) / 2 - at
        at += step
    return math.exp(-at)
