"""From the summary of a grid to `report.md`, figures and a table on one screen."""

import itertools
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from dtnh_jax import plots
from dtnh_jax.finetune.folder import write_json

_HEADER = [
    "rule",
    "optimizer",
    "cells",
    "harmed",
    "mean",
    "mean of the worst",
    "worst",
    "mean of the best",
    "cosine",
    "in conflict",
]


def write(folder: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes the figures, the report, and then the results."""
    figures = {}
    for regularizer, optimizer in sorted(
        {(row["regularizer"], row["optimizer"]) for row in results["rows"]}
    ):
        panels: dict[str, dict[str, list[Any]]] = {}
        for row in results["rows"]:
            if (row["regularizer"], row["optimizer"]) == (regularizer, optimizer):
                rules = panels.setdefault(f"{row['source']} > {row['target']}", {})
                keys = ("strength", "mean", "low", "high")
                rules[row["rule"]] = [
                    tuple(each[key] for key in keys) for each in row["strengths"]
                ]
        name = f"{regularizer}-{optimizer}.png"
        plots.strength_sweep(panels).savefig(folder / name)
        figures[f"{regularizer} with {optimizer}"] = name
    (folder / "report.md").write_text(_markdown(results, figures))
    write_json(folder / "results.json", results)


def show(console: Console, results: dict[str, Any], folder: pathlib.Path) -> None:
    """Prints the table of rules, and where the rest is."""
    table = Table(*_HEADER, title=f"Against plain fine-tuning, {results['split']} (%)")
    for row in _rule_rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"Report: {folder / 'report.md'}", markup=False, highlight=False, soft_wrap=True
    )


def _rule_rows(results: dict[str, Any]) -> list[list[str]]:
    body = []
    for rule in results["rules"]:
        harmed = f"{rule['harmed']} ({100 * rule['harm_rate']:.0f}%)"
        row = [rule["rule"], rule["optimizer"], str(rule["cells"]), harmed]
        row += [
            _points(rule[key]) for key in ("mean", "mean_worst", "worst", "mean_best")
        ]
        row.append("" if rule["cosine"] is None else f"{rule['cosine']:+.3f}")
        conflict = rule["conflict"]
        row.append("" if conflict is None else f"{100 * conflict:.0f}%")
        body.append(row)
    return body


def _markdown(results: dict[str, Any], figures: dict[str, str]) -> str:
    split = results["split"]
    seeds = sorted({rule["fewest_seeds"] for rule in results["rules"]})
    parts = [
        "# Do regularizers hurt?",
        f"Accuracy on {split} images minus that of plain fine-tuning with the same "
        "source, target, optimizer, learning rate and seed, in percentage points; a "
        "mean over seeds with its paired 95% t-interval. A cell here is a source, a "
        "target, a regularizer and a strength, all seeds together. It is harmed where "
        "the interval is wholly below 0, which 2.5% of cells are by chance if nothing "
        "makes a difference. The worst and the best are over strengths, which are "
        "multiples of the usual one.",
        _table(_HEADER, _rule_rows(results)),
    ]
    if seeds and seeds[0] == 1:
        parts.append("Cells of a single seed have no interval, so none is harmed.")
    parts += ["## Fine-tuning and training from scratch", _pair_table(results)]
    for title, name in figures.items():
        parts += [f"## {title}", f"![{title}]({name})"]
    wheres = itertools.groupby(
        sorted(results["rows"], key=_where), key=lambda row: _where(row)
    )
    for where, rows in wheres:
        parts += ["### {} > {}, {} with {}".format(*where), _strength_table(list(rows))]
    return "\n\n".join(parts) + "\n"


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
                    for end in ("worst", "best")
                ),
            ]
        )
    header = ["rule", *(f"x{strength:g}" for strength in strengths), "worst", "best"]
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
