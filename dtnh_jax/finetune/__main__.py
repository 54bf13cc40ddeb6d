"""The command `dtnh`, also `python -m dtnh_jax.finetune`."""

import sys
from collections.abc import Sequence

from dtnh_jax.finetune import shell


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the arguments, without the program's name; those of the process by default.

    Returns:
      The exit status: 0; 2 for arguments, data or weights that can not be used, after
      one line on stderr; 128 and the signal's number where one stopped it.
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
    import tyro

    from dtnh_jax.finetune.config import Config, check

    config = tyro.cli(Config, prog="dtnh", args=list(argv))
    try:
        check(config)
    except ValueError as error:
        return shell.refuse(str(error))
    return _finetune(config)


def _finetune(config) -> int:
    """Runs everything that a configuration asks for."""
    # Here, so that `--help` and mistakes in arguments are answered at once.
    from rich.console import Console

    from dtnh_jax.finetune import experiment, report, results
    from dtnh_jax.finetune.folder import check_folder, open_folder
    from dtnh_jax.finetune.interrupt import Interrupted

    console = Console()
    if not console.is_terminal:
        console.width = 120  # of a log, where nothing has to fit
    try:
        check_folder(config)
        shell.keep_compiled(config)
        prepared = experiment.prepare(config)
        folder = open_folder(config, results.machine())
    except ValueError as error:
        return shell.refuse(str(error))
    for line in report.introduction(prepared, folder):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    try:
        strengths, tuning = config.strengths, None
        if config.tune:
            strengths, tuning = experiment.tune(prepared, folder, console)
            report.show_tuning(console, tuning, strengths)
        cells = experiment.test(prepared, folder, strengths, console)
        outcome = results.summarize(prepared, folder, cells, strengths, tuning)
        report.write(prepared, folder, outcome)
        folder.clear()
    except (Interrupted, KeyboardInterrupt) as error:
        return shell.interrupted(error, folder.path)
    report.show(console, outcome, folder.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
