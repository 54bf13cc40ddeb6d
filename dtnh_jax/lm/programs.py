"""Compiled programs, and the compiler's estimate of their memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A compiled function for given shapes."""

    call: Callable[..., Any]
    temporary: int | None  # bytes beside arguments and results, if known


class Programs:
    """A function compiled once for each structure and shapes of its arguments."""

    def __init__(self, function: Callable[..., Any], *, donate: tuple[int, ...] = ()):
        self._jitted = jax.jit(function, donate_argnums=donate)
        self._compiled: dict[Any, Program] = {}

    def get(self, *args: Any) -> Program:
        """Returns the program for arguments with these shapes."""
        leaves, treedef = jax.tree.flatten(args)
        key = treedef, tuple((x.shape, str(x.dtype)) for x in leaves)
        if key not in self._compiled:
            compiled = self._jitted.lower(*args).compile()
            self._compiled[key] = Program(compiled, _temporary(compiled))
        return self._compiled[key]


def _temporary(compiled: Any) -> int | None:
    try:
        return int(compiled.memory_analysis().temp_size_in_bytes)
    except (AttributeError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None  # the backend does not report it
