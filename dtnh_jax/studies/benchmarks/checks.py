"""Checks the options of the benchmarks before anything is built."""

from dtnh_jax.finetune.weights.sources import is_source, known_sources
from dtnh_jax.studies.benchmarks import peers, regularizers
from dtnh_jax.studies.benchmarks.config import Config


def check(config: Config) -> None:
    """Checks the options.

    Raises:
      ValueError: an option is wrong, or `--peers` lacks packages.
    """
    for name in (
        "rounds",
        "compile_rounds",
        "batch_size",
        "image_size",
        "residual_size",
        "layers",
        "width",
        "tokens",
        "mlp_layers",
    ):
        _at_least_one(name, getattr(config, name))
    for size in config.sizes:
        _at_least_one("sizes", size)
    for name in ("mlp_widths", "mlp_batch_sizes", "language_tokens"):
        for value in getattr(config, name):
            _at_least_one(name, value)
    if len(config.mlp_widths) != len(config.mlp_batch_sizes):
        raise ValueError(
            "`--mlp-widths` must have as many numbers as `--mlp-batch-sizes`, got "
            f"{len(config.mlp_widths)} and {len(config.mlp_batch_sizes)}."
        )
    if not config.sizes:
        raise ValueError("`--sizes` must have at least 1 number, got 0.")
    if not config.wanted:
        raise ValueError("`--groups` must have at least 1 group, got 0.")
    if config.width % 4:
        raise ValueError(f"`--width` must be a multiple of 4, got {config.width}.")
    if not is_source(config.source):
        raise ValueError(
            f"`--source` must be one of {known_sources()}, got {config.source!r}."
        )
    if "regularizers" in config.wanted:
        regularizers.contests(config.methods)
    if "peers" in config.wanted:
        peers.check_installed()


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        option = name.replace("_", "-")
        raise ValueError(f"`--{option}` must be at least 1, got {value}.")
