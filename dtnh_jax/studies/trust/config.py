"""The options of `dtnh study`."""

import dataclasses
import pathlib
from typing import Literal

from dtnh_jax.studies.trust.catalogue import (
    LEARNING_RATES,
    METHODS,
    OF_PLAIN,
    REGULARIZERS,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures how much help and harm `never_hurt` and its rivals keep.

    Trains every method with every value of its hyperparameter, on folds of the training
    set and on all of it. Writes a file for each pair, optimizer and regularizer. Run
    the same command again to resume after an interruption. Commands with other pairs
    may run at the same time.
    """

    part: Literal["choosing", "final"] = "choosing"
    """Pairs by which the recipe was chosen, or those that were run once at the end."""
    only: str = ""
    """Only pairs with this text in their name, such as "dense" or "mnist > digits"."""
    optimizers: tuple[str, ...] = ("sgd", "adamw")
    """sgd (momentum 0.9) or adamw."""
    regularizers: tuple[str, ...] = ("l2_sp", "feature_map")
    """Regularizers: l2_sp or feature_map."""
    methods: tuple[str, ...] = ()
    """Methods beside plain fine-tuning, early stopping and WiSE-FT, such as trust sum
    dtnh. By default all."""
    seeds: int = 10
    """Repetitions, each with other training images, head, order and folds."""
    report_only: bool = False
    """Write tables and pictures of the cells that are done; train nothing."""
    run_dir: pathlib.Path = pathlib.Path("runs", "study")
    """Folder for results."""
    data_dir: pathlib.Path | None = None
    """Folder for sources and data. By default DTNH_DATA_DIR, or the user's cache."""


def check(config: Config) -> None:
    """Checks the options.

    Args:
      config: the options.

    Raises:
      ValueError: an option is out of range or unknown.
    """
    if config.seeds < 2:
        raise ValueError(f"`--seeds` must be at least 2, got {config.seeds}.")
    all_known = {
        "optimizers": LEARNING_RATES,
        "regularizers": REGULARIZERS,
        "methods": [name for name in METHODS if name not in OF_PLAIN],
    }
    for option, known in all_known.items():
        for name in getattr(config, option):
            if name not in known:
                raise ValueError(
                    f"`--{option}` must be one of {', '.join(known)}, got {name}."
                )
    if config.methods and not {"trust", "sum"} <= set(config.methods):
        raise ValueError(
            "`--methods` must hold trust and sum, which tables are made around, got "
            f"{' '.join(config.methods)}."
        )
