"""From the records of cells to what `results.json` holds."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from scipy import special

from dtnh_jax.finetune.results import plain
from dtnh_jax.finetune.statistics import estimate
from dtnh_jax.matrix.cells import ALONE, SCRATCH, Cell, Records
from dtnh_jax.matrix.photographs import TARGETS as PHOTOGRAPHS
from dtnh_jax.matrix.records import seconds
from dtnh_jax.matrix.rules import RULES

Split = Literal["validation", "test"]
Row = dict[str, Any]
_WHERE = ("source", "target", "regularizer", "optimizer")


def summarize(records: Records, split: Split) -> dict[str, Any]:
    """Returns what `results.json` holds, a function of records and split alone.

    All differences are of accuracies, between a cell and plain fine-tuning with the
    same source, target, optimizer, learning rate and seed. A cell without such a
    partner is left out.

    Args:
      records: of any part of a grid.
      split: which accuracy to compare.

    Returns:
      `split`; `cells`, how many; `seconds`, that they took; `pairs`, how fine-tuning
      and training from scratch do; `rows`, the differences of each pair, regularizer,
      optimizer and rule at every strength, with the worst and the best of them;
      `tables`, what each rule comes to on cells that all rules of a table have.
    """
    differences = _differences(records, split)
    rows = [
        _row(where, by_strength)
        for where, by_strength in grouped(
            (
                (*(getattr(cell, name) for name in _WHERE), cell.rule),
                (cell.strength, cell.seed, value),
            )
            for cell, value in differences.items()
            if cell.regularizer != ALONE
        )
    ]
    rows.sort(key=lambda row: _place(row["rule"]))
    return {
        "split": split,
        "cells": len(records),
        "seconds": seconds(records),
        "pairs": _pairs(records, differences, split),
        "rows": rows,
        "tables": [
            table
            for (optimizer, _), members in grouped(
                ((row["optimizer"], row["target"] in PHOTOGRAPHS), row) for row in rows
            )
            for table in _tables(optimizer, members, records)
        ],
    }


def _differences(records: Records, split: Split) -> dict[Cell, float]:
    """Accuracy minus that of plain fine-tuning, by cell."""
    found = {}
    for cell, record in records.items():
        partner = cell._replace(regularizer=ALONE, strength=0.0, rule=ALONE)
        if cell != partner and partner in records:
            found[cell] = record[split] - records[partner][split]
    return found


def _row(where: Sequence[str], members: Sequence[tuple[float, int, float]]) -> Row:
    """The differences of a rule on one pair, by strength."""
    by_strength = grouped((strength, rest) for strength, *rest in members)
    strengths = []
    for strength, found in sorted(by_strength, key=lambda group: group[0]):
        by_seed = dict(sorted(map(tuple, found)))
        numbers = plain(estimate([*by_seed.values()]))
        strengths.append(
            {
                "strength": strength,
                "by_seed": by_seed,
                **numbers,
                "chance": chance_of_harm([*by_seed.values()]),
                "is_harmed": numbers["high"] is not None and numbers["high"] < 0,
                "is_helped": numbers["low"] is not None and numbers["low"] > 0,
            }
        )
    return {
        **dict(zip((*_WHERE, "rule"), where, strict=True)),
        "strengths": strengths,
        **_ends(strengths),
    }


def _ends(strengths: Sequence[Row]) -> dict[str, Row]:
    """The worst and the best strength."""
    ends = {
        "worst": min(strengths, key=lambda each: each["mean"]),
        "best": max(strengths, key=lambda each: each["mean"]),
    }
    return {
        name: {key: each[key] for key in ("strength", "mean", "low", "high")}
        for name, each in ends.items()
    }


def chance_of_harm(values: Sequence[float]) -> float | None:
    """How likely differences as low as these are if nothing makes a difference.

    Args:
      values: paired differences, one for each seed.

    Returns:
      The one-sided p-value of the paired t-test; None for a single seed.

    Example:
      >>> print(round(chance_of_harm([-0.01, -0.02, -0.03]), 3))
      0.037
    """
    if len(values) < 2:
        return None
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    if spread == 0:
        return 0.5 if mean == 0 else float(mean > 0)
    return float(special.stdtr(len(values) - 1, mean / spread * math.sqrt(len(values))))


def surely_below(chances: Sequence[float | None], level: float = 0.025) -> int:
    """How many of many tests hold with the chance of one mistake in all at `level`.

    Example:
      >>> surely_below([0.001, 0.02, 0.5])
      1

    References:
      Holm, 1979, "A simple sequentially rejective multiple test procedure",
      https://www.jstor.org/stable/4615733
    """
    known = sorted(chance for chance in chances if chance is not None)
    for rank, chance in enumerate(known):
        if chance > level / (len(known) - rank):
            return rank
    return len(known)


def _tables(optimizer: str, rows: Sequence[Row], records: Records) -> list[Row]:
    """One table for every set of cells that a rule has, with all rules that have it.

    So numbers in one table are of the same cells, and can be compared. Rows are those
    of one optimizer and of one kind of network.
    """
    cells_of = {
        rule: {_place_of(row, each) for row in members for each in row["strengths"]}
        for rule, members in grouped((row["rule"], row) for row in rows)
    }
    tables = []
    for cells in sorted(
        {frozenset(cells) for cells in cells_of.values()},
        key=lambda cells: (-len(cells), sorted(cells)),
    ):
        members = [rule for rule, theirs in cells_of.items() if cells <= theirs]
        pairs = {cell[:2] for cell in cells}
        tables.append(
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
    return tables


def _place_of(row: Row, each: Row) -> tuple[Any, ...]:
    """Names a row's cell without its rule."""
    return (*(row[name] for name in _WHERE), each["strength"])


def _rule(
    rule: str, rows: Sequence[Row], cells: frozenset[Any], records: Records
) -> Row:
    """What a rule comes to on some cells."""
    kept = []
    for row in rows:
        strengths = [x for x in row["strengths"] if _place_of(row, x) in cells]
        if row["rule"] == rule and strengths:
            kept.append({**row, "strengths": strengths, **_ends(strengths)})
    each = [strength for row in kept for strength in row["strengths"]]
    ours = [
        record
        for cell, record in records.items()
        if cell.rule == rule
        and (*(getattr(cell, name) for name in _WHERE), cell.strength) in cells
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
        "mean_best": _mean(row["best"]["mean"] for row in kept),
        "cosine": _mean(record["cosine"] for record in ours),
        "conflict": _mean(record["conflict"] for record in ours),
    }


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


def _pairs(
    records: Records, differences: dict[Cell, float], split: Split
) -> list[dict[str, Any]]:
    """How plain fine-tuning does, at the learning rate that the other cells have."""
    others = [cell for cell in records if (cell.regularizer, cell.rule) != (ALONE,) * 2]
    found = []
    for where, _ in grouped(
        ((cell.source, cell.target, cell.optimizer, cell.learning_rate), cell)
        for cell in others
    ):

        def ours(rule: str, where: Sequence[Any] = where) -> list[Cell]:
            source, target, optimizer, rate = where
            head = Cell(source, target, ALONE, 0.0, rule, optimizer, 0, rate)
            return [cell for cell in records if cell._replace(seed=0) == head]

        def level(cells: list[Cell]) -> Any:
            values = [records[cell][split] for cell in cells]
            return plain(estimate(values)) if values else None

        transfer = [-differences[x] for x in ours(SCRATCH) if x in differences]
        names = ("source", "target", "optimizer", "learning_rate")
        found.append(
            {
                **dict(zip(names, where)),
                "fine_tuning": level(ours(ALONE)),
                "scratch": level(ours(SCRATCH)),
                "fine_tuning_minus_scratch": (
                    plain(estimate(transfer)) if transfer else None
                ),
            }
        )
    return found


def grouped(items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, list[Any]]]:
    """Values by key, in the order in which keys are first seen."""
    groups: dict[Any, list[Any]] = {}
    for key, value in items:
        groups.setdefault(key, []).append(value)
    return list(groups.items())


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else None


def _place(rule: str) -> int:
    """Where a rule stands in tables; one that is no longer known comes last."""
    return [*RULES, rule].index(rule)
