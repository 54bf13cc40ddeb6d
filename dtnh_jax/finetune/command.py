"""`dtnh` without a subcommand: compares methods of fine-tuning."""

from collections.abc import Sequence

import tyro

from dtnh_jax.finetune import shell
from dtnh_jax.finetune.config import Config


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: the arguments after `dtnh`.

    Returns:
      The exit status, as in `dtnh_jax._cli.main`.
    """
    config = tyro.cli(Config, prog="dtnh", args=list(argv))
    # Imported here because `--help` should not wait for Flax and TFDS.
    from dtnh_jax.finetune.comparison import compare
    from dtnh_jax.finetune.runs import processes
    from dtnh_jax.finetune.runs.checks import check

    try:
        check(config)
        processes.start(config)
    except ValueError as error:
        return shell.refuse(str(error))
    if not config.distributed:
        return compare(config)
    try:
        return processes.leave(compare(config))
    except Exception as error:  # the other processes would wait for this one
        return processes.leave_at_once(error, config.folder)
