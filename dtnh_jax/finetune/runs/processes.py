"""Several processes that train as one: what they agree on, and who writes.

Every process runs the same program. The first one alone writes results and prints, and
what it finds in the run folder the others are told.
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
LOST = 75  # exit status where it may go well the next time


def start(config: Config) -> None:
    """Joins the other processes, if the command is run with `--distributed`.

    Raises:
      ValueError: JAX can not find out who they are, or does not reach them.
    """
    if not config.distributed:
        return
    # Steps begin at 1 in every training, which is not what that service can count.
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
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def on_first(function: Callable[[], Any]) -> Any:
    """Calls a function in the first process, and returns its result in all.

    Args:
      function: its result has to be as JSON has it.

    Raises:
      ValueError: in all processes, if the function raised one, or an OSError.
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
    """Calls a function that prepares files: once it has, the others find them."""
    if jax.process_count() == 1:
        return function()
    made: list[_T] = []
    on_first(lambda: made.append(function()))
    return made[0] if made else function()


def is_same(text: str) -> bool:
    """Whether all processes have the same text; all of them have to ask."""
    if jax.process_count() == 1:
        return True
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool((multihost_utils.process_allgather(own) == own).all())


def _from_first(text: str) -> str:
    own = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(own))))
    # Arrays have to have one shape everywhere.
    buffer = own if is_first() else np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(buffer)).decode()


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Yields a function to call between steps: the signal to stop at, or None.

    It has to be called by all processes, which then stop at the same step, whichever of
    them got the signal.
    """
    with stop_signals() as received:

        def stop_at() -> int | None:
            own = received[0] if received else 0
            if jax.process_count() == 1:
                return own or None
            return int(multihost_utils.process_allgather(np.int32(own)).max()) or None

        yield stop_at


def leave(status: int) -> int:
    """Ends what `start` began, after an orderly end of all processes."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()
    return status


def leave_at_once(error: BaseException, folder: Any) -> int:
    """Ends the process without waiting for others, which may be gone."""
    print(
        f"dtnh: process {jax.process_index()} can not go on, which is how the loss of "
        f"another one looks ({' '.join(str(error).split())[:300]}). What is done is in "
        f"{folder}; the same commands go on from there.",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(LOST)
