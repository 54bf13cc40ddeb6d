"""Inner products of two gradients over a scope, and what a rule makes of them.

A scope cuts the parameters into groups; all parameters of a group share one Gram matrix
and so one answer of the rule. Groups are made of whole leaves (`"global"`, `"leaf"`,
labels) or lie inside of leaves (`"unit"`, `"element"`). Sums are `jnp.sum(x * y)` in
float32, because that partitions over a mesh without gathering anything.

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
from dtnh_jax.rules._gram import coefficients as answer

NAMED_SCOPES = ("global", "leaf", "unit", "element")
Scope = str | PyTree[str] | Callable[[PyTree], PyTree[str]]
# Returns the leaves of a gradient. Of one in closed form each call is one more
# computation: two sums and an update that shared one would have it written to memory.
Leaves = Callable[[], list[Array]]

# Relative to its two summands, a sum below this is their rounding: they cancel.
_ROUNDING = 1e-6
# Sums over many parameters leave this share of a square uncertain.
_UNCERTAIN = 1e-5


class Measured(NamedTuple):
    """What an update measured: a row for each group of leaves, or leaf of groups."""

    # <m, m>, <m, r> and <r, r> with the protected gradient m; the squared norm of what
    # the rule added, before a bound; how many parameters are in groups in conflict. As
    # one array, which takes one kernel to write.
    sums: Float[Array, "5 rows"]
    size: Float[Array, "rows"]  # parameters
    skipped: Int[Array, ""]  # updates so far that left a group out
    trust: Any = None  # `Float[Array, ""]` of `never_hurt`, None elsewhere


def unmeasured(rows: int) -> Measured:
    """What there is before the first update, with the shapes of all later ones."""
    zeros = jnp.zeros([5, rows], jnp.float32)
    return Measured(zeros, zeros[0], jnp.zeros([], jnp.int32))


class Groups(NamedTuple):
    """Which parameters share one inner product."""

    kind: str  # "whole", of leaves; or "unit" or "element", inside of them
    row_of: Int[np.ndarray, "L"]  # the row of each leaf, which is its group if whole
    rows: int
    axes: tuple[str, ...]  # along which each device holds a part, see `_axes`

    def inner(self, x: Array, y: Array) -> Array:
        """The inner products of a leaf's groups, in a shape that broadcasts with it."""
        products = real_product(x, y)
        if self.kind == "element":
            return products
        if self.kind == "unit":
            return jnp.sum(products, axis=tuple(range(x.ndim - 1)), keepdims=True)
        return jnp.sum(products)

    def measure(self, m: list[Array], r: Leaves, strength: Any = 1.0) -> list[Gram]:
        """Measures the protected gradient `m` and the regularizer's, `strength * r`.

        Returns:
          One Gram matrix `[G]` of all groups of whole leaves, or one for each leaf.
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
        by = jnp.asarray(strength, grams[0].gg.dtype)
        return [Gram(x.gg, by * x.gr, by * (by * x.rr)) for x in grams]

    def contribution(
        self,
        c: list[Coefficients],
        m: list[Array],
        r: list[Array],
        strength: Float[Array, ""],
    ) -> list[Array]:
        """The regularizer's part of the update: `c.g * m + c.r * strength * r`."""
        c = [Coefficients(each.g, _times(each.r, strength)) for each in c]
        if self.kind == "whole" and m:
            of_m, of_r = map(computed_once, c[0])
            c = [Coefficients(of_m[i], of_r[i]) for i in self.row_of]
        return [_added(_times(of.g, x), _times(of.r, y)) for of, x, y in zip(c, m, r)]

    def record(
        self,
        grams: list[Gram],
        c: list[Coefficients],
        m: list[Array],
        r: list[Array],
        before: Measured,
    ) -> Measured:
        """Sums up what an update measured, row by row.

        Args:
          grams: as `measure` returns them.
          c: what the rule added in each group, before a bound.
          m: the protected gradient, for its shapes and types.
          r: the regularizer's, for the same.
          before: what the last update recorded.
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
        is_whole = jnp.all(finite(Gram(*sums[:3])))
        return Measured(
            jnp.stack([x.astype(jnp.float32) for x in sums]),
            jnp.asarray(size),
            before.skipped + jnp.where(is_whole, 0, 1),
        )

    def _by_row(
        self, columns: Sequence[Sequence[Array]], pairs: Sequence[tuple[Array, Array]]
    ) -> list[Float[Array, "rows"]]:
        """Sums numbers of leaves by row, and over devices: one collective."""
        copies = _axes.copies(pairs, self.axes)
        joined = []
        for column in columns:
            rows: list[list[Array]] = [[] for _ in range(self.rows)]
            for i, x, n in zip(self.row_of, column, copies):
                rows[i].append(x / np.float32(n) if n > 1 else x)
            zero = jnp.zeros_like(column[0])
            sums = [jnp.sum(jnp.stack(row)) if row else zero for row in rows]
            joined.append(jnp.stack(sums))
        return _axes.add(joined, self.axes)


def groups_of(
    scope: Scope, leaves: AlignedLeaves, params: PyTree, axes: tuple[str, ...]
) -> Groups:
    """Finds the groups of the leaves that take part.

    Args:
      scope: as in `dtnh`.
      leaves: those that take part.
      params: what labels are a function of.
      axes: along which each device holds a part.
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
    """Raises ValueError for a name that is no scope, TypeError for no scope at all."""
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
    """What a rule adds to the loss gradient; nothing where sums are not finite."""
    is_finite = finite(gram)
    return Coefficients(*[jnp.where(is_finite, x, 0) for x in answer(rule, gram)])


def finite(gram: Gram) -> Bool[Array, "*groups"]:
    """Whether a group can be resolved."""
    return jnp.isfinite(gram.gg) & jnp.isfinite(gram.gr) & jnp.isfinite(gram.rr)


def squared_norm(c: Coefficients, gram: Gram) -> Array:
    """`||c.g * m + c.r * r||^2`, zero where the two cancel but for rounding."""
    of_m, of_r = c.g * (c.g * gram.gg), c.r * (c.r * gram.rr)
    square = of_m + of_r + 2 * c.g * (c.r * gram.gr)
    return jnp.where(square > _ROUNDING * (of_m + of_r), square, 0)


def matched(rule: Rule, gram: Gram) -> Coefficients:
    """As `coefficients`, of a loss gradient that is scaled to the length of `r`."""
    by = ratio(root(gram.rr), root(gram.gg))
    c = coefficients(rule, Gram(by * (by * gram.gg), by * gram.gr, gram.rr))
    return Coefficients(by * c.g, c.r)


def clipped(
    c: list[Coefficients],
    grams: list[Gram],
    max_ratio: Float[Array, ""] | None,
    longest: list[Gram] | None = None,
) -> list[Coefficients]:
    """Scales contributions down to `max_ratio` times the protected gradient's norm.

    Where its two summands cancel, a norm is known no better than to rounding: a bound
    that trusted a smaller value would let a huge regularizer's rounding through. So
    norms err on the large side.

    Args:
      c: what the rule adds in each group.
      grams: of the protected gradient and the regularizer's.
      max_ratio: the bound, or None for no bound.
      longest: of what norms are compared with, if not the protected gradient.
    """
    if max_ratio is None:
        return c

    def of_group(c: Coefficients, gram: Gram, longest: Gram) -> Coefficients:
        squares = c.g * (c.g * gram.gg) + c.r * (c.r * gram.rr)
        square = squares + 2 * c.g * (c.r * gram.gr)
        norm = root(jnp.maximum(square + _ROUNDING * squares, _UNCERTAIN * squares))
        limit = max_ratio.astype(norm.dtype) * root(longest.gg)
        factor = jnp.where(norm > limit, ratio(limit, norm), 1)
        return Coefficients(c.g * factor, c.r * factor)

    return [of_group(*each) for each in zip(c, grams, longest or grams)]


def real_product(x: Array, y: Array) -> Array:
    """The summands of the inner product: of complex numbers, the real part."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        return jnp.real(x) * jnp.real(y) + jnp.imag(x) * jnp.imag(y)
    return x * y


def root(square: Array) -> Array:
    """The square root, with a derivative of 0 at 0, where that of a norm has none."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _times(c: Array, x: Array) -> Array:
    """A product in which 0 takes nothing, even of what is not finite."""
    return jnp.where(c == 0, jnp.zeros_like(x), c.astype(x.dtype) * x)


def _added(of_m: Array, of_r: Array) -> Array:
    """A sum with an exact zero where the two cancel but for rounding."""
    part = of_m + of_r
    rounding = _ROUNDING * (jnp.abs(of_m) + jnp.abs(of_r))
    return jnp.where(jnp.abs(part) <= rounding, jnp.zeros_like(part), part)
