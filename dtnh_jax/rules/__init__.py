"""Conflict rules: how much of two gradients to take, from their Gram matrix alone.

A rule maps the Gram matrix `[[<g, g>, <g, r>], [<r, g>, <r, r>]]` of the loss gradient
`g` and the scaled regularizer gradient `r = strength * dregularizer` to weights `w`,
and the update is `w[0] * g + w[1] * r`. Rules are pure functions and work on any number
of leading axes, one matrix for each group of parameters. They are called with both
gradients divided by the length of the longer one, so every rule has to be homogeneous:
`rule(c * gram) == rule(gram)`.

Those of `projections` are written as what they add to `g`, `w[0] - 1` and `w[1]`, which
has to be exact where `w[0]` would round to 1; see `_gram.from_part`.

All rules are closed forms without iterations. Where one of the gradients is zero, the
update is the other one, whatever the rule: a term without a gradient has no say.
"""

from dtnh_jax.rules._gram import Entries, Gram, Rule, Weights
from dtnh_jax.rules.multi_task import (
    aligned_mtl,
    cagrad,
    dualproj,
    imtl_g,
    mgda,
    nash_mtl,
    pcgrad,
    upgrad,
)
from dtnh_jax.rules.projections import (
    dtnh,
    dynamic_barrier,
    gate,
    orthogonal,
    weighted_sum,
)

__all__ = [
    "Entries",
    "Gram",
    "Rule",
    "Weights",
    "aligned_mtl",
    "cagrad",
    "dtnh",
    "dualproj",
    "dynamic_barrier",
    "gate",
    "imtl_g",
    "mgda",
    "nash_mtl",
    "orthogonal",
    "pcgrad",
    "upgrad",
    "weighted_sum",
]
