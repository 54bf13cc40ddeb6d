"""Runs `dtnh study`."""

import itertools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import tyro

from dtnh_jax import _files
from dtnh_jax.finetune import directories, shell
from dtnh_jax.studies.trust.catalogue import PAIRS
from dtnh_jax.studies.trust.config import Config, check

_FIRST_SEED = {"choosing": 0, "final": 500}


def run(argv: Sequence[str]) -> int:
    """Trains the cells that are missing and writes the report, or only the report.

    Args:
      argv: the arguments after `dtnh study`.

    Returns:
      The exit status, as in `dtnh_jax._cli.main`.
    """
    config = tyro.cli(Config, prog="dtnh study", args=list(argv))
    try:
        check(config)
        pairs = [
            name
            for name, pair in PAIRS.items()
            if pair.is_final == (config.part == "final") and config.only in name
        ]
        if not pairs:
            raise ValueError(
                "`--only` must occur in the name of a pair, such as "
                f"{next(iter(PAIRS))!r}, got {config.only!r}."
            )
    except ValueError as error:
        return shell.refuse(str(error))
    folder = config.run_dir.expanduser()
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        if not config.report_only:
            _train(config, folder / "cells", pairs)
        return _report(folder)
    except ValueError as error:
        return shell.refuse(str(error))
    except OSError as error:
        return shell.failed(error, folder)
    except KeyboardInterrupt as error:
        return shell.interrupted(error, folder)


def _train(config: Config, folder: pathlib.Path, pairs: list[str]) -> None:
    """Trains the cells that are not done."""
    # Imported here because `--help` should not wait for Flax.
    from dtnh_jax.studies.trust import cells

    data_dir = (config.data_dir or directories.default_data_dir()).expanduser()
    first = _FIRST_SEED[config.part]
    seeds = tuple(range(first, first + config.seeds))
    todo = [
        cells.Cell(*each)
        for each in itertools.product(
            pairs, config.optimizers, [None, *config.regularizers]
        )
    ]
    for number, cell in enumerate(todo, start=1):
        path, start = folder / cell.file, time.monotonic()
        known = _read(path, seeds)
        if known is None or cells.missing(cell, known, config.methods):
            found = cells.run(cell, seeds, data_dir, known, config.methods)
            _files.replace(path, json.dumps(found, allow_nan=False) + "\n")
            seconds = f"{time.monotonic() - start:.0f} s"
            print(f"[{number}/{len(todo)}] {path.stem}, {seconds}", flush=True)


def _read(path: pathlib.Path, seeds: tuple[int, ...]) -> dict[str, Any] | None:
    """Returns an earlier result, or None."""
    if not path.exists():
        return None
    known = json.loads(path.read_text())
    if known["seeds"] != list(seeds):
        raise ValueError(
            f"{path} has {len(known['seeds'])} seeds, got `--seeds {len(seeds)}`: set "
            "another `--run-dir`."
        )
    return known


def _report(folder: pathlib.Path) -> int:
    from dtnh_jax.finetune.files import write_json
    from dtnh_jax.studies.trust import cells, report, summary

    found = summary.summarize(cells.read(folder / "cells"))
    if not found["cells"]:
        raise ValueError(f"{folder} must hold cells with a regularizer, got none.")
    write_json(folder / "results.json", found)
    report.write(found, folder)
    print(report.tables(found))
    return 0
