"""Checkpoints of a training: written by Orbax, verified by digests.

A list of files with their digests is written last to a step's folder. So truncated,
overwritten or corrupted files are detected before they are used.
"""

import hashlib
import json
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from dtnh_jax import _files

_DIGESTS = "digests.json"


class NotSavedError(OSError):
    """A checkpoint could not be written."""


def open_checkpoints(path: pathlib.Path, every: int) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints, which keeps the last two.

    Args:
      path: a new or existing folder that all processes can access.
      every: steps between two checkpoints.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        save_interval_steps=every,
        # Not in the background: the next step would donate the arrays being written.
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(path.absolute(), options=options)


def save(
    manager: ocp.CheckpointManager, step: int, arrays: Any, *, force: bool = False
) -> None:
    """Saves a step if one is due, or always with `force`.

    Raises:
      NotSavedError: an OSError, for example because the disk is full. Earlier
        checkpoints are unchanged.
    """
    path = pathlib.Path(manager.directory) / str(step)
    try:
        if not manager.save(step, args=ocp.args.StandardSave(arrays), force=force):
            return
        if jax.process_index() == 0:
            digests = {str(f.relative_to(path)): _digest(f) for f in _listed(path)}
            for written in (path.parent, *path.rglob("*")):
                _files.sync(written)
            _files.replace(path / _DIGESTS, json.dumps(digests))
    except jax.errors.JaxRuntimeError:
        raise  # another process was lost
    except (OSError, ValueError, RuntimeError) as error:  # Orbax raises any of these
        raise NotSavedError(
            f"the checkpoint of step {step} can not be written to {path.parent}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def newest_whole(path: pathlib.Path) -> tuple[int | None, list[str]]:
    """Finds the newest intact checkpoint, and deletes later, damaged ones.

    Args:
      path: folder of checkpoints, which may be missing.

    Returns:
      The step, or None, and a warning for each deleted checkpoint.
    """
    warnings = []
    names = [f.name for f in path.iterdir()] if path.is_dir() else []
    for step in sorted((int(name) for name in names if name.isdigit()), reverse=True):
        damage = _damage(path / str(step))
        if damage is None:
            return step, warnings
        warnings.append(
            f"the checkpoint of step {step} is skipped: {damage} in "
            f"{path / str(step)} is damaged"
        )
        shutil.rmtree(path / str(step))
    return None, warnings


def _damage(path: pathlib.Path) -> str | None:
    """Returns the name of the first damaged file, or None."""
    try:
        digests = json.loads((path / _DIGESTS).read_text())
        for name, digest in digests.items():
            if _digest(path / name) != digest:
                return name
    except FileNotFoundError as error:
        return pathlib.Path(error.filename).name
    except (OSError, ValueError, AttributeError):
        return _DIGESTS
    return None


def _listed(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
