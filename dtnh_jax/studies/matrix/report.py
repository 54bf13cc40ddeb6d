"""From the summary of a grid to `report.md`, figures and a table on one screen."""

import itertools
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from dtnh_jax import plots
from dtnh_jax.finetune import files
from dtnh_jax.studies.matrix.progress import duration

_HEADER = [
    "rule",
    "seeds",
    "harmed",
    "surely",
    "helped",
    "mean",
    "at the largest strength",
    "worst",
    "at the chosen strength",
    "cosine",
    "in conflict",
]


def write(folder: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes the figures, the report, and then the results."""
    figures = _figures(folder, results)
    files.write(folder / "report.md", _markdown(results, figures))
    files.write_json(folder / "results.json", results)


def show(console: Console, results: dict[str, Any], folder: pathlib.Path) -> None:
    """Prints the tables of rules, and where the rest is."""
    for each in results["tables"]:
        cells = f"{each['cells']} cells with {each['optimizer']}"
        table = Table(
            *_HEADER,
            title=f"Against plain fine-tuning, {results['split']} (%), {cells}",
        )
        for row in _rule_rows(each["rules"]):
            table.add_row(*row)
        console.print(table)
    console.print(
        f"Report: {folder / 'report.md'}", markup=False, highlight=False, soft_wrap=True
    )


def _figures(folder: pathlib.Path, results: dict[str, Any]) -> dict[str, str]:
    """Draws, and returns the files by what they show."""
    figures = {}
    for number, table in enumerate(results["tables"]):
        name = f"worst-{table['optimizer']}-{number}.png"
        worst = {rule["rule"]: rule["worst"]["mean"] for rule in table["rules"]}
        files.write_figure(folder / name, plots.worst_cases(worst))
        figures[f"worst {number}"] = name
        name = f"sweep-{table['optimizer']}-{number}.png"
        swept = plots.strength_sweep(_mean_panels(table))
        files.write_figure(folder / name, swept)
        figures[f"sweep {number}"] = name
    if results["harm"]:
        rates: dict[str, dict[str, float]] = {}
        for row in results["harm"]:
            rates.setdefault(row["optimizer"], {})[row["rule"]] = row["harm"]
        files.write_figure(folder / "harm.png", plots.harm_rates(rates))
        figures["harm"] = "harm.png"
    for regularizer, optimizer in sorted(
        {(row["regularizer"], row["optimizer"]) for row in results["rows"]}
    ):
        shown = {rule["rule"] for rule in _main_rules(results, optimizer)}
        panels: dict[str, dict[str, list[Any]]] = {}
        for row in results["rows"]:
            where = (row["regularizer"], row["optimizer"])
            if where == (regularizer, optimizer) and row["rule"] in shown:
                rules = panels.setdefault(f"{row['source']} > {row['target']}", {})
                keys = ("strength", "mean", "low", "high")
                rules[row["rule"]] = [
                    tuple(each[key] for key in keys) for each in row["strengths"]
                ]
        if panels:
            name = f"{regularizer}-{optimizer}.png"
            files.write_figure(folder / name, plots.strength_sweep(panels))
            figures[f"{regularizer} with {optimizer}"] = name
    return figures


def _mean_panels(table: dict[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """The mean over pairs at each strength, a panel for each regularizer."""
    panels: dict[str, dict[str, list[Any]]] = {}
    title = f"{{}}, mean of {len(table['pairs'])} pairs"
    for each in table["sweeps"]:
        rules = panels.setdefault(title.format(each["regularizer"]), {})
        keys = ("strength", "mean", "low", "high")
        rules.setdefault(each["rule"], []).append(tuple(each[key] for key in keys))
    return panels


def _main_rules(results: dict[str, Any], optimizer: str) -> list[dict[str, Any]]:
    """The rules of the table of the most cells."""
    tables = [x for x in results["tables"] if x["optimizer"] == optimizer]
    return max(tables, key=lambda table: table["cells"])["rules"]


def _rule_rows(rules: list[dict[str, Any]]) -> list[list[str]]:
    body = []
    for rule in rules:
        row = [rule["rule"]]
        row += [
            str(rule[key]) for key in ("seeds", "harmed", "surely_harmed", "helped")
        ]
        row += [_interval(rule[key]) for key in ("mean", "strongest", "worst")]
        row.append(_interval(rule["chosen"]))
        row.append("" if rule["cosine"] is None else f"{rule['cosine']:+.3f}")
        conflict = rule["conflict"]
        row.append("" if conflict is None else f"{100 * conflict:.0f}%")
        body.append(row)
    return body


def _markdown(results: dict[str, Any], figures: dict[str, str]) -> str:
    split = results["split"]
    parts = [
        "# Do regularizers hurt?",
        f"Accuracy on {split} images minus that of plain fine-tuning with the same "
        "source, target, optimizer, learning rate and seed, in percentage points; a "
        "mean over seeds with its paired 95% t-interval. A cell here is a source, a "
        "target, a regularizer and a strength, all seeds together. It is harmed where "
        "the interval is wholly below 0, which 2.5% of cells are by chance if nothing "
        "makes a difference, and helped where it is wholly above. Surely harmed are "
        "those that remain when it is taken into account how many cells were looked "
        "at (Holm's method). The worst is over strengths, which are multiples "
        "of the usual one; the chosen one has, for that rule and pair, the best mean "
        "accuracy on validation images.",
        f"{results['cells']} trainings, which took "
        f"{duration(results['seconds'])} of one processor core each at a time.",
    ]
    for number, table in enumerate(results["tables"]):
        parts += [
            f"## {table['optimizer']}, {table['cells']} cells",
            f"Regularizers: {', '.join(table['regularizers'])}. Strengths: "
            f"{', '.join(f'{x:g}' for x in table['strengths'])}. Pairs of source and "
            f"target: {', '.join(table['pairs'])}.",
            _table(_HEADER, _rule_rows(table["rules"])),
        ]
        if min(rule["seeds"] for rule in table["rules"]) == 1:
            parts.append("Cells of a single seed have no interval, so none is harmed.")
        for title, name in [
            ("Mean difference by strength", figures.pop(f"sweep {number}")),
            ("The worst cell of each rule", figures.pop(f"worst {number}")),
        ]:
            parts.append(f"![{title}]({name})")
    parts += ["## The paper's comparison", *_comparison(results["comparison"])]
    if results["harm"]:
        parts += ["## Step by step", *_harm(results["harm"], figures.pop("harm"))]
    parts += ["## Fine-tuning and training from scratch", _pair_table(results)]
    for title, name in figures.items():
        parts += [f"## {title}", f"![{title}]({name})"]
    wheres = itertools.groupby(
        sorted(results["rows"], key=_where), key=lambda row: _where(row)
    )
    for where, rows in wheres:
        parts += ["### {} > {}, {} with {}".format(*where), _strength_table(list(rows))]
    return "\n\n".join(parts) + "\n"


def _comparison(comparison: dict[str, Any]) -> list[str]:
    """The regularizer against its resolved forms, and how often which is better."""
    totals = comparison["totals"]
    header = ["pair", "regularizer", "strength", "fine-tuning", "sum"]
    for rule in totals:
        header += [rule, f"{rule} - sum"]
    body = []
    for row in comparison["rows"]:
        line = [f"{row['source']} > {row['target']}, {row['optimizer']}"]
        line += [row["regularizer"], f"x{row['strength']:g}"]
        line += [_level(row["fine_tuning"]), _level(row["sum"])]
        for rule in totals:
            found = row["rules"].get(rule, {})
            line.append(_level(found.get("accuracy")))
            line.append(_interval(found.get("difference")))
        body.append(line)
    count = ["better", "equal", "worse", "surely_better", "surely_worse"]
    return [
        "At the strength with the best validation accuracy of the plain sum.",
        _table(header, body),
        _table(
            ["rule", "rows", *(x.replace("_", " ") for x in count), "mean"],
            [
                [rule, str(total["rows"])]
                + [str(total[key]) for key in count]
                + [_points(total["mean"])]
                for rule, total in totals.items()
            ],
        ),
    ]


def _harm(rows: list[dict[str, Any]], figure: str) -> list[str]:
    """Which share of steps works against the loss."""
    keys = ("harm", "fresh_harm", "raised", "fresh_raised")
    body = [
        [row["rule"], row["optimizer"], str(row["cells"])]
        + [f"{100 * row[key]:.1f}" for key in keys]
        + [
            "" if row[key] is None else f"{row[key]:+.1e}"
            for key in ("change", "fresh_change")
        ]
        for row in rows
    ]
    header = ["rule", "optimizer", "cells", "harm", "harm, fresh batch"]
    header += ["loss raised", "loss raised, fresh batch", "change of the loss"]
    return [
        "The regularizer's part of a step is the applied update minus that of the same "
        "optimizer, which was given the gradients of the loss alone all along. Harm: "
        "the share of steps (%) at which that part raises the loss of the batch, or of "
        "another batch, to first order. Loss raised: the share at which the loss after "
        "the whole step is higher than after the step without that part. The last "
        "columns are the median differences of these losses.",
        _table([*header, "change, fresh batch"], body),
        f"![Harm by rule]({figure})",
    ]


def _pair_table(results: dict[str, Any]) -> str:
    header = ["source", "target", "optimizer", "learning rate", "fine-tuning"]
    body = []
    for pair in results["pairs"]:
        row = [pair["source"], pair["target"], pair["optimizer"]]
        row += [f"{pair['learning_rate']:g}"]
        row += [_level(pair[key]) for key in ("fine_tuning", "scratch")]
        body.append([*row, _interval(pair["fine_tuning_minus_scratch"])])
    return _table([*header, "scratch", "difference"], body)


def _where(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("source", "target", "regularizer", "optimizer")
    return tuple(row[name] for name in names)


def _strength_table(rows: list[dict[str, Any]]) -> str:
    strengths = sorted({x["strength"] for row in rows for x in row["strengths"]})
    body = []
    for row in rows:
        found = {each["strength"]: each for each in row["strengths"]}
        body.append(
            [
                row["rule"],
                *(_interval(found.get(strength)) for strength in strengths),
                *(
                    f"{_points(row[end]['mean'])} at x{row[end]['strength']:g}"
                    for end in ("worst", "chosen")
                ),
            ]
        )
    header = ["rule", *(f"x{strength:g}" for strength in strengths), "worst", "chosen"]
    return _table(header, body)


def _points(difference: float | None) -> str:
    return "" if difference is None else f"{100 * difference:+.1f}"


def _interval(numbers: dict[str, Any] | None) -> str:
    if numbers is None:
        return ""
    if numbers["low"] is None:
        return _points(numbers["mean"])
    ends = f"[{_points(numbers['low'])}, {_points(numbers['high'])}]"
    return f"{_points(numbers['mean'])} {ends}"


def _level(numbers: dict[str, Any] | None) -> str:
    if numbers is None:
        return ""
    mean = f"{100 * numbers['mean']:.1f}"
    return mean if numbers["std"] is None else f"{mean} ± {100 * numbers['std']:.1f}"


def _table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
