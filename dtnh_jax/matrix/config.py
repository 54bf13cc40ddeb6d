"""The options of `dtnh matrix`, and the checks that cost nothing."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable
from typing import Any, Literal

TUNING_SEEDS = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures whether regularizers hurt: many small fine-tunings of small networks.

    Every cell of the grid is trained, validated and tested once, and written to the run
    folder. The learning rate of each source and target is chosen on validation images
    with plain fine-tuning. The same command goes on after an interruption, and other
    seeds, rules, sources and so on add cells to the same folder. Commands whose sources
    or targets differ may run at the same time.
    """

    sources: tuple[str, ...] = ("fashion", "mnist", "shuffled", "absurd")
    """Networks to start from."""
    targets: tuple[str, ...] = ("digits-5", "digits-20", "fashion-20", "mnist-5")
    """Tasks to fine-tune on, named for their training images of each class."""
    regularizers: tuple[str, ...] = ("l2_sp", "feature_map")
    """What pulls back to the source."""
    strengths: tuple[float, ...] = (1e-4, 1e-2, 1.0, 1e2)
    """Multiples of each regularizer's usual strength."""
    rules: tuple[str, ...] = ("none", "sum", "dtnh", "element", "gate-element")
    """What becomes of conflicts. Plain fine-tuning, to which all is compared, always
    runs; `none` adds training from scratch."""
    optimizers: tuple[str, ...] = ("sgd",)
    """sgd (Nesterov momentum 0.9) or adam."""
    seeds: int = 5
    """Repetitions, with other training images, head and order each."""
    steps: int = 150
    """Training steps of each cell."""
    batch_size: int = 32
    """Images in a training step."""
    source_steps: int = 1500
    """Training steps of each source, of 64 images."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the network's three blocks."""
    validation_per_class: int = 30
    """Validation images of each class; the same for all seeds."""
    test_per_class: int = 100
    """Test images of each class; the same for all seeds."""
    split: Literal["validation", "test"] = "test"
    """Which accuracy the report is about: choose recipes by validation."""
    report_only: bool = False
    """Make the report from the cells that are done, and train nothing."""
    run_dir: pathlib.Path = pathlib.Path("runs", "matrix")
    """Folder for results."""
    data_dir: pathlib.Path | None = None
    """Folder for sources and data. By default DTNH_DATA_DIR, or the user's cache."""


def identity(config: Config) -> dict[str, Any]:
    """What all cells of a folder share, by option; ready for JSON."""
    from dtnh_jax.matrix.rules import LEARNING_RATES
    from dtnh_jax.matrix.training import REGULARIZERS

    names = (
        "steps",
        "batch_size",
        "source_steps",
        "widths",
        "validation_per_class",
        "test_per_class",
    )
    options = {_flag(name): getattr(config, name) for name in names}
    options[_flag("widths")] = list(config.widths)
    for name, rates in LEARNING_RATES.items():
        options[f"learning rates of {name}"] = list(rates)
    for name, regularizer in REGULARIZERS.items():
        options[f"reference strength of {name}"] = regularizer.reference
    return options


def check(config: Config) -> None:
    """Raises ValueError, in one line, for options that can not be meant."""
    from dtnh_jax.matrix.rules import OPTIMIZERS, RULES
    from dtnh_jax.matrix.sources import SOURCES
    from dtnh_jax.matrix.targets import TARGETS
    from dtnh_jax.matrix.training import REGULARIZERS

    _subset("sources", config.sources, SOURCES)
    _subset("targets", config.targets, TARGETS)
    _subset("regularizers", config.regularizers, REGULARIZERS)
    _subset("rules", config.rules, RULES)
    _subset("optimizers", config.optimizers, OPTIMIZERS)
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
    for name in (*whole, "validation_per_class", "test_per_class"):
        if getattr(config, name) < 1:
            raise ValueError(
                f"`{_flag(name)}` must be at least 1, got {getattr(config, name)}."
            )


def _subset(name: str, values: tuple[str, ...], known: Iterable[str]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(
                f"`{_flag(name)}` must be of {', '.join(known)}, got {value!r}."
            )
    _once(name, values)


def _once(name: str, values: tuple[Any, ...]) -> None:
    if not values:
        raise ValueError(f"`{_flag(name)}` must name at least 1, got none.")
    if len(set(values)) < len(values):
        got = " ".join(map(str, values))
        raise ValueError(f"`{_flag(name)}` must name each once, got {got}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
