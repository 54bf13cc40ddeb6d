"""`python -m dtnh_jax.benchmarks`: measures a table of times."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from dtnh_jax.finetune.directories import expanded
from dtnh_jax.studies.benchmarks.config import Config


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: the arguments, without the program's name.

    Returns:
      The exit status: 0, or 2 for wrong arguments or missing packages, after one line
      on stderr.
    """
    config = tyro.cli(Config, prog="python -m dtnh_jax.benchmarks", args=list(argv))
    # Imported here because `--help` should not wait for Flax.
    from rich.console import Console

    from dtnh_jax.studies.benchmarks import report
    from dtnh_jax.studies.benchmarks.checks import check

    console = Console()
    if not console.is_terminal:
        console.width = 200  # a log has no width of its own
    try:
        path = expanded(config.output)
        if config.report_only:
            results = report.read(path)
            report.draw(path, results)
        else:
            check(config)
            results = _measure(config, path, console)
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    report.show(console, results)
    console.print(
        f"Results: {path}, with a picture and a page beside it",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _measure(config: Config, path: pathlib.Path, console: Any) -> dict[str, Any]:
    """Measures, and writes the results so far after each part."""
    import dataclasses
    import time

    from dtnh_jax.studies.benchmarks import groups, peers, report

    rows = []
    started = time.monotonic()
    options = dataclasses.asdict(config) | {"output": None, "groups": config.wanted}
    others = peers.versions() if "peers" in config.wanted else {}
    results = {"machine": report.described_machine(others), "options": options}
    for title, measure in groups.parts(config):
        with console.status(title):
            rows += measure()
        results = results | {"rows": [row.plain() for row in rows]}
        report.write(path, results)
        seconds = time.monotonic() - started
        console.print(f"{title}, done after {seconds:.0f} s", highlight=False)
    return results
