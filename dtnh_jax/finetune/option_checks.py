"""Checks that options of several commands share."""

from typing import Any


def flag(name: str) -> str:
    """Returns an option as written on the command line."""
    return "--" + name.replace("_", "-")


def one_of(name: str, value: str, known: Any) -> None:
    """Raises ValueError unless the value of an option is known."""
    if value not in known:
        raise ValueError(
            f"`{flag(name)}` must be one of {', '.join(known)}, got {value!r}."
        )


def at_least(name: str, value: int | None, bound: int) -> None:
    """Raises ValueError for a number that is too small."""
    if value is not None and value < bound:
        raise ValueError(f"`{flag(name)}` must be at least {bound}, got {value}.")
