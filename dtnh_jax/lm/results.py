"""Summarizes the results of all cells: the content of `results.json`."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dtnh_jax.finetune.runs.statistics import Estimate, estimate
from dtnh_jax.lm import paths
from dtnh_jax.lm.config import Config, identity
from dtnh_jax.lm.methods import KL, LORA, METHODS, WISE_FT

LOSSES = ("target_loss", "kept_loss", "target_kl", "kept_kl")
COSTS = ("step_seconds", "temporary_bytes")
CURVES = (WISE_FT, KL)  # whose paths every row is compared with

Cell = dict[str, Any]


def summarize(
    config: Config,
    described: dict[str, Any],
    base: dict[str, float],
    cells: Sequence[Cell],
    path: pathlib.Path,
) -> dict[str, Any]:
    """Returns the content of `results.json`.

    Args:
      config: of the run.
      described: what it was made of; see `experiment.described`.
      base: what the base model measures.
      cells: results of all cells.
      path: of the run folder, for what it was measured on.
    """
    rows = []
    for name in config.methods:
        for strength in config.strengths_of(name):
            ours = _of(cells, name, strength)
            rows.append(_row(name, strength, ours, base, cells))
    return {
        "config": identity(config),
        **described,
        "base": base,
        "rows": rows,
        "at_shares": _plain_all(paths.at_shares(config.methods, base, cells)),
        "costs": _costs(config, cells),
        "cells": list(cells),
        "machine": json.loads((path / "machine.json").read_text()),
    }


def _row(
    name: str,
    strength: float,
    ours: Sequence[Cell],
    base: dict[str, float],
    cells: Sequence[Cell],
) -> dict[str, Any]:
    """What is said of a method at a strength."""
    row: dict[str, Any] = {
        "method": name,
        "strength": strength if METHODS[name].strengths != (0.0,) else None,
    }
    for key in LOSSES:
        row[key] = _plain(estimate([cell[key] for cell in ours]))
    forgotten = [cell["kept_loss"] - base["kept_loss"] for cell in ours]
    row["forgotten"] = _plain(estimate(forgotten))
    for curve in CURVES:
        each = [paths.above(curve, cell, base, cells) for cell in ours]
        known = [x for x in each if x is not None]
        complete = len(known) == len(each) and name not in (curve, LORA)
        row[f"above_{curve}"] = _plain(estimate(known)) if complete else None
    return row


def _of(cells: Sequence[Cell], name: str, strength: float) -> list[Cell]:
    found = [x for x in cells if (x["method"], x["strength"]) == (name, strength)]
    return sorted(found, key=lambda cell: cell["seed"])


def _costs(config: Config, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """The median time and memory of a step, and its ratio to those of other methods."""
    medians: dict[str, dict[str, Any]] = {}
    for name in config.methods:
        if METHODS[name].after is not None:
            continue
        ours = [cell for cell in cells if cell["method"] == name]
        medians[name] = {}
        for key in COSTS:
            known = [cell[key] for cell in ours if cell[key] is not None]
            medians[name][key] = float(np.median(known)) if known else None
    return {
        name: costs
        | {
            f"{key}_to_{other}": _ratio(costs[key], medians.get(other, {}).get(key))
            for key in COSTS
            for other in (LORA, KL)
        }
        for name, costs in medians.items()
    }


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def _plain(numbers: Estimate) -> dict[str, float | None]:
    """An estimate ready for JSON, which has no NaN."""
    return {k: None if np.isnan(x) else float(x) for k, x in numbers._asdict().items()}


def _plain_all(tree: Any) -> Any:
    """The same of all estimates in dictionaries and lists."""
    if isinstance(tree, Estimate):
        return _plain(tree)
    if isinstance(tree, dict):
        return {key: _plain_all(x) for key, x in tree.items()}
    return [_plain_all(x) for x in tree] if isinstance(tree, list) else tree
