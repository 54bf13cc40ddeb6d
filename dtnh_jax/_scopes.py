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
from jaxtyping import Array, Bool, Float, Int

from dtnh_jax._trees import as_float32

# Sums of squares between these bounds have lost nothing to underflow or overflow.
_SMALLEST, _LARGEST = 1e-24, 1e30
# With these factors others are too, from 1e-30 to 1e30 and beyond. Their squares are
# finite, because XLA multiplies scale by scale where it knows an array to be zero.
_UP, _DOWN = 2.0**60, 2.0**-60
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

    The second pass is for groups whose sums are out of range, with their gradients
    scaled by a power of two. It is another turn of a loop, since XLA takes its time to
    compile a sum for every leaf; and the loop is a scan of two turns, the second one
    skipped where it can be, since a `while` has no derivative in reverse mode.

    Args:
      xs: L arrays.
      get_ys: returns L arrays of the same shapes. It is a function so that gradients
        in closed form are computed inside the sums and never written to memory.
      member: which leaves are merged later: a small leaf in a large group need not be
        in range.

    Returns:
      A geometry of shape `[L]`.
    """
    if not xs:
        return Geometry(*[jnp.zeros([0], jnp.float32)] * 3)

    def measure(pass_: _Pass) -> _Pass:
        x_bys, y_bys = map(jnp.unstack, pass_.next_by)
        rows = [
            _sums(as_float32(x) * x_by, as_float32(y) * y_by, None)
            for x, y, x_by, y_by in zip(xs, get_ys(), x_bys, y_bys)
        ]
        sums = _stack(rows)
        next_by = tuple(_scale_for(squares, member) for squares in (sums[0], sums[2]))
        return _Pass(pass_.number + 1, sums, pass_.next_by, next_by)

    def is_needed(pass_: _Pass) -> Array:
        is_out_of_range = jnp.any(jnp.stack(pass_.next_by) != 1)
        return (pass_.number == 0) | is_out_of_range

    ones = (jnp.ones([len(xs)], jnp.float32),) * 2
    pass_ = _Pass(jnp.zeros([], jnp.int32), (ones[0],) * 3, ones, ones)
    data = [*xs, *get_ys()]
    if any(isinstance(leaf, Tracer) for leaf in [pass_.number, *data]):

        def turn(pass_, _):
            return jax.lax.cond(is_needed(pass_), measure, lambda p: p, pass_), None

        pass_, _ = jax.lax.scan(turn, _before(measure, pass_, data), length=2)
    else:  # no compilation outside of jit
        pass_ = measure(pass_)
        pass_ = measure(pass_) if is_needed(pass_) else pass_
    xx, xy, yy = pass_.sums
    x_by, y_by = pass_.by
    return _geometry(xx, xy, yy, 1 / x_by, 1 / y_by)


class _Pass(NamedTuple):
    """What a pass over two trees has found, and whether there has to be another."""

    number: Int[Array, ""]  # passes so far
    sums: tuple[Float[Array, "L"], ...]
    by: tuple[Float[Array, "L"], ...]  # what the two trees were multiplied by
    next_by: tuple[Float[Array, "L"], ...]  # and what they should have been


def _before(
    measure: Callable[[_Pass], _Pass], pass_: _Pass, data: list[Array]
) -> _Pass:
    """The carry of a loop over `measure` before its first turn, in the carry's type.

    That is the dtype of the sums, and in `jax.shard_map` the axes of the mesh over
    which the data vary.
    """
    sums = jax.eval_shape(measure, pass_).sums
    zeros = tuple(jnp.zeros(x.shape, x.dtype) for x in sums)
    axes = {a for x in data for a in jax.typeof(x).manual_axis_type.varying}
    pass_ = pass_._replace(sums=zeros)
    return jax.lax.pcast(pass_, tuple(axes), to="varying") if axes else pass_


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
    joined = root(jnp.sum(ratios * ratios, axis=-1, keepdims=True))
    return (largest * joined)[..., 0], ratios * reciprocal(joined)


def root(square: Array) -> Array:
    """The square root, with a derivative of 0 at 0, where that of a norm has none."""
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def reciprocal(x: Array) -> Array:
    """`1 / x` of a norm, bounded so that its product with a vector of zeros is zero."""
    # The second choice is for the derivative, which is 0 below the bound.
    return jnp.where(x > _TINIEST, 1 / jnp.where(x > _TINIEST, x, 1), 1 / _TINIEST)


def _scale_for(
    squares: Float[Array, "L"], member: Bool[np.ndarray, "G L"]
) -> Float[Array, "L"]:
    """A power of two for each leaf that brings the sum of its group into range."""
    groups = jnp.sum(jnp.where(member, squares[None, :], 0), axis=-1)
    scales = jnp.where(groups < _SMALLEST, _UP, jnp.where(groups > _LARGEST, _DOWN, 1))
    of_leaves = jnp.where(member, scales[:, None], 0).max(axis=0)
    return of_leaves.astype(jnp.float32)


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
        # One over a tiny number, squared, would not be finite: see `_UP`.
        return jnp.where(entries == 0, 1, jnp.clip(entries, _TINIEST, _HUGEST))

    x_scale, y_scale = largest(x), largest(y)
    return *_sums(x / x_scale, y / y_scale, axes), x_scale, y_scale


def _geometry(
    xx: Array, xy: Array, yy: Array, x_scale: Any = 1.0, y_scale: Any = 1.0
) -> Geometry:
    x_norm, y_norm = root(xx), root(yy)
    cosine = jnp.clip(xy * reciprocal(x_norm) * reciprocal(y_norm), -1, 1)
    return Geometry(x_norm * x_scale, y_norm * y_scale, cosine)
