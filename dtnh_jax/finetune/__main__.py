"""The command `dtnh`, also `python -m dtnh_jax.finetune`."""

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from dtnh_jax.finetune import shell

# What can be done with runs that are complete, by the first argument.
_COMMANDS = {
    "export": "dtnh_jax.finetune.export",
    "predict": "dtnh_jax.finetune.predict",
    "report": "dtnh_jax.finetune.html_report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the arguments, without the program's name; those of the process by default.

    Returns:
      The exit status: 0; 1 where it could not go on, such as with a full disk; 2 for
      arguments, data or weights that can not be used; 75 where another process was
      lost; each after one line on stderr; 128 and the signal's number where one
      stopped it.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except ModuleNotFoundError as error:
        return shell.refuse(
            f"the package {error.name} is missing: pip install 'dtnh-jax[matrix]'"
        )
    except KeyboardInterrupt:
        print("Interrupted, before any training.", file=sys.stderr)
        return shell.INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    if argv and argv[0] == "matrix":
        from dtnh_jax.matrix import command

        return command.run(argv[1:])
    if argv and argv[0] in _COMMANDS:
        command = importlib.import_module(_COMMANDS[argv[0]])
        return command.run(argv[1:])
    import tyro

    from dtnh_jax.finetune.config import Config, check

    config = tyro.cli(Config, prog="dtnh", args=list(argv))
    try:
        check(config)
    except ValueError as error:
        return shell.refuse(str(error))
    if not config.distributed:
        return _finetune(config)
    from dtnh_jax.finetune import processes

    try:
        processes.start(config)
    except ValueError as error:
        return shell.refuse(str(error))
    try:
        return processes.leave(_finetune(config))
    except Exception as error:  # the others would wait for one that is in trouble
        return processes.leave_at_once(error, config.folder)


def _finetune(config) -> int:
    """Runs everything that a configuration asks for."""
    # Here, so that `--help` and mistakes in arguments are answered at once.
    from rich.console import Console

    from dtnh_jax.finetune import processes, report
    from dtnh_jax.finetune.folder import Folder
    from dtnh_jax.finetune.interrupt import Interrupted
    from dtnh_jax.finetune.loop import NotFiniteError

    console = Console(quiet=not processes.is_first())
    if not console.is_terminal:
        console.width = 120  # of a log, where nothing has to fit
    folder = Folder(config.folder)
    try:
        prepared = _prepare(config)
    except ValueError as error:
        return shell.refuse(str(error)) if processes.is_first() else shell.MISTAKE
    for line in report.introduction(prepared, folder):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    try:
        _work(prepared, folder, console)
    except (Interrupted, KeyboardInterrupt) as error:
        return shell.interrupted(error, folder.path)
    except (OSError, NotFiniteError) as error:
        return shell.failed(error, folder.path)
    return 0


def _prepare(config) -> Any:
    """Checks, reads and opens what a run needs."""
    from dtnh_jax.finetune import preparation, processes, results
    from dtnh_jax.finetune.folder import check_folder, open_folder

    processes.on_first(lambda: check_folder(config))
    shell.keep_compiled(config)
    prepared = preparation.prepare(config)
    processes.on_first(lambda: open_folder(config, results.machine()) and None)
    return prepared


def _work(prepared, folder, console) -> None:
    """Tunes, trains, tests and reports."""
    from dtnh_jax.finetune import experiment, processes, report, results

    strengths, tuning = prepared.config.strengths, None
    if prepared.config.tune:
        strengths, tuning = experiment.tune(prepared, folder, console)
        report.show_tuning(console, tuning, strengths)
    cells = experiment.test(prepared, folder, strengths, console)
    if processes.is_first():
        outcome = results.summarize(prepared, folder, cells, strengths, tuning)
        report.write(prepared, folder, outcome)
        folder.clear()
        report.show(console, outcome, folder.path)


if __name__ == "__main__":
    sys.exit(main())
