"""Lengths and angles of two gradients, over any scope and at any scale.

Squares of single-precision numbers leave their range below 1e-19 and above 1e19, so
what leaves this file is not inner products but lengths and cosines, which do not. Sums
are `jnp.sum(x * y)` because that partitions over a mesh without gathering anything.

Shape letters: L leaves, G groups.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dtnh_jax._trees import as_float32

# Reciprocals of numbers between these bounds are normal numbers.
_TINIEST, _HUGEST = 1e-36, 1e36


class Geometry(NamedTuple):
    """All that a rule may know of two gradients `x` and `y`, group by group."""

    x_norm: Float[Array, "..."]
    y_norm: Float[Array, "..."]
    cosine: Float[Array, "..."]  # 0 where either norm is


def measure_units(x: Array, y: Array) -> Geometry:
    """Measures each output channel: sums over all axes but the last, which are kept.

    Some channel's gradient is nearly always out of range (dying units), and would send
    `_measure.measure` on its second pass at every step; so here scaling is the rule.
    """
    return geometry_of(*_scaled_sums(x, y, tuple(range(x.ndim - 1))))


def measure_elements(x: Array, y: Array) -> Geometry:
    """Measures each number by itself: of real numbers the cosine is -1, 0 or 1."""
    cosine = real_product(jnp.sign(x), jnp.sign(y))
    return Geometry(jnp.abs(x), jnp.abs(y), cosine)


def merge(geometry: Geometry, member: Bool[np.ndarray, "G L"]) -> Geometry:
    """Joins L measurements into G groups, of which `member` tells who belongs where."""
    if is_each_by_itself(member):
        return geometry

    def gather(values):
        return jnp.where(member, values[None, :], 0)

    x_norm, x_share = hypot(gather(geometry.x_norm))
    y_norm, y_share = hypot(gather(geometry.y_norm))
    cosine = jnp.sum(gather(geometry.cosine) * x_share * y_share, axis=-1)
    return Geometry(x_norm, y_norm, jnp.clip(cosine, -1, 1))


def total(geometry: Geometry) -> Geometry:
    """Joins all groups of a geometry of any shape into one of shape `[]`."""
    flat = Geometry(*[jnp.reshape(field, -1) for field in geometry])
    joined = merge(flat, np.ones([1, flat.cosine.size], bool))
    return Geometry(*[field[0] for field in joined])


def norm(norms: Float[Array, "*groups"]) -> Float[Array, ""]:
    """The norm of a vector of norms, safe at any scale."""
    return hypot(jnp.reshape(norms, -1))[0]


def hypot(norms: Float[Array, "*G L"]) -> tuple[Array, Array]:
    """Root of the sum of squares over the last axis, and each entry's part of it."""
    if norms.shape[-1] == 0:
        return jnp.zeros(norms.shape[:-1], norms.dtype), norms
    largest = jnp.max(norms, axis=-1, keepdims=True)
    ratios = norms * reciprocal(largest)
    joined = root(jnp.sum(ratios * ratios, axis=-1, keepdims=True))
    return (largest * joined)[..., 0], ratios * reciprocal(joined)


def root(square: Array) -> Array:
    """The square root, with a derivative of 0 at 0, where that of a norm has none."""
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def reciprocal(x: Array) -> Array:
    """`1 / x` of a norm, bounded so that its product with a vector of zeros is zero."""
    # The second choice is for the derivative, which is 0 below the bound.
    return jnp.where(x > _TINIEST, 1 / jnp.where(x > _TINIEST, x, 1), 1 / _TINIEST)


def is_each_by_itself(member: Bool[np.ndarray, "G L"]) -> bool:
    return np.array_equal(member, np.eye(len(member), dtype=bool))


def real_product(x: Array, y: Array) -> Array:
    """The summands of the inner product: of complex numbers, the real part."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        return jnp.real(x) * jnp.real(y) + jnp.imag(x) * jnp.imag(y)
    return x * y


def _sums(
    x: Array, y: Array, axes: tuple[int, ...] | None
) -> tuple[Array, Array, Array]:
    """The three inner products, over all axes or over some, which are kept."""
    x, y = as_float32(x), as_float32(y)

    def add(products):
        return jnp.sum(products, axis=axes, keepdims=axes is not None)

    return add(real_product(x, x)), add(real_product(x, y)), add(real_product(y, y))


def _scaled_sums(x: Array, y: Array, axes: tuple[int, ...] | None) -> tuple[Array, ...]:
    """Inner products after division by the largest entries, and these: two passes."""
    x, y = as_float32(x), as_float32(y)

    def largest(a):
        entries = jnp.max(jnp.abs(a), axis=axes, keepdims=axes is not None, initial=0)
        # One over a tiny number, squared, would not be finite: see `_UP`.
        return jnp.where(entries == 0, 1, jnp.clip(entries, _TINIEST, _HUGEST))

    x_scale, y_scale = largest(x), largest(y)
    return *_sums(x / x_scale, y / y_scale, axes), x_scale, y_scale


def geometry_of(
    xx: Array, xy: Array, yy: Array, x_scale: Any = 1.0, y_scale: Any = 1.0
) -> Geometry:
    x_norm, y_norm = root(xx), root(yy)
    cosine = jnp.clip(xy * reciprocal(x_norm) * reciprocal(y_norm), -1, 1)
    return Geometry(x_norm * x_scale, y_norm * y_scale, cosine)
