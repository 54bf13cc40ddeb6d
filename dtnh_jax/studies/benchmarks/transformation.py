"""Times of the transformation alone, relative to the time to move its bytes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dtnh_jax import GradientPair, add_regularizer, dtnh
from dtnh_jax.regularizers import l2_sp
from dtnh_jax.studies.benchmarks.by_hand import by_hand
from dtnh_jax.studies.benchmarks.rows import Row
from dtnh_jax.studies.benchmarks.timing import interleaved, spread

GROUP = "transformation"
_BLOCKS = 12
_BYTES = 4  # of a number
TARGET = 1.25  # of the floor, and of growth in proportion
_COPY, _BY_HAND, _DTNH = "copy", "DTNH by hand", "DTNH"
# Passes over memory: of a copy; of the inner products of two trees and their sum; and
# of the same if one of the trees is the difference of two others.
_PASSES = {_COPY: 2, _BY_HAND: 5, _DTNH: 5, "L2-SP with DTNH": 7}


def shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Returns shapes of arrays with about `size` numbers in total, like a network's.

    Example:
      >>> shapes(10_000)["in"], count(10_000)
      ((10, 40), 10200)
    """
    # A block has 8 d^2 + 5 d numbers.
    d = max(1, round((size / _BLOCKS / 8) ** 0.5 - 5 / 16))
    block = {"in": (d, 4 * d), "bias": (4 * d,), "out": (4 * d, d), "scale": (d,)}
    return {
        f"{name}_{number}" if number else name: shape
        for number in range(_BLOCKS)
        for name, shape in block.items()
    }


def count(size: int) -> int:
    """Returns how many numbers `shapes(size)` have."""
    return sum(math.prod(shape) for shape in shapes(size).values())


def contestants(size: int) -> dict[str, Callable[[], Any]]:
    """Returns the timed functions of one size: a copy, and three transformations.

    All write to existing memory, as in a training step with donated buffers, because an
    allocation takes longer than to fill the memory.
    """
    rng = np.random.default_rng(0)
    loss, other, source = (
        {
            name: jnp.array(rng.standard_normal(shape, np.float32))
            for name, shape in shapes(size).items()
        }
        for _ in range(3)
    )
    resolve, plain, pull = dtnh(0.1), by_hand(0.1), l2_sp(source)

    def copy(out, loss):
        del out
        return jax.tree.map(lambda x: 1.5 * x, loss), ()

    def of_pair_by_hand(out, loss, other, state):
        del out
        return plain.update(GradientPair(loss, other), state)

    def of_pair(out, loss, other, state):
        del out
        return resolve.update(loss, state, regularizer_grads=other)

    def of_weights(out, loss, params, pull, state):
        del out
        return add_regularizer(pull, 0.1).update(loss, state, params)

    state = resolve.init(loss)
    arguments = {
        _COPY: (copy, (loss,)),
        _BY_HAND: (of_pair_by_hand, (loss, other, plain.init(loss))),
        _DTNH: (of_pair, (loss, other, state)),
        "L2-SP with DTNH": (of_weights, (loss, other, pull, state)),
    }
    return {
        name: _repeated(function, given, loss)
        for name, (function, given) in arguments.items()
    }


def _repeated(
    function: Callable[..., Any], arguments: Sequence[Any], like: optax.Params
) -> Callable[[], Any]:
    """Returns a call that writes updates to the memory of the previous ones."""
    compiled = jax.jit(function, donate_argnums=0, keep_unused=True)
    out = jax.tree.map(jnp.zeros_like, like)

    def call():
        nonlocal out
        out, state = compiled(out, *arguments)
        return out, state

    return call


def measure(sizes: Sequence[int], rounds: int) -> list[Row]:
    """Measures bytes per second, and times relative to the floor and to other sizes."""
    ordered = sorted(sizes)
    numbers = {size: count(size) for size in ordered}
    calls = {
        (size, name): call
        for size in ordered
        for name, call in contestants(size).items()
    }
    by_label = {f"{size} {name}": call for (size, name), call in calls.items()}
    seconds = interleaved(by_label, rounds)
    rows = []
    for size, name in calls:
        ours, copied = seconds[f"{size} {name}"], seconds[f"{size} {_COPY}"]
        passes = _PASSES[name]
        moved = spread(1e-9 * passes * _BYTES * numbers[size] / ours)
        row = Row(GROUP, _title(size), name, moved, "GB/s")
        if name == _COPY:
            rows.append(row)
            continue
        floor = copied * passes / _PASSES[_COPY]
        target = None if name == _BY_HAND else TARGET
        compared = [(f"{passes} passes over memory", floor, target)]
        before = ordered[ordered.index(size) - 1]
        if target and before < size:
            share = numbers[size] / numbers[before]
            in_proportion = share * seconds[f"{before} {name}"]
            title = f"in proportion to {_title(before)}"
            compared.append((title, in_proportion, target))
        if name == _DTNH:
            compared.append((_BY_HAND, seconds[f"{size} {_BY_HAND}"], None))
        rows += [
            row._replace(against=label, ratio=spread(ours / other), target=target)
            for label, other, target in compared
        ]
    return rows


def _title(size: int) -> str:
    return f"{size / 1e6:g}M parameters"
