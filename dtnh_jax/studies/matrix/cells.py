"""The cells of the grid, and the learning rates that they are trained with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dtnh_jax.studies.matrix.catalogue import (
    ALONE,
    LEARNING_RATES,
    LEARNING_RATES_OF_PHOTOGRAPHS,
    SCRATCH,
    SOURCES,
    SOURCES_OF_PHOTOGRAPHS,
    TARGETS,
    TARGETS_OF_PHOTOGRAPHS,
    TUNING_SEEDS,
    TUNING_SEEDS_OF_PHOTOGRAPHS,
)
from dtnh_jax.studies.matrix.config import Config

Record = dict[str, Any]  # the fields of a cell, and what it came to


class Cell(NamedTuple):
    """One training. With the folder's configuration it decides the result."""

    source: str
    target: str
    regularizer: str  # "none" without one
    strength: float  # a multiple of the reference strength
    rule: str
    optimizer: str
    seed: int
    learning_rate: float

    @classmethod
    def of(cls, record: Record) -> "Cell":
        """The cell that a record is of."""
        return cls(*(record[field] for field in cls._fields))

    @property
    def name(self) -> str:
        """For people."""
        what = self.rule
        if self.regularizer != ALONE:
            what = f"{self.regularizer} x{self.strength:g} {self.rule}"
        return f"{self.source} > {self.target}, {what}, seed {self.seed}"


Records = dict[Cell, Record]


def pairs(config: Config) -> list[tuple[str, str]]:
    """Sources with targets of their kind that have no images in common."""

    def fits(source: str, target: str) -> bool:
        if source in SOURCES and target in TARGETS:
            return SOURCES[source].images != TARGETS[target].images
        return source in SOURCES_OF_PHOTOGRAPHS and target in TARGETS_OF_PHOTOGRAPHS

    return [
        (source, target)
        for source in config.sources
        for target in config.targets
        if fits(source, target)
    ]


def learning_rates(target: str, optimizer: str) -> tuple[float, ...]:
    """What the learning rate of plain fine-tuning is chosen from."""
    if target in TARGETS_OF_PHOTOGRAPHS:
        return LEARNING_RATES_OF_PHOTOGRAPHS[optimizer]
    return LEARNING_RATES[optimizer]


def tuning_cells(source: str, target: str, optimizer: str) -> list[Cell]:
    """Plain fine-tunings that a learning rate is chosen by."""
    is_small = target not in TARGETS_OF_PHOTOGRAPHS
    seeds = TUNING_SEEDS if is_small else TUNING_SEEDS_OF_PHOTOGRAPHS
    return [
        Cell(source, target, ALONE, 0.0, ALONE, optimizer, seed, rate)
        for rate in learning_rates(target, optimizer)
        for seed in range(seeds)
    ]


def chosen_rate(
    records: Mapping[Cell, Record], source: str, target: str, optimizer: str
) -> float | None:
    """The learning rate with the best validation accuracy, of equal ones the smallest.

    None as long as not all of `tuning_cells` are done.
    """
    cells = tuning_cells(source, target, optimizer)
    if not all(cell in records for cell in cells):
        return None

    def accuracy(rate: float) -> float:
        ours = [cell for cell in cells if cell.learning_rate == rate]
        return float(np.mean([records[cell]["validation"] for cell in ours]))

    return max(sorted(learning_rates(target, optimizer)), key=accuracy)


def grid_cells(
    config: Config, source: str, target: str, optimizer: str, rate: float, seed: int
) -> list[Cell]:
    """All cells of a pair with one seed, plain fine-tuning first."""

    def cell(regularizer: str, strength: float, rule: str) -> Cell:
        return Cell(source, target, regularizer, strength, rule, optimizer, seed, rate)

    plain = [cell(ALONE, 0.0, ALONE)]
    if ALONE in config.rules:
        plain.append(cell(ALONE, 0.0, SCRATCH))
    return plain + [
        cell(regularizer, float(strength), rule)
        for regularizer in config.regularizers
        for rule in config.rules
        if rule != ALONE
        for strength in config.strengths
    ]


def count(config: Config, records: Records) -> tuple[int, int]:
    """How many cells a configuration has, and how many of them are done."""
    counts = count_by_target(config, records).values()
    return sum(total for total, _ in counts), sum(done for _, done in counts)


def count_by_target(config: Config, records: Records) -> dict[str, tuple[int, int]]:
    """How many cells each target has, and how many of them are done."""
    found: dict[str, tuple[int, int]] = {}
    for source, target in pairs(config):
        for optimizer in config.optimizers:
            cells = tuning_cells(source, target, optimizer)
            rate = chosen_rate(records, source, target, optimizer)
            # Which rate it will be makes no difference to the number.
            guess = learning_rates(target, optimizer)[0] if rate is None else rate
            for seed in range(config.seeds):
                cells += grid_cells(config, source, target, optimizer, guess, seed)
            distinct = set(cells)
            total, done = found.get(target, (0, 0))
            total += len(distinct)
            if rate is None:
                distinct &= set(tuning_cells(source, target, optimizer))
            found[target] = total, done + len(distinct & records.keys())
    return found
