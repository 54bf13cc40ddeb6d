"""Writes `report.md`, figures and tables from results."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dtnh_jax import plots
from dtnh_jax.finetune import files
from dtnh_jax.finetune.data import loading
from dtnh_jax.finetune.methods import METHODS
from dtnh_jax.finetune.reports.results import plain
from dtnh_jax.finetune.runs.folder import Folder
from dtnh_jax.finetune.runs.preparation import Experiment
from dtnh_jax.finetune.runs.statistics import estimate
from dtnh_jax.finetune.wording import markdown

_PHOTOGRAPHS = 12


def introduction(experiment: Experiment, folder: Folder) -> list[str]:
    """Returns lines on the sources, sizes and licences of a run."""
    config = experiment.config
    trainings = f"{len(config.methods)} methods x {config.seeds} seeds"
    classes = len(experiment.target.class_names)
    original = len(experiment.variables["params"]["head"]["bias"])
    return [
        f"Source {experiment.source.name}: {experiment.source.licence}",
        f"Target {experiment.target.name}: {experiment.target.licence}",
        *experiment.target.notes,
        f"Head: the source's, of {original} classes, is replaced by one of {classes}",
        f"Pictures of each class: {config.train_per_class} for training, "
        f"{config.validation_per_class} for validation, {config.test_per_class} for "
        "the test",
        f"{trainings} of {experiment.steps} steps; folder {folder.path}",
    ]


def write(experiment: Experiment, folder: Folder, results: dict[str, Any]) -> None:
    """Writes the figures, the report, and then the results."""
    cells = results["cells"]
    accuracies = {
        name: [cell["accuracy"] for cell in cells if cell["method"] == name]
        for name in results["methods"]
    }
    intervals = {
        name: (numbers["accuracy"]["low"], numbers["accuracy"]["high"])
        for name, numbers in results["methods"].items()
        if numbers["accuracy"]["low"] is not None
    }
    figures = {"accuracy.png": plots.accuracy_by_method(accuracies, intervals)}
    lines = folder.metrics()
    if any("cosine" in line for line in lines):
        figures["conflict.png"] = plots.conflict_over_steps(lines)
    figures["predictions.png"] = _photographs(experiment, cells)
    for name, figure in figures.items():
        files.write_figure(folder.path / name, figure)
    files.write(folder.path / "report.md", _markdown(experiment, results, figures))
    files.write_json(folder.path / "results.json", results)


def _photographs(experiment: Experiment, cells: list[dict[str, Any]]) -> Any:
    """Plots the first test photographs of each class, with seed 0's predictions."""
    splits, target = experiment.splits, experiment.target
    labels = target.labels[splits.test]
    classes = len(target.class_names)
    each = max(_PHOTOGRAPHS // classes, 1)
    chosen = np.concatenate(
        [np.flatnonzero(labels == label)[:each] for label in range(classes)]
    )[:_PHOTOGRAPHS]
    shown = loading.materialize(target, splits.test[chosen], 150)
    predictions = {
        cell["method"]: [cell["predictions"][i] for i in chosen]
        for cell in cells
        if cell["seed"] == 0
    }
    return plots.prediction_grid(
        shown.images, shown.labels.tolist(), predictions, target.class_names
    )


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the header of the table and a row for every method."""
    several = results["config"]["seeds"] > 1
    header = ["method", "strength", "accuracy"]
    is_even = all(
        math.isclose(cell["accuracy"], cell["balanced_accuracy"])
        for cell in results["cells"]
    )
    header += [] if is_even else ["balanced"]
    header += ["vs plain sum", "vs no regularizer", "cosine", "in conflict"]
    found = {(d["method"], d["minus"]): d["accuracy"] for d in results["differences"]}
    body = []
    for name, numbers in results["methods"].items():
        method = METHODS[name]
        row = [name]
        trusts = [
            format(cell["trust"], "g")
            for cell in results["cells"]
            if "trust" in cell and cell["method"] == name
        ]
        if trusts:
            row.append(f"trust {', '.join(trusts)}")
        elif method.regularizer:
            row.append(f"{results['strengths'][method.regularizer]:g}")
        else:
            row.append("")
        keys = ["accuracy"] if is_even else ["accuracy", "balanced_accuracy"]
        row += [_level(numbers[key], several) for key in keys]
        row.append(_difference(found.get((name, method.plain))))
        row.append(_difference(found.get((name, method.baseline))))
        if "cosine" in numbers:
            row += [f"{numbers['cosine']:+.3f}", f"{100 * numbers['conflict']:.0f}%"]
        else:
            row += ["", ""]
        body.append(row)
    return header, body


def _level(numbers: dict[str, float | None], several: bool) -> str:
    mean = f"{100 * (numbers['mean'] or 0.0):.1f}"
    return f"{mean} ± {100 * (numbers['std'] or 0.0):.1f}" if several else mean


def _difference(numbers: dict[str, float | None] | None) -> str:
    if numbers is None:
        return ""
    mean = f"{100 * (numbers['mean'] or 0.0):+.1f}"
    if numbers["low"] is None or numbers["high"] is None:
        return mean
    return f"{mean} [{100 * numbers['low']:+.1f}, {100 * numbers['high']:+.1f}]"


def show(console: Console, results: dict[str, Any], folder: pathlib.Path) -> None:
    """Prints the table."""
    header, body = rows(results)
    table = Table(title="Test accuracy (%)")
    for number, title in enumerate(header):
        table.add_column(title, no_wrap=number == 0)
    for row in body:
        table.add_row(*row)
    console.print(table)
    for note in notes(results):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"Report: {folder / 'report.md'}", markup=False, highlight=False, soft_wrap=True
    )


def show_tuning(
    console: Console, tuning: list[dict[str, Any]], strengths: dict[str, float]
) -> None:
    """Prints validation accuracies and the chosen strengths."""
    header, body = _tuning_rows(tuning, strengths)
    table = Table(*header, title="Validation accuracy (%)")
    for row in body:
        table.add_row(*row)
    console.print(table)


def _tuning_rows(
    tuning: list[dict[str, Any]], strengths: dict[str, float]
) -> tuple[list[str], list[list[str]]]:
    body = []
    for row in tuning:
        name, strength = row["method"], row["strength"]
        chosen = strengths.get(name) == strength
        level = _level(plain(estimate(row["accuracies"])), len(row["accuracies"]) > 1)
        label = f"{strength:g}" if name in strengths else ""
        body.append([name, label, level, "chosen" if chosen else ""])
    return ["method", "strength", "accuracy", ""], body


def notes(results: dict[str, Any], shown: Callable[[str], str] = str) -> list[str]:
    """Returns sentences that explain the numbers of the table.

    Args:
      results: content of `results.json`.
      shown: formats names by users.
    """
    config = results["config"]
    seeds, classes = config["seeds"], len(results["class_names"])
    drawn = results.get("draws_training_set", True)  # older results lack it
    differ, share = ("training images, ", "") if drawn else ("", "training images and ")
    sentences = [
        f"Mean and standard deviation over {seeds} seeds; differences are paired by "
        "seed, with the 95% t-interval of their mean, in percentage points. "
        f"Seeds differ in {differ}head, order and dropout, and share the {share}test "
        "set."
        if seeds > 1
        else "One seed, without an interval.",
        f"Test set: {config['test_per_class'] * classes} photographs, "
        f"{config['test_per_class']} of each class, so balanced accuracy equals "
        f"accuracy. Training: {config['train_per_class'] * classes} photographs at "
        f"{config['image_size']} pixels, {results['steps']} steps of "
        f"{config['batch_size']} with {config['optimizer']}, scope {config['scope']}.",
        "Cosine and share in conflict are means over training.",
        *_trusts(results["cells"]),
    ]
    for kind in ("source", "target"):
        sentences.append(
            f"{kind.capitalize()} {shown(results[kind]['name'])}: "
            f"{results[kind]['licence']}"
        )
    return sentences


def _trusts(cells: list[dict[str, Any]]) -> list[str]:
    """Returns a sentence for each regularizer's trust and the cost of its choice."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if "trust" in cell:
            found.setdefault(cell["method"], []).append(cell)
    return [
        f"{method}: cross-validation on the training photographs chose the trust "
        f"{', '.join(format(cell['trust'], 'g') for cell in ours)} (by seed), in "
        f"{', '.join(str(cell['trainings']) for cell in ours)} trainings. The last "
        "training is on all photographs."
        for method, ours in found.items()
    ]


def _markdown(
    experiment: Experiment, results: dict[str, Any], figures: dict[str, Any]
) -> str:
    measured = results["measured"]
    machine = measured["machine"]
    seconds = sum(measured["seconds"].values())
    captions = {
        "accuracy.png": "Accuracy by method",
        "conflict.png": "Do the gradients of loss and regularizer agree?",
        "predictions.png": "Test photographs and what seed 0 took them for",
    }
    parts = [
        f"# {markdown(experiment.source.name)} on {markdown(experiment.target.name)}",
        _markdown_table(*rows(results)),
        *notes(results, markdown),
        f"Measured on {machine['date']}, {machine['device']} with "
        f"{machine['cpu_count']} cores, {machine['platform']}, Python "
        f"{machine['python']}, jax {machine['jax']}; training and testing took "
        f"{seconds / 60:.1f} minutes, compilation included.",
    ]
    for name in figures:
        parts += [f"## {captions[name]}", f"![{captions[name]}]({name})"]
    if results["tuning"]:
        tuning = _tuning_rows(results["tuning"], results["strengths"])
        parts += ["## Strengths, chosen by validation accuracy"]
        parts += [_markdown_table(*tuning)]
    options = json.dumps(results["config"], indent=1)
    parts += ["## Options", f"```json\n{options}\n```"]
    return "\n\n".join(parts) + "\n"


def _markdown_table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
