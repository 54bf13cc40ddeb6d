"""What became of training: accuracies, conflicts, predictions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dtnh_jax.plots._style import COLOURS, DASHES, GREY, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    figure = blank(7.0, 0.9 + 0.45 * len(accuracies))
    axes = figure.subplots()
    for row, (method, values) in enumerate(accuracies.items()):
        percent = 100 * np.asarray(values, float)
        colour = COLOURS[1] if "+" in method else COLOURS[0]
        if intervals and method in intervals:
            ends = 100 * np.asarray(intervals[method], float)
            axes.plot(ends, [row, row], color=colour, linewidth=2)
        below = np.full(len(percent), row + 0.25)
        axes.plot(percent, below, "o", color=GREY, ms=3.5)
        axes.plot(
            [percent.mean()], [row], "D" if "+" in method else "s", color=colour, ms=8
        )
    axes.set_yticks(range(len(accuracies)), list(accuracies))
    axes.invert_yaxis()
    drawn = "mean, 95% interval, and every seed" if intervals else "mean and every seed"
    axes.set_xlabel(f"test accuracy (%): {drawn}")
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
    figure = blank(7.0, 4.6)
    above, below = figure.subplots(2, 1, sharex=True)
    for number, method in enumerate(dict.fromkeys(line["method"] for line in lines)):
        ours = [line for line in lines if line["method"] == method]
        steps = sorted({line["step"] for line in ours})
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[number % len(DASHES)],
            "label": method,
        }
        for axes, key, factor in ((above, "cosine", 1), (below, "conflict", 100)):
            by_step = {step: [] for step in steps}
            for line in ours:
                by_step[line["step"]].append(factor * line[key])
            parts = np.array_split(steps, min(10, len(steps)))
            values = [np.mean([by_step[step] for step in part]) for part in parts]
            axes.plot([part.mean() for part in parts], values, **style, marker=".")
    above.axhline(0, color=GREY, linewidth=0.8)
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
