"""Measured times against their targets."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtnh_jax.plots._style import COLOURS, GREY, HATCHES, VERBATIM, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By whether the target is met: colours and hatching.
_STYLES = {
    True: (COLOURS[0], HATCHES[0], "target met"),
    False: (COLOURS[1], HATCHES[1], "target missed"),
    None: (COLOURS[5], HATCHES[2], "no target"),
}

# Ticks of axes with a wide, a medium and a narrow range around 1.
_FAR = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_NEAR = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5)
_NEXT_TO = (0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2)


def benchmark_ratios(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Plots each measured time as a multiple of the time it is compared with.

    Args:
      rows: the `rows` of `python -m dtnh_jax.benchmarks`, with `group`, `subject`,
        `name`, `against`, `ratio`, `ratio_low`, `ratio_high`, `target` and `is_met`;
        rows without a `ratio` are left out.

    Returns:
      A figure with a panel for each group. The title says how many targets are met, and
      which is missed by the largest factor. A bar goes from 1 to the median, its
      whisker spans the middle half of the rounds, and a black tick is the target.

    Raises:
      ValueError: no row has a ratio.

    Example:
      >>> row = {"group": "steps", "subject": "net", "name": "ours", "against": "plain"}
      >>> numbers = {"ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1}
      >>> goal = {"target": 1.05, "is_met": True}
      >>> figure = benchmark_ratios([row | numbers | goal])
      >>> figure.get_suptitle()
      'All of 1 targets met'
    """
    drawn = [row for row in rows if row["ratio"] is not None]
    if not drawn:
        raise ValueError("`rows` must hold a row with a `ratio`, got none.")
    groups = list(dict.fromkeys(row["group"] for row in drawn))
    by_group = [[row for row in drawn if row["group"] == group] for group in groups]
    figure = blank(8.0, 1.3 + 0.32 * len(drawn) + 0.45 * len(groups))
    heights = [len(members) + 1 for members in by_group]
    panels = figure.subplots(
        len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for (axes,), group, members in zip(panels, groups, by_group):
        _draw_group(axes, members)
        axes.set_title(group, fontsize=10, loc="left", fontweight="bold", **VERBATIM)
    from matplotlib.patches import Patch

    seen = [state for state in _STYLES if any(row["is_met"] is state for row in drawn)]
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=label)
        for colour, hatch, label in (_STYLES[state] for state in seen)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    panels[-1][0].set_xlabel(
        "ratio: median and middle half of the rounds; black: largest ratio allowed"
    )
    figure.suptitle(_finding(drawn), fontsize=11, **VERBATIM)
    return figure


def _draw_group(axes: Any, members: Sequence[Mapping[str, Any]]) -> None:
    """Draws bars from 1 on a logarithmic axis: 2 and 1/2 are equally far from 1."""
    axes.set_xscale("log")
    for place, row in enumerate(members):
        colour, hatch, _ = _STYLES[row["is_met"]]
        axes.barh(
            place,
            row["ratio"] - 1,
            left=1,
            height=0.7,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
        )
        axes.plot([row["ratio_low"], row["ratio_high"]], [place] * 2, color=GREY, lw=2)
        axes.plot([row["ratio"]], [place], "D", color=colour, markeredgecolor="white")
        if row["target"] is not None:
            ends = [place - 0.45, place + 0.45]
            axes.plot([row["target"]] * 2, ends, color="black", lw=2)
        beside = axes.get_yaxis_transform()
        label = f"{row['ratio']:.2f}"
        axes.text(1.01, place, label, transform=beside, va="center", fontsize=8)
    axes.axvline(1, color=GREY, linewidth=0.8)
    labels = [f"{row['subject']}: {row['name']}\n/ {row['against']}" for row in members]
    axes.set_yticks(
        range(len(members)), labels, fontsize=8, linespacing=0.95, **VERBATIM
    )
    axes.set_ylim(len(members) - 0.4, -0.6)
    ends = [1.0, *(row[key] for row in members for key in ("ratio_low", "ratio_high"))]
    ends += [row["target"] for row in members if row["target"] is not None]
    low, high = 0.93 * min(ends), 1.07 * max(ends)
    ticks = _NEXT_TO if high / low < 1.3 else _NEAR if high / low < 3 else _FAR
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_xticks([], minor=True)


def _finding(rows: Sequence[Mapping[str, Any]]) -> str:
    aimed = [row for row in rows if row["target"] is not None]
    missed = [row for row in aimed if not row["is_met"]]
    if not aimed:
        return "Times without targets"
    if not missed:
        return f"All of {len(aimed)} targets met"
    worst = max(missed, key=lambda row: row["ratio"] / row["target"])
    return (
        f"{len(aimed) - len(missed)} of {len(aimed)} targets met; furthest off: "
        f"{worst['subject']}, {worst['name']},\n{worst['ratio']:.2f} times "
        f"{worst['against']}, where {worst['target']:g} was the target"
    )
