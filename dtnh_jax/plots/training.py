"""Results of training: accuracies, conflicts, predictions."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dtnh_jax.plots._style import (
    COLOURS,
    DASHES,
    FEW,
    GREY,
    VERBATIM,
    blank,
    legend,
    span,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def accuracy_by_method(
    accuracies: Mapping[str, Sequence[float]],
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> "Figure":
    """Plots each method's accuracy: every seed, the mean, and its interval if given.

    Args:
      accuracies: by method, an accuracy from 0 to 1 for each seed. Methods are drawn
        from top to bottom.
      intervals: by method, the ends of the mean's 95% interval, from 0 to 1. A method
        may have none, for example with a single seed.

    Returns:
      A figure; the title names the method with the highest mean.

    Raises:
      ValueError: there are no methods, or a method has no accuracies.

    Example:
      >>> accuracies = {"l2_sp": [0.5, 0.6], "l2_sp+dtnh": [0.6, 0.7]}
      >>> figure = accuracy_by_method(accuracies, {"l2_sp+dtnh": (0.4, 0.9)})
      >>> figure.get_suptitle()
      'Highest mean: l2_sp+dtnh, 65.0% [40.0, 90.0]'
    """
    if not accuracies:
        raise ValueError("`accuracies` must hold at least 1 method, got 0.")
    for method, values in accuracies.items():
        if not len(values):
            raise ValueError(f"`accuracies[{method!r}]` must hold a number, got none.")
    ends = {
        method: 100 * np.asarray(interval, float)
        for method, interval in (intervals or {}).items()
        if method in accuracies
    }
    several = max(map(len, accuracies.values())) > 1
    figure = blank(7.0, 1.2 + 0.45 * len(accuracies))
    axes = figure.subplots()
    for row, (method, values) in enumerate(accuracies.items()):
        percent = 100 * np.asarray(values, float)
        colour = COLOURS[1] if "+" in method else COLOURS[0]
        if method in ends:
            axes.plot(ends[method], [row, row], color=colour, linewidth=2)
        if several:
            below = np.full(len(percent), row + 0.25)
            axes.plot(percent, below, "o", color=GREY, ms=3.5)
        axes.plot(
            [percent.mean()], [row], "D" if "+" in method else "s", color=colour, ms=8
        )
    axes.set_yticks(range(len(accuracies)), list(accuracies), **VERBATIM)
    axes.invert_yaxis()
    drawn = ["mean", *["95% interval"] * bool(ends), "every seed"]
    shown = f": {', '.join(drawn[:-1])} and {drawn[-1]}" if several else " of one seed"
    axes.set_xlabel(f"test accuracy (%){shown}")
    axes.grid(axis="x", alpha=0.3)
    means = {method: 100 * np.mean(values) for method, values in accuracies.items()}
    best = max(means, key=means.__getitem__)
    title = f"Highest {'mean' if several else 'accuracy'}: {best}, {means[best]:.1f}%"
    if best in ends:
        title += " [{:.1f}, {:.1f}]".format(*ends[best])
    figure.suptitle(title, fontsize=11, **VERBATIM)
    return figure


def conflict_over_steps(metrics: Sequence[Mapping[str, Any]]) -> "Figure":
    """Plots the cosine of two gradients, and the share in conflict, over training.

    Single mini-batches are mostly noise, so the curves are means over seeds and over
    tenths of all steps.

    Args:
      metrics: lines of `metrics.jsonl`, with `method`, `seed` and `step`. Lines without
        `cosine` (no regularizer) and numbers that are None (not finite) are left out.

    Returns:
      A figure with two panels; the title names the methods that were most and least in
      conflict, on average over all their steps.

    Raises:
      ValueError: no line has a cosine.

    Example:
      >>> line = {"method": "l2_sp", "seed": 0, "step": 1}
      >>> figure = conflict_over_steps([line | {"cosine": -0.1, "conflict": 1.0}])
      >>> figure.get_suptitle()
      'In conflict on average: 100% (l2_sp)'
    """
    lines = [line for line in metrics if "cosine" in line]
    if not lines:
        raise ValueError("`metrics` must hold a line with `cosine`, got none.")
    methods = list(dict.fromkeys(line["method"] for line in lines))
    is_crowded = len(methods) > FEW
    figure = blank(
        7.0 + 2.2 * is_crowded, max(4.9, (0.8 + 0.2 * len(methods)) * is_crowded)
    )
    above, below = figure.subplots(2, 1, sharex=True)
    shares, handles = {}, {}
    for number, method in enumerate(methods):
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
                if line[key] is not None:
                    by_step[line["step"]].append(factor * line[key])
            parts = np.array_split(steps, min(10, len(steps)))
            values = [_mean([x for s in part for x in by_step[s]]) for part in parts]
            (drawn,) = axes.plot(
                [part.mean() for part in parts], values, **style, marker="."
            )
            handles[method] = drawn
        shares[method] = _mean([x for found in by_step.values() for x in found])
    above.axhline(0, color=GREY, linewidth=0.8)
    above.set_ylabel("cosine of loss and\nregularizer gradients")
    below.set_ylabel("share in conflict (%)")
    below.set_ylim(-3, 103)
    below.set_xlabel("training step (means over seeds and a tenth of the steps)")
    legend(figure, list(handles.values()), methods)
    known = {method: share for method, share in shares.items() if np.isfinite(share)}
    if known:
        shown = span(known, "{:.0f}%".format)
        title = f"In conflict on average: {shown}"
        figure.suptitle(title, fontsize=11, **VERBATIM)
    return figure


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def prediction_grid(
    images: np.ndarray,
    labels: Sequence[int],
    predictions: Mapping[str, Sequence[int]],
    class_names: Sequence[str],
    columns: int = 6,
) -> "Figure":
    """Plots photographs with their class and each method's prediction.

    Args:
      images: uint8 `[n, h, w, 3]`.
      labels: the class of each image.
      predictions: by method, the predicted class of each image.
      class_names: names by class number.
      columns: largest number of images in a row; long names of methods reduce it.

    Returns:
      A figure. Mistakes are marked by a cross and by colour; the title says which
      methods have the fewest and the most correct predictions.

    Raises:
      ValueError: there are no images, or lengths differ.

    Example:
      >>> images = np.zeros((3, 8, 8, 3), np.uint8)
      >>> found = {"scratch": [1, 0, 0], "l2_sp": [0, 0, 0]}
      >>> figure = prediction_grid(images, [0, 1, 0], found, ["cup", "mug"])
      >>> figure.get_suptitle()
      'Right, of 3: from 1 (scratch) to 2 (l2_sp)'
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

    longest = max(map(len, predictions), default=0) + 2
    # In inches: a photograph below its title and above a line for each method, as wide
    # as the longest name.
    side, title, line, gap = 1.4, 0.25, 0.16, 0.1
    width, height = (
        max(side, 0.068 * longest) + gap,
        title + side + line * len(predictions) + gap,
    )
    columns = max(min(columns, len(images), int(9.2 / width)), 1)
    rows = -(-len(images) // columns)
    fit = int(width / 0.075)  # letters of a class that fit
    heading = _most_right(labels, predictions)
    heading = textwrap.fill(heading, max(int(columns * width * 12), 12))
    top = 0.1 + 0.2 * len(heading.splitlines())
    whole = rows * height + top
    figure = Figure(figsize=(columns * width, whole), dpi=150)
    figure.suptitle(heading, fontsize=11, y=1 - 0.05 / whole, va="top", **VERBATIM)
    for i in range(len(images)):
        row, column = divmod(i, columns)
        left = (column + 0.5 * (width - side) / width) / columns
        bottom = 1 - (top + row * height + title + side) / whole
        axes = figure.add_axes((left, bottom, side / width / columns, side / whole))
        axes.axis("off")
        axes.imshow(images[i])
        name = class_names[labels[i]]
        name = name if len(name) <= fit else name[: fit - 1] + "\u2026"
        style = {"fontsize": 8, "fontweight": "bold", **VERBATIM}
        axes.set_title(name, pad=3, **style)
        for number, (method, classes) in enumerate(predictions.items()):
            is_right = classes[i] == labels[i]
            axes.text(
                0.5,
                -(0.04 + number * line) / side,
                ("\u2713 " if is_right else "\u2717 ") + method,
                color=COLOURS[0] if is_right else COLOURS[1],
                fontsize=8,
                ha="center",
                va="top",
                transform=axes.transAxes,
                **VERBATIM,
            )
    return figure


def _most_right(labels: Sequence[int], predictions: Mapping[str, Sequence[int]]) -> str:
    right = {
        method: float(sum(found == label for found, label in zip(classes, labels)))
        for method, classes in predictions.items()
    }
    if not right:
        return f"{len(labels)} photographs"
    return f"Right, of {len(labels)}: {span(right, '{:.0f}'.format)}"
