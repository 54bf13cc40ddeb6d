"""Runs a comparison: reads data and weights, trains and tests methods, writes reports.

Mistakes are reported in one line. An interruption leaves a folder from which the same
command resumes.
"""

from rich.console import Console

from dtnh_jax.finetune import directories, shell
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data.target import contents
from dtnh_jax.finetune.reports import report, results
from dtnh_jax.finetune.runs import experiment, preparation, processes
from dtnh_jax.finetune.runs.folder import Folder, check_folder, open_folder
from dtnh_jax.finetune.runs.interrupt import Interrupted
from dtnh_jax.finetune.runs.machine import machine
from dtnh_jax.finetune.training.loop import NotFiniteError


def compare(config: Config) -> int:
    """Runs the comparison of a configuration; returns the exit status."""
    console = Console(quiet=not processes.is_first())
    if not console.is_terminal:
        console.width = 120  # a log has no width of its own
    folder = Folder(config.folder)
    try:
        prepared, notes = _prepare(config)
    except ValueError as error:
        return shell.refuse(str(error)) if processes.is_first() else shell.MISTAKE
    for line in (*report.introduction(prepared, folder), *notes):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    try:
        _work(prepared, folder, console)
    except (Interrupted, KeyboardInterrupt) as error:
        return shell.interrupted(error, folder.path)
    except (OSError, NotFiniteError) as error:
        return shell.failed(error, folder.path)
    return 0


def _prepare(config: Config) -> tuple[preparation.Experiment, list[str]]:
    """Checks options, reads data, opens the folder; returns notes on damaged files."""
    processes.on_first(lambda: check_folder(config))
    directories.keep_compiled(config)
    prepared = preparation.prepare(config)
    data = contents(prepared.target)
    if not processes.is_same(data["digest"]):
        raise ValueError(
            f"{prepared.target.name} must have the same pictures in every process, got "
            "different ones."
        )
    notes = processes.on_first(lambda: open_folder(config, machine(), data))
    return prepared, notes


def _work(prepared: preparation.Experiment, folder: Folder, console: Console) -> None:
    """Tunes, trains, tests and reports."""
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
