"""Training steps of forward, backward, resolution and optimizer in one program."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import dtnh_jax
from dtnh_jax import GradientPair, regularizers, rules
from dtnh_jax.studies.benchmarks.bloop import bloop, two_gradients
from dtnh_jax.studies.benchmarks.by_hand import by_hand
from dtnh_jax.studies.benchmarks.networks import Network
from dtnh_jax.studies.benchmarks.rows import Against, one

STRENGTH = 1e-3
DECAY = 0.9  # of moving averages, and of momentum
RATE = 1e-4

PLAIN, L2_SP, DISTILLATION = "plain", "L2-SP", "distillation"
REFRESHED = "distillation, DTNH refreshed every 8"
L2_SP_DTNH, DISTILLATION_DTNH = "L2-SP, DTNH global", "distillation, DTNH"
L2_SP_BY_HAND = "L2-SP, DTNH by hand"
L2_SP_LEAF, L2_SP_LABELS = "L2-SP, DTNH leaf", "L2-SP, DTNH labels"
L2_SP_UNIT, L2_SP_ELEMENT = "L2-SP, DTNH unit", "L2-SP, DTNH element"
L2_SP_NEVER_HURT = "L2-SP, never_hurt"
DISTILLATION_BY_HAND = "distillation, DTNH by hand"
FLOOR = "one forward, two backward passes"
BLOOP, OURS_AS_BLOOP = "Bloop, two jax.grad", "Bloop's rule, ours"


class State(NamedTuple):
    """The state of training."""

    params: Any
    batch_stats: Any
    opt_state: Any


class Data(NamedTuple):
    """The arguments of a step; none of them is a constant of the program."""

    batch: Any
    pull: regularizers.WeightRegularizer


# (network, state, data) -> gradients, batch_stats
Gradients = Callable[[Network, State, Data], tuple[Any, Any]]


class Method(NamedTuple):
    """The gradients of a step, and their transformation."""

    gradients: Gradients
    # The transformation before the optimizer.
    resolve: Callable[[Data], optax.GradientTransformation] = lambda data: (
        optax.identity()
    )
    # A method that only computes gradients has no optimizer and keeps the state.
    has_optimizer: bool = True
    # Number of steps in a call; the first one refreshes the weights.
    steps: int = 1


class Program(NamedTuple):
    """Steps to be compiled: pure functions that may reuse the memory of the state."""

    steps: tuple[Callable[[State, Data], Any], ...]  # that a call takes
    state: State
    data: Data
    is_advancing: bool

    def lower(self) -> dict[Callable[..., Any], Any]:
        """Traces each distinct step once, again at every call."""
        donated = (0,) if self.is_advancing else ()
        return {
            step: jax.jit(functools.partial(step), donate_argnums=donated).lower(
                self.state, self.data
            )
            for step in set(self.steps)
        }

    def compile(self) -> list[Any]:
        """Returns the executables of the steps, in order."""
        compiled = {step: traced.compile() for step, traced in self.lower().items()}
        return [compiled[step] for step in self.steps]


def _of_loss(network: Network, state: State, data: Data) -> tuple[Any, Any]:
    def loss(params):
        values, stats = network.objective(params, state.batch_stats, data.batch)
        return values[0], stats

    return jax.grad(loss, has_aux=True)(state.params)


def _of_sum(network: Network, state: State, data: Data) -> tuple[Any, Any]:
    def total(params):
        values, stats = network.objective(params, state.batch_stats, data.batch)
        return values[0] + STRENGTH * values[1], stats

    return jax.grad(total, has_aux=True)(state.params)


def _of_loss_and_pull(network: Network, state: State, data: Data) -> tuple[Any, Any]:
    """Returns the gradient of plain L2-SP, in one line without this library."""
    grads, stats = _of_loss(network, state, data)
    pull = data.pull.gradient(state.params)
    return jax.tree.map(lambda g, r: g + STRENGTH * r, grads, pull), stats


def _of_loss_beside_pull(network: Network, state: State, data: Data) -> tuple[Any, Any]:
    """Returns the same two gradients as a pair."""
    grads, stats = _of_loss(network, state, data)
    return GradientPair(grads, data.pull.gradient(state.params)), stats


def _of_pair(network: Network, state: State, data: Data) -> tuple[Any, Any]:
    value_and_pair = dtnh_jax.value_and_gradient_pair(network.objective, has_aux=True)
    (_, stats), pair = value_and_pair(state.params, state.batch_stats, data.batch)
    return pair, stats


def _of_two_calls(network: Network, state: State, data: Data) -> tuple[Any, Any]:
    return two_gradients(network.objective, state.params, state.batch_stats, data.batch)


def _pulled(**options: Any) -> Callable[[Data], optax.GradientTransformation]:
    return lambda data: dtnh_jax.add_regularizer(data.pull, STRENGTH, **options)


def _by_layer(params: Any) -> Any:
    """Returns labels of parameters, one for each layer."""
    return {
        name: jax.tree.map(lambda _, name=name: name, layer)
        for name, layer in params.items()
    }


METHODS: dict[str, Method] = {
    PLAIN: Method(_of_loss),
    L2_SP: Method(_of_loss_and_pull),
    L2_SP_BY_HAND: Method(_of_loss_beside_pull, lambda data: by_hand(STRENGTH)),
    L2_SP_DTNH: Method(_of_loss, _pulled()),
    L2_SP_LEAF: Method(_of_loss, _pulled(scope="leaf")),
    L2_SP_UNIT: Method(_of_loss, _pulled(scope="unit")),
    L2_SP_ELEMENT: Method(_of_loss, _pulled(scope="element")),
    L2_SP_LABELS: Method(_of_loss, _pulled(scope=_by_layer)),
    L2_SP_NEVER_HURT: Method(
        _of_loss,
        lambda data: dtnh_jax.never_hurt(STRENGTH, regularizer=data.pull),
    ),
    DISTILLATION: Method(_of_sum),
    FLOOR: Method(_of_pair, has_optimizer=False),
    DISTILLATION_BY_HAND: Method(_of_pair, lambda data: by_hand(STRENGTH)),
    DISTILLATION_DTNH: Method(_of_pair, lambda data: dtnh_jax.dtnh(STRENGTH)),
    # It has gradients and state of its own, see `_refreshing`.
    REFRESHED: Method(_of_sum, steps=8),
    "distillation, never_hurt": Method(
        _of_pair, lambda data: dtnh_jax.never_hurt(STRENGTH)
    ),
    BLOOP: Method(_of_two_calls, lambda data: bloop(STRENGTH, 1 - DECAY)),
    OURS_AS_BLOOP: Method(
        _of_pair,
        lambda data: dtnh_jax.resolve_conflicts(
            rules.orthogonal, STRENGTH, ema_decay=DECAY
        ),
    ),
}
COMPARISONS: Mapping[str, list[Against]] = {
    L2_SP: [one(PLAIN)],
    L2_SP_BY_HAND: [one(L2_SP)],
    L2_SP_DTNH: [one(L2_SP, target=1.05)],
    L2_SP_LEAF: [one(L2_SP, target=1.05)],
    L2_SP_UNIT: [one(L2_SP)],
    L2_SP_ELEMENT: [one(L2_SP)],
    L2_SP_NEVER_HURT: [one(L2_SP)],
    DISTILLATION: [one(PLAIN)],
    FLOOR: [one(DISTILLATION)],
    DISTILLATION_BY_HAND: [one(FLOOR)],
    DISTILLATION_DTNH: [one(FLOOR, target=1.05), one(DISTILLATION)],
    REFRESHED: [one(DISTILLATION, target=1.15)],
    "distillation, never_hurt": [one(FLOOR)],
    OURS_AS_BLOOP: [one(BLOOP, target=1.0)],
}
OF_BLOOP = (BLOOP, OURS_AS_BLOOP)
OF_STEPS = tuple(name for name in METHODS if name not in (*OF_BLOOP, L2_SP_LABELS))


def program(network: Network, name: str) -> Program:
    """Builds the step of one of `METHODS`."""
    method = METHODS[name]
    data = Data(network.batch, regularizers.l2_sp(network.source_params, new=["head"]))
    sgd = optax.sgd(RATE, momentum=DECAY)
    if name == REFRESHED:
        return _refreshing(network, data, sgd, method.steps)

    def optimizer(data):
        return optax.chain(method.resolve(data), sgd)

    def step(state: State, data: Data) -> Any:
        grads, stats = method.gradients(network, state, data)
        if not method.has_optimizer:
            return grads, stats
        updates, opt_state = optimizer(data).update(
            grads, state.opt_state, state.params
        )
        return State(optax.apply_updates(state.params, updates), stats, opt_state)

    opt_state = optimizer(data).init(network.params) if method.has_optimizer else ()
    state = State(network.params, network.batch_stats, opt_state)
    return Program((step,), state, data, method.has_optimizer)


def _refreshing(
    network: Network,
    data: Data,
    optimizer: optax.GradientTransformation,
    refresh_every: int,
) -> Program:
    """Returns steps with `refreshed_gradient` in place of gradients."""
    resolved = dtnh_jax.refreshed_gradient(network.objective, STRENGTH, has_aux=True)

    def step_with(gradient: Callable[..., Any]) -> Callable[[State, Data], State]:
        def step(state, data):
            refreshed, inner = state.opt_state
            (_, stats), grads, refreshed = gradient(
                state.params, refreshed, state.batch_stats, data.batch
            )
            updates, inner = optimizer.update(grads, inner, state.params)
            params = optax.apply_updates(state.params, updates)
            return State(params, stats, (refreshed, inner))

        return step

    first, others = step_with(resolved.refresh), step_with(resolved.reuse)
    opt_state = resolved.init(network.params), optimizer.init(network.params)
    state = State(network.params, network.batch_stats, opt_state)
    return Program((first, *[others] * (refresh_every - 1)), state, data, True)


def pair_of(network: Network) -> tuple[tuple[Any, Any], GradientPair]:
    """Returns values and gradients of the two terms, for checks."""
    value_and_pair = dtnh_jax.value_and_gradient_pair(network.objective, has_aux=True)
    (values, _), pair = jax.jit(value_and_pair)(
        network.params, network.batch_stats, network.batch
    )
    return values, pair
