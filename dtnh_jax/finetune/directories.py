"""Where prepared data and compiled programs are kept."""

import os
import pathlib
from typing import Any

# By which backups, and `class_folders`, know what can be made again.
_TAG = "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n"


def default_data_dir() -> pathlib.Path:
    """Returns where targets are prepared unless the caller says otherwise."""
    if chosen := os.environ.get("DTNH_DATA_DIR"):
        return pathlib.Path(chosen)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dtnh_jax"


def data_dir(given: str | os.PathLike[str] | None) -> pathlib.Path:
    """Returns where targets are prepared, with the user's home in it.

    Raises:
      ValueError: none is given, and the user has no home.
    """
    try:
        return expanded(default_data_dir() if given is None else given)
    except ValueError as error:
        if given is not None:
            raise
        raise ValueError(
            "There is no home folder to prepare data in: give `--data-dir`, or set "
            "DTNH_DATA_DIR."
        ) from error


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path with the home of `~` in it.

    Raises:
      ValueError: nobody knows where that is, as in containers without users.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"`{path}` begins with a home folder that is not known: give a whole path."
        ) from error


def keep_compiled(config: Any) -> None:
    """Keeps compiled steps with the data, for the next run or the rest of this one."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # which jax reads by itself
        return
    try:
        directory = data_dir(config.data_dir) / "compiled"
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / _TAG[0]).exists():
            (directory / _TAG[0]).write_text(_TAG[1])
    except (ValueError, OSError):
        return  # there is no home, or it can not be written: every run compiles
    jax.config.update("jax_compilation_cache_dir", str(directory))
