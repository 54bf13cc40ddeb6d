"""What each rule comes to, on cells that all rules of a table have."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dtnh_jax.finetune.reports.results import plain
from dtnh_jax.finetune.runs.statistics import estimate
from dtnh_jax.studies.matrix.cells import Records
from dtnh_jax.studies.matrix.significance import surely_below

Row = dict[str, Any]
WHERE = ("source", "target", "regularizer", "optimizer")


def tables(optimizer: str, rows: Sequence[Row], records: Records) -> list[Row]:
    """One table for every set of cells that a rule has, with all rules that have it.

    So numbers in one table are of the same cells, and can be compared. Rows are those
    of one optimizer and of one kind of network.
    """
    cells_of = {
        rule: {_place_of(row, each) for row in members for each in row["strengths"]}
        for rule, members in grouped((row["rule"], row) for row in rows)
    }
    found = []
    for cells in sorted(
        {frozenset(cells) for cells in cells_of.values()},
        key=lambda cells: (-len(cells), sorted(cells)),
    ):
        members = [rule for rule, theirs in cells_of.items() if cells <= theirs]
        pairs = {cell[:2] for cell in cells}
        found.append(
            {
                "optimizer": optimizer,
                "cells": len(cells),
                "pairs": sorted(" > ".join(pair) for pair in pairs),
                "regularizers": sorted({cell[2] for cell in cells}),
                "strengths": sorted({cell[-1] for cell in cells}),
                "rules": [_rule(rule, rows, cells, records) for rule in members],
                "sweeps": [
                    sweep for rule in members for sweep in _sweeps(rule, rows, cells)
                ],
            }
        )
    return found


def _place_of(row: Row, each: Row) -> tuple[Any, ...]:
    """Names a row's cell without its rule."""
    return (*(row[name] for name in WHERE), each["strength"])


def _rule(
    rule: str, rows: Sequence[Row], cells: frozenset[Any], records: Records
) -> Row:
    """What a rule comes to on some cells."""
    kept = []
    for row in rows:
        strengths = [x for x in row["strengths"] if _place_of(row, x) in cells]
        if row["rule"] == rule and strengths:
            kept.append({**row, "strengths": strengths, **ends(strengths)})
    each = [strength for row in kept for strength in row["strengths"]]
    ours = [
        record
        for cell, record in records.items()
        if cell.rule == rule
        and (*(getattr(cell, name) for name in WHERE), cell.strength) in cells
    ]
    strongest = max(strength["strength"] for strength in each)
    worst = min((row["worst"] for row in kept), key=lambda end: end["mean"])
    return {
        "rule": rule,
        "seeds": min(len(strength["by_seed"]) for strength in each),
        "harmed": sum(strength["is_harmed"] for strength in each),
        "surely_harmed": surely_below([strength["chance"] for strength in each]),
        "helped": sum(strength["is_helped"] for strength in each),
        "mean": _mean_by_seed(each),
        "strongest": _mean_by_seed([x for x in each if x["strength"] == strongest]),
        "worst": worst,
        "chosen": _mean_by_seed([_chosen(row) for row in kept]),
        "cosine": _mean(record["cosine"] for record in ours),
        "conflict": _mean(record["conflict"] for record in ours),
    }


def _chosen(row: Row) -> Row:
    """What a row has at the strength that is chosen on validation images."""
    (found,) = (
        each
        for each in row["strengths"]
        if each["strength"] == row["chosen"]["strength"]
    )
    return found


def _sweeps(rule: str, rows: Sequence[Row], cells: frozenset[Any]) -> list[Row]:
    """Means over pairs, by regularizer and strength."""
    by_place = grouped(
        ((row["regularizer"], each["strength"]), each)
        for row in rows
        for each in row["strengths"]
        if row["rule"] == rule and _place_of(row, each) in cells
    )
    return [
        {
            "rule": rule,
            "regularizer": regularizer,
            "strength": strength,
            **_mean_by_seed(each),
        }
        for (regularizer, strength), each in by_place
    ]


def _mean_by_seed(each: Sequence[Row]) -> dict[str, Any]:
    """Mean over cells, with an interval over the seeds that all of the cells have."""
    seeds = set.intersection(*(set(x["by_seed"]) for x in each))
    if not seeds:
        mean = _mean(x["mean"] for x in each)
        return {"mean": mean, "std": None, "low": None, "high": None}
    means = [float(np.mean([x["by_seed"][seed] for x in each])) for seed in seeds]
    return plain(estimate(means))


def ends(strengths: Sequence[Row]) -> dict[str, Row]:
    """The worst strength, and the one that would be chosen on validation images."""
    ends = {
        "worst": min(strengths, key=lambda each: each["mean"]),
        "chosen": max(strengths, key=lambda each: each["validation"]),
    }
    return {
        name: {key: each[key] for key in ("strength", "mean", "low", "high")}
        for name, each in ends.items()
    }


def grouped(items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, list[Any]]]:
    """Values by key, in the order in which keys are first seen."""
    groups: dict[Any, list[Any]] = {}
    for key, value in items:
        groups.setdefault(key, []).append(value)
    return list(groups.items())


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else None
