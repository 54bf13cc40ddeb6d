"""The run folder: what survives an interruption.

config.json        the options; another configuration needs another folder
data.json          which pictures; other ones need another folder
machine.json       what it ran on, and when it began
metrics.jsonl      a line for every step of every method and seed
tensorboard/       the same for TensorBoard, a folder for every method and seed
cells/             the result of every method and seed that is complete
checkpoints/       of the one that is in training
weights/           the fine-tuned networks, see `trained`
prepared/          the teacher's features and estimates of a seed, until the end
tune/              metrics and cells of `--tune`
trust/             metrics and cells of the trainings that trust was chosen by
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

# What a result has to say.
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
    """A run folder holds the results of other options, or of other pictures."""


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
        """The folder for tuning, which shares what is prepared for a seed."""
        return Folder(self.path / "tune", self.prepared).make()

    def of_race(self) -> "Folder":
        """The folder for the race of levels of trust, which shares that too."""
        return Folder(self.path / "trust", self.prepared).make()

    def clear(self) -> None:
        """Deletes what is of no use once there are results."""
        shutil.rmtree(self.prepared, ignore_errors=True)

    def make(self) -> "Folder":
        """Makes the directories, and returns itself."""
        make_folder(self.path / "cells")
        return self

    def result(self, cell: str) -> dict[str, Any] | None:
        """What `finish` wrote for a cell, or None while it is not complete."""
        return _result(self.path / "cells" / f"{cell}.json", self._needed)

    def finish(self, cell: str, result: dict[str, Any]) -> None:
        """Writes the result of a cell, and deletes its checkpoints."""
        if self.metrics_path.exists():
            _files.sync(self.metrics_path)
        write_json(self.path / "cells" / f"{cell}.json", result)
        shutil.rmtree(self.checkpoints(cell), ignore_errors=True)

    def checkpoints(self, cell: str) -> pathlib.Path:
        """Where the checkpoints of a cell are, while it is in training."""
        return self.path / "checkpoints" / cell

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, without those that were cut off or damaged."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_bytes().split(b"\n")[:-1]
        found = [_parsed(line) for line in lines]
        return [
            x for x in found if isinstance(x, dict) and {"cell", "step"} <= x.keys()
        ]

    def rewind(self, cell: str, step: int) -> float:
        """Forgets metrics of a cell after a step; returns its seconds until there.

        What a killed process logged after its last checkpoint will be logged again.
        """
        lines = self.metrics()
        kept = [x for x in lines if x["cell"] != cell or x["step"] <= step]
        if self.metrics_path.exists():
            write(self.metrics_path, "".join(json.dumps(x) + "\n" for x in kept))
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
            raise ValueError(
                f"{options} is not readable: {error}. Delete the folder, or give "
                "another `--run-dir`."
            ) from error
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
    config: Any,
    machine: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    identify: Identify = identity,
    needed: Collection[str] = OF_PICTURES,
) -> list[str]:
    """Opens the folder of a run, new or begun, after `check_folder`.

    Args:
      config: of the run.
      machine: what a new run is measured on.
      data: what `target.contents` says of the pictures; None leaves that open.
      identify: returns the options that decide the results.
      needed: what the result of a training has to say.

    Returns:
      Sentences on files that were damaged, as by a loss of power. Trainings whose
      results are damaged are not complete any more.

    Raises:
      OtherConfigurationError: it holds results of other pictures.
      ValueError: it can not be written.
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
            notes += [f"{path / 'machine.json'} was damaged: it is of now."] * begun
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
                notes.append(f"{file} was damaged: that training is done anew.")
    except OSError as error:
        raise ValueError(f"{path} can not be written: {error}.") from error
    return notes


def _check_data(path: pathlib.Path, ours: Mapping[str, Any]) -> None:
    """Raises if a run folder, but for one that does not say so, is of other data."""
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
            f"{file} is not readable: delete it if the pictures are as they were, or "
            "give another `--run-dir`."
        ) from error
    more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
    what = "; ".join(changed[:3]) + more or "as many of each class, but not the same"
    raise OtherConfigurationError(
        f"{path} holds a run on other pictures ({what}): give another `--run-dir`."
    )


def _foreign(path: pathlib.Path) -> bool:
    """Whether a folder holds more than `open_folder` may have left when killed."""
    ours = {"cells", "machine.json", "data.json"}
    return any(
        entry.name not in ours and entry.suffix != ".partial"
        for entry in path.iterdir()
    )


def _result(path: pathlib.Path, needed: Collection[str]) -> dict[str, Any] | None:
    """The result of a cell, or None if it is missing or damaged."""
    found = _read(path)
    return found if isinstance(found, dict) and found.keys() >= set(needed) else None


def _read(path: pathlib.Path) -> Any:
    """The content of a JSON file, or None if it is missing or damaged."""
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
