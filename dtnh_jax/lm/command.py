"""`dtnh lm`: compares methods of fine-tuning a language model."""

from collections.abc import Sequence

import tyro

from dtnh_jax.finetune import directories, shell
from dtnh_jax.lm.config import Config, identity


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: the arguments after `dtnh lm`.

    Returns:
      The exit status, as in `dtnh_jax._cli.main`.
    """
    config = tyro.cli(Config, prog="dtnh lm", args=list(argv))
    # Imported here because `--help` should not wait for Flax.
    from dtnh_jax.finetune.runs.folder import check_folder
    from dtnh_jax.lm.checks import check

    try:
        check(config)
        check_folder(config, identity)
    except ValueError as error:
        return shell.refuse(str(error))
    directories.keep_compiled(config)
    return compare(config)


def compare(config: Config) -> int:
    """Runs the comparison of a configuration; returns the exit status."""
    from rich.console import Console

    from dtnh_jax.finetune.runs.folder import Folder, open_folder
    from dtnh_jax.finetune.runs.interrupt import Interrupted
    from dtnh_jax.finetune.runs.machine import machine
    from dtnh_jax.lm import cells, experiment, report, results

    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log has no width of its own
    try:
        prepared = experiment.prepare(config)
        folder = Folder(config.folder, needed=())
        notes = open_folder(config, machine(), identify=identity, needed=())
    except ValueError as error:
        return shell.refuse(str(error))
    for line in [*report.introduction(prepared, folder.path), *notes]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    try:
        base = cells.base_result(prepared, folder)
        found = cells.run_cells(prepared, folder, console)
        outcome = results.summarize(
            config, experiment.described(prepared), base, found, folder.path
        )
        report.write(folder.path, outcome)
    except (Interrupted, KeyboardInterrupt) as error:
        return shell.interrupted(error, folder.path)
    except (OSError, cells.NotFiniteError) as error:
        return shell.failed(error, folder.path)
    report.show(console, outcome, folder.path)
    return 0
