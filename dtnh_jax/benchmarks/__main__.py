"""`python -m dtnh_jax.benchmarks`: a table of times, all measured in turn."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.table import Table

# Every regularizer of the weights, and for scale one that is not.
_METHODS = (
    "fine-tuning",
    "l2",
    "l2_sp",
    "l2_sp+dtnh",
    "l1_sp+dtnh",
    "l2_sp_fisher+dtnh",
)
_ADAPTED = ("lora", "lora_decay", "lora_decay+dtnh")


@dataclasses.dataclass(frozen=True)
class Config:
    """Times a training step with each regularizer, against the step without it.

    The steps of all methods are run in turn, again and again; a ratio is the median of
    the ratios within a round, and its range that of the middle half of the rounds.
    """

    batch_size: int = 64
    """Images in a batch."""
    image_size: int = 64
    """Height and width of an image, in pixels."""
    rounds: int = 15
    """How often every step is run and timed."""
    methods: tuple[str, ...] = (*_METHODS, *_ADAPTED)
    """Methods of the fine-tuning command. Each is compared with its own baseline,
    `fine-tuning` or `lora`, which has to be among them."""
    source: str = "efficientnet-lite0"
    """Pretrained network of the fine-tuning command."""
    output: pathlib.Path | None = None
    """File for the times, as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for.

    Args:
      argv: the arguments, without the program's name; those of the process by default.

    Returns:
      The exit status: 0, or 2 for arguments that can not be used.
    """
    config = tyro.cli(Config, prog="python -m dtnh_jax.benchmarks", args=argv)
    from dtnh_jax.benchmarks.regularizers import measure
    from dtnh_jax.finetune.config import one_of
    from dtnh_jax.finetune.folder import write_json
    from dtnh_jax.finetune.methods import METHODS
    from dtnh_jax.finetune.results import machine
    from dtnh_jax.finetune.sources import SOURCES

    groups: dict[str, list[str]] = {}
    try:
        for name in config.methods:
            one_of("methods", name, METHODS)
            groups.setdefault(METHODS[name].baseline, []).append(name)
        for baseline, names in groups.items():
            if baseline not in names:
                raise ValueError(f"`--methods` must have {baseline}, got none.")
            names.sort(key=lambda name, first=baseline: name != first)
        one_of("source", config.source, SOURCES)
        for name in ("batch_size", "image_size", "rounds"):
            if getattr(config, name) < 1:
                raise ValueError(
                    f"`--{name.replace('_', '-')}` must be at least 1, got "
                    f"{getattr(config, name)}."
                )
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console.width = 120
    times = {}
    for names in groups.values():
        with console.status(f"compiling and timing {', '.join(names)}"):
            times |= measure(
                names,
                batch_size=config.batch_size,
                image_size=config.image_size,
                rounds=config.rounds,
                source_name=config.source,
            )
    table = Table(title=f"A training step of {config.source}")
    for heading in ("method", "ms", "against", "ratio", "middle half"):
        table.add_column(heading)
    for name, each in times.items():
        table.add_row(
            name,
            f"{1000 * each.median:.0f}",
            METHODS[name].baseline,
            f"{each.ratio:.3f}",
            f"{each.ratio_low:.3f} to {each.ratio_high:.3f}",
        )
    console.print(table)
    if config.output is not None:
        options = dataclasses.asdict(config) | {"output": None}
        rows = {name: each._asdict() for name, each in times.items()}
        config.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            config.output, {"machine": machine(), "options": options, "times": rows}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
