"""What the classes of a target say of the pretrained ones, for `co_tuning`.

These run once, before training, in float64 on the host.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer

# Letters of shapes: n examples, s source classes, t target classes.

_METHODS = ("direct", "reverse")
_TEMPERATURES = (0.01, 100.0)
_TOLERANCE = 1e-10  # of the mean gradient of the logistic regression


def category_relationship(
    source_logits: Float[Array | np.ndarray, "n s"],
    labels: Integer[Array | np.ndarray, " _"],
    num_classes: int,
    *,
    temperature: float = 1.0,
    method: str = "direct",
    l2: float = 1.0,
) -> Float32[Array, "t s"]:
    """Estimates `p(source class | target class)` from a pretrained network's outputs.

    With `p(s | x)` the softmax of `source_logits / temperature`:

    - "direct" averages `p(s | x)` over the examples of each target class.
    - "reverse" learns `p(t | s)`, a softmax of weights `W[s]`, as the multinomial
      logistic regression from the vectors `p(s | x)` to the labels, which minimises
      `sum over examples of -log p(t | x) + l2/2 ||W||^2`. Bayes' rule turns it round:
      `p(s | t)` is proportional to `p(t | s) p(s)`, where `p(s)` is the average of
      `p(s | x)` over all examples.

    Args:
      source_logits: `[n, source classes]`, of the pretrained network, with its own
        head, on the training images of the target.
      labels: `[n]`, of the target.
      num_classes: how many classes the target has.
      temperature: by which logits are divided, above 0; see `calibration_temperature`.
      method: "direct" or "reverse".
      l2: strength of the penalty in "reverse", above 0. At 1 a source class says
        something once the examples hold about one example's worth of it. The smaller,
        the longer it takes: seconds at 0.01, for 2,000 examples of 1,000 classes.

    Returns:
      `[target classes, source classes]`; each row has the sum 1.

    Raises:
      ValueError: if an argument is out of range, shapes do not match, or a class has
        no examples.

    Example:
      >>> logits = np.log(np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]))
      >>> print(category_relationship(logits, np.array([0, 0, 1]), num_classes=2))
      [[0.7 0.3]
       [0.1 0.9]]

    References:
      You et al., 2020, "Co-Tuning for Transfer Learning", section 3,
      https://papers.nips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html

    Differs from the official code, whose "reverse" chooses `1 / l2` among 17 values
    by the accuracy on validation data, and calibrates the regression on them.
    """
    if method not in _METHODS:
        raise ValueError(f"`method` must be one of {_METHODS}, got {method!r}.")
    for argument, value in {"temperature": temperature, "l2": l2}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"`{argument}` must be above 0 and finite, got {value}.")
    if num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
    logits, targets = _checked(source_logits, labels, num_classes, "source_logits")
    counts = np.bincount(targets, minlength=num_classes)
    if not counts.all():
        raise ValueError(
            f"`labels` must have an example of each of the {num_classes} classes, got "
            f"none of class {int(np.argmin(counts))}."
        )
    probabilities = np.exp(_log_softmax(logits / temperature))
    one_hot = np.eye(num_classes)[targets]
    if method == "direct":
        relationship = one_hot.T @ probabilities / counts[:, None]
    else:
        # No intercept: probabilities have the sum 1, so weights hold one already.
        weights = _logistic_regression(probabilities, one_hot, l2)
        with np.errstate(divide="ignore"):  # of source classes that never occur
            log_prior = np.log(probabilities.mean(axis=0))
        joint = _log_softmax(weights) + log_prior[:, None]  # [s, t]
        relationship = np.exp(_log_softmax(joint.T))
    return jnp.asarray(relationship, jnp.float32)


def calibration_temperature(
    logits: Float[Array | np.ndarray, "n s"],
    labels: Integer[Array | np.ndarray, " _"],
) -> float:
    """Finds the temperature at which a network's probabilities are calibrated.

    It minimises the mean of `-log softmax(logits / T)[label]` over the examples, which
    must be held out: on those that it was trained with, a network is too sure.

    Args:
      logits: `[n, classes]`, of the pretrained network on data of its own task.
      labels: `[n]`, of that task.

    Returns:
      The temperature, from 0.01 to 100, to a relative 1e-6. It is at the lower bound
      where every prediction is right, since then no `T` is too small, and at the upper
      where logits are no better than chance. It is 1 where every example's logits are
      equal, since then no `T` changes anything.

    Raises:
      ValueError: if shapes do not match, a label is out of range, there are no
        examples, or a logit is not finite.

    Example:
      >>> logits = np.array([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
      >>> temperature = calibration_temperature(logits, np.array([0, 0, 0, 1]))
      >>> print(f"{1 / (1 + np.exp(-2 / temperature)):.4f}")  # right 3 times in 4
      0.7500

    References:
      Guo et al., 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """
    values, targets = _checked(logits, labels, logits.shape[1], "logits")
    values = values - values[np.arange(len(values)), targets][:, None]
    if not values.any():
        return 1.0

    def slope(log_scale: float) -> tuple[float, float]:
        """Returns the derivative by `1/T`, and its derivative by `log(1/T)`."""
        scale = math.exp(log_scale)
        weights = np.exp(_log_softmax(values * scale))
        mean = np.sum(weights * values, axis=1)
        variance = np.sum(weights * (values - mean[:, None]) ** 2, axis=1)
        return float(mean.mean()), scale * float(variance.mean())

    # The loss is convex in 1/T, so its slope has one sign below the minimum and the
    # other above: the root stays between `low` and `high`.
    least, most = _TEMPERATURES
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
        # Newton's step where it leads inside and the last one was twice as long, so
        # that steps die out; the middle otherwise.
        is_safe = low < at + newton < high and abs(newton) <= abs(step) / 2
        step = newton if is_safe else (low + high) / 2 - at
        at += step
    return math.exp(-at)


def _checked(
    logits: Array | np.ndarray,
    labels: Array | np.ndarray,
    num_classes: int,
    argument: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits in float64 and labels, or raises what the callers document."""
    if labels.shape != logits.shape[:1] or not logits.size:
        raise ValueError(
            f"`{argument}` and `labels` must have one number of examples, at least 1, "
            f"got shapes {logits.shape} and {labels.shape}."
        )
    values, targets = np.asarray(logits, np.float64), np.asarray(labels)
    if targets.min() < 0 or targets.max() >= num_classes:
        raise ValueError(
            f"`labels` must be from 0 to {num_classes - 1}, got {targets.min()} to "
            f"{targets.max()}."
        )
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"`{argument}` must be finite, got {values[int(np.argmin(finite))]} for "
            f"example {int(np.argmin(finite))}."
        )
    return values, targets.astype(np.int64)  # `bincount` takes no unsigned integers


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns log probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _logistic_regression(
    inputs: np.ndarray, one_hot: np.ndarray, l2: float
) -> np.ndarray:
    """Returns the weights `[s, t]` of a multinomial logistic regression.

    Newton's method, which the penalty makes converge from anywhere. Its linear systems,
    of s times t unknowns, are solved by conjugate gradients: no matrix is formed.
    """

    def loss(weights):
        log_likelihood = np.sum(one_hot * _log_softmax(inputs @ weights))
        return 0.5 * l2 * np.sum(weights**2) - log_likelihood

    weights = np.zeros((inputs.shape[1], one_hot.shape[1]))
    value = loss(weights)
    for _ in range(200):
        predicted = np.exp(_log_softmax(inputs @ weights))
        gradient = inputs.T @ (predicted - one_hot) + l2 * weights
        error = float(np.linalg.norm(gradient)) / len(inputs)
        if error <= _TOLERANCE:
            return weights

        def curvature(x, predicted=predicted):
            moved = predicted * (inputs @ x)
            moved -= predicted * moved.sum(axis=1, keepdims=True)
            return inputs.T @ moved + l2 * x

        # Roughly at first: far from the minimum, an exact step is no better.
        step = _conjugate_gradients(curvature, -gradient, min(0.1, error**0.5))
        decrease = np.sum(gradient * step)  # negative
        rounding = 1e-14 * abs(value)
        length = 1.0
        while (
            loss(weights + length * step) > value + 1e-4 * length * decrease + rounding
        ):
            length /= 2
        weights = weights + length * step
        value = loss(weights)
    raise ValueError(f"`l2` must be larger, the regression does not converge at {l2}.")


def _conjugate_gradients(
    apply: Callable[[np.ndarray], np.ndarray], right: np.ndarray, relative: float
) -> np.ndarray:
    """Solves `apply(x) = right`, up to a relative error, for positive definite ones."""
    x, residual = np.zeros_like(right), right
    direction, square = right, np.sum(right**2)
    enough = relative**2 * square
    for _ in range(right.size):
        if square <= enough:
            break
        applied = apply(direction)
        length = square / np.sum(direction * applied)
        x = x + length * direction
        residual = residual - length * applied
        previous, square = square, np.sum(residual**2)
        direction = residual + square / previous * direction
    return x
