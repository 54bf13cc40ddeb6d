"""Whether the options of `dtnh matrix` can be meant, before anything is read."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from dtnh_jax.studies.matrix import cells
from dtnh_jax.studies.matrix.catalogue import (
    SOURCES,
    SOURCES_OF_PHOTOGRAPHS,
    TARGETS,
    TARGETS_OF_PHOTOGRAPHS,
)
from dtnh_jax.studies.matrix.config import Config
from dtnh_jax.studies.matrix.identity import flag
from dtnh_jax.studies.matrix.regularizers import REGULARIZERS
from dtnh_jax.studies.matrix.rules import OPTIMIZERS, RULES


def check(config: Config) -> None:
    """Raises ValueError, in one line, for options that can not be meant."""
    _subset("sources", config.sources, [*SOURCES, *SOURCES_OF_PHOTOGRAPHS])
    _subset("targets", config.targets, [*TARGETS, *TARGETS_OF_PHOTOGRAPHS])
    _subset("regularizers", config.regularizers, REGULARIZERS)
    _subset("rules", config.rules, RULES)
    _subset("optimizers", config.optimizers, OPTIMIZERS)
    if not cells.pairs(config):
        raise ValueError(
            "`--sources` and `--targets` must have a pair that fits, got "
            f"{' '.join(config.sources)} and {' '.join(config.targets)}: "
            f"{', '.join(SOURCES_OF_PHOTOGRAPHS)} is for "
            f"{', '.join(TARGETS_OF_PHOTOGRAPHS)} alone, and no source is for images "
            "that it has seen."
        )
    for strength in config.strengths:
        if not (math.isfinite(strength) and strength > 0):
            raise ValueError(
                f"`--strengths` must be above 0 and finite, got {strength}."
            )
    _once("strengths", config.strengths)
    if len(config.widths) != 3 or min(config.widths) < 1:
        got = " ".join(map(str, config.widths))
        raise ValueError(f"`--widths` must be 3 numbers of at least 1, got {got}.")
    whole = ("seeds", "steps", "batch_size", "source_steps")
    counts = {
        name: getattr(config, name)
        for name in (*whole, "validation_per_class", "test_per_class")
    }
    for name, value in dataclasses.asdict(config.photographs).items():
        counts[f"photographs.{name}"] = value
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"`{flag(name)}` must be at least 1, got {value}.")


def _subset(name: str, values: tuple[str, ...], known: Iterable[str]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(
                f"`{flag(name)}` must be of {', '.join(known)}, got {value!r}."
            )
    _once(name, values)


def _once(name: str, values: tuple[Any, ...]) -> None:
    if not values:
        raise ValueError(f"`{flag(name)}` must name at least 1, got none.")
    if len(set(values)) < len(values):
        got = " ".join(map(str, values))
        raise ValueError(f"`{flag(name)}` must name each once, got {got}.")
