"""The exact updates and weights, in double precision NumPy, from definitions.

Updates are computed as nearest points, and weights as solutions of the problems that
rules solve, without formulas of the library.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

Vector = Float[np.ndarray, "_"]
Groups = Int[np.ndarray, "_"]
Gram = Float[np.ndarray, "pairs 2 2"]
Weights = Float[np.ndarray, "pairs 2"]


def sums(of: Groups, values: Vector) -> Vector:
    """Sums numbers by their group."""
    return np.bincount(of, values, minlength=int(of.max()) + 1)


def nearest(of: Groups, g: Vector, r: Vector) -> Vector:
    """Returns, in each group, the point nearest to `g + r` with `<g, d> >= ||g||^2`.

    By the conditions of Karush, Kuhn and Tucker it is `g + r + t g` with the smallest
    feasible `t >= 0`, which bisection finds.

    Example:
      >>> nearest(np.array([0, 0]), np.array([1.0, 0.0]), np.array([-3.0, 2.0]))
      array([1., 2.])
    """
    square, inner = sums(of, g * g), sums(of, g * r)
    is_free = (square == 0) | (inner >= 0)
    safe = np.where(is_free, 1, square)
    low = np.zeros_like(square)
    high = np.where(is_free, 0, 2 * np.sqrt(sums(of, r * r) / safe))
    for _ in range(60):
        middle = 0.5 * (low + high)
        is_short = inner + middle * square < 0
        low, high = np.where(is_short, middle, low), np.where(is_short, high, middle)
    return g + r + np.where(is_free, 0, high)[of] * g


def groups(shapes: Sequence[tuple[int, ...]], scope: str) -> Groups:
    """Returns the group of every number of all leaves, concatenated.

    Args:
      shapes: shapes of the leaves.
      scope: scope of `dtnh`, or "labels", which puts every second leaf in one group.

    Example:
      >>> groups([(2, 2), (1,)], "unit")
      array([0, 1, 0, 1, 2])
    """
    found, first = [], 0
    for number, shape in enumerate(shapes):
        size = int(np.prod(shape))
        if scope == "global":
            of = np.zeros(size, int)
        elif scope == "labels":
            of = np.full(size, number % 2)
        elif scope == "leaf":
            of = np.full(size, number)
        elif scope == "unit" and shape:
            of = first + np.arange(size) % shape[-1]
        elif scope == "unit":
            of = np.full(size, first)
        else:
            of = first + np.arange(size)
        found.append(of)
        if scope in ("unit", "element"):
            first = int(of.max()) + 1
    return np.concatenate(found)


def grams(norms: Sequence[float], cosines: Sequence[float]) -> Gram:
    """Returns Gram matrices of all pairs with these norms and cosines, in float32."""
    g, r, cosine = (x.ravel() for x in np.meshgrid(norms, norms, cosines))
    rows = [[g * g, g * r * cosine], [g * r * cosine, r * r]]
    return np.array(rows, np.float32).astype(np.float64).transpose(2, 0, 1)


def rules() -> dict[str, Callable[[Gram], Weights]]:
    """Returns functions that compute the weights of rules, by name."""
    return {
        "weighted_sum": lambda gram: np.ones(gram.shape[:-1]),
        "dtnh": lambda gram: _stack(1 + _along(gram, 0, True), 1),
        "gate": lambda gram: _stack(1, gram[..., 0, 1] >= 0),
        "orthogonal": lambda gram: _stack(1 + _along(gram, 0), 1),
        "dynamic_barrier": lambda gram: _stack(np.maximum(0, 1 + _along(gram, 0)), 1),
        "pcgrad": _pcgrad,
        "dualproj": lambda gram: _into_cone(gram, np.ones(gram.shape[:-1])),
        "cagrad": _cagrad,
        "mgda": _mgda,
        "imtl_g": _imtl_g,
        "nash_mtl": _nash_mtl,
        "aligned_mtl": _aligned_mtl,
    }


def _stack(g, r) -> Weights:
    return np.stack(np.broadcast_arrays(np.asarray(g, float), r), -1).astype(float)


def _along(gram: Gram, of: int, conflicts_only: bool = False) -> np.ndarray:
    """Returns the multiple of one gradient that cancels the other along it."""
    inner = gram[..., 0, 1]
    inner = np.minimum(0, inner) if conflicts_only else inner
    return -inner / gram[..., of, of]


def _pcgrad(gram: Gram) -> Weights:
    """Projects `g` away from `r` and `r` away from `g`, and adds both."""
    return _stack(1 + _along(gram, 0, True), 1 + _along(gram, 1, True))


def _into_cone(gram: Gram, weights: Weights) -> Weights:
    """Returns the nearest point without conflict, by the four active sets."""
    best = np.full(weights.shape, np.nan)
    least = np.full(weights.shape[:-1], np.inf)
    for active in ((), (0,), (1,), (0, 1)):
        added = np.zeros(weights.shape)
        if active:
            rows = list(active)
            inner = gram[:, rows][:, :, rows]
            missing = -np.einsum("nij,nj->ni", gram, weights)[:, rows]
            added[:, rows] = np.linalg.solve(inner, missing[..., None])[..., 0]
        point = weights + added
        progress = np.einsum("nij,nj->ni", gram, point)
        scale = np.abs(gram) @ np.ones(2)
        far = np.einsum("ni,nij,nj->n", added, gram, added)
        allowed = np.all(progress >= -1e-9 * scale, -1) & np.all(added >= 0, -1)
        is_better = allowed & (far < least)
        best[is_better], least[is_better] = point[is_better], far[is_better]
    return best


def _minimize(function: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
    """Returns the minimizers in [0, 1] of many convex functions at once."""
    low, high = np.zeros(size), np.ones(size)
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(90):
        left, right = high - golden * (high - low), low + golden * (high - low)
        is_left = function(left) < function(right)
        high, low = np.where(is_left, right, high), np.where(is_left, low, left)
    return (low + high) / 2


def _cagrad(gram: Gram, c: float = 0.5) -> Weights:
    """Solves the dual problem of the paper, which has one unknown for two gradients."""
    ones = np.ones(gram.shape[:-1])
    radius = c * np.sqrt(_square(gram, ones))

    def objective(a):
        worst = _stack(a, 1 - a)
        along = np.einsum("ni,nij,nj->n", worst, gram, ones)
        return along + radius * np.sqrt(_square(gram, worst))

    a = _minimize(objective, len(gram))
    worst = _stack(a, 1 - a)
    return ones + (radius / np.sqrt(_square(gram, worst)))[:, None] * worst


def _mgda(gram: Gram) -> Weights:
    a = _minimize(lambda a: _square(gram, _stack(a, 1 - a)), len(gram))
    return 2 * _stack(a, 1 - a)


def _imtl_g(gram: Gram) -> Weights:
    """Solves for equal projections on both unit gradients, with weights of sum 2."""
    norms = np.sqrt(np.einsum("nii->ni", gram))
    unit = gram / norms[:, :, None]
    rows = np.stack([unit[:, 0] - unit[:, 1], np.ones((len(gram), 2))], 1)
    return np.linalg.solve(rows, np.array([0.0, 2.0])[:, None])[..., 0]


def _nash_mtl(gram: Gram) -> Weights:
    """Solves `w * (G @ w) = ||G||`: minimizes `1/2 w G w - ||G|| log w` by Newton."""
    norms = np.sqrt(np.einsum("nii->ni", gram))
    size = np.sqrt(np.sum(gram**2, axis=(1, 2)))
    unit = gram / norms[:, :, None] / norms[:, None, :]
    w = np.ones((len(gram), 2))
    for _ in range(60):
        slope = np.einsum("nij,nj->ni", unit, w) - 1 / w
        curvature = unit + np.eye(2) / w[:, :, None] ** 2
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        decrement = np.sqrt(np.einsum("ni,ni->n", slope, step))
        w = w - step / (1 + decrement)[:, None]  # damped, so that `w` stays positive
    return np.sqrt(size)[:, None] * w / norms


def _aligned_mtl(gram: Gram) -> Weights:
    values, vectors = np.linalg.eigh(gram)
    root = np.einsum("nij,nj,nkj->nik", vectors, values**-0.5, vectors)
    return np.sqrt(values[:, :1]) * root.sum(-1)


def _square(gram: Gram, weights: Weights) -> np.ndarray:
    return np.maximum(np.einsum("ni,nij,nj->n", weights, gram, weights), 1e-300)
