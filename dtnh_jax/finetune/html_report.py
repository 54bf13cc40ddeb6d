"""`dtnh report`: run folders side by side, in one page that opens from disk."""

import base64
import dataclasses
import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tyro

from dtnh_jax.finetune import shell

_FIGURES = {
    "accuracy.png": "Accuracy by method",
    "conflict.png": "Do the gradients of loss and regularizer agree?",
    "predictions.png": "Test photographs and what seed 0 took them for",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; }
img { max-width: 100%; }
tr.best td { background: #eef6ea; }
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares runs in one page of HTML, with their tables, figures and options."""

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    """Run folders, complete."""
    output: pathlib.Path = pathlib.Path("report.html")
    """The page to write."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    options = tyro.cli(Options, prog="dtnh report", args=list(argv))
    try:
        text = page([read_run(folder) for folder in options.runs])
        options.output.write_text(text, encoding="utf-8")
    except ValueError as error:
        return shell.refuse(str(error))
    except OSError as error:
        return shell.refuse(f"{options.output} can not be written: {error.strerror}.")
    print(options.output)
    return 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What a page says of a run."""

    name: str
    results: dict[str, Any]
    figures: dict[str, bytes]  # PNG by name of the file


def read_run(folder: pathlib.Path) -> Run:
    """Reads the results and figures of a run.

    Raises:
      ValueError: it is no run folder, or not complete.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError):
        results = None
    if not (isinstance(results, dict) and {"methods", "config"} <= results.keys()):
        raise ValueError(
            f"{folder} is no run folder that is complete: it has no results.json with "
            "methods and options."
        )
    figures = {
        name: (folder / name).read_bytes()
        for name in _FIGURES
        if (folder / name).exists()
    }
    return Run(str(folder), results, figures)


def page(runs: Sequence[Run]) -> str:
    """Returns the page; it refers to nothing outside itself.

    Args:
      runs: at least one.

    Raises:
      ValueError: there are none.
    """
    if not runs:
        raise ValueError("`dtnh report` needs run folders, got none.")
    title = "Runs of dtnh" if len(runs) > 1 else f"Run {runs[0].name}"
    parts = [f"<h1>{_text(title)}</h1>"]
    if len(runs) > 1:
        parts += ["<h2>All methods of all runs</h2>", _overview(runs)]
        parts += ["<h2>What differs in their options</h2>", _differing_options(runs)]
    for each in runs:
        parts.append(_section(each))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _overview(runs: Sequence[Run]) -> str:
    """Returns a row for every method of every run; the best of each task is marked."""
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
    header = ["method", "run", "source", "target", "accuracy (%)", "95%", "in conflict"]
    return _table(
        header, rows, "Test accuracy", marked={number for _, number in best.values()}
    )


def _differing_options(runs: Sequence[Run]) -> str:
    """Returns the options that not all runs share, one in a row."""
    configs = [each.results["config"] for each in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = []
    for name in names:
        values = [_shown(config.get(name)) for config in configs]
        if len(set(values)) > 1:
            rows.append([f"--{name.replace('_', '-')}", *values])
    if not rows:
        return "<p>Nothing: all have the same options.</p>"
    return _table(["option", *(each.name for each in runs)], rows, "Options")


def _section(each: Run) -> str:
    """Returns the table, notes, figures and options of one run."""
    # Here, because it imports Flax, and mistakes should be answered at once.
    from dtnh_jax.finetune import report

    results = each.results
    title = f"{results['source']['name']} on {results['target']['name']}"
    parts = [f"<h2>{_text(each.name)}: {_text(title)}</h2>"]
    parts.append(_table(*report.rows(results), "Test accuracy (%)"))
    parts += [f"<p>{_text(note)}</p>" for note in report.notes(results)]
    for name, figure in each.figures.items():
        caption = _text(_FIGURES[name])
        encoded = base64.b64encode(figure).decode()
        parts.append(
            f'<figure><img alt="{caption}" src="data:image/png;base64,{encoded}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    if results.get("tuning"):
        parts.append(
            _table(
                ["regularizer", "strength", "validation accuracy (%)"],
                [
                    [
                        row["method"],
                        f"{row['strength']:g}",
                        f"{100 * sum(row['accuracies']) / len(row['accuracies']):.1f}",
                    ]
                    for row in results["tuning"]
                ],
                "How strengths were chosen",
            )
        )
    options = [[name, _shown(value)] for name, value in results["config"].items()]
    parts.append(
        "<details><summary>All options</summary>"
        f"{_table(['option', 'value'], options, 'Options')}</details>"
    )
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str,
    marked: set[int] | frozenset[int] = frozenset(),
) -> str:
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in header)
    body = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in row)
        body.append(f"<tr{' class=best' * (number in marked)}>{cells}</tr>")
    return (
        f"<table>\n<caption>{_text(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        "<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>"
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


def _text(text: str) -> str:
    return html.escape(text)
