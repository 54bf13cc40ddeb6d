"""Checks the options of a run before anything is read."""

import math
import os
import pathlib

from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data.targets import FAMILIES, TARGETS, is_target
from dtnh_jax.finetune.directories import expanded
from dtnh_jax.finetune.methods import METHODS
from dtnh_jax.finetune.option_checks import at_least, flag, one_of
from dtnh_jax.finetune.regularizers import REGULARIZERS
from dtnh_jax.finetune.weights.sources import is_source, known_sources
from dtnh_jax.finetune.wording import printable


def check(config: Config) -> None:
    """Raises ValueError for wrong options, with a message of one line."""
    if not is_source(config.source):
        raise ValueError(
            f"`--source` must be one of {known_sources()}, got {config.source!r}."
        )
    if not is_target(config.target):
        raise ValueError(
            f"`--target` must be one of {', '.join(TARGETS)}, {', '.join(FAMILIES)}, "
            f"got {config.target!r}."
        )
    if not config.methods:
        raise ValueError("`--methods` must name at least one method, got none.")
    for name in config.methods:
        one_of("methods", name, METHODS)
    if len(set(config.methods)) < len(config.methods):
        raise ValueError(
            f"`--methods` must name each method once, got {' '.join(config.methods)}."
        )
    for name, strength in config.strength.items():
        one_of("strength", name, REGULARIZERS)
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(
                f"`--strength {name}` must be at least 0 and finite, got {strength}."
            )
        if name not in config.regularizers:
            raise ValueError(f"`--strength {name}` has no effect: no method has it.")
    if config.tune and not set(config.regularizers) - set(config.strength):
        raise ValueError("`--tune` has no effect: there is no strength left to choose.")
    if config.steps is not None and config.epochs is not None:
        raise ValueError("`--steps` and `--epochs` must not be given together.")
    whole = ("batch_size", "image_size", "train_per_class", "test_per_class", "seeds")
    if config.tuning_seeds is not None and not config.tune:
        raise ValueError("`--tuning-seeds` has no effect without `--tune`.")
    for name in (*whole, "steps", "checkpoint_every", "tuning_seeds", "accumulate"):
        at_least(name, getattr(config, name), 1)
    _check_devices(config)
    at_least("validation_per_class", config.validation_per_class, int(config.tune))
    for name in ("learning_rate", "epochs"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{flag(name)}` must be above 0 and finite, got {value}.")
    # Last, because the name of the folder depends on the options.
    _check_place("run_dir", config.folder)
    if config.data_dir is not None:
        _check_place("data_dir", expanded(config.data_dir))


def _check_place(name: str, folder: pathlib.Path) -> None:
    whole = os.path.abspath(folder)
    if whole != printable(whole):  # Orbax supports no other names
        raise ValueError(
            f"`{flag(name)}` must be a folder whose name is one line of UTF-8, got "
            f"{printable(whole)}."
        )


def _check_devices(config: Config) -> None:
    for axis, size in config.mesh.items():
        one_of("mesh", axis, ("data", "fsdp"))
        if size < 1:
            raise ValueError(f"`--mesh {axis}` must be at least 1, got {size}.")
    config.check_batches(math.prod(config.mesh.values()))
    for name in ("coordinator", "processes", "process_id"):
        if getattr(config, name) is not None and not config.distributed:
            raise ValueError(f"`{flag(name)}` has no effect without `--distributed`.")
    at_least("processes", config.processes, 1)
    at_least("process_id", config.process_id, 0)
    at_least("heartbeat", config.heartbeat, 1)
    number, count = config.process_id, config.processes
    if number is not None and count is not None and number >= count:
        raise ValueError(
            f"`--process-id` must be below `--processes`, {count}, got {number}."
        )
