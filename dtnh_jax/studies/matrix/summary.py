"""From the records of cells to what `results.json` holds."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dtnh_jax.finetune.reports.results import plain
from dtnh_jax.finetune.runs.statistics import estimate
from dtnh_jax.studies.matrix.catalogue import ALONE, SCRATCH, TARGETS_OF_PHOTOGRAPHS
from dtnh_jax.studies.matrix.cells import Cell, Records
from dtnh_jax.studies.matrix.records import seconds
from dtnh_jax.studies.matrix.rules import RULES
from dtnh_jax.studies.matrix.significance import chance_of_harm
from dtnh_jax.studies.matrix.tables import WHERE, Row, ends, grouped, tables

Split = Literal["validation", "test"]


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
      optimizer and rule at every strength, with the worst of them, and the one of the
      best validation accuracy;
      `tables`, what each rule comes to on cells that all rules of a table have.
    """
    differences = _differences(records, split)
    validated = _differences(records, "validation")
    rows = [
        _row(where, by_strength)
        for where, by_strength in grouped(
            (
                (*(getattr(cell, name) for name in WHERE), cell.rule),
                (cell.strength, cell.seed, value, validated[cell]),
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
                ((row["optimizer"], row["target"] in TARGETS_OF_PHOTOGRAPHS), row)
                for row in rows
            )
            for table in tables(optimizer, members, records)
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


def _row(
    where: Sequence[str], members: Sequence[tuple[float, int, float, float]]
) -> Row:
    """The differences of a rule on one pair, by strength."""
    by_strength = grouped((strength, rest) for strength, *rest in members)
    strengths = []
    for strength, found in sorted(by_strength, key=lambda group: group[0]):
        by_seed = dict(sorted((seed, value) for seed, value, _ in found))
        numbers = plain(estimate([*by_seed.values()]))
        strengths.append(
            {
                "strength": strength,
                "by_seed": by_seed,
                "validation": float(np.mean([validated for *_, validated in found])),
                **numbers,
                "chance": chance_of_harm([*by_seed.values()]),
                "is_harmed": numbers["high"] is not None and numbers["high"] < 0,
                "is_helped": numbers["low"] is not None and numbers["low"] > 0,
            }
        )
    return {
        **dict(zip((*WHERE, "rule"), where, strict=True)),
        "strengths": strengths,
        **ends(strengths),
    }


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


def _place(rule: str) -> int:
    """Where a rule stands in tables; one that is no longer known comes last."""
    return [*RULES, rule].index(rule)
