"""The effect of a regularizer at every strength."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dtnh_jax.plots._style import (
    COLOURS,
    DASHES,
    FEW,
    GREY,
    VERBATIM,
    blank,
    legend,
    points,
    span,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Points = Sequence[tuple[float, float, float | None, float | None]]


def strength_sweep(panels: Mapping[str, Mapping[str, _Points]]) -> "Figure":
    """Plots the accuracy that a regularizer gains at every strength, rule by rule.

    Args:
      panels: by title, and in each panel by the name of a rule: points of strength
        (above 0), mean difference of accuracies (from -1 to 1), and the ends of its
        interval, which may be None.

    Returns:
      A figure with a small panel for each title. Both axes are logarithmic, except that
      differences (in percentage points) are linear within five points of 0. The title
      says which rules have the lowest and the highest minimum.

    Raises:
      ValueError: there are no panels, or a strength is not above 0.

    Example:
      >>> sums = [(1.0, 0.01, -0.01, 0.03), (100.0, -0.2, None, None)]
      >>> figure = strength_sweep({"l2_sp": {"sum": sums, "dtnh": sums[:1]}})
      >>> figure.get_suptitle()
      'Lowest mean from -20.0 (sum) to +1.0 (dtnh) points'
    """
    if not panels:
        raise ValueError("`panels` must hold at least 1 panel, got 0.")
    names = list(dict.fromkeys(name for rules_ in panels.values() for name in rules_))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    is_crowded = len(names) > FEW
    figure = blank(
        0.6 + max(2.7 * columns, 5.4) + 1.8 * is_crowded,
        max(1.1 + 2.2 * rows, (0.8 + 0.2 * len(names)) * is_crowded),
    )
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.ravel()[len(panels) :]:
        axes.axis("off")
    for axes in grid.ravel()[: len(panels)][-columns:]:  # the lowest of each column
        axes.set_xlabel("strength / usual strength")
        axes.tick_params(labelbottom=True)
    lines = {}
    for axes, (title, by_rule) in zip(grid.ravel(), panels.items()):
        axes.axhline(0, color=GREY, linewidth=0.8)
        for name, found in by_rule.items():
            number = names.index(name)
            ordered = sorted(found, key=lambda point: point[0])
            if ordered and ordered[0][0] <= 0:
                raise ValueError(
                    f"`panels[{title!r}][{name!r}]` must have strengths above 0, got "
                    f"{ordered[0][0]}."
                )
            # None becomes NaN, which is not drawn.
            strengths, means, lows, highs = np.array(ordered, float).T
            style = {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": DASHES[number % len(DASHES)],
            }
            (line,) = axes.plot(strengths, 100 * means, **style, marker=".", label=name)
            lines.setdefault(name, line)
            axes.fill_between(
                strengths,
                100 * lows,
                100 * highs,
                color=style["color"],
                alpha=0.12,
                linewidth=0,
            )
        axes.set_title(title, fontsize=9, **VERBATIM)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=5)
        axes.set_yticks([-50, -20, -5, 0, 5, 20], ["-50", "-20", "-5", "0", "5", "20"])
        axes.set_yticks([], minor=True)
        axes.grid(alpha=0.3)
    legend(figure, [lines[name] for name in names], names)
    figure.supylabel("accuracy gained (percentage points)", fontsize=10)
    figure.suptitle(_lowest(panels, names), fontsize=11, **VERBATIM)
    return figure


def _lowest(panels: Mapping[str, Mapping[str, _Points]], names: list[str]) -> str:
    lowest = {
        name: [point[1] for panel in panels.values() for point in panel.get(name, ())]
        for name in names
    }
    found = {name: min(means) for name, means in lowest.items() if means}
    return f"Lowest mean {span(found, points)} points" if found else ""
