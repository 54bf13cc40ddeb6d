"""Where prepared data and compiled programs are kept."""

import os
import pathlib
from typing import Any


def default_data_dir() -> pathlib.Path:
    """Returns where targets are prepared unless the caller says otherwise."""
    if chosen := os.environ.get("DTNH_DATA_DIR"):
        return pathlib.Path(chosen)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dtnh_jax"


def keep_compiled(config: Any) -> None:
    """Keeps compiled steps with the data, for the next run or the rest of this one."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # which jax reads by itself
        directory = (config.data_dir or default_data_dir()).expanduser() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(directory))
