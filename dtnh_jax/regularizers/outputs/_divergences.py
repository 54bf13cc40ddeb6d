"""Sums of divergences between two models, in chunks of tokens.

No float32 array of the size of the logits is written. The vocabulary is not split,
because logits are often sharded over it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dtnh_jax.regularizers.outputs._tokens import log_normalizer

_CHUNKS = 16
_WHOLE = 2**18  # logits with at most so many entries are not split


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def weighted_sum(
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


@weighted_sum.defjvp
def _weighted_sum_jvp(direction, primals, tangents):
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
