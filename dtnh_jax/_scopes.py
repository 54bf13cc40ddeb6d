"""Lengths and angles of two gradients, over any scope and at any scale.

Squares of single-precision numbers leave their range below 1e-19 and above 1e19, so
what leaves this file is not inner products but lengths and cosines, which do not. Sums
are `jnp.sum(x * y)` because that partitions over a mesh without gathering anything.

Shape letters: L leaves, G groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from dtnh_jax._trees import as_float32

# Sums of squares between these bounds have lost nothing to underflow or overflow.
_SMALLEST, _LARGEST = 1e-24, 1e30
# Reciprocals of numbers between these bounds are normal numbers.
_TINIEST, _HUGEST = 1e-36, 1e36


class Geometry(NamedTuple):
    """All that a rule may know of two gradients `x` and `y`, group by group."""

    x_norm: Float[Array, "..."]
    y_norm: Float[Array, "..."]
    cosine: Float[Array, "..."]  # 0 where either norm is


def measure_leaves(
    xs: list[Array],
    get_ys: Callable[[], list[Array]],
    member: Bool[np.ndarray, "G L"],
) -> Geometry:
    """Measures each leaf in float32 sums: one pass over memory, a second if need be.

    Args:
      xs: L arrays.
      get_ys: returns L arrays of the same shapes. It is a function so that gradients
        in closed form are computed inside the sums and never written to memory.
      member: which leaves are merged later: the second pass is for groups whose sums
        are out of range, and need not care for a small leaf in a large group.

    Returns:
      A geometry of shape `[L]`.
    """
    if not xs:
        return Geometry(*[jnp.zeros([0], jnp.float32)] * 3)

    def plainly():
        return _stack([_sums(x, y, None) for x, y in zip(xs, get_ys())])

    def scaled():
        rows = [_scaled_sums(x, y, None) for x, y in zip(xs, get_ys())]
        return _geometry(*_stack(rows))

    xx, xy, yy = plainly()
    in_range = _in_range(xx, member) & _in_range(yy, member)
    if not isinstance(in_range, Tracer):  # no compilation outside of jit
        return _geometry(xx, xy, yy) if in_range else scaled()
    return jax.lax.cond(in_range, lambda: _geometry(xx, xy, yy), scaled)


def measure_units(x: Array, y: Array) -> Geometry:
    """Measures each output channel: sums over all axes but the last, which are kept.

    Channels with a gradient of exactly zero are common (dead units), and would send
    `measure_leaves` on its second pass at every step; so here scaling is the rule.
    """
    return _geometry(*_scaled_sums(x, y, tuple(range(x.ndim - 1))))


def measure_elements(x: Array, y: Array) -> Geometry:
    """Measures each number by itself: of real numbers the cosine is -1, 0 or 1."""
    cosine = real_product(jnp.sign(x), jnp.sign(y))
    return Geometry(jnp.abs(x), jnp.abs(y), cosine)


def merge(geometry: Geometry, member: Bool[np.ndarray, "G L"]) -> Geometry:
    """Joins L measurements into G groups, of which `member` tells who belongs where."""
    if np.array_equal(member, np.eye(len(member), dtype=bool)):
        return geometry  # each by itself

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
    root = jnp.sqrt(jnp.sum(ratios * ratios, axis=-1, keepdims=True))
    return (largest * root)[..., 0], ratios * reciprocal(root)


def reciprocal(x: Array) -> Array:
    """`1 / x` of a norm, bounded so that its product with a vector of zeros is zero."""
    return 1 / jnp.maximum(x, _TINIEST)


def _in_range(
    squares: Float[Array, "L"], member: Bool[np.ndarray, "G L"]
) -> Bool[Array, ""]:
    sums = jnp.sum(jnp.where(member, squares[None, :], 0), axis=-1)
    return jnp.all((sums >= _SMALLEST) & (sums <= _LARGEST))


def real_product(x: Array, y: Array) -> Array:
    """The summands of the inner product: of complex numbers, the real part."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        return jnp.real(x) * jnp.real(y) + jnp.imag(x) * jnp.imag(y)
    return x * y


def _stack(rows: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    return tuple(jnp.stack(column) for column in zip(*rows))


def _sums(
    x: Array, y: Array, axes: tuple[int, ...] | None
) -> tuple[Array, Array, Array]:
    """The three inner products, over all axes or over some, which are kept."""
    x, y = as_float32(x), as_float32(y)

    def inner(a, b):
        return jnp.sum(real_product(a, b), axis=axes, keepdims=axes is not None)

    return inner(x, x), inner(x, y), inner(y, y)


def _scaled_sums(x: Array, y: Array, axes: tuple[int, ...] | None) -> tuple[Array, ...]:
    """Inner products after division by the largest entries, and these: two passes."""
    x, y = as_float32(x), as_float32(y)

    def largest(a):
        entries = jnp.max(jnp.abs(a), axis=axes, keepdims=axes is not None, initial=0)
        return jnp.clip(entries, _TINIEST, _HUGEST)

    x_scale, y_scale = largest(x), largest(y)
    return *_sums(x / x_scale, y / y_scale, axes), x_scale, y_scale


def _geometry(
    xx: Array, xy: Array, yy: Array, x_scale: Any = 1.0, y_scale: Any = 1.0
) -> Geometry:
    x_norm, y_norm = jnp.sqrt(xx), jnp.sqrt(yy)
    cosine = jnp.clip(xy * reciprocal(x_norm) * reciprocal(y_norm), -1, 1)
    return Geometry(x_norm * x_scale, y_norm * y_scale, cosine)
