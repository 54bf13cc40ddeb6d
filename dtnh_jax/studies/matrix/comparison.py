"""The paper's comparison: a regularizer against the same one without conflicts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dtnh_jax.finetune.reports.results import plain
from dtnh_jax.finetune.runs.statistics import estimate
from dtnh_jax.studies.matrix.catalogue import ALONE
from dtnh_jax.studies.matrix.cells import Cell, Records
from dtnh_jax.studies.matrix.summary import Split
from dtnh_jax.studies.matrix.tables import grouped

SUM = "sum"  # the rule that adds the two gradients


def compare(records: Records, rules: Sequence[str], split: Split) -> dict[str, Any]:
    """Each rule against the plain sum, at the strength that suits the plain sum best.

    That strength has the best validation accuracy of the plain sum, mean over seeds,
    of equal ones the smallest: as in the paper, a regularizer is tuned first, and its
    resolved form gets the same strength.

    Args:
      records: of any part of a grid.
      rules: to compare with the plain sum.
      split: which accuracy to compare.

    Returns:
      `rows`, one for each source, target, regularizer and optimizer, with the
      accuracies of fine-tuning, of the sum and of the rules, and the rules' paired
      differences to the sum; `totals`, by rule: on how many of the rows it is better,
      equal and worse, and on how many with an interval that does not hold 0.
    """
    rows = []
    for where, members in grouped(
        ((cell.source, cell.target, cell.regularizer, cell.optimizer), cell)
        for cell in records
        if cell.rule == SUM
    ):
        by_strength = sorted(grouped((cell.strength, cell) for cell in members))
        strength, cells = max(
            by_strength,
            key=lambda group: np.mean([records[x]["validation"] for x in group[1]]),
        )
        names = ("source", "target", "regularizer", "optimizer")
        row = {**dict(zip(names, where)), "strength": strength, "rules": {}}
        alone = [x._replace(regularizer=ALONE, strength=0.0, rule=ALONE) for x in cells]
        row["fine_tuning"] = _level(records, alone, split)
        row["sum"] = _level(records, cells, split)
        for rule in rules:
            both = [
                (cell, other)
                for cell in cells
                if (other := cell._replace(rule=rule)) in records
            ]
            if both:
                change = [records[b][split] - records[a][split] for a, b in both]
                row["rules"][rule] = {
                    "accuracy": _level(records, [b for _, b in both], split),
                    "difference": plain(estimate(change)),
                }
        rows.append(row)
    totals = {rule: _total(rows, rule) for rule in rules}
    return {
        "rows": rows,
        "totals": {rule: total for rule, total in totals.items() if total["rows"]},
    }


def _level(
    records: Records, cells: Sequence[Cell], split: Split
) -> dict[str, Any] | None:
    values = [records[cell][split] for cell in cells if cell in records]
    return plain(estimate(values)) if values else None


def _total(rows: Sequence[dict[str, Any]], rule: str) -> dict[str, Any]:
    found = [row["rules"][rule]["difference"] for row in rows if rule in row["rules"]]
    means = [each["mean"] for each in found]
    return {
        "rows": len(found),
        "better": sum(mean > 0 for mean in means),
        "equal": sum(mean == 0 for mean in means),
        "worse": sum(mean < 0 for mean in means),
        "surely_better": sum((each["low"] or 0) > 0 for each in found),
        "surely_worse": sum((each["high"] or 0) < 0 for each in found),
        "mean": float(np.mean(means)) if means else None,
    }
