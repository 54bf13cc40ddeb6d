"""Summarizes the results of all cells: the content of `results.json`."""

import json
import math
from typing import Any

import numpy as np

from dtnh_jax.finetune.config import identity
from dtnh_jax.finetune.methods import METHODS
from dtnh_jax.finetune.runs.folder import Folder
from dtnh_jax.finetune.runs.preparation import Experiment
from dtnh_jax.finetune.runs.statistics import Estimate, estimate


def summarize(
    experiment: Experiment,
    folder: Folder,
    cells: list[dict[str, Any]],
    strengths: dict[str, float],
    tuning: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """Returns the content of `results.json`.

    Everything except `measured` is a function of the configuration, with or without
    interruptions.
    """
    config = experiment.config
    by_method = {
        name: [cell for cell in cells if cell["method"] == name]
        for name in config.methods
    }
    lines = folder.metrics()
    methods = {}
    for name, ours in by_method.items():
        methods[name] = {
            key: plain(estimate([cell[key] for cell in ours]))
            for key in ("accuracy", "balanced_accuracy")
        }
        of_method = [x for x in lines if x["method"] == name and "cosine" in x]
        if of_method:
            methods[name] |= {
                key: float(np.mean([line[key] for line in of_method]))
                for key in ("cosine", "conflict", "removed")
            }
    return {
        "config": identity(config),
        "strengths": strengths,
        "steps": experiment.steps,
        "source": _name_and_licence(experiment.source),
        "target": _name_and_licence(experiment.target),
        "class_names": list(experiment.target.class_names),
        # Whether seeds draw different training images.
        "draws_training_set": len(experiment.splits.train)
        > (config.train_per_class or 0) * len(experiment.target.class_names),
        "methods": methods,
        "differences": differences(by_method),
        "tuning": tuning,
        "cells": [
            {key: value for key, value in cell.items() if key != "seconds"}
            for cell in cells
        ],
        "measured": {
            "mesh": dict(experiment.mesh.shape),
            "machine": json.loads((folder.path / "machine.json").read_text()),
            "seconds": {
                f"{cell['method']}-seed{cell['seed']}": cell["seconds"]
                for cell in cells
            },
        },
    }


def differences(by_method: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns accuracy by seed minus that of the plain sum and of no regularizer."""
    found = []
    for name, cells in by_method.items():
        for other in (METHODS[name].plain, METHODS[name].baseline):
            if other not in by_method or other == name or name == "scratch":
                continue
            each = [
                ours["accuracy"] - theirs["accuracy"]
                for ours, theirs in zip(cells, by_method[other], strict=True)
            ]
            found.append(
                {
                    "method": name,
                    "minus": other,
                    "by_seed": each,
                    "accuracy": plain(estimate(each)),
                }
            )
    return found


def plain(numbers: Estimate) -> dict[str, float | None]:
    """Returns an estimate for JSON, with None in place of NaN."""
    return {
        key: None if math.isnan(value) else value
        for key, value in numbers._asdict().items()
    }


def _name_and_licence(described: Any) -> dict[str, str]:
    return {"name": described.name, "licence": described.licence}
