"""Measures two gradients leaf by leaf: one pass over memory, on all devices.

Shape letters: L leaves, G groups.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from dtnh_jax import _axes
from dtnh_jax._scopes import Geometry, geometry_of, is_each_by_itself, real_product
from dtnh_jax._trees import as_float32

# Sums of squares between these bounds have lost nothing to underflow or overflow.
_SMALLEST, _LARGEST = 1e-24, 1e36
# With the first factor those of gradients with norms from 1e-23 to 1e6 are, and squares
# down to those of 1e-30 are not 0. With the others those of norms from 1e-30 to 1e30
# are. What is below is as good as zeros.
_USUAL, _UP, _DOWN = 2.0**39, 2.0**63, 2.0**-63
# Leaves of one shape with at most so many numbers are measured as one array. To copy
# them is nothing, and to compile the same sums again for each of them is not.
_SMALL = 2**14


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
    """The same values, of which XLA does not know on a CPU that they are the same.

    It would work out once what two sums are of, and write it to memory in between. On
    other devices sums of the same arrays can become one kernel, which reads them once,
    unless a barrier stands between them.
    """
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(tree)):
        return tree  # nothing is fused outside of jit
    for _ in range(times):
        tree = jax.lax.platform_dependent(tree, cpu=_apart, default=lambda same: same)
    return tree


def _apart(tree: PyTree) -> PyTree:
    # Leaf by leaf, since in `jax.shard_map` they may vary over different axes.
    return jax.tree.map(jax.lax.optimization_barrier, tree)


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

    def scales_for(squares: Array) -> Array:
        members = [pairing.member for pairing in pairings]
        split = zip(jnp.split(squares, ends[:-1]), members)
        return jnp.concatenate([_scale_for(*each) for each in split])

    data = get(0)
    leaves = [*data[0], *data[1]]
    alike = _alike(*data)
    if not leaves:
        return [Geometry(*[jnp.zeros([0], jnp.float32)] * 3) for _ in pairings]
    copies = _axes.copies(list(zip(*data)), axes)

    def measure(pass_: _Pass) -> _Pass:
        pairs, again = zip(*get(0)), zip(*get(1))
        sums = _axes.add(
            _products(list(zip(pairs, again)), pass_.next_by, alike), copies, axes
        )
        next_by = scales_for(sums[0]), scales_for(sums[2])
        return _Pass(pass_.number + 1, tuple(sums), pass_.next_by, next_by)

    def is_needed(pass_: _Pass) -> Array:
        is_out_of_range = jnp.any(jnp.stack(pass_.next_by) != _USUAL)
        return (pass_.number == 0) | is_out_of_range

    usual = (jnp.full([ends[-1]], _USUAL, jnp.float32),) * 2
    pass_ = _Pass(jnp.zeros([], jnp.int32), (usual[0],) * 3, usual, usual)
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
    member: Bool[np.ndarray, "G L"],
) -> Float[Array, "L"]:
    """A power of two for each leaf that brings the sum of its group into range.

    Args:
      squares: their sums. Sums of 0 are in range: heads that a regularizer does not
        reach, frozen leaves and dead units are common and are not to cost a second
        pass at every step.
      member: which leaves are in which group.
    """

    def by_group(values):
        if is_each_by_itself(member):
            return values
        return jnp.sum(jnp.where(member, values[None, :], 0), axis=-1)

    groups = by_group(squares)
    is_small = (groups > 0) & (groups < _SMALLEST)
    scales = jnp.where(is_small, _UP, jnp.where(groups > _LARGEST, _DOWN, _USUAL))
    if not is_each_by_itself(member):
        scales = jnp.where(member, scales[:, None], 0).max(axis=0)
    return scales.astype(jnp.float32)


def _alike(xs: list[Array], ys: list[Array]) -> list[list[int]]:
    """Numbers of the leaves that can be stacked, and of each of the others alone."""
    groups: dict[Any, list[int]] = {}
    for i, pair in enumerate(zip(xs, ys)):
        types = [jax.typeof(a) for a in pair]
        is_small = types[0].size <= _SMALL
        key = [(t.shape, t.dtype, t.sharding, t.manual_axis_type) for t in types]
        groups.setdefault((*key, None if is_small else i), []).append(i)
    return list(groups.values())


def _products(
    leaves: list[tuple[tuple[Array, Array], tuple[Array, Array]]],
    by: tuple[Float[Array, "L"], ...],
    alike: list[list[int]],
) -> tuple[Float[Array, "L"], ...]:
    """The three inner products of every leaf, scaled.

    Args:
      leaves: for each the two arrays, and the same again, see `hide`: for the mixed
        product. There one array is scaled for both, which takes less time, and leaves
        XLA nothing to share.
      by: scales of the first and the second arrays, powers of two.
      alike: from `_alike`.
    """
    order = np.concatenate(alike)
    ends = np.cumsum([len(group) for group in alike])[:-1]
    x_bys, y_bys = (jnp.split(each[order], ends) for each in by)
    rows = []
    for group, x_by, y_by in zip(alike, x_bys, y_bys):
        (xs, ys), (again_xs, again_ys) = (
            zip(*each) for each in zip(*_at(leaves, group))
        )
        shape = [len(group)] + [1] * xs[0].ndim
        x_by, y_by = (jnp.reshape(each, shape) for each in (x_by, y_by))
        xx, yy = [real_product(a, a) for a in (_stack(xs) * x_by, _stack(ys) * y_by)]
        xy = real_product(_stack(again_xs) * (x_by * y_by), _stack(again_ys))
        axes = tuple(range(1, len(shape)))
        rows.append([jnp.sum(a, axes) for a in (xx, xy, yy)])
    return tuple(jnp.concatenate(column)[np.argsort(order)] for column in zip(*rows))


def _at(items: list[Any], places: list[int]) -> list[Any]:
    return [items[i] for i in places]


def _stack(arrays: Sequence[Array]) -> Array:
    return jnp.stack([as_float32(a) for a in arrays])
