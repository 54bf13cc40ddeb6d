"""What all cells of a run folder share: those of one folder can be compared."""

import dataclasses
from typing import Any

from dtnh_jax.studies.matrix.catalogue import (
    LEARNING_RATES,
    LEARNING_RATES_OF_PHOTOGRAPHS,
)
from dtnh_jax.studies.matrix.config import Config
from dtnh_jax.studies.matrix.regularizers import REGULARIZERS


def identity(config: Config) -> dict[str, Any]:
    """What all cells of a folder share, by option; ready for JSON."""
    names = (
        "steps",
        "batch_size",
        "source_steps",
        "widths",
        "validation_per_class",
        "test_per_class",
    )
    options = {flag(name): getattr(config, name) for name in names}
    options[flag("widths")] = list(config.widths)
    for name, value in dataclasses.asdict(config.photographs).items():
        options[flag(f"photographs.{name}")] = value
    options["parts of never-hurt"] = "average, confidence, bound"
    for name, rates in LEARNING_RATES.items():
        options[f"learning rates of {name}"] = list(rates)
        rates = LEARNING_RATES_OF_PHOTOGRAPHS[name]
        options[f"learning rates of {name} on photographs"] = list(rates)
    for name, regularizer in REGULARIZERS.items():
        key = f"reference strength of {name}"
        options[key] = regularizer.reference
        options[f"{key} on photographs"] = regularizer.on_photographs
    return options


def flag(name: str) -> str:
    """How an option is written."""
    return "--" + name.replace("_", "-")
