"""The cosine of two gradients by leaf and step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from dtnh_jax.plots._style import COLOURS, VERBATIM, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def conflict_map(
    cosines: Float[np.ndarray, "leaves steps"], names: Sequence[str]
) -> "Figure":
    """Plots the cosine of two gradients in every leaf at every step, as a heat map.

    Agreement is blue, conflict is orange, a cosine of 0 is white. The largest absolute
    cosine has the full colour. A missing value (NaN) is grey.

    Args:
      cosines: from -1 to 1, such as the field of `conflict_metrics` with scope "leaf",
        with one column for each step.
      names: names of the leaves, from top to bottom.

    Returns:
      A figure. Its title names the leaf that was in conflict at most steps.

    Raises:
      ValueError: a cosine is out of range, or the number of names is not that of rows.

    Example:
      >>> figure = conflict_map(np.array([[0.1, -0.2], [-0.3, -0.1]]), ["body", "head"])
      >>> figure.axes[0].get_title()
      'In conflict at 75% of the steps on average, head at 100%'
    """
    values = np.asarray(cosines, float)
    if values.ndim != 2 or values.shape[0] != len(names) or not values.size:
        raise ValueError(
            "`cosines` must have a row for each of `names` and a column for each step, "
            f"got shape {values.shape} and {len(names)} names."
        )
    if np.any(np.abs(values) > 1):
        worst = float(values.flat[np.nanargmax(np.abs(values))])
        raise ValueError(f"`cosines` must be from -1 to 1, got {worst:g}.")
    from matplotlib.colors import LinearSegmentedColormap

    palette = LinearSegmentedColormap.from_list(
        "conflict", [COLOURS[1], "#FFFFFF", COLOURS[0]]
    ).with_extremes(bad="#CCCCCC")
    known = values[np.isfinite(values)]
    limit = float(np.abs(known).max(initial=0)) or 1.0
    figure = blank(8.0, 1.3 + 0.26 * len(names))
    axes = figure.subplots()
    image = axes.imshow(
        values,
        cmap=palette,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, values.shape[1] + 0.5, len(names) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(names)), list(names), fontsize=8, **VERBATIM)
    axes.set_xlabel("step")
    figure.colorbar(image, label="cosine\n(below 0: conflict)")
    if known.size:
        counts = np.isfinite(values).sum(axis=1)
        shares = (values < 0).sum(axis=1) / np.maximum(counts, 1)
        most = int(np.argmax(shares))
        axes.set_title(
            f"In conflict at {100 * np.mean(known < 0):.0f}% of the steps on average, "
            f"{names[most]} at {100 * shares[most]:.0f}%",
            fontsize=11,
            **VERBATIM,
        )
    return figure
