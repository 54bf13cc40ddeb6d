"""Whether regularizers hurt: by strength, how often, and how much at worst."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dtnh_jax.plots._style import COLOURS, DASHES, GREY, HATCHES, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    figure = blank(0.6 + 2.7 * columns, 0.8 + 2.2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.ravel()[len(panels) :]:
        axes.axis("off")
    for axes, (title, by_rule) in zip(grid.ravel(), panels.items()):
        axes.axhline(0, color=GREY, linewidth=0.8)
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
                "linestyle": DASHES[number % len(DASHES)],
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


def harm_rates(rates: Mapping[str, Mapping[str, float]]) -> "Figure":
    """How often each rule harms: a panel for each optimizer, a bar for each rule.

    Args:
      rates: share of cells that are harmed, from 0 to 1, by optimizer and then by
        rule. Rules are drawn from top to bottom, in the same colour and hatching in
        every panel.

    Returns:
      A figure; each bar has its share written beside it.

    Raises:
      ValueError: without optimizers, for an optimizer without rules, or for a share
        that is not between 0 and 1.

    Example:
      >>> figure = harm_rates({"sgd": {"sum": 0.25, "dtnh": 0.0}})
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['25%', '0%']
    """
    if not rates:
        raise ValueError("`rates` must hold at least 1 optimizer, got 0.")
    for optimizer, by_rule in rates.items():
        if not by_rule:
            raise ValueError(f"`rates[{optimizer!r}]` must hold a rule, got none.")
        for rule, rate in by_rule.items():
            if not 0 <= rate <= 1:
                raise ValueError(
                    f"`rates[{optimizer!r}][{rule!r}]` must be between 0 and 1, got "
                    f"{rate}."
                )
    names = list(dict.fromkeys(rule for by_rule in rates.values() for rule in by_rule))
    figure = blank(1.5 + 3.2 * len(rates), 1.0 + 0.34 * len(names))
    panels = figure.subplots(1, len(rates), sharex=True, sharey=True, squeeze=False)
    largest = max(max(by_rule.values()) for by_rule in rates.values())
    for axes, (optimizer, by_rule) in zip(panels[0], rates.items()):
        for rule, rate in by_rule.items():
            row = names.index(rule)
            _bar(axes, row, 100 * rate, row)
            label = f"{100 * rate:.0f}%"
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(label, (100 * rate, row), xytext=(3, 0), **style)
        axes.set_title(optimizer, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    first = panels[0][0]
    first.set_yticks(range(len(names)), names)
    first.set_ylim(len(names) - 0.4, -0.6)
    first.set_xlim(0, 118 * largest or 1.0)
    figure.supxlabel("harmed (%)", fontsize=10)
    return figure


def worst_cases(worst: Mapping[str, float]) -> "Figure":
    """The worst that each rule does to fine-tuning, a bar for each.

    Args:
      worst: the least difference of accuracies to plain fine-tuning, from -1 to 1, by
        rule. Rules are drawn from top to bottom.

    Returns:
      A figure in percentage points; each bar has its number written beside it. Bars
      of harm are hatched.

    Raises:
      ValueError: without rules, or for a difference that is not between -1 and 1.

    Example:
      >>> figure = worst_cases({"sum": -0.566, "never-hurt": 0.01})
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['-56.6', '+1.0']
    """
    if not worst:
        raise ValueError("`worst` must hold at least 1 rule, got 0.")
    for rule, difference in worst.items():
        if not -1 <= difference <= 1:
            raise ValueError(
                f"`worst[{rule!r}]` must be between -1 and 1, got {difference}."
            )
    figure = blank(6.0, 0.9 + 0.34 * len(worst))
    axes = figure.subplots()
    for row, difference in enumerate(worst.values()):
        is_harm = difference < 0
        _bar(axes, row, 100 * difference, 1 if is_harm else 0)
        axes.annotate(
            f"{100 * difference:+.1f}",
            (100 * difference, row),
            textcoords="offset points",
            xytext=(-3 if is_harm else 3, 0),
            ha="right" if is_harm else "left",
            va="center",
            fontsize=8,
        )
    low, high = 100 * min(*worst.values(), 0), 100 * max(*worst.values(), 0)
    margin = 0.18 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(worst)), list(worst))
    axes.set_ylim(len(worst) - 0.4, -0.6)
    axes.set_xlabel("worst difference to plain fine-tuning (percentage points)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def _bar(axes, row: int, length: float, number: int) -> None:
    """Draws a bar in the colour and hatching of a number."""
    axes.barh(
        row,
        length,
        height=0.7,
        color=COLOURS[number % len(COLOURS)],
        hatch=HATCHES[number % len(HATCHES)],
        edgecolor="white",
        linewidth=0,
    )
