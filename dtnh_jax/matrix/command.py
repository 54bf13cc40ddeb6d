"""What `dtnh matrix` does."""

import pathlib
from collections.abc import Sequence
from typing import Any


def run(argv: Sequence[str]) -> int:
    """Runs the command, or makes its report alone.

    Args:
      argv: the arguments after `dtnh matrix`.

    Returns:
      The exit status, as `dtnh_jax.finetune.__main__.main` says.
    """
    import tyro

    from dtnh_jax.finetune import shell
    from dtnh_jax.matrix.config import Config, check

    config = tyro.cli(Config, prog="dtnh matrix", args=list(argv))
    try:
        check(config)
    except ValueError as error:
        return shell.refuse(str(error))

    # Here, so that `--help` and mistakes in arguments are answered at once.
    from rich.console import Console

    from dtnh_jax.finetune.interrupt import Interrupted
    from dtnh_jax.matrix import harm, report, results, study

    console = Console()
    if not console.is_terminal:
        console.width = 120  # of a log, where nothing has to fit
    folder = config.run_dir.expanduser()
    path = folder / "cells.jsonl"
    try:
        prepared = None if config.report_only else _prepare(config, path, console)
        found = results.gather(folder, config.split)
    except ValueError as error:
        return shell.refuse(str(error))
    if prepared is not None:
        try:
            study.run(prepared, path, console)
            if config.harm:
                harm.run(prepared, folder, console)
        except (Interrupted, KeyboardInterrupt) as error:
            return shell.interrupted(error, folder)
        found = results.gather(folder, config.split)
    report.write(folder, found)
    report.show(console, found, folder)
    return 0


def _prepare(config: Any, path: pathlib.Path, console: Any) -> Any:
    """Reads the data, opens the folder, and pretrains the sources that are missing."""
    from dtnh_jax.finetune import shell
    from dtnh_jax.finetune.targets import default_data_dir
    from dtnh_jax.matrix import records, study

    data_dir = (config.data_dir or default_data_dir()).expanduser()
    shell.keep_compiled(config)
    prepared = study.prepare(config, data_dir)
    records.open_folder(config)
    for lines in (
        study.introduction(prepared, path),
        study.accuracies_of_sources(prepared),
    ):
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return prepared
