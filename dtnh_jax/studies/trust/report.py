"""Writes the tables and pictures of a `summary`."""

import pathlib
from typing import Any

import numpy as np
from matplotlib.axes import Axes as Plot
from matplotlib.figure import Figure

from dtnh_jax.studies.trust.noninferiority import ALL_MARGIN, PAIR_MARGIN
from dtnh_jax.studies.trust.summary import HELP

# Names of methods in tables and pictures, in order.
TITLES = {
    "trust": "never_hurt",
    "one-pass": "never_hurt in one pass",
    "sum": "sum, strength tuned",
    "dtnh": "DTNH, strength tuned",
    "bloop": "Bloop, strength tuned",
    "pcgrad": "PCGrad, strength tuned",
    "metabalance": "MetaBalance, factor tuned",
    "pcd": "PCD, fraction tuned",
    "cautious": "cautious decay, strength tuned",
    "spd": "AdamSPD, strength tuned",
    "ftp": "FTP, factor tuned",
    "wise-ft": "WiSE-FT, point tuned",
    "early": "early stopping",
}
# Variants of `never_hurt` that lack one of its parts.
INGREDIENTS = {
    "trust": "never_hurt: trust 0.5 if clearly better by smooth accuracy, else 0",
    "trust-of-one": "trust 1 or 0",
    "trust-of-both": "trust 1, 0.5 or 0",
    "trust-by-any-lead": "trust 0.5 if it is better, clearly or not",
    "trust-by-accuracy": "judged by plain accuracy",
    "trust-by-probability": "judged by the probability of the label",
    "trust-one-fold": "trust 1, 0.5 or 0 by plain accuracy on one fold",
    "sum": "the sum, its strength by plain accuracy on one fold",
}
_OURS, _SUM, _OTHERS = "#c2410c", "#1d4ed8", "#64748b"
_LABEL_SPACING = 5.0  # percentage points of help kept


def tables(found: dict[str, Any]) -> str:
    """Returns the tables in Markdown."""
    methods = {
        name: found["methods"][name] for name in TITLES if name in found["methods"]
    }
    parts = {k: v for k, v in found["methods"].items() if k in INGREDIENTS}
    harm = [["method", "all pairs", *_pairs(found)]]
    for name, row in methods.items():
        cells = [_bound(row["all_pairs"])]
        cells += [_bound(row["pairs"][pair]) for pair in _pairs(found)]
        harm.append([TITLES[name], *cells])
    parts = [
        "# Help and harm",
        _markdown(_main(methods, TITLES)),
        "Differences from plain fine-tuning in percentage points (KL: nats per image), "
        "means over cells. Help kept: a method's share of the gain of the best "
        "strength in hindsight, over the cells where that gain is at least "
        f"{HELP:g} points. "
        "Elsewhere: the mean over the other cells.",
        "## Variants of never_hurt",
        _markdown(_main(parts, INGREDIENTS)),
        "## Tests for harm",
        _markdown(harm),
        "Mean difference in target accuracy, with the lower end of its one-sided 95% "
        "interval over seeds in brackets. Bold rules out a loss of more than the "
        f"margin: {ALL_MARGIN:g} points over all pairs, {PAIR_MARGIN:g} points for a "
        "pair.",
        "## Every cell",
        _markdown(_cells(found, list(methods))),
    ]
    return "\n\n".join(parts) + "\n"


def _main(methods: dict[str, Any], titles: dict[str, str]) -> list[list[str]]:
    """Returns a row for each method, in the order of their titles."""
    rows = [
        [
            "method",
            "help kept",
            "elsewhere",
            "lowest cell",
            "under shift",
            "source task",
            "KL to source",
            "trainings",
        ]
    ]
    for name in titles:
        if name not in methods:
            continue
        row = methods[name]
        rows.append(
            [
                titles[name],
                "" if row["help_kept"] is None else f"{row['help_kept']:.0%}",
                "" if row["elsewhere"] is None else f"{row['elsewhere']:+.1f}",
                f"{row['lowest']:+.1f}",
                f"{row['shift']:+.1f}",
                f"{row['kept']:+.1f}",
                f"{row['kl']:+.2f}",
                f"{row['trainings']:.1f}",
            ]
        )
    return rows


def _pairs(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(cell["pair"] for cell in found["cells"]))


def _bound(tested: dict[str, Any]) -> str:
    text = f"{tested['mean']:+.1f} [{tested['low']:+.1f}]"
    return f"**{text}**" if tested["is_shown"] else text


def _cells(found: dict[str, Any], methods: list[str]) -> list[list[str]]:
    header = ["pair", "optimizer", "regularizer", "plain", "best strength"]
    rows = [header + [TITLES[name] for name in methods]]
    for cell in found["cells"]:
        row = [cell[key] for key in ("pair", "optimizer", "regularizer")]
        row += [f"{cell['plain']['target']:.1f}", f"{cell['best']:+.1f}"]
        for name in methods:
            each = cell["methods"].get(name)
            row.append(f"{np.mean(each['target']):+.1f}" if each else "")
        rows.append(row)
    return rows


def _markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def help_and_harm(found: dict[str, Any]) -> Figure:
    """Plots help kept against the change in cells without help, a point per method."""
    figure = Figure((7.5, 5), layout="constrained")
    plot = figure.subplots()
    points = [
        (100 * row["help_kept"], row["elsewhere"], name)
        for name, row in found["methods"].items()
        if name in TITLES and None not in (row["help_kept"], row["elsewhere"])
    ]
    height = -np.inf
    for y, x, name in sorted(points):
        height = max(y + 1, height + _LABEL_SPACING)
        _point(plot, name, x, y, height)
    plot.axhline(100, color="0.85", zorder=0)
    plot.axvline(0, color="0.85", zorder=0)
    plot.set_xlabel("Change where no strength helps (points of target accuracy)")
    plot.set_ylabel("Help kept (% of the best strength in hindsight)")
    plot.set_title("Up: more of the help. Right: less harm.", loc="left")
    plot.margins(0.25, 0.1)
    return figure


def _point(plot: Plot, name: str, x: float, y: float, height: float) -> None:
    """Draws a method, with its label at a height that no other label has."""
    color = _OURS if name == "trust" else _OTHERS
    plot.scatter([x], [y], s=70 if name == "trust" else 35, color=color, zorder=3)
    plot.annotate(
        TITLES[name].partition(",")[0],
        (x, y),
        xytext=(x + 0.12, height),
        va="center",
        fontsize=9,
        color=color,
        weight="bold" if name == "trust" else "normal",
        arrowprops={"arrowstyle": "-", "color": "0.8", "lw": 0.7, "shrinkA": 0},
    )


def sweep(found: dict[str, Any], helpful: int, harmful: int) -> Figure:
    """Plots the sum at every strength and `never_hurt`, for two cells side by side."""
    figure = Figure((9, 3.8), layout="constrained")
    for plot, number in zip(figure.subplots(1, 2), (helpful, harmful)):
        cell = found["cells"][number]
        sums = cell["by_value"]["sum"]
        plot.axhline(0, color="0.75", zorder=0)
        plot.plot(
            sums["values"], sums["target"], "o-", color=_SUM, label="sum at a strength"
        )
        ours = np.mean(cell["methods"]["trust"]["target"])
        plot.axhline(ours, color=_OURS, lw=2.5, label=f"never_hurt: {ours:+.1f}")
        plot.set_xscale("log")
        plot.set_xlabel("Strength (multiples of the usual one)")
        plot.set_title(
            f"{cell['pair']}\n{cell['optimizer']}, {cell['regularizer']}",
            loc="left",
            fontsize=9,
        )
        plot.legend(frameon=False, loc="lower left")
    figure.axes[0].set_ylabel("Target accuracy minus\nplain fine-tuning (points)")
    return figure


def pareto(found: dict[str, Any]) -> Figure:
    """Plots target accuracy against that under shift and on the source's task."""
    figure = Figure((10.5, 4.4), layout="constrained")
    names = {
        "shift": "Test images under shift (points)",
        "kept": "The source's task, its own head (points)",
    }
    shown = [name for name in TITLES if name in found["methods"]]
    for plot, (axis, label) in zip(figure.subplots(1, 2), names.items()):
        plot.scatter([0], [0], marker="x", color="0.3", label="plain fine-tuning")
        for number, name in enumerate(shown):
            row = found["methods"][name]
            style = {"color": f"C{number % 10}", "s": 38, "zorder": 3}
            if name == "trust":
                style = {"color": _OURS, "s": 90, "zorder": 4}
            marker = "osD^v<>PX*hp"[number % 12]
            plot.scatter(
                [row["target"]], [row[axis]], marker=marker, label=TITLES[name], **style
            )
        plot.set_xlabel("Target accuracy (points)")
        plot.set_title(label, loc="left", fontsize=10)
        plot.grid(alpha=0.25)
        plot.margins(0.08)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle("Difference from plain fine-tuning, mean over cells", fontsize=10)
    return figure


def write(found: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes `tables.md` and the pictures."""
    (folder / "tables.md").write_text(tables(found))
    gains = [cell["best"] for cell in found["cells"]]
    losses = [min(cell["by_value"]["sum"]["target"][:3]) for cell in found["cells"]]
    figures = {
        "help_and_harm.png": help_and_harm(found),
        "sweep.png": sweep(found, int(np.argmax(gains)), int(np.argmin(losses))),
        "pareto.png": pareto(found),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
