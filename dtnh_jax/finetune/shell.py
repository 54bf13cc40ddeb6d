"""What commands say to the shell when they stop early."""

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
