"""Folders of prepared data and compiled programs."""

import os
import pathlib
from typing import Any

# The mark by which backups and `class_folders` recognize caches.
_TAG = "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n"


def default_data_dir() -> pathlib.Path:
    """Returns the default folder of prepared targets."""
    if chosen := os.environ.get("DTNH_DATA_DIR"):
        return pathlib.Path(chosen)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dtnh_jax"


def data_dir(given: str | os.PathLike[str] | None) -> pathlib.Path:
    """Returns the folder of prepared targets, with `~` expanded.

    Raises:
      ValueError: no folder is given, and the user has no home.
    """
    try:
        return expanded(default_data_dir() if given is None else given)
    except ValueError as error:
        if given is not None:
            raise
        raise ValueError(
            "There is no home folder for prepared data: set `--data-dir`, or set "
            "DTNH_DATA_DIR."
        ) from error


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path with `~` expanded.

    Raises:
      ValueError: the home folder is unknown, as in containers without users.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"`{path}` begins with an unknown home folder: give an absolute path."
        ) from error


def keep_compiled(config: Any) -> None:
    """Caches compiled steps beside the data, for this run and later ones."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # JAX reads it by itself
        return
    try:
        directory = data_dir(config.data_dir) / "compiled"
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / _TAG[0]).exists():
            (directory / _TAG[0]).write_text(_TAG[1])
    except (ValueError, OSError):
        return  # no home, or it can not be written: every run compiles again
    jax.config.update("jax_compilation_cache_dir", str(directory))
