"""Inner products of two gradients over a scope, and the coefficients of a rule.

A scope divides the parameters into groups. All parameters of a group share one Gram
matrix and the coefficients that the rule computes from it. Groups consist of whole
leaves (`"global"`, `"leaf"`, labels) or lie within a leaf (`"unit"`, `"element"`). Sums
are `jnp.sum(x * y)` in float32, because this partitions over a mesh without gathers.

Shape letters: L leaves that take part, G groups of whole leaves.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from dtnh_jax import _axes
from dtnh_jax._trees import (
    AlignedLeaves,
    computed_once,
    flatten,
    prefix_leaves,
)
from dtnh_jax.rules import Rule
from dtnh_jax.rules._gram import Coefficients, Gram, ratio
from dtnh_jax.rules._gram import coefficients as rule_coefficients

NAMED_SCOPES = ("global", "leaf", "unit", "element")
Scope = str | PyTree[str] | Callable[[PyTree], PyTree[str]]
# Returns the leaves of a gradient. Each call recomputes a closed-form gradient: if two
# sums and an update shared one computation, XLA would write its result to memory.
Leaves = Callable[[], list[Array]]

# A sum smaller than this share of its two summands is their rounding error: they
# cancel.
_ROUNDING = 1e-6
# Relative error of a square that is summed over many parameters.
_RELATIVE_ERROR = 1e-5


class Measured(NamedTuple):
    """Sums of an update, with a row for each group of leaves or each leaf of groups."""

    # <m, m>, <m, r> and <r, r> with the protected gradient m; the squared norm of the
    # rule's contribution, before a bound; the number of parameters in groups in
    # conflict. One array, so that one kernel writes it.
    sums: Float[Array, "5 rows"]
    size: Float[Array, "rows"]  # number of parameters
    skipped: Int[Array, ""]  # updates so far that left a group out
    trust: Any = None  # `Float[Array, ""]` for `never_hurt`, else None


def unmeasured(rows: int) -> Measured:
    """Returns zeros with the shapes of every update's sums, for `init`."""
    zeros = jnp.zeros([5, rows], jnp.float32)
    return Measured(zeros, zeros[0], jnp.zeros([], jnp.int32))


class Groups(NamedTuple):
    """The groups of parameters that share one inner product."""

    kind: str  # "whole" for groups of leaves; "unit" or "element" within a leaf
    row_of: Int[np.ndarray, "L"]  # the row of each leaf; its group if `kind` is "whole"
    rows: int
    axes: tuple[str, ...]  # mapped axes along which devices hold parts, see `_axes`

    def inner(self, x: Array, y: Array) -> Array:
        """Returns a leaf's inner products, in a shape that broadcasts with the leaf."""
        products = real_product(x, y)
        if self.kind == "element":
            return products
        if self.kind == "unit":
            return jnp.sum(products, axis=tuple(range(x.ndim - 1)), keepdims=True)
        return jnp.sum(products)

    def measure(self, m: list[Array], r: Leaves, strength: Any = 1.0) -> list[Gram]:
        """Measures the protected gradient `m` and the regularizer's, `strength * r`.

        Returns:
          A list of one `Gram` with shape `[G]` for groups of whole leaves; else of one
          `Gram` for each leaf.
        """
        if not m:
            return []
        pairs = list(zip(m, r()))
        mm = [self.inner(x, x) for x in m]
        mr = [self.inner(x, y) for x, y in pairs]
        rr = [self.inner(y, y) for y in r()]
        grams = [Gram(*x) for x in zip(mm, mr, rr)]
        if self.kind == "whole":
            grams = [Gram(*self._by_row([mm, mr, rr], pairs))]
        s = jnp.asarray(strength, grams[0].gg.dtype)
        return [Gram(x.gg, s * x.gr, s * (s * x.rr)) for x in grams]

    def contribution(
        self,
        c: list[Coefficients],
        m: list[Array],
        r: list[Array],
        strength: Float[Array, ""],
    ) -> list[Array]:
        """Returns the regularizer's part: `c.g * m + c.r * strength * r`."""
        c = [Coefficients(each.g, _times(each.r, strength)) for each in c]
        if self.kind == "whole" and m:
            c_m, c_r = map(computed_once, c[0])
            c = [Coefficients(c_m[i], c_r[i]) for i in self.row_of]
        return [
            _sum_or_zero(_times(c_leaf.g, x), _times(c_leaf.r, y))
            for c_leaf, x, y in zip(c, m, r)
        ]

    def record(
        self,
        grams: list[Gram],
        c: list[Coefficients],
        m: list[Array],
        r: list[Array],
        before: Measured,
    ) -> Measured:
        """Sums Gram matrices and contributions of an update, row by row.

        Args:
          grams: the result of `measure`.
          c: coefficients of the rule in each group, before a bound.
          m: the protected gradient, for its shapes and types.
          r: the regularizer's gradient, for its shapes and types.
          before: record of the last update.
        """
        if not m:
            return before
        pairs = list(zip(m, r))
        size = np.zeros([self.rows], np.float32)
        total = [x.size * _axes.count(self.axes) for x in m]
        np.add.at(size, self.row_of, np.divide(total, _axes.copies(pairs, self.axes)))
        parts = [squared_norm(*each) for each in zip(c, grams)]
        if self.kind == "whole":
            (x,), (part,) = grams, parts
            sums = [x.gg, x.gr, x.rr, part, jnp.where(x.gr < 0, size, 0)]
        else:
            width = [np.float32(x.size / max(y.size, 1)) for x, y in zip(m, parts)]
            columns = [*zip(*[(x.gg, x.gr, x.rr) for x in grams]), parts]
            columns.append([jnp.where(x.gr < 0, n, 0) for x, n in zip(grams, width)])
            leaves = [[jnp.sum(x) for x in column] for column in columns]
            sums = self._by_row(leaves, pairs)
        all_finite = jnp.all(finite(Gram(*sums[:3])))
        return Measured(
            jnp.stack([x.astype(jnp.float32) for x in sums]),
            jnp.asarray(size),
            before.skipped + jnp.where(all_finite, 0, 1),
        )

    def _by_row(
        self, columns: Sequence[Sequence[Array]], pairs: Sequence[tuple[Array, Array]]
    ) -> list[Float[Array, "rows"]]:
        """Sums numbers of leaves by row and over devices, in one collective."""
        copies = _axes.copies(pairs, self.axes)
        joined = []
        for column in columns:
            rows: list[list[Array]] = [[] for _ in range(self.rows)]
            for i, x, n in zip(self.row_of, column, copies):
                rows[i].append(x / np.float32(n) if n > 1 else x)
            zero = jnp.zeros_like(column[0])
            sums = [jnp.sum(jnp.stack(row)) if row else zero for row in rows]
            joined.append(jnp.stack(sums))
        return _axes.sum_over_devices(joined, self.axes)


def groups_of(
    scope: Scope, leaves: AlignedLeaves, params: PyTree, axes: tuple[str, ...]
) -> Groups:
    """Returns the groups of the leaves that take part.

    Args:
      scope: as in `dtnh`.
      leaves: the leaves that take part.
      params: the parameters, for labels that are a function of them.
      axes: mapped axes along which each device holds a part.
    """
    places = np.array(leaves.places, int)
    count = len(flatten(leaves.tree)[0])
    if scope == "global":
        return Groups("whole", np.zeros_like(places), 1, axes)
    if isinstance(scope, str):
        return Groups("whole" if scope == "leaf" else scope, places, count, axes)
    labels = scope(params) if callable(scope) else scope
    labels = np.array(prefix_leaves(labels, leaves.tree, "scope"), str)
    names, index = np.unique(labels, return_inverse=True)
    return Groups("whole", index.reshape(-1)[places], len(names), axes)


def check_scope(scope: Any) -> None:
    """Raises ValueError for an unknown name, TypeError for a value of another type."""
    if isinstance(scope, str) and scope not in NAMED_SCOPES:
        raise ValueError(
            f"`scope` must be one of {', '.join(NAMED_SCOPES)}, or a tree of labels, "
            f"or a function from the parameters to one, got {scope!r}."
        )
    if scope is None or isinstance(scope, (int, float)):
        raise TypeError(
            f"`scope` must be a name, a tree of labels or a function, got {scope!r}."
        )


def coefficients(rule: Rule, gram: Gram) -> Coefficients:
    """Returns the coefficients of a rule, zero in groups whose sums are not finite."""
    is_finite = finite(gram)
    return Coefficients(
        *[jnp.where(is_finite, x, 0) for x in rule_coefficients(rule, gram)]
    )


def finite(gram: Gram) -> Bool[Array, "*groups"]:
    """Returns whether all inner products of a group are finite."""
    return jnp.isfinite(gram.gg) & jnp.isfinite(gram.gr) & jnp.isfinite(gram.rr)


def squared_norm(c: Coefficients, gram: Gram) -> Array:
    """Returns `||c.g * m + c.r * r||^2`, or 0 if the two cancel except for rounding."""
    squares = c.g * (c.g * gram.gg) + c.r * (c.r * gram.rr)
    square = squares + 2 * c.g * (c.r * gram.gr)
    return jnp.where(square > _ROUNDING * squares, square, 0)


def matched(rule: Rule, gram: Gram) -> Coefficients:
    """Returns the coefficients for a loss gradient scaled to the length of `r`."""
    scale = ratio(safe_sqrt(gram.rr), safe_sqrt(gram.gg))
    c = coefficients(rule, Gram(scale * (scale * gram.gg), scale * gram.gr, gram.rr))
    return Coefficients(scale * c.g, c.r)


def clipped(
    c: list[Coefficients],
    grams: list[Gram],
    max_ratio: Float[Array, ""] | None,
    longest: list[Gram] | None = None,
) -> list[Coefficients]:
    """Scales contributions down to `max_ratio` times the protected gradient's norm.

    If the two summands of a contribution cancel, rounding errors dominate its norm. A
    norm that is computed too small would let the rounding error of a huge regularizer
    through, so norms are rounded up.

    Args:
      c: coefficients of the rule in each group.
      grams: Gram matrices of the protected gradient and the regularizer's.
      max_ratio: the bound, or None for no bound.
      longest: Gram matrices whose `gg` is compared with, in place of the protected
        gradient's.
    """
    if max_ratio is None:
        return c

    def of_group(c: Coefficients, gram: Gram, longest: Gram) -> Coefficients:
        squares = c.g * (c.g * gram.gg) + c.r * (c.r * gram.rr)
        square = squares + 2 * c.g * (c.r * gram.gr)
        high = jnp.maximum(square + _ROUNDING * squares, _RELATIVE_ERROR * squares)
        norm = safe_sqrt(high)
        limit = max_ratio.astype(norm.dtype) * safe_sqrt(longest.gg)
        factor = jnp.where(norm > limit, ratio(limit, norm), 1)
        return Coefficients(c.g * factor, c.r * factor)

    return [of_group(*each) for each in zip(c, grams, longest or grams)]


def real_product(x: Array, y: Array) -> Array:
    """Returns the summands of the inner product; for complex numbers, the real part."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        return jnp.real(x) * jnp.real(y) + jnp.imag(x) * jnp.imag(y)
    return x * y


def safe_sqrt(square: Array) -> Array:
    """Returns the square root, with a derivative of 0 at 0 instead of infinity."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _times(c: Array, x: Array) -> Array:
    """Returns `c * x`, and 0 where `c` is 0 even if `x` is not finite."""
    return jnp.where(c == 0, jnp.zeros_like(x), c.astype(x.dtype) * x)


def _sum_or_zero(x: Array, y: Array) -> Array:
    """Returns `x + y`, and exactly 0 where the two cancel except for rounding."""
    total = x + y
    rounding = _ROUNDING * (jnp.abs(x) + jnp.abs(y))
    return jnp.where(jnp.abs(total) <= rounding, jnp.zeros_like(total), total)
