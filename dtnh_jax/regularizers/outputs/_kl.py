"""The divergence from a reference model's next-token probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from dtnh_jax.regularizers.outputs._divergences import weighted_sum
from dtnh_jax.regularizers.outputs._tokens import (
    check_floating,
    check_labels,
    weights_of_mean,
)

_DIRECTIONS = ("forward", "reverse")


def kl_to_reference(
    logits: Float[Array | np.ndarray, "... vocabulary"],
    reference_logits: Float[Array | np.ndarray, "..."],
    *,
    mask: Float[Array | np.ndarray, "..."]
    | Integer[Array | np.ndarray, "..."]
    | Bool[Array | np.ndarray, "..."]
    | None = None,
    direction: str = "forward",
) -> Float[Array, ""]:
    """Returns the divergence of next-token probabilities from a reference model's.

    With `p` the model's probabilities and `q` the reference's, "forward" is
    `KL(q || p) = sum over the vocabulary of q log(q / p)`. "reverse" is `KL(p || q)`,
    the penalty of reinforcement learning from human feedback. The reference gets no
    gradient.

    It is computed in float32, a sixteenth of the tokens at a time, without a float32
    array of the size of the logits. The backward pass keeps one array of the size and
    dtype of the logits. Logits may be sharded along any axis. If explicit mesh axes
    shard the tokens, the logits are processed at once.

    Args:
      logits: `[batch, tokens, vocabulary]` of the network in training; or with any
        other axes before the last.
      reference_logits: the same of the pretrained network.
      mask: weights of tokens, `[batch, tokens]`, for example 0 for padding and prompts.
      direction: "forward" or "reverse".

    Returns:
      A scalar in float32: nats per token, as the mean weighted by `mask`; 0 if all
      weights are 0. It is at least 0, and 0 if the probabilities are equal.
      `KL(a || b)` is infinite if a token has probability 0 (a logit of `-inf`) in `b`
      but not in `a`.

    Raises:
      TypeError: logits are not floating.
      ValueError: shapes differ, or the direction is unknown.

    Example:
      >>> logits = jnp.zeros((1, 2, 2))  # one sequence of two tokens
      >>> reference = jnp.array([[[4.0, 0.0], [1.0, 3.0]]])
      >>> mask = jnp.array([[1, 0]])
      >>> print(f"{kl_to_reference(logits, reference, mask=mask):.3f}")
      0.603
      >>> reverse = kl_to_reference(logits, reference, mask=mask, direction="reverse")
      >>> print(f"{reverse:.3f}")
      1.325

    References:
      Kullback and Leibler, 1951, https://doi.org/10.1214/aoms/1177729694; for the
      reverse direction Ouyang et al., 2022, equation 2,
      https://arxiv.org/abs/2203.02155
    """
    return _mean(logits, reference_logits, None, mask, direction)


def masked_kl(
    logits: Float[Array | np.ndarray, "... vocabulary"],
    reference_logits: Float[Array | np.ndarray, "..."],
    labels: Integer[Array | np.ndarray, "..."],
    *,
    mask: Float[Array | np.ndarray, "..."]
    | Integer[Array | np.ndarray, "..."]
    | Bool[Array | np.ndarray, "..."]
    | None = None,
    direction: str = "forward",
) -> Float[Array, ""]:
    """Returns the divergence from a reference model among the tokens except the label.

    The label's probability is removed from both models, and the others are scaled to
    sum to 1: `p'(v) = p(v) / (1 - p(label))` for tokens `v` except the label, and `q'`
    likewise from the reference. "forward" is `KL(q' || p')`, "reverse" is
    `KL(p' || q')`. It keeps the reference's relative probabilities of the other tokens.
    It does not oppose the loss, which moves probability to the label: its gradient with
    respect to the label's logit is 0. The reference gets no gradient.

    It takes as much memory as `kl_to_reference`.

    Args:
      logits: `[batch, tokens, vocabulary]` of the network in training; or with any
        other axes before the last.
      reference_logits: the same of the pretrained network.
      labels: integers, `[batch, tokens]`: the labels of the loss. Under `jax.jit` a
        label out of range can not raise; it makes the result NaN.
      mask: weights of tokens, `[batch, tokens]`, for example 0 for padding and prompts.
        Where a weight is 0, the label is ignored.
      direction: "forward" or "reverse".

    Returns:
      A scalar in float32: nats per token, as the mean weighted by `mask`; 0 if all
      weights are 0.

    Raises:
      TypeError: logits are not floating, or `labels` are no integers.
      ValueError: shapes do not match, the direction is unknown, or a label that is not
        traced is out of range.

    Example:
      >>> logits = jnp.array([[[9.0, 0.0, 0.0]]])  # one sequence of one token
      >>> reference = jnp.array([[[0.0, 2.0, 2.0]]])
      >>> label = jnp.array([[0]])  # the other two tokens are equally likely in both
      >>> print(f"{masked_kl(logits, reference, label):.3f}")
      0.000
      >>> print(f"{kl_to_reference(logits, reference):.3f}")
      7.544

    References:
      Xu et al., 2026, "Mask the Target", https://arxiv.org/abs/2605.29498
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be integers, got {labels.dtype}.")
    if not logits.ndim or labels.shape != logits.shape[:-1]:
        raise ValueError(
            "`labels` must have the shape of `logits` without the vocabulary, got "
            f"{labels.shape} for {logits.shape}."
        )
    check_labels(labels, mask, logits.shape[-1])
    return _mean(logits, reference_logits, labels, mask, direction)


def _mean(
    logits: Array | np.ndarray,
    reference_logits: Array | np.ndarray,
    labels: Array | np.ndarray | None,
    mask: Array | np.ndarray | None,
    direction: str,
) -> Float[Array, ""]:
    """Returns the mean over tokens, without the labels if they are given."""
    if direction not in _DIRECTIONS:
        raise ValueError(
            f"`direction` must be one of {_DIRECTIONS}, got {direction!r}."
        )
    check_floating(logits, "logits")
    check_floating(reference_logits, "reference_logits")
    if not logits.ndim or logits.shape != reference_logits.shape:
        raise ValueError(
            "`logits` and `reference_logits` must have one shape [batch, tokens, "
            f"vocabulary], got {logits.shape} and {reference_logits.shape}."
        )
    weights = weights_of_mean(mask, logits.shape[:-1])[..., None]
    reference = jax.lax.stop_gradient(jnp.asarray(reference_logits))
    if labels is not None:
        labels = jnp.asarray(labels).astype(jnp.int32)[..., None]
        is_word = (labels >= 0) & (labels < logits.shape[-1])
        weights = jnp.where(is_word | (weights == 0), weights, jnp.nan)
    return weighted_sum(direction, jnp.asarray(logits), reference, weights, labels)
