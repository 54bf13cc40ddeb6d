"""Compiles many programs ahead of time, in parallel."""

import collections
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A function `(state, data) -> (state, report)`, and its arguments' shapes."""

    key: tuple[str, ...]
    function: Callable[[Any, Any], tuple[Any, Any]]
    state: Any  # shapes; its memory is given away and written over
    data: Any  # shapes
    # Whether arguments stay that are not used, such as memory to write results to.
    keep_unused: bool = False


class Compiled(NamedTuple):
    """A program that is ready to run."""

    call: Callable[[Any, Any], tuple[Any, Any]]
    memory: dict[str, int]  # bytes
    trace_seconds: float  # of one thread's own time, whatever else runs
    compile_seconds: float  # by the clock, beside whatever else compiles


Found = dict[tuple[str, ...], Compiled | str]


def compiled(program: Program) -> Compiled:
    """Traces and compiles one program."""
    jitted = jax.jit(
        program.function, donate_argnums=0, keep_unused=program.keep_unused
    )
    started = time.thread_time()
    lowered = jitted.lower(program.state, program.data)
    traced = time.thread_time() - started
    started = time.perf_counter()
    call = lowered.compile()
    return Compiled(call, memory(call), traced, time.perf_counter() - started)


def memory(call: Any) -> dict[str, int]:
    """Returns the memory that XLA plans, in bytes; empty if it is not reported."""
    analysis = call.memory_analysis()
    if analysis is None:
        return {}
    temp = analysis.temp_size_in_bytes
    arguments = analysis.argument_size_in_bytes
    outputs = analysis.output_size_in_bytes
    shared = analysis.alias_size_in_bytes
    peak = temp + arguments + outputs - shared
    return {
        "temp": temp,
        "arguments": arguments,
        "outputs": outputs,
        "alias": shared,
        "peak": peak,
    }


def compile_all(
    programs: Iterable[Program], found: Found, *, workers: int, seconds: float
) -> None:
    """Compiles programs in threads, in their order, until the time is over.

    Args:
      programs: the programs; those in `found` are left out.
      found: gets a `Compiled` for each program, or the reason for its absence.
      workers: number of programs that are compiled at once.
      seconds: time limit. Later compilations continue in the background and are not
        used.
    """
    waiting = collections.deque(p for p in programs if p.key not in found)
    keys = [program.key for program in waiting]
    until = time.perf_counter() + seconds
    ready: Found = {}

    def work() -> None:
        while time.perf_counter() < until:
            try:
                program = waiting.popleft()
            except IndexError:
                return
            try:
                ready[program.key] = compiled(program)
            except Exception as error:  # a row that fails must not end the others
                traceback.print_exc()
                ready[program.key] = f"{type(error).__name__}: {first_line(error)}"

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.perf_counter()))
    for key in keys:
        found[key] = ready.get(key, "not compiled in time")


def first_line(error: BaseException) -> str:
    """Returns the first line of a message, cut to a table's width."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:200]


def shapes(tree: Any) -> Any:
    """Returns the shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
