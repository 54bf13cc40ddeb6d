"""The run folder, and the file that keeps what every cell came to.

config.json     what all cells share; another configuration needs another folder
cells.jsonl     a line for every cell that is complete
results.json, report.md and figures, which are made from it
"""

import json
import math
import os
import pathlib
from typing import Any

from dtnh_jax.finetune import files
from dtnh_jax.finetune.directories import expanded
from dtnh_jax.finetune.runs.folder import OtherConfigurationError
from dtnh_jax.studies.matrix.cells import Cell, Record, Records
from dtnh_jax.studies.matrix.config import Config
from dtnh_jax.studies.matrix.identity import identity


def open_folder(config: Config) -> pathlib.Path:
    """Makes the run folder, or makes sure that its cells have our configuration.

    Returns:
      The file for records, without a last line that was cut off.

    Raises:
      OtherConfigurationError: its cells were trained in another way.
      ValueError: it is something else, or can not be written.
    """
    folder = expanded(config.run_dir)
    options, path = folder / "config.json", folder / "cells.jsonl"
    ours, theirs = identity(config), {}
    if options.exists():
        try:
            theirs = json.loads(options.read_text())
            differing = [k for k in ours if k in theirs and theirs[k] != ours[k]]
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{options} is not readable: {error}.") from error
        if differing:
            key = differing[0]
            raise OtherConfigurationError(
                f"{folder} holds cells whose `{key}` is {_shown(theirs[key])}, got "
                f"{_shown(ours[key])}: give another `--run-dir`."
            )
    elif folder.exists() and (not folder.is_dir() or _foreign(folder)):
        raise ValueError(f"{folder} is no folder of `dtnh matrix` and not empty.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(options, {**theirs, **ours})
        with path.open("ab+") as file:
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
    except OSError as error:
        raise ValueError(f"{folder} can not be written: {error}.") from error
    return path


def read(path: pathlib.Path) -> Records:
    """All records of a file; a last line that was cut off is left out.

    Raises:
      ValueError: a line is damaged, or there is no such file.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
    except OSError as error:
        raise ValueError(f"{path} is not readable: {error}.") from error
    records: Records = {}
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            records.setdefault(Cell.of(record), record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must have a cell in every line, got {line.strip()[:60]!r} in "
                f"line {number}."
            ) from error
    return records


def seconds(records: Records) -> float:
    """What all cells of a file took together, one after the other."""
    return math.fsum(record["seconds"] for record in records.values())


def append(path: pathlib.Path, record: Record) -> None:
    """Adds a record; it is on disk when this returns, whole or cut off."""
    line = json.dumps(record, allow_nan=False) + "\n"
    # One write to the file's end, which other commands may be writing to as well.
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())
        os.fsync(file.fileno())


def _foreign(folder: pathlib.Path) -> bool:
    """Whether a folder holds more than `open_folder` may have left when killed."""
    return any(entry.suffix != ".partial" for entry in folder.iterdir())


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
