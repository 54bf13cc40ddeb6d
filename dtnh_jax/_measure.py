"""Measures two gradients leaf by leaf: one pass over memory, on all devices.

Shape letters: L leaves, G groups.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from dtnh_jax import _axes
from dtnh_jax._scopes import Geometry, geometry_of, is_each_by_itself, real_product
from dtnh_jax._trees import as_float32

# Sums of squares between these bounds have lost nothing to underflow or overflow.
_SMALLEST, _LARGEST = 1e-24, 1e30
# With these factors others are too, from 1e-30 to 1e30 and beyond. Their squares are
# finite, because XLA multiplies scale by scale where it knows an array to be zero.
_UP, _DOWN = 2.0**60, 2.0**-60


class Pairing(NamedTuple):
    """Two gradients that are to be measured leaf by leaf."""

    # Returns L arrays twice. It is a function so that what is in closed form or a
    # moving average is computed inside the sums and never written to memory; it is
    # called for each sum, and told how often to `hide` what it starts from.
    get: Callable[[int], tuple[list[Array], list[Array]]]
    # Which leaves are merged later: a small leaf in a large group need not be in range.
    member: Bool[np.ndarray, "G L"]


def paired(
    get_xs: Callable[[int], list[Array]],
    get_ys: Callable[[int], list[Array]],
    member: Bool[np.ndarray, "G L"],
) -> Pairing:
    """Returns the pairing of two gradients that come from two functions."""
    return Pairing(lambda times: (get_xs(times), get_ys(times)), member)


def hide(tree: PyTree, times: int) -> PyTree:
    """The same values, of which XLA does not know that they are the same.

    It would work out once what two sums are of, and write it to memory in between.
    """
    for _ in range(times):
        tree = jax.lax.optimization_barrier(tree)
    return tree


def measure(pairings: list[Pairing], axes: tuple[str, ...] = ()) -> list[Geometry]:
    """Measures each leaf in float32 sums: one pass over memory, a second if need be.

    The second pass is for groups whose sums are out of range, with their gradients
    scaled by a power of two. It is another turn of a loop, since XLA takes its time to
    compile a sum for every leaf; and the loop is a scan of two turns, the second one
    skipped where it can be, since a `while` has no derivative in reverse mode.

    Sums over devices are of all pairings together, so that a pass has one collective.

    Args:
      pairings: what is to be measured.
      axes: names of axes along which each device holds a part, see `_axes`.

    Returns:
      A geometry of shape `[L]` for each pairing.
    """
    ends = np.cumsum([pairing.member.shape[1] for pairing in pairings])

    def get(times: int) -> tuple[list[Array], list[Array]]:
        columns = zip(*[pairing.get(times) for pairing in pairings])
        xs, ys = [list(itertools.chain(*column)) for column in columns]
        return xs, ys

    def scales_for(*sums: Array) -> Array:
        members = [pairing.member for pairing in pairings]
        split = zip(*[jnp.split(each, ends[:-1]) for each in sums], members)
        return jnp.concatenate([_scale_for(*each) for each in split])

    data = get(0)
    leaves = [*data[0], *data[1]]
    if not leaves:
        return [Geometry(*[jnp.zeros([0], jnp.float32)] * 3) for _ in pairings]
    copies = _axes.copies(list(zip(*data)), axes)

    def measure(pass_: _Pass) -> _Pass:
        x_bys, y_bys = map(jnp.unstack, pass_.next_by)
        rows = [
            _products(*each)
            for each in zip(zip(*get(0)), zip(*get(1)), zip(*get(2)), x_bys, y_bys)
        ]
        *sums, x_size, y_size = _axes.add(_stack(rows), copies, axes)
        next_by = scales_for(sums[0], x_size), scales_for(sums[2], y_size)
        return _Pass(pass_.number + 1, tuple(sums), pass_.next_by, next_by)

    def is_needed(pass_: _Pass) -> Array:
        is_out_of_range = jnp.any(jnp.stack(pass_.next_by) != 1)
        return (pass_.number == 0) | is_out_of_range

    ones = (jnp.ones([ends[-1]], jnp.float32),) * 2
    pass_ = _Pass(jnp.zeros([], jnp.int32), (ones[0],) * 3, ones, ones)
    if any(isinstance(leaf, Tracer) for leaf in [pass_.number, *leaves]):

        def turn(pass_, _):
            return jax.lax.cond(is_needed(pass_), measure, lambda p: p, pass_), None

        before = _before(measure, pass_, leaves, axes)
        pass_, _ = jax.lax.scan(turn, before, length=2)
    else:  # no compilation outside of jit
        pass_ = measure(pass_)
        pass_ = measure(pass_) if is_needed(pass_) else pass_
    xx, xy, yy = pass_.sums
    x_by, y_by = pass_.by
    whole = geometry_of(xx, xy, yy, 1 / x_by, 1 / y_by)
    return [Geometry(*each) for each in zip(*[jnp.split(f, ends[:-1]) for f in whole])]


class _Pass(NamedTuple):
    """What a pass over two trees has found, and whether there has to be another."""

    number: Int[Array, ""]  # passes so far
    sums: tuple[Float[Array, "L"], ...]
    by: tuple[Float[Array, "L"], ...]  # what the two trees were multiplied by
    next_by: tuple[Float[Array, "L"], ...]  # and what they should have been


def _before(
    measure: Callable[[_Pass], _Pass],
    pass_: _Pass,
    data: list[Array],
    summed: tuple[str, ...],
) -> _Pass:
    """The carry of a loop over `measure` before its first turn, in the carry's type.

    That is the dtype of the sums, and in `jax.shard_map` the axes of the mesh over
    which the data vary and are not summed.
    """
    sums = jax.eval_shape(measure, pass_).sums
    zeros = tuple(jnp.zeros(x.shape, x.dtype) for x in sums)
    axes = {a for x in data for a in jax.typeof(x).manual_axis_type.varying}
    axes -= set(summed)
    pass_ = pass_._replace(sums=zeros)
    return jax.lax.pcast(pass_, tuple(axes), to="varying") if axes else pass_


def _scale_for(
    squares: Float[Array, "L"],
    sizes: Float[Array, "L"],
    member: Bool[np.ndarray, "G L"],
) -> Float[Array, "L"]:
    """A power of two for each leaf that brings the sum of its group into range.

    Args:
      squares: their sums.
      sizes: sums of absolute values, which are 0 for zeros alone. These are in range:
        heads that a regularizer does not reach, frozen leaves and dead units are common
        and are not to cost a second pass at every step.
      member: which leaves are in which group.
    """

    def by_group(values):
        if is_each_by_itself(member):
            return values
        return jnp.sum(jnp.where(member, values[None, :], 0), axis=-1)

    groups = by_group(squares)
    is_small = (groups < _SMALLEST) & (by_group(sizes) > 0)
    scales = jnp.where(is_small, _UP, jnp.where(groups > _LARGEST, _DOWN, 1))
    if not is_each_by_itself(member):
        scales = jnp.where(member, scales[:, None], 0).max(axis=0)
    return scales.astype(jnp.float32)


def _products(
    pair: tuple[Array, Array],
    same: tuple[Array, Array],
    again: tuple[Array, Array],
    x_by: Array,
    y_by: Array,
) -> tuple[Array, ...]:
    """The three inner products of a leaf, scaled, and the sums of absolute values.

    Args:
      pair: the two arrays; `same` and `again` are the same, see `hide`.
      same: for the mixed product. Each array is scaled by something else there, with
        the same result, again so that XLA has nothing to share.
      again: for the absolute values.
      x_by: scale of the first array, a power of two.
      y_by: scale of the second.
    """
    x, y = map(as_float32, pair)
    xx, yy = [jnp.sum(real_product(a, a)) for a in (x * x_by, y * y_by)]
    x, y = map(as_float32, same)
    xy = jnp.sum(real_product(x * (2 * x_by), y * (y_by / 2)))
    return xx, xy, yy, *[jnp.sum(jnp.abs(as_float32(a))) for a in again]


def _stack(rows: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    return tuple(jnp.stack(column) for column in zip(*rows))
