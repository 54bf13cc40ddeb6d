"""Conflict rules: functions from a Gram matrix to the weights of two gradients.

A rule maps the Gram matrix `[[<g, g>, <g, r>], [<g, r>, <r, r>]]` of the loss gradient
`g` and the regularizer's gradient times its strength, `r`, to weights `w`. The update
is `w[0] * g + w[1] * r`. Rules are pure functions. They accept any number of leading
axes, with one matrix for each group of parameters. Every rule is homogeneous:
`rule(c * gram) == rule(gram)`.

All rules are closed forms without iterations. If one of the gradients is zero, the
update is the other gradient, for every rule.

Guarantees are to first order, for the update itself. An adaptive optimizer that follows
it voids them; `dtnh_jax.decoupled` keeps them.
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
