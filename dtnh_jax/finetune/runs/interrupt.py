"""Handles Ctrl-C and SIGTERM between two steps."""

import contextlib
import signal
from collections.abc import Iterator


class Interrupted(Exception):
    """A signal stopped training, after a checkpoint."""

    def __init__(self, signal_number: int):
        super().__init__(f"signal {signal_number}")
        self.exit_status = 128 + signal_number


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Records the first Ctrl-C or SIGTERM; a second one acts at once.

    A step donates its state, so training can only stop and save between steps.
    """
    received: list[int] = []
    previous = {}

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def remember(number, frame):
        del frame
        received.append(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, remember)
        except ValueError:  # only the main thread can handle signals
            break
    try:
        yield received
    finally:
        restore()
