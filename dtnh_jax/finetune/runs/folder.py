"""The run folder, whose files survive an interruption.

config.json        the options; another configuration needs another folder
data.json          identity of the pictures; others need another folder
machine.json       the machine, and the time of the start
metrics.jsonl      a line for every step of every method and seed
tensorboard/       the same for TensorBoard, a folder for every method and seed
cells/             the results of complete methods and seeds
checkpoints/       checkpoints of the method and seed in training
weights/           the fine-tuned networks, see `trained`
prepared/          teacher's features and estimates of a seed, deleted at the end
tune/              metrics and cells of `--tune`
trust/             metrics and cells of the trainings that choose trust
results.json, report.md and figures, at the end
"""

import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dtnh_jax import _files
from dtnh_jax.finetune.config import identity
from dtnh_jax.finetune.files import make_folder, write, write_json

# Required keys of a result.
OF_PICTURES = frozenset(
    {
        "method",
        "seed",
        "strength",
        "accuracy",
        "balanced_accuracy",
        "predictions",
        "seconds",
    }
)


class OtherConfigurationError(ValueError):
    """A run folder has results of other options or other pictures."""


class Folder:
    """Files of one run, or of its tuning; every change leaves it consistent."""

    def __init__(
        self,
        path: pathlib.Path,
        prepared: pathlib.Path | None = None,
        needed: Collection[str] = OF_PICTURES,
    ):
        self._needed = needed
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.prepared = prepared or path / "prepared"

    def of_tuning(self) -> "Folder":
        """Returns the folder for tuning, which shares the prepared files of a seed."""
        return Folder(self.path / "tune", self.prepared).make()

    def of_race(self) -> "Folder":
        """Returns the folder for choosing trust, which shares the prepared files."""
        return Folder(self.path / "trust", self.prepared).make()

    def clear(self) -> None:
        """Deletes files that are not needed once there are results."""
        shutil.rmtree(self.prepared, ignore_errors=True)

    def make(self) -> "Folder":
        """Makes the directories; returns itself."""
        make_folder(self.path / "cells")
        return self

    def result(self, cell: str) -> dict[str, Any] | None:
        """Returns the result of a cell, or None if it is not complete."""
        return _result(self.path / "cells" / f"{cell}.json", self._needed)

    def finish(self, cell: str, result: dict[str, Any]) -> None:
        """Writes the result of a cell, and deletes its checkpoints."""
        if self.metrics_path.exists():
            _files.sync(self.metrics_path)
        write_json(self.path / "cells" / f"{cell}.json", result)
        shutil.rmtree(self.checkpoints(cell), ignore_errors=True)

    def checkpoints(self, cell: str) -> pathlib.Path:
        """Returns the folder of a cell's checkpoints."""
        return self.path / "checkpoints" / cell

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of `metrics.jsonl`, without truncated or damaged ones."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_bytes().split(b"\n")[:-1]
        found = [_parsed(line) for line in lines]
        return [
            x for x in found if isinstance(x, dict) and {"cell", "step"} <= x.keys()
        ]

    def rewind(self, cell: str, step: int) -> float:
        """Deletes metrics of a cell after a step; returns its seconds until that step.

        Steps after the last checkpoint of a killed process will be logged again.
        """
        lines = self.metrics()
        kept = [x for x in lines if x["cell"] != cell or x["step"] <= step]
        if self.metrics_path.exists():
            write(self.metrics_path, "".join(json.dumps(x) + "\n" for x in kept))
        return max((x["seconds"] for x in kept if x["cell"] == cell), default=0.0)


Identify = Callable[[Any], dict[str, Any]]  # from a configuration


def check_folder(config: Any, identify: Identify = identity) -> None:
    """Checks that a run may use its folder, without changes to it.

    Args:
      config: configuration of `dtnh`, or of another command with a `folder`.
      identify: returns the options that determine the results.

    Raises:
      OtherConfigurationError: the folder has another run; the error names the first
        option that differs.
      ValueError: the folder has other files.
    """
    path, ours = config.folder, identify(config)
    options = path / "config.json"
    if options.exists():
        try:
            # A run older than an option used its default.
            theirs = {**identify(type(config)()), **json.loads(options.read_text())}
            differing = [key for key in ours if theirs.get(key) != ours[key]]
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(
                f"{options} is not readable: {error}. Delete the folder, or set "
                "another `--run-dir`."
            ) from error
        if differing:
            key = differing[0]
            raise OtherConfigurationError(
                f"{path} holds a run whose `--{key.replace('_', '-')}` is "
                f"{_shown(theirs.get(key))}, got {_shown(ours[key])}: "
                "set another `--run-dir`."
            )
    elif path.exists() and (not path.is_dir() or _foreign(path)):
        raise ValueError(
            f"{path} is no run folder and not empty: set another `--run-dir`."
        )


def open_folder(
    config: Any,
    machine: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    identify: Identify = identity,
    needed: Collection[str] = OF_PICTURES,
) -> list[str]:
    """Opens the folder of a new or unfinished run, after `check_folder`.

    Args:
      config: configuration of the run.
      machine: description of the machine, for a new run.
      data: result of `target.contents`; None skips the check of pictures.
      identify: returns the options that determine the results.
      needed: required keys of a training's result.

    Returns:
      Sentences on damaged files, for example after a power failure. Trainings with
      damaged results count as incomplete.

    Raises:
      OtherConfigurationError: the folder has results of other pictures.
      ValueError: the folder can not be written.
    """
    path = config.folder
    notes: list[str] = []
    try:
        begun = (path / "config.json").exists()
        if begun and data is not None:
            _check_data(path, data)
        make_folder(path)
        found = _read(path / "machine.json")
        if not begun or not (
            isinstance(found, dict) and found.keys() >= machine.keys()
        ):
            write_json(path / "machine.json", machine)
            notes += [f"{path / 'machine.json'} was damaged and replaced."] * begun
        if data is not None and not (begun and (path / "data.json").exists()):
            write_json(path / "data.json", data)
        if not begun:
            # Last: from here on it is a run folder.
            write_json(path / "config.json", identify(config))
        Folder(path).make()
        found = [path.glob(f"{part}cells/*.json") for part in ("", "trust/", "tune/")]
        for file in sorted(itertools.chain(*found)):
            if _result(file, needed) is None:
                file.unlink()
                notes.append(f"{file} was damaged: that training is repeated.")
    except OSError as error:
        raise ValueError(f"{path} can not be written: {error}.") from error
    return notes


def _check_data(path: pathlib.Path, ours: Mapping[str, Any]) -> None:
    """Raises OtherConfigurationError if a run folder records other pictures."""
    file = path / "data.json"
    if not file.exists():
        return
    theirs = _read(file)
    if theirs == ours:
        return
    try:
        before, now = theirs["pictures"], ours["pictures"]
        changed = [
            f"{name} had {before.get(name, 'none')} and has {now.get(name, 'none')}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is not readable: delete it if the pictures are unchanged, or set "
            "another `--run-dir`."
        ) from error
    more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
    what = "; ".join(changed[:3]) + more or "equal numbers, but other pictures"
    raise OtherConfigurationError(
        f"{path} holds a run on other pictures ({what}): set another `--run-dir`."
    )


def _foreign(path: pathlib.Path) -> bool:
    """Returns whether a folder has more than a killed `open_folder` may leave."""
    ours = {"cells", "machine.json", "data.json"}
    return any(
        entry.name not in ours and entry.suffix != ".partial"
        for entry in path.iterdir()
    )


def _result(path: pathlib.Path, needed: Collection[str]) -> dict[str, Any] | None:
    """Returns the result of a cell, or None if it is missing or damaged."""
    found = _read(path)
    return found if isinstance(found, dict) and found.keys() >= set(needed) else None


def _read(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file, or None if it is missing or damaged."""
    return _parsed(path.read_bytes()) if path.exists() else None


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return " ".join(f"{key}={_shown_number(x)}" for key, x in value.items())
    return str(value)


def _shown_number(value: Any) -> str:
    several = value if isinstance(value, list) else [value]
    return ",".join(f"{number:g}" for number in several)
