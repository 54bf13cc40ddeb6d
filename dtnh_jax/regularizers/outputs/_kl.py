"""The divergence from a reference model's next-token probabilities.

Tokens are processed in chunks, so that no float32 array of the size of the logits is
written. The vocabulary is not split, because logits are often sharded over it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from dtnh_jax.regularizers.outputs._tokens import (
    check_floating,
    check_labels,
    log_normalizer,
    weights_of_mean,
)

_DIRECTIONS = ("forward", "reverse")
_CHUNKS = 16
_WHOLE = 2**18  # logits with at most so many entries are not split


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
    return _weighted(direction, jnp.asarray(logits), reference, weights, labels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weighted(
    direction: str,
    logits: Float[Array, "*tokens n"],
    reference: Float[Array, "*tokens n"],
    weights: Float[Array, "*tokens 1"],
    labels: Int[Array, "*tokens 1"] | None,
) -> Float[Array, ""]:
    """Returns the sum over tokens of their weighted divergences."""
    inputs = logits, reference, weights, labels
    total, _ = _in_chunks(direction, *inputs, with_slope=False)
    return total


@_weighted.defjvp
def _weighted_jvp(direction, primals, tangents):
    total, slope = _in_chunks(direction, *primals, with_slope=True)
    # Autodiff would keep several float32 arrays instead of this one.
    return total, jnp.sum(slope.astype(jnp.float32) * tangents[0].astype(jnp.float32))


def _in_chunks(
    direction: str,
    logits: Array,
    reference: Array,
    weights: Array,
    labels: Array | None,
    *,
    with_slope: bool,
) -> tuple[Array, Any]:
    """Returns the weighted sum and its gradient, in the dtype of the logits."""
    axis = _chunked_axis(logits)
    if axis is None:
        fresh = jnp.ones([1] * logits.ndim, bool)
        return _whole(direction, logits, reference, weights, labels, fresh, with_slope)
    length = logits.shape[axis]
    size = -(-length // _CHUNKS)

    def add_chunk(i, sums):
        total, slopes = sums
        start = jnp.minimum(i * size, length - size)
        ours, theirs, weighed = [
            _as_floats(jax.lax.dynamic_slice_in_dim(bits, start, size, axis), like)
            for bits, like in zip(inputs, (logits, reference, weights))
        ]
        wanted = labels
        if labels is not None:
            wanted = jax.lax.dynamic_slice_in_dim(labels, start, size, axis)
        # The last chunk may overlap the one before.
        shape = [size if at == axis else 1 for at in range(logits.ndim)]
        positions = start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        fresh = positions >= i * size
        part, slope = _whole(
            direction, ours, theirs, weighed, wanted, fresh, with_slope
        )
        if with_slope:
            slopes = jax.lax.dynamic_update_slice_in_dim(
                slopes, _as_bits(slope), start, axis
            )
        return total + part, slopes

    inputs = [_as_bits(x) for x in (logits, reference, weights)]
    slopes = jnp.zeros_like(inputs[0]) if with_slope else None
    sums = (jnp.zeros([], jnp.float32), slopes)
    total, slopes = jax.lax.fori_loop(0, -(-length // size), add_chunk, sums)
    return total, _as_floats(slopes, logits) if with_slope else None


def _as_bits(x: Array) -> Array:
    """Returns half precision as bits: XLA would cast numbers before a loop."""
    is_half = x.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if is_half else x


def _as_floats(bits: Array, like: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, like.dtype)


def _chunked_axis(logits: Array) -> int | None:
    """Returns the axis of the tokens, or one before it that is not sharded."""
    if logits.size <= _WHOLE:
        return None
    spec = (*jax.typeof(logits).sharding.spec, *[None] * logits.ndim)
    axes = [at for at in range(logits.ndim - 1) if spec[at] is None]
    return max((at for at in axes if logits.shape[at] > 1), default=None)


def _whole(
    direction: str,
    logits: Array,
    reference: Array,
    weights: Array,
    labels: Array | None,
    fresh: Array,
    with_slope: bool,
) -> tuple[Array, Any]:
    """Returns the weighted sum over `fresh` tokens, and the slope of all, or None."""
    log_p = _log_probabilities(logits, labels)
    log_q = _log_probabilities(reference, labels)
    first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    divergences = jnp.sum(_terms(first, second), axis=-1, keepdims=True)
    is_kept = weights != 0
    total = jnp.sum(jnp.where(is_kept & fresh, weights * divergences, 0.0))
    if not with_slope:
        return total, None
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if direction == "forward":
        slope = p - q
    else:
        slope = jnp.where(p == 0, 0.0, p * (log_p - log_q - divergences))
    return total, jnp.where(is_kept, weights * slope, 0.0).astype(logits.dtype)


def _log_probabilities(logits: Array, labels: Array | None) -> Array:
    """Returns log probabilities in float32, without the labels if they are given."""
    logits = logits.astype(jnp.float32)
    if labels is not None:
        words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where(words == labels, -jnp.inf, logits)
    return logits - log_normalizer(logits)


def _terms(log_a: Array, log_b: Array) -> Array:
    """Returns terms at least 0 whose sum is `KL(a || b)`: `a log(a / b) - a + b`.

    The sum of `b - a` is 0. With it, terms are squares of small differences; without
    it, rounding errors of the differences would hide a small divergence.
    """
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    d = jnp.where(a == 0, 0.0, log_a - log_b)
    series = a * jnp.square(d) * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d / 120)))
    plain = jnp.where(a == 0, 0.0, a * d) + (b - a)
    return jnp.where((jnp.abs(d) < 0.15) & (a != 0), series, plain)
