"""Coordinates several processes that train together.

Every process runs the same program. Only the first writes results and prints; it sends
the content of the run folder to the others.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.runs.interrupt import stop_signals

_T = TypeVar("_T")
LOST = 75  # exit status of a failure that may not recur


def start(config: Config) -> None:
    """Joins the other processes, if the command is run with `--distributed`.

    Raises:
      ValueError: JAX can not detect or reach the other processes.
    """
    if not config.distributed:
        return
    # Steps start at 1 in every training, which that service can not count.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process_id,
            heartbeat_timeout_seconds=config.heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"`--distributed` needs a cluster that JAX knows, or `--coordinator`, "
            f"`--processes` and `--process-id`: {error}"
        ) from error


def is_first() -> bool:
    """Returns whether this process writes and prints."""
    return jax.process_index() == 0


def on_first(function: Callable[[], Any]) -> Any:
    """Calls a function in the first process, and returns its result in all.

    Args:
      function: a function whose result can be stored as JSON.

    Raises:
      ValueError: in all processes, if the function raised a ValueError or an OSError.
    """
    if jax.process_count() == 1:
        return function()
    result, trouble = None, None
    if is_first():
        try:
            result = function()
        except (ValueError, OSError) as error:
            trouble = str(error)
    result, trouble = json.loads(_from_first(json.dumps([result, trouble])))
    if trouble is not None:
        raise ValueError(trouble)
    return result


def first_before_others(function: Callable[[], _T]) -> _T:
    """Calls a function that prepares files, in the first process before the others."""
    if jax.process_count() == 1:
        return function()
    made: list[_T] = []
    on_first(lambda: made.append(function()))
    return made[0] if made else function()


def is_same(text: str) -> bool:
    """Returns whether all processes have the same text; all of them must call this."""
    if jax.process_count() == 1:
        return True
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool((multihost_utils.process_allgather(own) == own).all())


def _from_first(text: str) -> str:
    own = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(own))))
    # Arrays must have the same shape in all processes.
    buffer = own if is_first() else np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(buffer)).decode()


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Yields a function that returns the signal to stop at, or None, between steps.

    All processes must call it. They then stop at the same step, whichever got the
    signal.
    """
    with stop_signals() as received:

        def stop_at() -> int | None:
            own = received[0] if received else 0
            if jax.process_count() == 1:
                return own or None
            return int(multihost_utils.process_allgather(np.int32(own)).max()) or None

        yield stop_at


def leave(status: int) -> int:
    """Disconnects from the other processes after all have finished."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()
    return status


def leave_at_once(error: BaseException, folder: Any) -> int:
    """Ends the process without waiting for others, which may be lost."""
    print(
        f"dtnh: process {jax.process_index()} can not continue, probably because "
        f"another was lost ({' '.join(str(error).split())[:300]}). Finished work is in "
        f"{folder}; the same commands resume from there.",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(LOST)
