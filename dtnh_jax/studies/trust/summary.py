"""Summarizes the results of all cells: the content of `results.json`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtnh_jax.studies.trust import noninferiority
from dtnh_jax.studies.trust.choice import RACED, best_in_hindsight, outcome_of
from dtnh_jax.studies.trust.measure import AXES

HELP = 2.0  # gain of the best strength, in points, from which a cell counts as helpful


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the cells with their differences, and a row for every method.

    Args:
      results: results of cells, including those without a regularizer.

    Returns:
      `cells`: for each pair, optimizer and regularizer, the gain of the best strength
      and the result of every method, as differences from plain fine-tuning by seed, in
      points. `methods`: for each method, the share of the help that it keeps; its mean
      and lowest difference in the cells without help; and the tests for harm.
    """
    alone = {
        (each["pair"], each["optimizer"]): each["methods"]
        for each in results
        if each["regularizer"] is None
    }
    cells = []
    for each in results:
        others = alone.get((each["pair"], each["optimizer"]))
        if each["regularizer"] is None or others is None:
            continue
        methods = {k: v for k, v in others.items() if k != "plain"} | each["methods"]
        methods |= dict.fromkeys([*RACED, "trust-one-fold"], methods["trust"])
        plain = others["plain"]
        start = {axis: np.array(plain[axis][0]) for axis in AXES}
        found = {}
        for name, numbers in methods.items():
            outcome = outcome_of(name, plain, numbers)
            found[name] = {
                axis: (outcome.axes[axis] - start[axis]).round(4).tolist()
                for axis in AXES
            } | {"values": outcome.values, "trainings": outcome.trainings.tolist()}
        cells.append(
            {
                **{key: each[key] for key in ("pair", "optimizer", "regularizer")},
                "seeds": each["seeds"],
                "plain": {axis: float(np.mean(x)) for axis, x in start.items()},
                "best": best_in_hindsight(plain, each["methods"]["sum"]),
                "by_value": {
                    name: {
                        "values": methods[name]["values"],
                        "target": (np.array(methods[name]["target"]) - start["target"])
                        .mean(axis=1)
                        .round(3)
                        .tolist(),
                    }
                    for name in ("sum", "trust")
                },
                "methods": found,
            }
        )
    names = dict.fromkeys(name for cell in cells for name in cell["methods"])
    return {"cells": cells, "methods": {name: _row(cells, name) for name in names}}


def _row(cells: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Summarizes a method over all cells."""
    cells = [cell for cell in cells if name in cell["methods"]]

    def means(axis: str, chosen: list[dict[str, Any]]) -> list[float]:
        return [float(np.mean(cell["methods"][name][axis])) for cell in chosen]

    helped = [cell for cell in cells if cell["best"] >= HELP]
    others = [cell for cell in cells if cell["best"] < HELP]
    pairs = {}
    for pair in dict.fromkeys(cell["pair"] for cell in cells):
        ours = [c["methods"][name]["target"] for c in cells if c["pair"] == pair]
        tested = noninferiority.bound(np.mean(ours, axis=0), noninferiority.PAIR_MARGIN)
        pairs[pair] = {**tested._asdict(), "is_shown": tested.is_shown}
    # Every pair has other seeds, so pool them pair by pair.
    pooled = np.concatenate(
        [
            np.mean(
                [c["methods"][name]["target"] for c in cells if c["pair"] == pair],
                axis=0,
            )
            for pair in pairs
        ]
    )
    tested = noninferiority.bound(pooled, noninferiority.ALL_MARGIN)
    possible = sum(cell["best"] for cell in helped)
    return {
        "cells": len(cells),
        "help_kept": sum(means("target", helped)) / possible if possible else None,
        "cells_with_help": len(helped),
        "elsewhere": float(np.mean(means("target", others))) if others else None,
        "lowest": min(means("target", cells)),
        "lowest_cell": min(zip(means("target", cells), range(len(cells))))[1],
        **{axis: float(np.mean(means(axis, cells))) for axis in AXES},
        "trainings": float(
            np.mean([np.mean(cell["methods"][name]["trainings"]) for cell in cells])
        ),
        "pairs": pairs,
        "all_pairs": {**tested._asdict(), "is_shown": tested.is_shown},
    }
