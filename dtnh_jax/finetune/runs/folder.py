"""The run folder: what survives an interruption.

config.json        the options; another configuration needs another folder
machine.json       what it ran on, and when it began
metrics.jsonl      a line for every step of every method and seed
tensorboard/       the same for TensorBoard, a folder for every method and seed
cells/             the result of every method and seed that is complete
checkpoints/       of the one that is in training
weights/           the fine-tuned networks, see `trained`
prepared/          the teacher's features and estimates of a seed, until the end
tune/              metrics and cells of `--tune`
results.json, report.md and figures, at the end
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from dtnh_jax.finetune.config import identity


class OtherConfigurationError(ValueError):
    """A run folder holds the results of other options."""


class Folder:
    """Files of one run, or of its tuning; every change leaves it consistent."""

    def __init__(self, path: pathlib.Path, prepared: pathlib.Path | None = None):
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.prepared = prepared or path / "prepared"

    def of_tuning(self) -> "Folder":
        """The folder for tuning, which shares what is prepared for a seed."""
        return Folder(self.path / "tune", self.prepared).make()

    def clear(self) -> None:
        """Deletes what is of no use once there are results."""
        shutil.rmtree(self.prepared, ignore_errors=True)

    def make(self) -> "Folder":
        """Makes the directories, and returns itself."""
        (self.path / "cells").mkdir(parents=True, exist_ok=True)
        return self

    def result(self, cell: str) -> dict[str, Any] | None:
        """What `finish` wrote for a cell, or None while it is not complete."""
        path = self.path / "cells" / f"{cell}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, cell: str, result: dict[str, Any]) -> None:
        """Writes the result of a cell, and deletes its checkpoints."""
        write_json(self.path / "cells" / f"{cell}.json", result)
        shutil.rmtree(self.checkpoints(cell), ignore_errors=True)

    def checkpoints(self, cell: str) -> pathlib.Path:
        """Where the checkpoints of a cell are, while it is in training."""
        return self.path / "checkpoints" / cell

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, without one that was cut off."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, cell: str, step: int) -> float:
        """Forgets metrics of a cell after a step; returns its seconds until there.

        What a killed process logged after its last checkpoint will be logged again.
        """
        lines = self.metrics()
        kept = [x for x in lines if x["cell"] != cell or x["step"] <= step]
        if self.metrics_path.exists():
            _write(self.metrics_path, "".join(json.dumps(x) + "\n" for x in kept))
        return max((x["seconds"] for x in kept if x["cell"] == cell), default=0.0)


Identify = Callable[[Any], dict[str, Any]]  # of a configuration


def check_folder(config: Any, identify: Identify = identity) -> None:
    """Makes sure, without changing anything, that a run may use its folder.

    Args:
      config: of `dtnh`, or of another command that has a `folder`.
      identify: returns the options that decide the results.

    Raises:
      OtherConfigurationError: it holds another run; names the first option that
        differs.
      ValueError: it holds something else.
    """
    path, ours = config.folder, identify(config)
    options = path / "config.json"
    if options.exists():
        try:
            # A run that is older than an option was made with its default.
            theirs = {**identify(type(config)()), **json.loads(options.read_text())}
            differing = [key for key in ours if theirs.get(key) != ours[key]]
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{options} is not readable: {error}.") from error
        if differing:
            key = differing[0]
            raise OtherConfigurationError(
                f"{path} holds a run whose `--{key.replace('_', '-')}` is "
                f"{_shown(theirs.get(key))}, got {_shown(ours[key])}: "
                "give another `--run-dir`."
            )
    elif path.exists() and (not path.is_dir() or _foreign(path)):
        raise ValueError(f"{path} is no run folder and not empty: give another.")


def open_folder(
    config: Any, machine: dict[str, Any], identify: Identify = identity
) -> Folder:
    """Opens the folder of a run, new or begun, after `check_folder`.

    Raises:
      ValueError: it can not be written.
    """
    path = config.folder
    try:
        folder = Folder(path).make()
        if not (path / "config.json").exists():
            write_json(path / "machine.json", machine)
            # Last: from here on it is a run folder.
            write_json(path / "config.json", identify(config))
    except OSError as error:
        raise ValueError(f"{path} can not be written: {error}.") from error
    return folder


def _foreign(path: pathlib.Path) -> bool:
    """Whether a folder holds more than `open_folder` may have left when killed."""
    ours = {"cells", "machine.json", "machine.json.partial", "config.json.partial"}
    return bool({entry.name for entry in path.iterdir()} - ours)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that readers see the old file or the new one, whole."""
    _write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _write(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return " ".join(f"{key}={_shown_number(x)}" for key, x in value.items())
    return str(value)


def _shown_number(value: Any) -> str:
    several = value if isinstance(value, list) else [value]
    return ",".join(f"{number:g}" for number in several)
