"""The training step, compiled ahead of time, so that its time and memory are known."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dtnh_jax import conflict_metrics, value_and_gradient_pair
from dtnh_jax.finetune.training import meshes
from dtnh_jax.lm import objectives
from dtnh_jax.lm.methods import Method
from dtnh_jax.lm.networks import Network, Tree
from dtnh_jax.lm.packing import Rows

Metrics = dict[str, Array]
_SEEN = ("cosine", "removed", "trust")  # of `conflict_metrics`, of both gradients


class State(NamedTuple):
    """The state of training."""

    adapters: Tree
    optimizer: optax.OptState
    step: Int[Array, ""]


class Trainer(NamedTuple):
    """Training with one method, at any strength."""

    init: Callable[[Tree, float], State]
    # (state, base weights, strength, rows, gradient of held-out text or None). Base
    # weights are an argument: constants would be folded while it compiles.
    step: Callable[..., tuple[State, Metrics]]


def make_trainer(
    method: Method,
    network: Network,
    optimizer: optax.GradientTransformationExtraArgs,
    with_strength: Callable[[Any, float], Any],
    *,
    accumulate: int = 1,
    mesh: Mesh,
) -> Trainer:
    """Builds the functions that training calls; nothing is compiled yet.

    Args:
      method: one that is trained.
      network: for its structure; weights are arguments.
      optimizer: of the adapters.
      with_strength: puts a strength into a state of the optimizer.
      accumulate: parts that a batch is cut into, one after the other; gradients are
        averaged over its tokens, then resolved.
      mesh: what states are spread over.
    """

    def init(adapters: Tree, strength: float) -> State:
        state = with_strength(optimizer.init(adapters), strength)
        return State(adapters, state, jnp.zeros([], jnp.int32))

    def gradients(adapters, base, strength, rows):
        """Returns metrics, and gradients as arguments of the optimizer's update."""
        if method.regularizer is None:
            of = jax.value_and_grad(objectives.loss, argnums=1)
            value, g = of(network, adapters, base, rows)
            return {"loss": value}, {"updates": g}

        def both(adapters):
            return objectives.loss_and_regularizer(
                str(method.regularizer), network, adapters, base, rows
            )

        if method.gradients == "sum":

            def added(adapters):
                value, penalty = both(adapters)
                return value + strength * penalty, (value, penalty)

            of = jax.value_and_grad(added, has_aux=True)
            (_, (value, penalty)), g = of(adapters)
            found = {"updates": g}
        else:
            (value, penalty), pair = value_and_gradient_pair(both)(adapters)
            found = {"updates": pair.loss, "regularizer_grads": pair.regularizer}
        return {"loss": value, "regularizer": penalty}, found

    def step(
        state: State,
        base: Tree,
        strength: Float[Array, ""],
        rows: Rows,
        held_out_grads: Tree | None,
    ) -> tuple[State, Metrics]:
        metrics, found = _averaged(
            functools.partial(gradients, state.adapters, base, strength),
            rows,
            accumulate,
        )
        if held_out_grads is not None:
            found["held_out_grads"] = held_out_grads
        updates, optimizer_state = optimizer.update(
            found.pop("updates"), state.optimizer, state.adapters, **found
        )
        if "regularizer_grads" in found:
            seen = conflict_metrics(optimizer_state)
            metrics |= {key: seen[key] for key in _SEEN if key in seen}
        adapters: Any = optax.apply_updates(state.adapters, updates)
        new = State(adapters, optimizer_state, state.step + 1)
        return meshes.constrain(mesh, new), meshes.whole(mesh, metrics)

    return Trainer(init, step)


def held_out_gradient(
    network: Network, accumulate: int, mesh: Mesh
) -> Callable[[Tree, Tree, Rows], tuple[Metrics, Tree]]:
    """Returns a function of (adapters, base weights, rows): the judge's gradient.

    It is a program of its own, so that its activations are not in memory together with
    those of a step.
    """

    def gradient(adapters: Tree, base: Tree, rows: Rows) -> tuple[Metrics, Tree]:
        def of_rows(rows):
            of = jax.value_and_grad(objectives.held_out_error, argnums=1)
            value, h = of(network, adapters, base, rows)
            return {"held_out_error": value}, h

        metrics, h = _averaged(of_rows, rows, accumulate)
        return meshes.whole(mesh, metrics), meshes.constrain(mesh, h)

    return gradient


def _averaged(of_rows: Callable[[Rows], Any], rows: Rows, parts: int) -> Any:
    """Averages over the tokens of a batch what a function makes of its parts."""
    if parts == 1:
        return of_rows(rows)
    cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
    total = jnp.sum(rows.weights)
    total = jnp.where(total == 0, 1.0, total)

    def add(sums, part):
        share = jnp.sum(part.weights) / total
        found = of_rows(part)
        return jax.tree.map(lambda s, x: s + share * x, sums, found), None

    shapes = jax.eval_shape(of_rows, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, cut)[0]
