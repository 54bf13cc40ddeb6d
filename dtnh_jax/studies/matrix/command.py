"""What `dtnh matrix` does."""

import pathlib
from collections.abc import Sequence
from typing import Any

import tyro

from dtnh_jax.finetune import directories, shell
from dtnh_jax.studies.matrix.config import Config


def run(argv: Sequence[str]) -> int:
    """Runs the command, or makes its report alone.

    Args:
      argv: the arguments after `dtnh matrix`.

    Returns:
      The exit status, as `dtnh_jax._cli.main` says.
    """
    config = tyro.cli(Config, prog="dtnh matrix", args=list(argv))
    # Here, because these import Flax and more, for which `--help` should not wait.
    from rich.console import Console

    from dtnh_jax.finetune.runs.interrupt import Interrupted
    from dtnh_jax.studies.matrix import harm, report, results, study
    from dtnh_jax.studies.matrix.checks import check

    try:
        check(config)
        folder = directories.expanded(config.run_dir)
    except ValueError as error:
        return shell.refuse(str(error))

    console = Console()
    if not console.is_terminal:
        console.width = 120  # of a log, where nothing has to fit
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
    from dtnh_jax.studies.matrix import records, study

    data_dir = directories.data_dir(config.data_dir)
    directories.keep_compiled(config)
    prepared = study.prepare(config, data_dir)
    records.open_folder(config)
    for lines in (
        study.introduction(prepared, path),
        study.accuracies_of_sources(prepared),
    ):
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return prepared
