"""`dtnh report`: compares run folders in one HTML page without external files."""

import base64
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from dtnh_jax.finetune import files, shell
from dtnh_jax.finetune.reports.html_parts import STYLE, figure, table, text

_FIGURES = {
    "accuracy.png": "Accuracy by method",
    "conflict.png": "Do the gradients of loss and regularizer agree?",
    "predictions.png": "Test photographs and what seed 0 took them for",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares runs in one page of HTML, with their tables, figures and options."""

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    """Folders of complete runs."""
    output: pathlib.Path = pathlib.Path("report.html")
    """File to write."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    options = tyro.cli(Options, prog="dtnh report", args=list(argv))
    try:
        made = page([read_run(folder) for folder in options.runs])
        files.write(options.output, made)
    except ValueError as error:
        return shell.refuse(str(error))
    except OSError as error:
        return shell.refuse(f"{options.output} can not be written: {error.strerror}.")
    print(options.output)
    return 0


@dataclasses.dataclass(frozen=True)
class Run:
    """Results and figures of a run."""

    name: str
    results: dict[str, Any]
    figures: dict[str, bytes]  # PNG by name of the file


def read_run(folder: pathlib.Path) -> Run:
    """Reads the results and figures of a run.

    Raises:
      ValueError: the folder is no run folder, or its run is not complete.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError):
        results = None
    if not (isinstance(results, dict) and {"methods", "config"} <= results.keys()):
        raise ValueError(
            f"{folder} is not the folder of a complete run: it has no results.json "
            "with methods and options."
        )
    figures = {
        name: (folder / name).read_bytes()
        for name in _FIGURES
        if (folder / name).exists()
    }
    return Run(str(folder), results, figures)


def page(runs: Sequence[Run]) -> str:
    """Returns the page, which needs no other files.

    Args:
      runs: at least one run.

    Raises:
      ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("`dtnh report` needs run folders, got none.")
    title = "Runs of dtnh" if len(runs) > 1 else f"Run {runs[0].name}"
    parts = [f"<h1>{text(title)}</h1>"]
    if len(runs) > 1:
        parts += ["<h2>All methods of all runs</h2>", _overview(runs)]
        parts += ["<h2>Options that differ</h2>", _differing_options(runs)]
    for each in runs:
        parts.append(_section(each))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _overview(runs: Sequence[Run]) -> str:
    """Returns a row for every method of every run, with the best per task marked."""
    rows, best = [], {}
    for each in runs:
        target = each.results["target"]["name"]
        for method, numbers in each.results["methods"].items():
            accuracy = numbers["accuracy"]
            row = [
                method,
                each.name,
                each.results["source"]["name"],
                target,
                f"{100 * accuracy['mean']:.1f}",
                _interval(accuracy),
                f"{100 * numbers['conflict']:.0f}%" if "conflict" in numbers else "",
            ]
            key = best.setdefault(target, (accuracy["mean"], len(rows)))
            if accuracy["mean"] > key[0]:
                best[target] = (accuracy["mean"], len(rows))
            rows.append(row)
    header = ["method", "run", "source", "target"]
    return table(
        [*header, "accuracy (%)", "95% interval", "in conflict"],
        rows,
        "Test accuracy; the highest mean of each target is shaded",
        words=len(header),
        marked={number for _, number in best.values()},
    )


def _differing_options(runs: Sequence[Run]) -> str:
    """Returns a row for each option that differs between runs."""
    configs = [each.results["config"] for each in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = []
    for name in names:
        values = [_shown(config.get(name)) for config in configs]
        if len(set(values)) > 1:
            rows.append([f"--{name.replace('_', '-')}", *values])
    if not rows:
        return "<p>All runs have the same options.</p>"
    header = ["option", *(each.name for each in runs)]
    return table(header, rows, "Options", words=len(header))


def _section(each: Run) -> str:
    """Returns the table, notes, figures and options of one run."""
    # Imported here because errors should not wait for Flax.
    from dtnh_jax.finetune.reports import report

    results = each.results
    title = f"{results['source']['name']} on {results['target']['name']}"
    parts = [f"<h2>{text(each.name)}: {text(title)}</h2>"]
    parts.append(table(*report.rows(results), "Test accuracy (%)"))
    parts += [f"<p>{text(note)}</p>" for note in report.notes(results)]
    for name, picture in each.figures.items():
        caption = _FIGURES[name]
        encoded = base64.b64encode(picture).decode()
        image = f'<img alt="{text(caption)}" src="data:image/png;base64,{encoded}">'
        parts.append(figure(image, caption))
    if results.get("tuning"):
        parts.append(_tuning(results["tuning"], results["strengths"]))
    options = [[name, _shown(value)] for name, value in results["config"].items()]
    parts.append(
        "<details><summary>All options</summary>"
        f"{table(['option', 'value'], options, 'Options', words=2)}</details>"
    )
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _tuning(tuning: Sequence[Mapping[str, Any]], strengths: Mapping[str, float]) -> str:
    """Returns the strengths that were tried, with the chosen ones marked."""
    rows = [
        [
            row["method"],
            f"{row['strength']:g}" if row["method"] in strengths else "",
            f"{100 * sum(row['accuracies']) / len(row['accuracies']):.1f}",
        ]
        for row in tuning
    ]
    chosen = {
        number
        for number, row in enumerate(tuning)
        if strengths.get(row["method"]) == row["strength"]
    }
    return table(
        ["regularizer", "strength", "validation accuracy (%)"],
        rows,
        "Strengths that were tried; the chosen ones are shaded",
        marked=chosen,
    )


def _interval(numbers: dict[str, float | None]) -> str:
    low, high = numbers["low"], numbers["high"]
    if low is None or high is None:
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_shown(x)}" for key, x in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
