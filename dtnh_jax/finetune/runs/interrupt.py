"""Ctrl-C between two steps, not in the middle of one."""

import contextlib
import signal
from collections.abc import Iterator


class Interrupted(Exception):
    """Training stopped at a signal, after saving."""

    def __init__(self, signal_number: int):
        super().__init__(f"signal {signal_number}")
        self.exit_status = 128 + signal_number


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects the first Ctrl-C or SIGTERM, to stop between steps; a second one acts.

    A step donates its state, so the middle of one is no place to stop and save.
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
        except ValueError:  # not the main thread, which alone gets signals
            break
    try:
        yield received
    finally:
        restore()
