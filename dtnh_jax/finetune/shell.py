"""What commands say to the shell, and where they keep what they compiled."""

import os
import sys
from typing import Any

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130  # exit statuses


def refuse(message: str) -> int:
    """Says in one line why nothing was done."""
    print(f"dtnh: {' '.join(message.split())}", file=sys.stderr)
    return MISTAKE


def failed(error: BaseException, folder: Any) -> int:
    """Says in one line why it stopped, and what is left."""
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        at = f" to {error.filename}" if error.filename else ""
        reason = f"writing{at} failed: {error.strerror}"
    print(
        f"dtnh: {' '.join(reason.split()).rstrip('.')}. What is done is in {folder}; "
        "the same command goes on from there.",
        file=sys.stderr,
    )
    return FAILED


def interrupted(error: BaseException, folder: Any) -> int:
    """Says how to go on, and returns the exit status of whatever stopped it."""
    print(
        f"Interrupted; what is done is in {folder}. "
        "The same command goes on from there.",
        file=sys.stderr,
    )
    return getattr(error, "exit_status", INTERRUPTED)


def keep_compiled(config: Any) -> None:
    """Keeps compiled steps with the data, for the next run or the rest of this one."""
    import jax

    from dtnh_jax.finetune.targets import default_data_dir

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # which jax reads by itself
        directory = (config.data_dir or default_data_dir()).expanduser() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(directory))
