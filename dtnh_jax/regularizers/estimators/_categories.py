"""The relation of the target's classes to the pretrained classes, for `co_tuning`."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer

from dtnh_jax.regularizers.estimators._labelled import checked, log_softmax

# Letters of shapes: n examples, s source classes, t target classes.

_METHODS = ("direct", "reverse")
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
    - "reverse" learns `p(t | s)`, a softmax of weights `W[s]`, by multinomial logistic
      regression from the vectors `p(s | x)` to the labels. It minimises
      `sum over examples of -log p(t | x) + l2/2 ||W||^2`. Bayes' rule then gives
      `p(s | t)`, proportional to `p(t | s) p(s)`, where `p(s)` is the average of
      `p(s | x)` over all examples.

    Args:
      source_logits: `[n, source classes]`, logits of the pretrained network with its
        own head, on the training images of the target.
      labels: `[n]`, labels of the target.
      num_classes: number of classes of the target.
      temperature: divisor of the logits, above 0; see `calibration_temperature`.
      method: "direct" or "reverse".
      l2: strength of the penalty in "reverse", above 0. At 1, a source class has an
        effect once its probabilities sum to about 1 over the examples. A smaller
        strength takes longer: seconds at 0.01, for 2,000 examples of 1,000 classes.

    Returns:
      `[target classes, source classes]`; each row sums to 1.

    Raises:
      ValueError: an argument is out of range, shapes do not match, or a class has no
        examples.

    Example:
      >>> logits = np.log(np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]))
      >>> print(category_relationship(logits, np.array([0, 0, 1]), num_classes=2))
      [[0.7 0.3]
       [0.1 0.9]]

    References:
      You et al., 2020, "Co-Tuning for Transfer Learning", section 3,
      https://papers.nips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html

    Differs from the official code, whose "reverse" chooses `1 / l2` among 17 values by
    the accuracy on validation data, and calibrates the regression on the same data.
    """
    if method not in _METHODS:
        raise ValueError(f"`method` must be one of {_METHODS}, got {method!r}.")
    for argument, value in {"temperature": temperature, "l2": l2}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"`{argument}` must be above 0 and finite, got {value}.")
    if num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
    logits, targets = checked(source_logits, labels, num_classes, "source_logits")
    counts = np.bincount(targets, minlength=num_classes)
    if not counts.all():
        raise ValueError(
            f"`labels` must have an example of each of the {num_classes} classes, got "
            f"none of class {int(np.argmin(counts))}."
        )
    probabilities = np.exp(log_softmax(logits / temperature))
    one_hot = np.eye(num_classes)[targets]
    if method == "direct":
        relationship = one_hot.T @ probabilities / counts[:, None]
    else:
        # No intercept: probabilities sum to 1, so the weights contain one.
        weights = _logistic_regression(probabilities, one_hot, l2)
        with np.errstate(divide="ignore"):  # of source classes that never occur
            log_prior = np.log(probabilities.mean(axis=0))
        joint = log_softmax(weights) + log_prior[:, None]  # [s, t]
        relationship = np.exp(log_softmax(joint.T))
    return jnp.asarray(relationship, jnp.float32)


def _logistic_regression(
    inputs: np.ndarray, one_hot: np.ndarray, l2: float
) -> np.ndarray:
    """Returns the weights `[s, t]` of a multinomial logistic regression.

    Uses Newton's method, which the penalty makes converge from any start. Conjugate
    gradients solve its linear systems of `s * t` unknowns without forming a matrix.
    """

    def loss(weights):
        log_likelihood = np.sum(one_hot * log_softmax(inputs @ weights))
        return 0.5 * l2 * np.sum(weights**2) - log_likelihood

    weights = np.zeros((inputs.shape[1], one_hot.shape[1]))
    value = loss(weights)
    for _ in range(200):
        predicted = np.exp(log_softmax(inputs @ weights))
        gradient = inputs.T @ (predicted - one_hot) + l2 * weights
        error = float(np.linalg.norm(gradient)) / len(inputs)
        if error <= _TOLERANCE:
            return weights

        def curvature(x, predicted=predicted):
            moved = predicted * (inputs @ x)
            moved -= predicted * moved.sum(axis=1, keepdims=True)
            return inputs.T @ moved + l2 * x

        # Solve roughly at first: far from the minimum an exact step is no better.
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
    """Solves `apply(x) = right`, positive definite, to a relative error."""
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
