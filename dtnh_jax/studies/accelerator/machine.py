"""Measures the machine's limits: bandwidth and matrix products."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dtnh_jax.studies.accelerator.contest import Contest, Entry
from dtnh_jax.studies.accelerator.devices import dtype_of
from dtnh_jax.studies.accelerator.programs import Program
from dtnh_jax.studies.accelerator.rows import Results, Row
from dtnh_jax.studies.accelerator.timing import spread

GROUP = "machine"
_COPIES = ("copy", "scaled copy")
_PRODUCT = "matrix product"


def contest(size: int, side: int, dtype: str) -> Contest:
    """Returns the contest of two copies, by runtime and by kernel, and a product.

    Args:
      size: number of entries of the copied array.
      side: number of rows and columns of the matrices.
      dtype: dtype of both.
    """
    x = jax.ShapeDtypeStruct((size,), dtype_of(dtype))
    matrix = jax.ShapeDtypeStruct((side, side), dtype_of(dtype))
    data = {"x": x, "matrix": matrix}

    def entry(name, function, like):
        program = Program((GROUP, dtype, name), function, like, data, keep_unused=True)
        start = functools.partial(jnp.full, like.shape, jnp.nan, like.dtype)
        return Entry(name, (program,), start)

    entries = (
        entry("copy", lambda state, data: (jnp.copy(data["x"]), ()), x),
        entry("scaled copy", lambda state, data: (1.5 * data["x"], ()), x),
        entry(
            _PRODUCT, lambda state, data: (data["matrix"] @ data["matrix"], ()), matrix
        ),
    )
    moved = 2 * dtype_of(dtype).itemsize * size
    note = functools.partial(_note, moved, 2 * side**3)
    return Contest(GROUP, dtype, entries, lambda: _data(data), note)


def bandwidth(results: Results, dtype: str) -> float | None:
    """Returns the largest measured bytes per second of a copy, or None."""
    rows = [results.row(GROUP, name, dtype) for name in _COPIES]
    return max((row.more.get("GB/s", 0.0) * 1e9 for row in rows), default=0.0) or None


def _data(like: dict[str, Any]) -> dict[str, Any]:
    key = jax.random.key(0)
    # A key for each, since numbers that are alike can be faster.
    return {
        name: jax.jit(jax.random.normal, static_argnums=(1, 2))(key, x.shape, x.dtype)
        for name, x in like.items()
    }


def _note(
    moved: int, operations: int, row: Row, seconds: list[float], runs: Any
) -> None:
    del runs
    if row.name == _PRODUCT:
        row.more["TFLOP/s"] = spread([1e-12 * operations / s for s in seconds]).median
    else:
        row.more["GB/s"] = spread([1e-9 * moved / s for s in seconds]).median
