"""Writes rows as a file of results, a picture and tables."""

import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dtnh_jax import plots
from dtnh_jax.finetune import files
from dtnh_jax.finetune.runs.machine import machine

_HEADER = (
    "group",
    "of",
    "what",
    "median",
    "middle half",
    "against",
    "ratio",
    "middle half",
    "target",
    "met",
)
_MET = {None: "", True: "yes", False: "no"}


def described_machine(others: Mapping[str, str]) -> dict[str, Any]:
    """Returns a description of the machine: cores, memory and versions."""
    found = machine()
    if hasattr(os, "sched_getaffinity"):
        found["usable_cores"] = len(os.sched_getaffinity(0))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory_gib"] = round(total / 2**30, 1)
    for name in ("jaxlib", "flax", "optax"):
        found[name] = importlib.metadata.version(name)
    return {**found, **others}


def write(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes the results, and draws them.

    Args:
      path: path of the JSON file. The picture and the table are written beside it, with
        the suffixes `.png` and `.md`.
      results: `machine`, `options` and `rows`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, results)
    draw(path, results)


def draw(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes the table of the results, and a picture of rows with a target."""
    rows = results["rows"]
    compared = [row for row in rows if row["ratio"] is not None]
    # Rows without a target would make the picture too long.
    aimed = [row for row in compared if row["target"] is not None] or compared
    if aimed:
        figure = plots.benchmark_ratios(aimed)
        files.write_figure(path.with_suffix(".png"), figure)
    lines = [_HEADER, ["---"] * len(_HEADER), *map(cells, rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    files.write(path.with_suffix(".md"), f"{on_machine(results)}\n\n{table}\n")


def read(path: pathlib.Path) -> dict[str, Any]:
    """Reads a file of `write`.

    Raises:
      ValueError: the file is missing, or of another kind.
    """
    try:
        results = json.loads(path.read_text())
        if not {"machine", "options", "rows"} <= results.keys():
            raise ValueError("it has no `machine`, `options` and `rows`")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds no benchmarks: {error}.") from error
    return results


def show(console: Console, results: dict[str, Any]) -> None:
    """Prints the table."""
    table = Table(title=on_machine(results), title_justify="left")
    for heading in _HEADER:
        table.add_column(heading)
    before = None
    for row in results["rows"]:
        if before not in (None, row["group"]):
            table.add_section()
        before = row["group"]
        table.add_row(*cells(row))
    console.print(table)


def on_machine(results: dict[str, Any]) -> str:
    """Returns a line on the machine."""
    return ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in results["machine"].items()
    )


def cells(row: Mapping[str, Any]) -> Sequence[str]:
    """Returns the cells of a row of the table.

    Example:
      >>> value = {"value": 12.34, "value_low": 12.0, "value_high": 13.0, "unit": "ms"}
      >>> row = {"group": "steps", "subject": "net", "name": "plain", "ratio": None}
      >>> goal = {"against": None, "target": None, "is_met": None}
      >>> cells({**row, **value, **goal})[2:5]
      ['plain', '12.3 ms', '12 to 13']
    """
    found = [row["group"], row["subject"], row["name"]]
    found += [f"{row['value']:.3g} {row['unit']}"]
    found += [f"{row['value_low']:.3g} to {row['value_high']:.3g}"]
    if row["ratio"] is None:
        return [*found, "", "", "", "", ""]
    found += [row["against"], f"{row['ratio']:.2f}"]
    found += [f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"]
    target = "" if row["target"] is None else f"{row['target']:g}"
    return [*found, target, _MET[row["is_met"]]]
