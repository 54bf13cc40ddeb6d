"""The rows of each group of the table."""

import functools
from collections.abc import Callable, Iterator

from dtnh_jax.studies.benchmarks import (
    contests,
    mlp,
    networks,
    peers,
    programs,
    regularizers,
    steps,
    transformation,
)
from dtnh_jax.studies.benchmarks.config import Config
from dtnh_jax.studies.benchmarks.networks import Network
from dtnh_jax.studies.benchmarks.rows import Row

# A short title, and the function that measures.
Part = tuple[str, Callable[[], list[Row]]]


def parts(config: Config) -> Iterator[Part]:
    """Yields the parts to measure.

    Parts share compiled programs, because compilation takes most of a short run.
    """
    compiled = contests.Compiled()

    @functools.cache
    def residual() -> Network:
        return networks.residual(config.batch_size, config.residual_size)

    @functools.cache
    def pretrained() -> Network:
        return networks.pretrained(config.source, config.batch_size, config.image_size)

    @functools.cache
    def encoder() -> Network:
        size = config.layers, config.width, config.tokens
        return networks.encoder(config.batch_size, *size)

    def contest(group: str, network: Network, names: tuple[str, ...]) -> list[Row]:
        return contests.contest(group, network, names, compiled, config.rounds)

    def peer(network: Network, is_convolutional: bool) -> list[Row]:
        return peers.measure(network, config.rounds, is_convolutional)

    def regularized(names: list[str]) -> list[Row]:
        return regularizers.measure(
            names,
            batch_size=config.batch_size,
            image_size=config.image_size,
            rounds=config.rounds,
            source_name=config.source,
        )

    def compiling(network: Network) -> list[Row]:
        return programs.compile_times(network, config.compile_rounds)

    def perceptron(width: int, batch_size: int) -> list[Row]:
        return mlp.measure(
            networks.perceptron(batch_size, config.mlp_layers, width),
            mlp.TARGETS.get(width, mlp.Targets()),
            compiled,
            config.rounds,
            config.compile_rounds,
        )

    def language_model() -> list[Row]:
        # Here, because it needs packages of its own.
        from dtnh_jax.studies.benchmarks import language

        model = config.language_model
        texts = config.language_target, config.language_kept
        return language.measure(model, *texts, config.language_tokens, config.rounds)

    def all_of(group: str) -> list[Callable[[], list[Row]]]:
        if group == "transformation":
            return [lambda: transformation.measure(config.sizes, config.rounds)]
        if group == "steps":
            return [
                lambda: contest(group, residual(), steps.OF_STEPS),
                lambda: contest(group, pretrained(), steps.OF_STEPS),
            ]
        if group == "bloop":
            return [
                lambda: contest(group, residual(), steps.OF_BLOOP),
                lambda: contest(group, encoder(), steps.OF_BLOOP),
            ]
        if group == "peers":
            return [lambda: peer(residual(), True), lambda: peer(encoder(), False)]
        if group == "compile":
            return [lambda: compiling(residual()), lambda: compiling(pretrained())]
        if group == "memory":
            return [
                lambda: programs.memory(residual(), compiled),
                lambda: programs.memory(pretrained(), compiled),
            ]
        if group == "mlp":
            return [
                lambda width=width, batch_size=batch_size: perceptron(width, batch_size)
                for width, batch_size in zip(
                    config.mlp_widths, config.mlp_batch_sizes, strict=True
                )
            ]
        if group == "language":
            return [language_model]
        return [
            lambda names=names: regularized(names)
            for names in regularizers.contests(config.methods)
        ]

    for group in config.wanted:
        members = all_of(group)
        for number, measure in enumerate(members, start=1):
            yield f"{group} {number} of {len(members)}", measure
