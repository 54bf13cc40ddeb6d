"""Messages and exit statuses of commands that stop early."""

import sys
from typing import Any

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130  # exit statuses


def refuse(message: str) -> int:
    """Prints in one line why nothing was done; returns the exit status."""
    print(f"dtnh: {' '.join(message.split())}", file=sys.stderr)
    return MISTAKE


def failed(error: BaseException, folder: Any) -> int:
    """Prints in one line why the command stopped; returns the exit status."""
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        at = f" to {error.filename}" if error.filename else ""
        reason = f"writing{at} failed: {error.strerror}"
    print(
        f"dtnh: {' '.join(reason.split()).rstrip('.')}. Finished work is in {folder}; "
        "the same command resumes from there.",
        file=sys.stderr,
    )
    return FAILED


def interrupted(error: BaseException, folder: Any) -> int:
    """Prints how to resume; returns the exit status of the interruption."""
    print(
        f"Interrupted; finished work is in {folder}. "
        "The same command resumes from there.",
        file=sys.stderr,
    )
    return getattr(error, "exit_status", INTERRUPTED)
