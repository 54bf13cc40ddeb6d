"""How often regularizers hurt, and how much at worst."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dtnh_jax.plots._style import COLOURS, GREY, HATCHES, VERBATIM, blank, points, span

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def harm_rates(rates: Mapping[str, Mapping[str, float]]) -> "Figure":
    """How often each rule harms: a panel for each optimizer, a bar for each rule.

    Args:
      rates: share of cells that are harmed, from 0 to 1, by optimizer and then by
        rule. Rules are drawn from top to bottom, in the same colour and hatching in
        every panel.

    Returns:
      A figure; each bar has its share written beside it. The title says which rules
      harm least and most, by the mean over optimizers, of those that all of them have.

    Raises:
      ValueError: without optimizers, for an optimizer without rules, or for a share
        that is not between 0 and 1.

    Example:
      >>> figure = harm_rates({"sgd": {"sum": 0.25, "dtnh": 0.0}})
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['25%', '0%']
      >>> figure.get_suptitle()
      'Harmed: from 0% (dtnh) to 25% (sum)'
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
    figure = blank(1.5 + 3.2 * len(rates), 1.3 + 0.34 * len(names))
    panels = figure.subplots(1, len(rates), sharex=True, sharey=True, squeeze=False)
    largest = max(max(by_rule.values()) for by_rule in rates.values())
    for axes, (optimizer, by_rule) in zip(panels[0], rates.items()):
        for rule, rate in by_rule.items():
            row = names.index(rule)
            _bar(axes, row, 100 * rate, row)
            label = f"{100 * rate:.0f}%"
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(label, (100 * rate, row), xytext=(3, 0), **style)
        axes.set_title(optimizer, fontsize=10, **VERBATIM)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    first = panels[0][0]
    first.set_yticks(range(len(names)), names, **VERBATIM)
    first.set_ylim(len(names) - 0.4, -0.6)
    first.set_xlim(0, 118 * largest or 1.0)
    figure.supxlabel("harmed (%)", fontsize=10)
    figure.suptitle(_harm(rates, names), fontsize=11, **VERBATIM)
    return figure


def _harm(rates: Mapping[str, Mapping[str, float]], names: list[str]) -> str:
    """Says which rules harm least and most, of those that every optimizer has."""
    shared = [name for name in names if all(name in found for found in rates.values())]
    if not shared:
        return ""
    means = {
        name: 100 * sum(found[name] for found in rates.values()) / len(rates)
        for name in shared
    }
    average = " on average" if len(rates) > 1 else ""
    return f"Harmed{average}: {span(means, '{:.0f}%'.format)}"


def worst_cases(worst: Mapping[str, float]) -> "Figure":
    """The worst that each rule does to fine-tuning, a bar for each.

    Args:
      worst: the least difference of accuracies to plain fine-tuning, from -1 to 1, by
        rule. Rules are drawn from top to bottom.

    Returns:
      A figure in percentage points; each bar has its number written beside it, and
      the title the longest and the shortest. Bars of harm are hatched.

    Raises:
      ValueError: without rules, or for a difference that is not between -1 and 1.

    Example:
      >>> figure = worst_cases({"sum": -0.566, "never-hurt": 0.01})
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['-56.6', '+1.0']
      >>> figure.get_suptitle()
      'At worst from -56.6 (sum) to +1.0 (never-hurt) points'
    """
    if not worst:
        raise ValueError("`worst` must hold at least 1 rule, got 0.")
    for rule, difference in worst.items():
        if not -1 <= difference <= 1:
            raise ValueError(
                f"`worst[{rule!r}]` must be between -1 and 1, got {difference}."
            )
    figure = blank(6.0, 1.2 + 0.34 * len(worst))
    axes = figure.subplots()
    for row, difference in enumerate(worst.values()):
        is_harm = points(difference).startswith("-")
        _bar(axes, row, 100 * difference, 1 if is_harm else 0)
        axes.annotate(
            points(difference),
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
    axes.set_yticks(range(len(worst)), list(worst), **VERBATIM)
    axes.set_ylim(len(worst) - 0.4, -0.6)
    axes.set_xlabel("worst difference to plain fine-tuning (percentage points)")
    title = f"At worst {span(worst, points)} points"
    figure.suptitle(title, fontsize=11, **VERBATIM)
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
