"""Two gradients in the plane."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from dtnh_jax import rules
from dtnh_jax.plots._style import COLOURS, GREY, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def projection(g: Sequence[float], r: Sequence[float]) -> "Figure":
    """Two gradients in the plane, their sum, and what DTNH makes of it.

    Args:
      g: gradient of the loss, two numbers.
      r: gradient of the regularizer with its strength, two numbers.

    Returns:
      A figure. Shaded is the half-plane of updates that lower the loss at least as
      fast as `g` alone, on to which DTNH projects `g + r`.

    Raises:
      ValueError: unless both are two numbers and `g` is not zero.
    """
    ours, theirs = np.asarray(g, float), np.asarray(r, float)
    if ours.shape != (2,) or theirs.shape != (2,) or not ours.any():
        raise ValueError(
            f"`g` and `r` must be two numbers each, `g` not zero, got {g} and {r}."
        )
    total = ours + theirs
    gram = np.array([[ours @ ours, ours @ theirs], [ours @ theirs, theirs @ theirs]])
    weights = np.asarray(rules.dtnh(jnp.asarray(gram, jnp.float32)))
    update = weights[0] * ours + weights[1] * theirs
    figure = blank(5.2, 4.2)
    axes = figure.subplots()
    points = np.array([np.zeros(2), ours, theirs, total, update])
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.3 * (high - low).max()
    axes.set_xlim(low[0] - margin, high[0] + margin)
    axes.set_ylim(low[1] - margin, high[1] + margin)
    along, across = ours / np.linalg.norm(ours), np.array([-ours[1], ours[0]])
    far = 10 * (high - low).max()
    across = far * across / np.linalg.norm(across)
    corners = [ours - across, ours + across, *(
        ours + far * along + sign * across for sign in (1, -1)
    )]  # fmt: skip
    axes.fill(*np.transpose(corners), color=COLOURS[2], alpha=0.12, linewidth=0)
    axes.plot(*np.transpose(corners[:2]), color=COLOURS[2], linewidth=1)
    arrows = {
        "g, the loss": (ours, COLOURS[0], "-", (8, -4), "left"),
        "r, the regularizer": (theirs, COLOURS[4], "-", (0, 6), "center"),
        "g + r": (total, GREY, "--", (-6, 6), "right"),
        "DTNH": (update, COLOURS[1], "-", (6, 6), "left"),
    }
    for label, (end, colour, dashes, offset, side) in arrows.items():
        style = {"arrowstyle": "-|>", "color": colour, "lw": 2, "ls": dashes}
        axes.annotate("", end, (0, 0), arrowprops=style)
        axes.annotate(
            label,
            end,
            textcoords="offset points",
            xytext=offset,
            color=colour,
            ha=side,
        )
    axes.plot(*np.transpose([total, update]), ":", color=GREY)
    axes.set_title("In the shaded half, the loss falls as fast as with g alone")
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    return figure
