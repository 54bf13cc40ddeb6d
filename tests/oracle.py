"""DTNH in extended precision NumPy, from its definition as a projection.

No formula of the library is used: the update is the point nearest to `g + r` in the
half-space `<g, d> >= ||g||^2`, and its multiplier is found by bisection. Leading axes
are those of a stack of pairs.
"""

import jax
import numpy as np

Long = np.longdouble


def flat(tree) -> np.ndarray:
    """All leaves `[count, ...]` of a tree as one vector each, `[count, n]`."""
    leaves = [np.asarray(x, Long) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=-1)


def inner(a, b) -> np.ndarray:
    """Inner products along the last axis."""
    return np.einsum("...i,...i->...", np.asarray(a, Long), np.asarray(b, Long))


def project(g: np.ndarray, r: np.ndarray) -> np.ndarray:
    """The update of groups, given as vectors `[..., n]`, `r` with its strength."""
    g, r = np.asarray(g, Long), np.asarray(r, Long)
    target, square = g + r, inner(g, g)

    def falls_short(multiplier):
        return inner(g, target + multiplier[..., None] * g) < square

    low = np.zeros(square.shape, Long)
    in_conflict, high = falls_short(low), low + 1
    while np.any(short := falls_short(high)):
        high = np.where(short, 2 * high, high)
    for _ in range(200):
        middle = (low + high) / 2
        short = falls_short(middle)
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return target + np.where(in_conflict, high, 0)[..., None] * g


def grouped(x, scope: str) -> np.ndarray:
    """The entries of one leaf `[count, ...]` by their groups, `[count, groups, n]`."""
    x = np.asarray(x, Long)
    if scope == "element":
        return x.reshape(len(x), -1, 1)
    if scope == "unit" and x.ndim > 1:
        return x.reshape(len(x), -1, x.shape[-1]).swapaxes(1, 2)
    return x.reshape(len(x), 1, -1)


def update(g, r, scope: str = "global"):
    """The update of whole trees, a list of arrays in the order of leaves."""
    gs, rs = jax.tree.leaves(g), jax.tree.leaves(r)
    if scope == "global":
        whole = project(flat(g), flat(r))
        ends = np.cumsum([x[0].size for x in gs])[:-1]
        parts = np.split(whole, ends, axis=-1)
    else:
        parts = [project(grouped(x, scope), grouped(y, scope)) for x, y in zip(gs, rs)]
        parts = [p.swapaxes(1, 2) if scope == "unit" else p for p in parts]
    return [part.reshape(x.shape) for part, x in zip(parts, gs)]
