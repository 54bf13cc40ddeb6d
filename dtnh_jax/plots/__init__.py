"""Figures as functions of results; each returns a `matplotlib.figure.Figure`.

Matplotlib is imported when a function is called, and pyplot never: figures belong to
the caller, who saves them (`figure.savefig("a.png")`) or shows them in a notebook.
Colours are those of Okabe and Ito, which colour-blind readers can distinguish. Lines
also differ in their dashes, and bars in their hatching.
"""

from dtnh_jax.plots._style import COLOURS
from dtnh_jax.plots.conflict import conflict_map
from dtnh_jax.plots.forgetting import forgetting
from dtnh_jax.plots.geometry import projection
from dtnh_jax.plots.speed import benchmark_ratios
from dtnh_jax.plots.strength import strength_sweep
from dtnh_jax.plots.training import (
    accuracy_by_method,
    conflict_over_steps,
    prediction_grid,
)

__all__ = [
    "COLOURS",
    "accuracy_by_method",
    "benchmark_ratios",
    "conflict_map",
    "conflict_over_steps",
    "forgetting",
    "prediction_grid",
    "projection",
    "strength_sweep",
]
