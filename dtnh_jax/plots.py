"""Figures as functions of results; each returns a `matplotlib.figure.Figure`.

Matplotlib is imported when a figure is asked for, and pyplot never: figures belong to
the caller, who saves them (`figure.savefig("a.png")`) or shows them in a notebook.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart; lines
differ in their dashes too.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from dtnh_jax import rules

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":")
_GREY = "#777777"


def accuracy_by_method(
    accuracies: Mapping[str, Sequence[float]],
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> "Figure":
    """Accuracy of each method: every seed, the mean, and the interval of the mean.

    Args:
      accuracies: from 0 to 1, one a seed, by method. Methods are drawn from top to
        bottom.
      intervals: the ends of the mean's 95% interval, from 0 to 1, by method. Methods
        that are not in it have none, as with a single seed.

    Returns:
      A figure.

    Raises:
      ValueError: without methods, or for a method without accuracies.
    """
    if not accuracies:
        raise ValueError("`accuracies` must hold at least 1 method, got 0.")
    for method, values in accuracies.items():
        if not len(values):
            raise ValueError(f"`accuracies[{method!r}]` must hold a number, got none.")
    figure = _figure(7.0, 0.9 + 0.45 * len(accuracies))
    axes = figure.subplots()
    for row, (method, values) in enumerate(accuracies.items()):
        percent = 100 * np.asarray(values, float)
        colour = COLOURS[1] if "+" in method else COLOURS[0]
        if intervals and method in intervals:
            ends = 100 * np.asarray(intervals[method], float)
            axes.plot(ends, [row, row], color=colour, linewidth=2)
        below = np.full(len(percent), row + 0.25)
        axes.plot(percent, below, "o", color=_GREY, ms=3.5)
        axes.plot(
            [percent.mean()], [row], "D" if "+" in method else "s", color=colour, ms=8
        )
    axes.set_yticks(range(len(accuracies)), list(accuracies))
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy (%): mean, 95% interval, and every seed")
    axes.grid(axis="x", alpha=0.3)
    return figure


def conflict_over_steps(metrics: Sequence[Mapping[str, Any]]) -> "Figure":
    """Cosine of the two gradients, and share in conflict, over the steps of training.

    Args:
      metrics: lines as in `metrics.jsonl`, with `method`, `seed` and `step`; those
        without `cosine` (no regularizer) are left out. Drawn are means over seeds and
        over a tenth of all steps: those of single mini-batches are mostly noise.

    Returns:
      A figure of two panels.

    Raises:
      ValueError: if no line has a cosine.
    """
    lines = [line for line in metrics if "cosine" in line]
    if not lines:
        raise ValueError("`metrics` must hold a line with `cosine`, got none.")
    figure = _figure(7.0, 4.6)
    above, below = figure.subplots(2, 1, sharex=True)
    for number, method in enumerate(dict.fromkeys(line["method"] for line in lines)):
        ours = [line for line in lines if line["method"] == method]
        steps = sorted({line["step"] for line in ours})
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": _DASHES[number % len(_DASHES)],
            "label": method,
        }
        for axes, key, factor in ((above, "cosine", 1), (below, "conflict", 100)):
            by_step = {step: [] for step in steps}
            for line in ours:
                by_step[line["step"]].append(factor * line[key])
            parts = np.array_split(steps, min(10, len(steps)))
            values = [np.mean([by_step[step] for step in part]) for part in parts]
            axes.plot([part.mean() for part in parts], values, **style, marker=".")
    above.axhline(0, color=_GREY, linewidth=0.8)
    above.set_ylabel("cosine of loss and\nregularizer gradients")
    below.set_ylabel("share in conflict (%)")
    below.set_ylim(-3, 103)
    below.set_xlabel("training step (means over seeds and a tenth of the steps)")
    figure.legend(
        *above.get_legend_handles_labels(), loc="outside upper center", ncols=4
    )
    return figure


def prediction_grid(
    images: np.ndarray,
    labels: Sequence[int],
    predictions: Mapping[str, Sequence[int]],
    class_names: Sequence[str],
    columns: int = 6,
) -> "Figure":
    """Photographs with their class and what each method took them for.

    Args:
      images: uint8 `[n, h, w, 3]`.
      labels: the class of each image.
      predictions: the class that each method found for each image, by method.
      class_names: by class number.
      columns: images in a row.

    Returns:
      A figure. Mistakes are marked with a cross as well as by colour.

    Raises:
      ValueError: without images, or if lengths differ.
    """
    if not len(images):
        raise ValueError("`images` must hold at least 1 image, got 0.")
    for name, values in {"labels": labels, **predictions}.items():
        if len(values) != len(images):
            raise ValueError(
                f"`images` and {name!r} must have one length, got {len(images)} and "
                f"{len(values)}."
            )
    from matplotlib.figure import Figure

    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    # In inches: a photograph under its title and over a line for each method.
    side, title, line, gap = 1.4, 0.25, 0.14, 0.1
    width, height = side + gap, title + side + line * len(predictions) + gap
    figure = Figure(figsize=(columns * width, rows * height), dpi=150)
    for i in range(len(images)):
        row, column = divmod(i, columns)
        left = (column + 0.5 * gap / width) / columns
        bottom = 1 - (row + (title + side) / height) / rows
        axes = figure.add_axes(
            (left, bottom, side / width / columns, side / height / rows)
        )
        axes.axis("off")
        axes.imshow(images[i])
        axes.set_title(class_names[labels[i]], fontsize=8, fontweight="bold", pad=3)
        for number, (method, classes) in enumerate(predictions.items()):
            is_right = classes[i] == labels[i]
            axes.text(
                0.5,
                -(0.04 + number * line) / side,
                ("\u2713 " if is_right else "\u2717 ") + method,
                color=COLOURS[0] if is_right else COLOURS[1],
                fontsize=7,
                ha="center",
                va="top",
                transform=axes.transAxes,
            )
    return figure


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
    figure = _figure(5.2, 4.2)
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
        "g + r": (total, _GREY, "--", (-6, 6), "right"),
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
    axes.plot(*np.transpose([total, update]), ":", color=_GREY)
    axes.set_title("In the shaded half, the loss falls as fast as with g alone")
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def strength_sweep(
    panels: Mapping[
        str,
        Mapping[str, Sequence[tuple[float, float, float | None, float | None]]],
    ],
) -> "Figure":
    """How much a regularizer helps or hurts at every strength, rule by rule.

    Args:
      panels: by title, and in each panel by the name of a rule: points of strength
        (above 0), mean difference of accuracies (from -1 to 1), and the ends of its
        interval, which may be None.

    Returns:
      A figure with a small panel for each title. Both axes are logarithmic, that of
      differences (in percentage points) but for five points on either side of 0.

    Raises:
      ValueError: without panels, or for a strength that is not above 0.
    """
    if not panels:
        raise ValueError("`panels` must hold at least 1 panel, got 0.")
    names = list(dict.fromkeys(name for rules_ in panels.values() for name in rules_))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(0.6 + 2.7 * columns, 0.8 + 2.2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.ravel()[len(panels) :]:
        axes.axis("off")
    for axes, (title, by_rule) in zip(grid.ravel(), panels.items()):
        axes.axhline(0, color=_GREY, linewidth=0.8)
        for name, points in by_rule.items():
            number = names.index(name)
            ordered = sorted(points, key=lambda point: point[0])
            if ordered and ordered[0][0] <= 0:
                raise ValueError(
                    f"`panels[{title!r}][{name!r}]` must have strengths above 0, got "
                    f"{ordered[0][0]}."
                )
            # None becomes NaN, where nothing is drawn.
            strengths, means, lows, highs = np.array(ordered, float).T
            style = {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": _DASHES[number % len(_DASHES)],
            }
            axes.plot(strengths, 100 * means, **style, marker=".", label=name)
            axes.fill_between(
                strengths,
                100 * lows,
                100 * highs,
                color=style["color"],
                alpha=0.12,
                linewidth=0,
            )
        axes.set_title(title, fontsize=9)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=5)
        axes.set_yticks([-50, -20, -5, 0, 5, 20], ["-50", "-20", "-5", "0", "5", "20"])
        axes.set_yticks([], minor=True)
        axes.grid(alpha=0.3)
    found = {}
    for axes in grid.ravel()[: len(panels)]:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles))
    figure.legend(
        [found[name] for name in names],
        names,
        loc="outside upper center",
        ncols=2 * columns,
    )
    figure.supxlabel("strength / usual strength", fontsize=10)
    figure.supylabel("accuracy gained (%)", fontsize=10)
    return figure
