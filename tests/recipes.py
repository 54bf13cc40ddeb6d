"""The recipes of the documentation, and how their checks train again.

A check gets the names that a recipe's block leaves behind. It trains again, with the
recipe's own step, and compares every step on the way with the formula in NumPy.
"""

import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import optax

from dtnh_jax import value_and_gradient_pair

TEXT = (pathlib.Path(__file__).parents[1] / "notebooks" / "recipes.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {
    section.partition("\n")[0]: section.partition("\n")[2]
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
}

Names = dict[str, Any]


def combined(function: Callable[..., Any], *trees):
    """Maps trees to one of NumPy arrays in double precision."""
    return jax.tree.map(
        lambda *xs: function(*[np.asarray(x, np.float64) for x in xs]), *trees
    )


def minus(x, y):
    return combined(np.subtract, x, y)


def times(factor, x):
    return combined(lambda a: factor * a, x)


def dot(x, y) -> float:
    return float(sum(map(np.sum, jax.tree.leaves(combined(np.multiply, x, y)))))


def cosine(x, y) -> float:
    lengths = (dot(x, x) * dot(y, y)) ** 0.5
    return dot(x, y) / lengths if lengths else 0.0


def projected(g, r):
    """What DTNH leaves of `r`: all but what is against `g`."""
    against = min(0.0, dot(g, r)) / dot(g, g)
    return combined(lambda a, b: b - against * a, g, r)


def resolved(g, *rs):
    return combined(lambda *xs: sum(xs), g, *[projected(g, r) for r in rs])


def near(found, expected, atol=3e-6):
    chex.assert_trees_all_equal_shapes(found, expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=atol)


class At(NamedTuple):
    """A place on the way of a training: what a loop throws away."""

    params: Any
    state: Any
    batch: Any
    new_params: Any
    new_state: Any
    seen: Any  # what else a step returned


def walk(step: Callable[..., Any], params, state, batches: Iterable[Any]) -> list[At]:
    """Trains again, as the loop of a recipe did."""
    steps = []
    for batch in batches:
        new_params, new_state, *seen = step(params, state, *batch)
        steps.append(At(params, state, batch, new_params, new_state, seen))
        params, state = new_params, new_state
    return steps


def gradient(loss, *data):
    """The gradient at a place of the loss of its batch, or of the data of all steps."""
    compiled = jax.jit(lambda params, *batch: jax.grad(loss)(params, *batch, *data))
    return lambda at: compiled(at.params, *at.batch)


def gradient_pair(objective, *data):
    """The same for both gradients of an objective."""
    pair = value_and_gradient_pair(objective)
    compiled = jax.jit(lambda params, *batch: pair(params, *batch, *data)[1])
    return lambda at: compiled(at.params, *at.batch)


def trained(tx, gradients, params, batches) -> list[At]:
    """Trains with another transformation than a recipe's."""

    @jax.jit
    def step(params, state, *batch):
        updates, state = tx.update(gradients(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    return walk(step, params, tx.init(params), batches)


# Recipes of trainers, and the packages beside Flax that they need.
TRAINERS = {
    "Flax linen, as in its ImageNet example": (),
    "NNX, as in Flax's MNIST example": (),
    "tunix, PeftTrainer": ("tunix", "qwix"),
    "equimo": ("equimo",),
    "kauldron": ("kauldron",),
    "kauldron: a second gradient": ("kauldron",),
}


def code_of(title: str) -> str:
    """The block of a recipe that is to be run."""
    return next(
        code for kind, code in FENCE.findall(SECTIONS[title]) if kind == "python"
    )


def run(title: str) -> Names:
    """Runs the block of a recipe as a program of its own, and returns its names."""
    names: Names = {"__name__": "__main__"}
    exec(compile(code_of(title), title, "exec"), names)
    return names
