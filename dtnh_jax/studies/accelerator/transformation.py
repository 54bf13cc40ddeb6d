"""Times of the transformation alone, relative to the time to move its bytes."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import dtnh_jax
from dtnh_jax.regularizers import l2_sp
from dtnh_jax.studies.accelerator.contest import Contest, Entry, Steps, refused
from dtnh_jax.studies.accelerator.devices import dtype_of, same_structure
from dtnh_jax.studies.accelerator.programs import Program
from dtnh_jax.studies.accelerator.rows import Row
from dtnh_jax.studies.accelerator.timing import spread

TARGET = 1.25  # times the floor
STRENGTH = 0.1
_BLOCKS, _FEW = 12, 1_000_000  # numbers, below which there is one block
COPY, BY_HAND, GLOBAL = "scaled copy", "DTNH by hand", "DTNH global"
PULL_SUM, PULL_DTNH = "L2-SP, sum by hand", "L2-SP with DTNH"
CORE = (COPY, BY_HAND, GLOBAL, PULL_SUM, PULL_DTNH)
# How often memory of the gradients' dtype is read or written at least: two reads for
# inner products, two for the sum, one write; L2-SP reads a third tree each time, and
# numbers that are resolved one by one need no inner products first.
PASSES = {
    COPY: 2,
    BY_HAND: 5,
    GLOBAL: 5,
    PULL_SUM: 4,
    PULL_DTNH: 7,
    "DTNH leaf": 5,
    "DTNH unit": 5,
    "DTNH element": 3,
    "DTNH labels": 5,
    "DTNH, moving average": 5,
}
# The same in single precision, for state: two reads and a write.
_PASSES_IN_SINGLE = {"DTNH, moving average": 3}
# The comparisons of rows; all others are compared with `GLOBAL`.
_AGAINST = {COPY: (), BY_HAND: (), GLOBAL: (BY_HAND,), PULL_DTNH: (PULL_SUM,)}


def leaf_shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Returns shapes of arrays with about `size` numbers in total, like a network's.

    Example:
      >>> leaf_shapes(10_000)["in_0"]
      (35, 140)
    """
    blocks = _BLOCKS if size > _FEW else 1
    # A block has 8 d^2 + 5 d numbers.
    d = max(1, round((size / blocks / 8) ** 0.5 - 5 / 16))
    block = {"in": (d, 4 * d), "bias": (4 * d,), "out": (4 * d, d), "scale": (d,)}
    return {
        f"{name}_{number}": shape
        for number in range(blocks)
        for name, shape in block.items()
    }


def count(size: int) -> int:
    """Returns how many numbers `leaf_shapes(size)` have."""
    return sum(math.prod(shape) for shape in leaf_shapes(size).values())


def group(size: int) -> str:
    """Returns the title of the rows of one size."""
    return f"transformation, {size / 1e6:g}M parameters"


def contest(size: int, dtype: str, bandwidth: Callable[[], float | None]) -> Contest:
    """Returns the contest of one size.

    All entries write to existing memory, as in a training step with donated buffers.

    Args:
      size: approximate number of parameters.
      dtype: dtype of the gradients.
      bandwidth: returns the bytes per second of a large copy, once it is known.
    """
    like = {
        name: jax.ShapeDtypeStruct(shape, dtype_of(dtype))
        for name, shape in leaf_shapes(size).items()
    }
    pull = jax.eval_shape(_pull, like)
    labels = {name: name.rpartition("_")[2] for name in like}

    def resolving(**options: Any) -> Any:
        return lambda: _of_pair(dtnh_jax.dtnh(STRENGTH, **options))

    variants: dict[str, Callable[[], Any]] = {
        COPY: lambda: (None, _copy),
        BY_HAND: lambda: (None, _by_hand),
        GLOBAL: resolving(),
        PULL_SUM: lambda: (None, _pull_by_hand),
        PULL_DTNH: lambda: _pulled(pull),
        "DTNH leaf": resolving(scope="leaf"),
        "DTNH unit": resolving(scope="unit"),
        "DTNH element": resolving(scope="element"),
        "DTNH labels": resolving(scope=labels),
        "DTNH, moving average": resolving(ema_decay=0.9),
        "never_hurt": lambda: _of_pair(dtnh_jax.never_hurt(STRENGTH)),
        "DTNH, held-out gradient": lambda: _of_pair(
            dtnh_jax.dtnh(STRENGTH), held_out=True
        ),
    }
    entries = []
    for name, make in variants.items():
        try:
            tx, function = make()
            state = () if tx is None else jax.eval_shape(tx.init, like)
        except Exception as error:  # a variant that fails must not end the others
            entries.append(refused(name, error))
            continue
        program = Program(
            ("transformation", str(size), dtype, name),
            function,
            (like, state),
            {key: {"g": like, "r": like, "pull": pull}[key] for key in _reads(name)},
            keep_unused=True,
        )
        start = functools.partial(_start, like, tx)
        against = _AGAINST.get(name, (GLOBAL,))
        entries.append(
            Entry(name, (program,), start, against=against, reads=_reads(name))
        )
    note = functools.partial(_note, size, dtype_of(dtype).itemsize, bandwidth)
    data = functools.partial(_data, like, pull)
    return Contest(group(size), dtype, tuple(entries), data, note)


def _reads(name: str) -> tuple[str, ...]:
    """Returns the arrays that a variant reads; others would count as its memory."""
    few = {COPY: ("g",), PULL_SUM: ("g", "r", "pull"), PULL_DTNH: ("g", "r", "pull")}
    return few.get(name, ("g", "r"))


def _pull(source: Any) -> Any:
    """Returns L2-SP without its value, which would need another source."""
    return l2_sp(source)._replace(value=jax.tree_util.Partial(_no_value))


def _no_value(params: Any) -> Array:
    del params
    return jnp.zeros([])


def _of_pair(tx: optax.GradientTransformationExtraArgs, held_out: bool = False) -> Any:
    def update(state, data):
        extra = {"held_out_grads": data["r"]} if held_out else {}
        pair = dtnh_jax.GradientPair(data["g"], data["r"])
        return tx.update(pair, state[1], data["r"], **extra), ()

    return tx, update


def _pulled(pull: Any) -> Any:
    """Returns DTNH of L2-SP, whose source is an argument; `r` is the weights."""

    def update(state, data):
        tx = dtnh_jax.add_regularizer(data["pull"], STRENGTH)
        return tx.update(data["g"], state[1], data["r"]), ()

    return dtnh_jax.add_regularizer(pull, STRENGTH), update


def _copy(state: Any, data: Any) -> Any:
    del state
    return (jax.tree.map(lambda g: 1.5 * g, data["g"]), ()), ()


def _by_hand(state: Any, data: Any) -> Any:
    del state
    return (by_hand(data["g"], data["r"]), ()), ()


def _pull_by_hand(state: Any, data: Any) -> Any:
    del state
    pull = data["pull"].gradient(data["r"])
    return (jax.tree.map(lambda g, r: g + STRENGTH * r, data["g"], pull), ()), ()


def by_hand(g: Any, r: Any) -> Any:
    """Computes DTNH in four lines, without this library."""
    gg, gr = _inner(g, g), _inner(g, r)
    share = jnp.minimum(gr, 0) / gg
    new = jax.tree.map(lambda g, r: g + STRENGTH * (r - share * g), g, r)
    return jax.tree.map(lambda x, g: x.astype(g.dtype), new, g)


def _inner(left: Any, right: Any) -> Array:
    single = jnp.float32
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(single) * y.astype(single)), left, right
    )
    return sum(jax.tree.leaves(products), jnp.zeros([], single))


def _start(like: Any, tx: Any) -> Any:
    """Returns output memory, filled so that unwritten parts show, and a state."""
    out = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), like)
    # Copies, since states may hold one array twice, which cannot be given away twice.
    return out, () if tx is None else jax.tree.map(jnp.copy, tx.init(out))


def _data(like: Any, pull: Any) -> Any:
    """Returns two gradients in conflict, and a regularizer with its own source."""
    g, noise, source = (_random(like, number) for number in range(3))
    r = jax.tree.map(lambda g, x: x - 0.1 * g, g, noise)
    return {"g": g, "r": r, "pull": same_structure(_pull(source), pull)}


def _random(like: Any, seed: int) -> Any:
    keys = iter(jax.random.split(jax.random.key(seed), len(like)))
    return {n: _normal(next(keys), x.shape, x.dtype) for n, x in like.items()}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.normal(key, shape, dtype)


def _note(
    size: int,
    itemsize: int,
    bandwidth: Callable[[], float | None],
    row: Row,
    seconds: list[float],
    runs: Mapping[str, Steps],
) -> None:
    """Adds a row's distance from the floor, and the error of its result."""
    known, passes = bandwidth(), PASSES.get(row.name)
    if known and passes:
        single = _PASSES_IN_SINGLE.get(row.name, 0)
        floor = (passes * itemsize + single * 4) * count(size) / known
        title = f"of {passes + single} passes"
        row.against[title] = spread([each / floor for each in seconds])
        if row.name == GLOBAL:
            row.more["at most"] = TARGET
    if row.name == GLOBAL and BY_HAND in runs:
        difference = _distance(runs[GLOBAL].state[0], runs[BY_HAND].state[0])
        row.more["differs from by hand by"] = float(difference)


@jax.jit
def _distance(ours: Any, theirs: Any) -> Array:
    """Returns the norm of a difference, relative to the second norm."""
    single = jnp.float32
    ours, theirs = (
        jax.tree.map(lambda x: x.astype(single), tree) for tree in (ours, theirs)
    )
    apart = jax.tree.map(jnp.subtract, ours, theirs)
    return jnp.sqrt(_inner(apart, apart) / _inner(theirs, theirs))
