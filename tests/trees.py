"""Pairs of gradient trees for property tests: several structures, any scale.

Pairs of one structure are stacked along a leading axis, so that a property of all of
them takes one program, compiled once.
"""

from operator import itemgetter
from typing import NamedTuple

import jax
import numpy as np

STRUCTURES = {
    "one leaf": [(2, 3)],
    "a scalar and a vector": ((), (3,)),
    "nested": {"first": (2, 1, 4), "rest": {"0": (3,), "1": ()}},
}
KINDS = ("any", "any", "any", "opposed", "zero g", "zero r")


class _Pair(NamedTuple):
    g: np.ndarray
    r: np.ndarray


def _is_shape(x):
    return isinstance(x, tuple) and all(isinstance(size, int) for size in x)


def pairs(structure: str, low: int = -3, high: int = 3, count: int = 100):
    """Two trees of a structure, with leaves `[count, ...]`.

    The gradients of a pair have scales of `10**low` to `10**high` each. Some leaves
    are zero, some are antiparallel, so that every branch is met.
    """
    random = np.random.default_rng(0)
    scales = 10.0 ** random.integers(low, high + 1, (2, count))

    def draw(shape):
        ones = (1,) * len(shape)
        x, y = random.standard_normal((2, count, *shape))
        kind = random.choice(KINDS, count).reshape(count, *ones)
        y = np.where(kind == "opposed", -x, y)
        leaves = (np.where(kind == "zero g", 0, x), np.where(kind == "zero r", 0, y))
        scaled = [leaf * s.reshape(count, *ones) for leaf, s in zip(leaves, scales)]
        return _Pair(*[leaf.astype(np.float32) for leaf in scaled])

    drawn = jax.tree.map(draw, STRUCTURES[structure], is_leaf=_is_shape)
    return tuple(
        jax.tree.map(itemgetter(i), drawn, is_leaf=lambda x: isinstance(x, _Pair))
        for i in range(2)
    )


def lengths(*trees) -> np.ndarray:
    """The largest norm among trees, of each pair: what rounding is relative to."""
    squares = [
        sum(
            np.sum(np.asarray(x, np.longdouble) ** 2, axis=tuple(range(1, np.ndim(x))))
            for x in jax.tree.leaves(tree)
        )
        for tree in trees
    ]
    return np.sqrt(np.max(squares, axis=0))
