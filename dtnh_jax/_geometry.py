"""Inner products of two gradients over a scope, and what a rule makes of them.

A scope cuts the parameters into groups; all parameters of a group share one Gram matrix
and so one answer of the rule. Groups are made of whole leaves (`"global"`, `"leaf"`,
labels) or lie inside of leaves (`"unit"`, `"element"`). Sums are `jnp.sum(x * y)` in
float32, because that partitions over a mesh without gathering anything.

Shape letters: L leaves that take part, G groups.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from dtnh_jax import _axes
from dtnh_jax._trees import AlignedLeaves, flatten, prefix_leaves
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
    """What an update measured: a row for each leaf, or each label in sorted order."""

    gram: Float[Array, "rows 3"]  # <m, m>, <m, r>, <r, r>
    part: Float[Array, "rows"]  # squared norm of what the rule added, before a bound
    conflicting: Float[Array, "rows"]  # parameters in groups that are in conflict
    size: Float[Array, "rows"]  # parameters
    skipped: Int[Array, ""]  # updates so far that left a group out


def unmeasured(rows: int) -> Measured:
    """What there is before the first update, with the shapes of all later ones."""
    zeros = jnp.zeros([rows], jnp.float32)
    gram = jnp.zeros([rows, 3], jnp.float32)
    return Measured(gram, zeros, zeros, zeros, jnp.zeros([], jnp.int32))


class Seen(NamedTuple):
    """The Gram matrices of an update."""

    groups: list[Gram]  # one `[G]` of all groups, or one for each leaf of its own
    leaves: Gram | None  # `[L]`, where groups are made of whole leaves


class Groups(NamedTuple):
    """Which parameters share one inner product."""

    kind: str  # "whole", of leaves; or "unit" or "element", inside of them
    index: Int[np.ndarray, "L"]  # the group of each leaf, if groups are of whole leaves
    rows: Int[np.ndarray, "L"]  # the row of each leaf in `Measured`
    row_count: int
    axes: tuple[str, ...]  # along which each device holds a part, see `_axes`

    def inner(self, x: Array, y: Array) -> Array:
        """The inner products of a leaf's groups, in a shape that broadcasts with it."""
        products = real_product(x, y)
        if self.kind == "element":
            return products
        if self.kind == "unit":
            return jnp.sum(products, axis=tuple(range(x.ndim - 1)), keepdims=True)
        return jnp.sum(products)

    def measure(self, m: list[Array], r: Leaves, strength: Any = 1.0) -> Seen:
        """Measures the protected gradient `m` and the regularizer's, `strength * r`."""
        pairs = list(zip(m, r()))
        mm = [self.inner(x, x) for x in m]
        mr = [self.inner(x, y) for x, y in pairs]
        rr = [self.inner(y, y) for y in r()]
        if not m:
            return Seen([], None)
        if self.kind != "whole":
            return Seen([_scaled(Gram(*x), strength) for x in zip(mm, mr, rr)], None)
        sums = [jnp.stack(column) for column in (mm, mr, rr)]
        sums = _axes.add(sums, _axes.copies(pairs, self.axes), self.axes)
        leaves = _scaled(Gram(*sums), strength)
        joined = [_joined(x, self.index) for x in (leaves.gg, leaves.gr, leaves.rr)]
        return Seen([Gram(*joined)], leaves)

    def by_leaf(self, blocks: Sequence[Array]) -> list[Array]:
        """Returns what is known of groups leaf by leaf, to broadcast with these."""
        return [blocks[0][i] for i in self.index] if self.kind == "whole" else [*blocks]

    def contribution(
        self,
        c: list[Coefficients],
        m: list[Array],
        r: list[Array],
        strength: Float[Array, ""],
    ) -> list[Array]:
        """The regularizer's part of the update: `c.g * m + c.r * strength * r`."""
        if not m:
            return []
        of_m = self.by_leaf([each.g for each in c])
        of_r = self.by_leaf([_times(each.r, strength) for each in c])
        return [
            _added(_times(*x), _times(*y)) for x, y in zip(zip(of_m, m), zip(of_r, r))
        ]

    def record(
        self,
        seen: Seen,
        c: list[Coefficients],
        m: list[Array],
        r: list[Array],
        before: Measured,
    ) -> Measured:
        """Sums up what an update measured, row by row.

        Args:
          seen: the Gram matrices.
          c: what the rule added in each group, before a bound.
          m: the protected gradient, for its shapes and types.
          r: the regularizer's, for the same.
          before: what the last update recorded.
        """
        if not m:
            return before
        copies = _axes.copies(list(zip(m, r)), self.axes)
        size = np.array([x.size for x in m], np.float32)
        total_size = size * np.float32(_axes.count(self.axes)) / copies
        conflicts = [gram.gr < 0 for gram in seen.groups]
        if seen.leaves is not None:
            sums = [seen.leaves.gg, seen.leaves.gr, seen.leaves.rr]
            of_leaf = Coefficients(*[x[self.index] for x in c[0]])
            part = squared_norm(of_leaf, seen.leaves)
            conflicting = jnp.where(conflicts[0][self.index], total_size, 0)
            is_finite = finite(seen.groups[0])
        else:
            parts = [squared_norm(*each) for each in zip(c, seen.groups)]
            width = [np.float32(n / max(x.size, 1)) for n, x in zip(size, parts)]
            counts = [jnp.where(x, n, np.float32(0)) for x, n in zip(conflicts, width)]
            columns = [*zip(*[(x.gg, x.gr, x.rr) for x in seen.groups]), parts, counts]
            sums = [jnp.stack([jnp.sum(x) for x in column]) for column in columns]
            *sums, part, conflicting = _axes.add(sums, copies, self.axes)
            is_finite = finite(Gram(*sums))
        skipped = before.skipped + jnp.where(jnp.all(is_finite), 0, 1)
        rows = [self._by_row(x) for x in (*sums, part, conflicting, total_size)]
        return Measured(jnp.stack(rows[:3], axis=-1), *rows[3:], skipped)

    def _by_row(self, leaves: Any) -> Float[Array, "rows"]:
        """Sums over the leaves of a row; zero where none of them takes part."""
        leaves = jnp.asarray(leaves, jnp.float32)
        if np.array_equal(self.rows, np.arange(self.row_count)):
            return leaves
        is_in = np.arange(self.row_count)[:, None] == self.rows[None, :]
        return jnp.sum(jnp.where(is_in, leaves[None, :], 0), axis=1)


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
    count = len(flatten(leaves.tree)[0])
    rows = np.array(leaves.places, int)
    if isinstance(scope, str):
        if scope in ("unit", "element"):
            return Groups(scope, rows, rows, count, axes)
        index = np.arange(len(rows)) if scope == "leaf" else np.zeros(len(rows), int)
        return Groups("whole", index, rows, count, axes)
    labels = scope(params) if callable(scope) else scope
    labels = np.array(prefix_leaves(labels, leaves.tree, "scope"), str)
    names, label = np.unique(labels, return_inverse=True)
    rows = label.reshape(-1)[rows]
    return Groups("whole", rows, rows, len(names), axes)


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


def _scaled(gram: Gram, strength: Any) -> Gram:
    """The Gram matrix of `m` and `strength * r`, from that of `m` and `r`."""
    by = jnp.asarray(strength, gram.gg.dtype)
    return Gram(gram.gg, by * gram.gr, by * (by * gram.rr))


def _joined(leaves: Float[Array, "L"], index: np.ndarray) -> Float[Array, "G"]:
    count = int(index.max()) + 1
    if count == len(index):
        return leaves
    is_in = np.arange(count)[:, None] == index[None, :]
    return jnp.sum(jnp.where(is_in, leaves[None, :], 0), axis=1)


def _times(c: Array, x: Array) -> Array:
    """A product in which 0 takes nothing, even of what is not finite."""
    return jnp.where(c == 0, jnp.zeros_like(x), c.astype(x.dtype) * x)


def _added(of_m: Array, of_r: Array) -> Array:
    """A sum with an exact zero where the two cancel but for rounding."""
    part = of_m + of_r
    rounding = _ROUNDING * (jnp.abs(of_m) + jnp.abs(of_r))
    return jnp.where(jnp.abs(part) <= rounding, jnp.zeros_like(part), part)
