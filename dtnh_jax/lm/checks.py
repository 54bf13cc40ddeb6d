"""Checks the options before anything is read."""

import math

from dtnh_jax.finetune.option_checks import at_least, flag, one_of
from dtnh_jax.lm.architecture import LINEAR
from dtnh_jax.lm.config import Config
from dtnh_jax.lm.methods import METHODS, WISE_FT


def check(config: Config) -> None:
    """Raises ValueError for wrong options, with a message of one line."""
    for name, known in (("methods", METHODS), ("adapt", LINEAR)):
        given = getattr(config, name)
        if not given:
            raise ValueError(f"`{flag(name)}` must name at least one, got none.")
        for value in given:
            one_of(name, value, known)
        if len(set(given)) < len(given):
            raise ValueError(
                f"`{flag(name)}` must name each once, got {' '.join(given)}."
            )
    for name in config.methods:
        after = METHODS[name].after
        if after is not None and after not in config.methods:
            raise ValueError(f"`--methods {name}` needs {after} among the methods.")
    for name, strengths in config.strength.items():
        one_of("strength", name, METHODS)
        if name not in config.methods:
            raise ValueError(f"`--strength {name}` has no effect: no method has it.")
        if METHODS[name].strengths == (0.0,):
            raise ValueError(f"`--strength {name}` has no effect: it has no strength.")
        for value in strengths:
            most = 1.0 if name == WISE_FT else math.inf
            if not (math.isfinite(value) and 0 <= value <= most):
                bounds = "from 0 to 1" if name == WISE_FT else "at least 0 and finite"
                raise ValueError(f"`--strength {name}` must be {bounds}, got {value}.")
    for name in (
        "rank",
        "steps",
        "batch_size",
        "context",
        "test_rows",
        "held_out_every",
        "seeds",
        "accumulate",
    ):
        at_least(name, getattr(config, name), 1)
    at_least("warmup", config.warmup, 0)
    if not (math.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise ValueError(
            f"`--learning-rate` must be above 0 and finite, got {config.learning_rate}."
        )
    for axis, size in config.mesh.items():
        one_of("mesh", axis, ("data", "fsdp"))
        if size < 1:
            raise ValueError(f"`--mesh {axis}` must be at least 1, got {size}.")
    devices = math.prod(config.mesh.values())
    if config.batch_size % (devices * config.accumulate):
        raise ValueError(
            f"`--batch-size` must be a multiple of {devices} devices times "
            f"{config.accumulate} (`--accumulate`), got {config.batch_size}."
        )
