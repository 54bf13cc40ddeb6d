"""The expected error of a classifier: the loss for held-out gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from dtnh_jax.regularizers.outputs._tokens import (
    check_floating,
    check_labels,
    log_normalizer,
    weights_of_mean,
)


def expected_error(
    logits: Float[Array | np.ndarray, "... classes"],
    labels: Integer[Array | np.ndarray, "..."],
    *,
    mask: Float[Array | np.ndarray, "..."]
    | Integer[Array | np.ndarray, "..."]
    | Bool[Array | np.ndarray, "..."]
    | None = None,
) -> Float[Array, ""]:
    """Returns the error rate of a classifier that samples its answer: `1 - p(label)`.

    Use it for held-out gradients: pass its gradient on held-out examples to `tx.update`
    as `held_out_grads`. It is bounded, so one confidently wrong example does not
    outweigh all others, as it would in a cross-entropy.

    Args:
      logits: `[batch, classes]` or `[batch, tokens, vocabulary]`.
      labels: integers, `[batch]` or `[batch, tokens]`. Under `jax.jit` a label out of
        range can not raise; it makes the result NaN.
      mask: weights of examples or tokens, with the shape of `labels`, for the mean.
        Where a weight is 0, label and logits are ignored.

    Returns:
      The mean in float32, from 0 to 1; 0 if all weights are 0.

    Raises:
      TypeError: `logits` are not floating, or `labels` are no integers.
      ValueError: shapes do not match, or a label that is not traced is out of range.

    Example:
      >>> logits = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
      >>> print(f"{expected_error(logits, jnp.array([0, 1])):.3f}")  # (0.25 + 0.5) / 2
      0.375
    """
    check_floating(logits, "logits")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be integers, got {labels.dtype}.")
    if not logits.ndim or labels.shape != logits.shape[:-1]:
        raise ValueError(
            "`labels` must have the shape of `logits` without the classes, got "
            f"{labels.shape} for {logits.shape}."
        )
    weights = weights_of_mean(mask, labels.shape)
    check_labels(labels, mask, logits.shape[-1])
    errors = jax.checkpoint(_errors)(
        logits, jnp.asarray(labels).astype(jnp.int32), weights != 0
    )
    return jnp.sum(weights * errors)


def _errors(logits: Array, labels: Array, is_kept: Array) -> Array:
    """Returns `1 - p(label)` of each entry, and 0 for masked entries."""
    is_kept, labels = is_kept[..., None], labels[..., None]
    logits = jnp.where(is_kept, jnp.asarray(logits).astype(jnp.float32), 0.0)
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    log_p = jnp.where(classes == labels, logits - log_normalizer(logits), 0.0)
    error = -jnp.expm1(jnp.sum(log_p, axis=-1, keepdims=True))
    is_class = (labels >= 0) & (labels < logits.shape[-1])
    error = jnp.where(is_class, error, jnp.nan)
    return jnp.where(is_kept, error, 0.0)[..., 0]
