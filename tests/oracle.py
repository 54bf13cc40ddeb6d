"""DTNH in extended precision NumPy, from its definition as a projection.

No formula of the library is used: the update is the point nearest to `g + r` in the
half-space `<g, d> >= ||g||^2`, and its multiplier is found by bisection.
"""

import jax
import numpy as np

Long = np.longdouble


def flat(tree) -> np.ndarray:
    """All leaves of a tree as one vector."""
    leaves = [np.asarray(x, Long).reshape(-1) for x in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0, Long), *leaves])


def project(g: np.ndarray, r: np.ndarray) -> np.ndarray:
    """The update of one group, given as two vectors, `r` with its strength."""
    g, r = np.asarray(g, Long), np.asarray(r, Long)
    target = g + r
    square = g @ g
    if square == 0 or g @ target >= square:
        return target
    low, high = Long(0), Long(1)
    while g @ (target + high * g) < square:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if g @ (target + middle * g) < square:
            low = middle
        else:
            high = middle
    return target + high * g


def groups(shape: tuple[int, ...], scope: str) -> np.ndarray:
    """The group of each entry of one leaf, as numbers."""
    if scope == "element":
        return np.arange(int(np.prod(shape))).reshape(shape)
    if scope == "unit" and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape)
    return np.zeros(shape, int)


def update(g, r, scope: str = "global"):
    """The update of whole trees, a list of arrays in the order of leaves."""
    gs, rs = jax.tree.leaves(g), jax.tree.leaves(r)
    if scope == "global":
        whole = project(flat(g), flat(r))
        ends = np.cumsum([np.size(x) for x in gs])[:-1]
        return [part.reshape(x.shape) for part, x in zip(np.split(whole, ends), gs)]
    outs = []
    for x, y in zip(gs, rs):
        x, y = np.asarray(x, Long), np.asarray(y, Long)
        out, of = np.zeros_like(x), groups(x.shape, scope)
        for group in np.unique(of):
            out[of == group] = project(x[of == group], y[of == group])
        outs.append(out)
    return outs
