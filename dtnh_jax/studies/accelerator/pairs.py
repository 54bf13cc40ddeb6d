"""Pairs of gradients for the checks: all angles, all scales, and special cases."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

SHAPES: tuple[tuple[int, ...], ...] = ((), (7,), (6, 5), (3, 2, 4))
# A leaf of one number has no angle, which some rules are about.
ANGLED = SHAPES[1:]
_EXTREMES = (1e-18, 1.0, 1e18)
OVERFLOWS = 2  # the leaf of `overflowing` whose sums do

Flat = list[np.ndarray]  # a flat array of every leaf, in double precision


class Pair(NamedTuple):
    """Two gradients, rounded to the dtype under test."""

    g: Flat
    r: Flat


def rounded(g: Flat, r: Flat, dtype: Any) -> Pair:
    """Rounds to a dtype, and returns the result in double precision."""
    return Pair(
        *[[x.astype(dtype).astype(np.float64) for x in leaves] for leaves in (g, r)]
    )


def leaves(flat: Flat, shapes: tuple[tuple[int, ...], ...], dtype: Any) -> list[Any]:
    """Returns the arrays of one gradient, on the device."""
    return [
        jnp.asarray(x.reshape(shape).astype(dtype)) for x, shape in zip(flat, shapes)
    ]


def ordinary(seed: int, count: int, dtype: Any, shapes: Any = SHAPES) -> list[Pair]:
    """Returns normal gradients at scales from 0.001 to 1000, in conflict and not."""
    rng = np.random.default_rng(seed)
    return [
        rounded(_normal(rng, shapes), _normal(rng, shapes), dtype) for _ in range(count)
    ]


def special(seed: int, count: int, dtype: Any) -> list[Pair]:
    """Returns opposite gradients, and gradients with zeros in one leaf or in all."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        g, r = _normal(rng, SHAPES), _normal(rng, SHAPES)
        leaf = int(rng.integers(len(SHAPES)))
        changed = range(len(SHAPES)) if number % 2 else [leaf]
        for i in changed:
            if number % 6 < 2:
                g[i] = 0 * g[i]
            elif number % 6 < 4:
                r[i] = 0 * r[i]
            else:
                r[i] = -3 * g[i]
        made.append(rounded(g, r, dtype))
    return made


def agreeing(seed: int, count: int, dtype: Any) -> list[Pair]:
    """Returns gradients that agree in every entry, so at every scope."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        g, r = _normal(rng, SHAPES), _normal(rng, SHAPES)
        same = [np.abs(y) * np.sign(x) for x, y in zip(g, r)]
        made.append(rounded(g, same, dtype))
    return made


def extreme(seed: int, count: int, dtype: Any) -> list[Pair]:
    """Returns gradients with entries of 1e-18, with norms of 1e18, or about 1."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        scales = _EXTREMES[number % 3], _EXTREMES[number // 3 % 3]
        g, r = (_at(rng, scale) for scale in scales)
        made.append(rounded(g, r, dtype))
    return made


def overflowing(seed: int, count: int, dtype: Any) -> list[Pair]:
    """Returns ordinary pairs, with overflowing squares in a leaf of one gradient."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        g, r = _normal(rng, SHAPES), _normal(rng, SHAPES)
        large = (g, r)[number % 2]
        large[OVERFLOWS] = 1e25 * np.sign(large[OVERFLOWS])
        made.append(rounded(g, r, dtype))
    return made


def _normal(rng: np.random.Generator, shapes: Any) -> Flat:
    scale = 10.0 ** rng.uniform(-3, 3)
    return [scale * rng.standard_normal(int(np.prod(shape))) for shape in shapes]


def _at(rng: np.random.Generator, scale: float) -> Flat:
    """Returns numbers of both signs with magnitudes between 1 and 2, times a scale."""
    numbers = [
        rng.uniform(1, 2, int(np.prod(shape))) * rng.choice([-1, 1])
        * rng.choice([-1, 1], int(np.prod(shape)))
        for shape in SHAPES
    ]  # fmt: skip
    if scale <= 1:
        return [scale * x for x in numbers]
    norm = np.sqrt(sum(x @ x for x in numbers))
    return [0.99 * scale / norm * x for x in numbers]
