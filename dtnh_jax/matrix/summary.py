"""From the records of cells to what `results.json` holds."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from dtnh_jax.finetune.results import plain
from dtnh_jax.finetune.statistics import estimate
from dtnh_jax.matrix.cells import ALONE, SCRATCH, Cell, Records
from dtnh_jax.matrix.rules import RULES

Split = Literal["validation", "test"]
Row = dict[str, Any]


def summarize(records: Records, split: Split) -> dict[str, Any]:
    """Returns what `results.json` holds, a function of records and split alone.

    All differences are of accuracies, between a cell and plain fine-tuning with the
    same source, target, optimizer, learning rate and seed. A cell without such a
    partner is left out.

    Args:
      records: of any part of a grid.
      split: which accuracy to compare.

    Returns:
      `split`; `pairs`, how fine-tuning and training from scratch do; `rows`, the
      differences of each pair, regularizer, optimizer and rule at every strength, with
      the worst and the best of them; `rules`, what each rule comes to.
    """
    differences = _differences(records, split)
    rows = [
        _row(where, by_strength)
        for where, by_strength in _grouped(
            (
                (
                    cell.source,
                    cell.target,
                    cell.regularizer,
                    cell.optimizer,
                    cell.rule,
                ),
                (cell.strength, value),
            )
            for cell, value in differences.items()
            if cell.regularizer != ALONE
        )
    ]
    return {
        "split": split,
        "cells": len(records),
        "pairs": _pairs(records, differences, split),
        "rows": rows,
        "rules": [
            _rule(rule, optimizer, members, records)
            for (rule, optimizer), members in _grouped(
                ((row["rule"], row["optimizer"]), row)
                for row in sorted(rows, key=lambda row: _place(row["rule"]))
            )
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


def _row(where: Sequence[str], members: Sequence[tuple[float, float]]) -> Row:
    """The differences of a rule on one pair, by strength."""
    strengths = [
        {"strength": strength, "by_seed": values, **plain(estimate(values))}
        for strength, values in sorted(_grouped(members), key=lambda group: group[0])
    ]
    for each in strengths:
        each["is_harmed"] = each["high"] is not None and each["high"] < 0
    names = ("source", "target", "regularizer", "optimizer", "rule")
    ends = {
        "worst": min(strengths, key=lambda each: each["mean"]),
        "best": max(strengths, key=lambda each: each["mean"]),
    }
    return {
        **dict(zip(names, where, strict=True)),
        "strengths": strengths,
        **{
            name: {key: each[key] for key in ("strength", "mean", "low", "high")}
            for name, each in ends.items()
        },
    }


def _rule(rule: str, optimizer: str, rows: Sequence[Row], records: Records) -> Row:
    """What a rule comes to, over all pairs, regularizers and strengths."""
    each = [strength for row in rows for strength in row["strengths"]]
    ours = [
        record
        for cell, record in records.items()
        if (cell.rule, cell.optimizer) == (rule, optimizer)
    ]
    harmed = sum(strength["is_harmed"] for strength in each)
    return {
        "rule": rule,
        "optimizer": optimizer,
        "cells": len(each),
        "fewest_seeds": min(len(strength["by_seed"]) for strength in each),
        "harmed": harmed,
        "harm_rate": harmed / len(each),
        "mean": _mean(strength["mean"] for strength in each),
        "mean_worst": _mean(row["worst"]["mean"] for row in rows),
        "worst": min(row["worst"]["mean"] for row in rows),
        "mean_best": _mean(row["best"]["mean"] for row in rows),
        "cosine": _mean(record["cosine"] for record in ours),
        "conflict": _mean(record["conflict"] for record in ours),
    }


def _pairs(
    records: Records, differences: dict[Cell, float], split: Split
) -> list[dict[str, Any]]:
    """How plain fine-tuning does, at the learning rate that the other cells have."""
    others = [cell for cell in records if (cell.regularizer, cell.rule) != (ALONE,) * 2]
    found = []
    for where, _ in _grouped(
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


def _grouped(items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, list[Any]]]:
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
