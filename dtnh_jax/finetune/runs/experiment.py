"""Tunes strengths, then trains and tests every method with every seed."""

from typing import Any

import numpy as np
from rich.console import Console

from dtnh_jax.finetune.methods import METHODS, UNLIMITED, Method
from dtnh_jax.finetune.regularizers import REGULARIZERS
from dtnh_jax.finetune.runs.cells import Cell, run_cells
from dtnh_jax.finetune.runs.folder import Folder
from dtnh_jax.finetune.runs.preparation import Experiment


def tune(
    experiment: Experiment, folder: Folder, console: Console
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Chooses strengths by the mean validation accuracy over seeds.

    Each regularizer is tuned as a plain sum. Its resolved forms get the same strength,
    so that a pair of methods differs only by the rule. Ties go to the smaller strength.

    Returns:
      Strengths by regularizer, and the table of their accuracies, whose first row is
      fine-tuning without a regularizer.
    """
    config = experiment.config
    open_names = [name for name in config.regularizers if name not in config.strength]
    candidates = [("fine-tuning", 0.0)] + [
        (name, strength) for name in open_names for strength in REGULARIZERS[name].grid
    ]
    cells = [
        Cell(METHODS[name], seed, strength, is_tuning=True)
        for seed in range(config.tuning_seeds or config.seeds)
        for name, strength in candidates
    ]
    results = run_cells(
        experiment,
        folder.of_tuning(),
        cells,
        experiment.validation_set,
        console,
        "tuning",
    )
    table = [
        {
            "method": name,
            "strength": strength,
            "accuracies": [
                result["accuracy"]
                for result in results
                if (result["method"], result["strength"]) == (name, strength)
            ],
        }
        for name, strength in candidates
    ]
    strengths = dict(config.strengths)
    for name in open_names:
        rows = [row for row in table if row["method"] == name]
        best = max(rows, key=lambda row: np.mean(row["accuracies"]))
        strengths[name] = best["strength"]
    return strengths, table


def test(
    experiment: Experiment,
    folder: Folder,
    strengths: dict[str, float],
    console: Console,
) -> list[dict[str, Any]]:
    """Trains every method with every seed, and tests each once at its end."""
    methods = [METHODS[name] for name in experiment.config.methods]
    cells = [
        Cell(method, seed, _strength(method, strengths))
        for seed in range(experiment.config.seeds)
        for method in methods
    ]
    return run_cells(experiment, folder, cells, experiment.test_set, console, "all")


def _strength(method: Method, strengths: dict[str, float]) -> float:
    if method.regularizer is None:
        return 0.0
    if method.never_hurts:  # only its trust matters
        return UNLIMITED * REGULARIZERS[method.regularizer].strength
    return strengths[method.regularizer]
