"""Conflict rules: how much of two gradients to take, from their Gram matrix alone.

A rule maps the Gram matrix `[[<g, g>, <g, r>], [<g, r>, <r, r>]]` of the loss gradient
`g` and the scaled regularizer gradient `r = strength * dregularizer` to weights `w`,
and the update is `w[0] * g + w[1] * r`. Rules are pure functions and work on any number
of leading axes, one matrix for each group of parameters. Every rule is homogeneous:
`rule(c * gram) == rule(gram)`.

All rules are closed forms without iterations. Where one of the gradients is zero, the
update is the other one, whatever the rule: a term without a gradient has no say.
"""

from dtnh_jax.rules._gram import Gram, Rule
from dtnh_jax.rules.baselines import (
    aligned_mtl,
    cagrad,
    dualproj,
    imtl_g,
    mgda,
    nash_mtl,
    pcgrad,
)
from dtnh_jax.rules.projections import (
    dtnh,
    dynamic_barrier,
    gate,
    orthogonal,
    weighted_sum,
)

__all__ = [
    "Gram",
    "Rule",
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
    "weighted_sum",
]
