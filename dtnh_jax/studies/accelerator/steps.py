"""Training steps with a regularizer, by several methods."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import dtnh_jax
from dtnh_jax.regularizers import l2_sp
from dtnh_jax.studies.accelerator.contest import (
    Contest,
    Entry,
    Steps,
    peak_in_use,
    refused,
)
from dtnh_jax.studies.accelerator.devices import on_host, put, same_structure
from dtnh_jax.studies.accelerator.programs import Program, shapes
from dtnh_jax.studies.accelerator.rows import Row

PLAIN, PULL_SUM, PULL_DTNH = "plain", "L2-SP, sum", "L2-SP with DTNH"
EVERY = 8  # steps, of which one measures
_PULL_STRENGTH = 0.01


class Task(NamedTuple):
    """A network, its data on the host, and its trained parameters."""

    name: str
    dtype: str
    penalty: str  # name of the regularizer of features or outputs
    params: Any
    aux: Any  # such as batch statistics
    make_data: Callable[[], Any]
    loss: Callable[[Any, Any, Any], tuple[Any, Any]]  # -> loss, aux
    objective: Callable[[Any, Any, Any], tuple[Any, Any]]  # -> (loss, penalty), aux
    held_out: Callable[[Any, Any, Any], Any]  # -> error on held-out examples
    optimizer: optax.GradientTransformation
    strength: float
    with_pull: bool  # whether L2-SP makes sense for the trained parameters


class State(NamedTuple):
    """The state of training."""

    params: Any
    aux: Any
    opt_state: Any


class _Method(NamedTuple):
    """The initial state of a method's optimizer, and its functions."""

    init: Callable[[Any], Any]  # host parameters -> state of the optimizer
    steps: tuple[Callable[[State, Any], Any], ...]
    pattern: tuple[int, ...] = (0,)


def names(task: Task) -> dict[str, str]:
    """Returns the names of a task's rows by method, in order."""
    rows = {"plain": PLAIN}
    if task.with_pull:
        rows |= {"pull sum": PULL_SUM, "pull DTNH": PULL_DTNH}
    return rows | {
        "sum": f"{task.penalty}, sum",
        "DTNH": f"{task.penalty} with DTNH",
        "refreshed": f"{task.penalty}, refreshed every {EVERY}",
        "held out": f"{task.penalty} with DTNH, held-out gradient",
    }


def contest(task: Task, methods: tuple[str, ...]) -> Contest:
    """Returns the contest of a task's methods, which are keys of `names(task)`."""
    titles = names(task)
    of_task = task.make_data()
    # Another point, so that there is a pull.
    source = jax.tree.map(lambda x: x[::-1], task.params)
    pull = jax.eval_shape(l2_sp, source) if task.with_pull else None
    data = shapes({"task": of_task, "pull": pull})

    def make_data():
        made = same_structure(l2_sp(put(source)), pull) if task.with_pull else None
        return {"task": put(of_task), "pull": made}

    entries = []
    for method in methods:
        if method not in titles:
            continue
        try:
            found = _made(task, method)
            opt_state = jax.eval_shape(found.init, shapes(task.params))
        except Exception as error:  # a method that fails must not end the others
            entries.append(refused(titles[method], error))
            continue
        state = State(shapes(task.params), shapes(task.aux), opt_state)
        programs = tuple(
            Program((task.name, task.dtype, method, str(i)), function, state, data)
            for i, function in enumerate(found.steps)
        )
        against = {"plain": (), "sum": (PLAIN,), "pull sum": (PLAIN,)}.get(
            method, (PLAIN, titles["pull sum" if method == "pull DTNH" else "sum"])
        )
        start = functools.partial(_start, task, found)
        entries.append(
            Entry(titles[method], programs, start, found.pattern, against=against)
        )
    return Contest(task.name, task.dtype, tuple(entries), make_data, _note)


def _start(task: Task, method: _Method) -> State:
    opt_state = on_host(method.init, task.params)
    return State(put(task.params), put(task.aux), opt_state)


def _made(task: Task, method: str) -> _Method:
    """Returns a method's steps, or raises if the task does not support it."""
    if method == "refreshed":
        return _refreshed(task)
    if method == "plain":
        return _simple(task, _of_loss, lambda data: task.optimizer)
    if method == "pull sum":
        return _simple(task, _of_loss_and_pull, lambda data: task.optimizer)
    if method == "sum":
        return _simple(task, _of_sum, lambda data: task.optimizer)
    if method == "pull DTNH":

        def pulled(data):
            pull = dtnh_jax.add_regularizer(data["pull"], _PULL_STRENGTH)
            return optax.chain(pull, task.optimizer)

        return _simple(task, _of_loss, pulled)
    if method == "DTNH":
        tx = optax.chain(dtnh_jax.dtnh(task.strength), task.optimizer)
        return _simple(task, _of_pair, lambda data: tx)
    # The cost of trust from held-out examples: one more backward pass.
    tx = optax.chain(dtnh_jax.dtnh(task.strength, max_ratio=1.0), task.optimizer)
    return _simple(task, _of_pair, lambda data: tx, held_out=True)


def _simple(
    task: Task,
    gradients: Callable[[Task, State, Any], tuple[Any, Any, Any]],
    optimizer: Callable[[Any], Any],
    held_out: bool = False,
) -> _Method:
    """Returns a method whose step passes gradients to an optimizer."""

    def init(params):
        # The source of a pull is no part of the state.
        return optimizer({"pull": l2_sp(params) if task.with_pull else None}).init(
            params
        )

    def step(state: State, data: Any):
        loss, grads, aux = gradients(task, state, data)
        extra = {}
        if held_out:
            extra["held_out_grads"] = jax.grad(task.held_out)(
                state.params, state.aux, data["task"]
            )
        tx = optax.with_extra_args_support(optimizer(data))
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        return State(params, aux, opt_state), loss

    return _Method(init, (step,))


def _of_loss(task: Task, state: State, data: Any) -> tuple[Any, Any, Any]:
    value_and_grad = jax.value_and_grad(task.loss, has_aux=True)
    (loss, aux), grads = value_and_grad(state.params, state.aux, data["task"])
    return loss, grads, aux


def _of_loss_and_pull(task: Task, state: State, data: Any) -> tuple[Any, Any, Any]:
    """Returns the gradient of plain L2-SP, in one line without this library."""
    loss, grads, aux = _of_loss(task, state, data)
    pull = data["pull"].gradient(state.params)
    return loss, jax.tree.map(lambda g, r: g + _PULL_STRENGTH * r, grads, pull), aux


def _of_sum(task: Task, state: State, data: Any) -> tuple[Any, Any, Any]:
    def total(params):
        (loss, penalty), aux = task.objective(params, state.aux, data["task"])
        return loss + task.strength * penalty, aux

    (loss, aux), grads = jax.value_and_grad(total, has_aux=True)(state.params)
    return loss, grads, aux


def _of_pair(task: Task, state: State, data: Any) -> tuple[Any, Any, Any]:
    take = dtnh_jax.value_and_gradient_pair(task.objective, has_aux=True)
    (values, aux), pair = take(state.params, state.aux, data["task"])
    return values[0], pair, aux


def _refreshed(task: Task) -> _Method:
    """Returns a method of one step that measures, and seven that reuse its weights."""
    refreshed = dtnh_jax.refreshed_gradient(task.objective, task.strength, has_aux=True)

    def init(params):
        return refreshed.init(params), task.optimizer.init(params)

    def step(take: Callable[..., Any], state: State, data: Any):
        kept, opt_state = state.opt_state
        (values, aux), grads, kept = take(state.params, kept, state.aux, data["task"])
        updates, opt_state = task.optimizer.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, aux, (kept, opt_state)), values[0]

    steps = tuple(
        functools.partial(step, take) for take in (refreshed.refresh, refreshed.reuse)
    )
    return _Method(init, steps, (0,) + (1,) * (EVERY - 1))


def _note(row: Row, seconds: list[float], runs: Mapping[str, Steps]) -> None:
    """Adds the last loss; if it is not finite, times mean little."""
    del seconds
    row.more["loss"] = float(runs[row.name].report)
    if in_use := peak_in_use():
        row.more["most GB in use so far"] = 1e-9 * in_use
