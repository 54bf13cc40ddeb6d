"""The options of `dtnh matrix`, and the checks that cost nothing."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable
from typing import Any, Literal

TUNING_SEEDS = 2


@dataclasses.dataclass(frozen=True)
class Photographs:
    """How a large pretrained network is fine-tuned on photographs."""

    steps: int = 36
    """Training steps of each cell."""
    batch_size: int = 64
    """Images in a training step."""
    image_size: int = 64
    """Height and width that photographs are resized to, in pixels."""
    train_per_class: int = 100
    """Training images of each class; every seed draws others."""
    validation_per_class: int = 100
    """Validation images of each class; the same for all seeds."""
    test_per_class: int = 300
    """Test images of each class; the same for all seeds."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures whether regularizers hurt: many small fine-tunings.

    Every cell of the grid is trained, validated and tested once, and written to the run
    folder. The learning rate of each source and target is chosen on validation images
    with plain fine-tuning. The same command goes on after an interruption, and other
    seeds, rules, sources and so on add cells to the same folder. Commands whose sources
    or targets differ may run at the same time.
    """

    sources: tuple[str, ...] = ("fashion", "mnist", "shuffled", "absurd")
    """Networks to start from; also imagenet (EfficientNet-Lite0), for elpv."""
    targets: tuple[str, ...] = ("digits-5", "digits-20", "fashion-20", "mnist-5")
    """Tasks to fine-tune on, named for their training images of each class; also elpv
    (photographs of solar cells), for imagenet, and digits-20-noisy and
    fashion-20-noisy, where four training labels in ten are wrong."""
    regularizers: tuple[str, ...] = ("l2_sp", "feature_map")
    """What pulls back to the source; also l1_sp, attention_transfer and
    logit_distillation."""
    strengths: tuple[float, ...] = (1e-4, 1e-2, 1.0, 1e2)
    """Multiples of each regularizer's usual strength."""
    rules: tuple[str, ...] = ("none", "sum", "dtnh", "never-hurt")
    """What becomes of conflicts. Plain fine-tuning, to which all is compared, always
    runs; `none` adds training from scratch."""
    optimizers: tuple[str, ...] = ("sgd",)
    """sgd (Nesterov momentum 0.9) or adamw."""
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
    photographs: Photographs = Photographs()
    split: Literal["validation", "test"] = "test"
    """Which accuracy the report is about: choose recipes by validation."""
    harm: bool = False
    """Afterwards train the same cells again, and look at what each step does."""
    report_only: bool = False
    """Make the report from the cells that are done, and train nothing."""
    run_dir: pathlib.Path = pathlib.Path("runs", "matrix")
    """Folder for results."""
    data_dir: pathlib.Path | None = None
    """Folder for sources and data. By default DTNH_DATA_DIR, or the user's cache."""


def identity(config: Config) -> dict[str, Any]:
    """What all cells of a folder share, by option; ready for JSON."""
    from dtnh_jax.matrix import photographs
    from dtnh_jax.matrix.regularizers import REGULARIZERS
    from dtnh_jax.matrix.rules import LEARNING_RATES

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
    for name, value in dataclasses.asdict(config.photographs).items():
        options[_flag(f"photographs.{name}")] = value
    options["parts of never-hurt"] = "average, confidence, bound"
    for name, rates in LEARNING_RATES.items():
        options[f"learning rates of {name}"] = list(rates)
        rates = photographs.learning_rates(name)
        options[f"learning rates of {name} on photographs"] = list(rates)
    for name, regularizer in REGULARIZERS.items():
        key = f"reference strength of {name}"
        options[key] = regularizer.reference
        options[f"{key} on photographs"] = regularizer.on_photographs
    return options


def check(config: Config) -> None:
    """Raises ValueError, in one line, for options that can not be meant."""
    from dtnh_jax.matrix import cells, photographs
    from dtnh_jax.matrix.regularizers import REGULARIZERS
    from dtnh_jax.matrix.rules import OPTIMIZERS, RULES
    from dtnh_jax.matrix.sources import SOURCES
    from dtnh_jax.matrix.targets import TARGETS

    _subset("sources", config.sources, [*SOURCES, *photographs.SOURCES])
    _subset("targets", config.targets, [*TARGETS, *photographs.TARGETS])
    _subset("regularizers", config.regularizers, REGULARIZERS)
    _subset("rules", config.rules, RULES)
    _subset("optimizers", config.optimizers, OPTIMIZERS)
    if not cells.pairs(config):
        raise ValueError(
            "`--sources` and `--targets` must have a pair that fits, got "
            f"{' '.join(config.sources)} and {' '.join(config.targets)}: "
            f"{', '.join(photographs.SOURCES)} is for {', '.join(photographs.TARGETS)} "
            "alone, and no source is for images that it has seen."
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
            raise ValueError(f"`{_flag(name)}` must be at least 1, got {value}.")


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
