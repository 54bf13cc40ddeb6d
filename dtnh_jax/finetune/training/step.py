"""The train step: two gradients from one forward pass, one update.

A `Trainer` holds one compiled step for one regularizer. Seeds, strengths, rules and
data of the source are arguments, so all of them share the compilation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PRNGKeyArray

import dtnh_jax
from dtnh_jax import GradientPair
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.methods import Method
from dtnh_jax.finetune.regularizers import REGULARIZERS, BatchOutputs
from dtnh_jax.finetune.training import meshes
from dtnh_jax.finetune.training.network import (
    Known,
    State,
    look,
    network_params,
    single,
)
from dtnh_jax.finetune.training.optimizers import (
    make_optimizer,
    rule_number,
    with_hyperparameters,
)
from dtnh_jax.finetune.weights.sources import Source, Variables
from dtnh_jax.linen import capture_features

Metrics = dict[str, Array]  # scalars by name
ALL_FINITE, LOSS = -1, -2  # values in place of the number of a leaf


class Trainer(NamedTuple):
    """The initial state and the training step of one regularizer."""

    # (initial variables, method, strength, trust of `never_hurt`) -> state; the
    # variables are copied.
    init: Callable[..., State]
    # (state, batch, known data, key of the run) -> state, metrics. The state is
    # donated: use the new one. The metrics are those before the update.
    step: Callable[[State, Any, Known, PRNGKeyArray], tuple[State, Metrics]]


def make_trainer(
    source: Source,
    network: Any,
    regularizer_name: str | None,
    config: Config,
    steps: int,
    *,
    never_hurts: bool = False,
    mesh: Mesh | None = None,
) -> Trainer:
    """Builds an optimizer and a step, which is compiled at its first call.

    A batch is skipped if its loss or gradient is not finite, or if its update would
    make a parameter not finite: only `step` and `skipped` increase. The metric
    `not_finite` is the number of the first leaf that is not finite, `LOSS` if that is
    the loss, or `ALL_FINITE`.

    Args:
      source: the source, which preprocesses images.
      network: the network, with the target's number of classes.
      regularizer_name: one of `REGULARIZERS`, or None.
      config: configuration of the optimizer, the scope, and the rules of its methods.
      steps: number of training steps, for the schedule of the learning rate.
      never_hurts: whether the trainer is for `dtnh_jax.never_hurt`, whose state
        differs, instead of for rules.
      mesh: mesh of states, batches and known data; by default one device.
    """
    mesh = meshes.make_mesh() if mesh is None else mesh
    regularizer = REGULARIZERS[regularizer_name] if regularizer_name else None
    of_batch = regularizer.of_batch if regularizer else None
    of_weights = regularizer.of_weights if regularizer else None
    optimizer, schedule = make_optimizer(
        regularizer_name, config, steps, never_hurts=never_hurts
    )
    number_of = rule_number(regularizer_name, config, never_hurts=never_hurts)

    @jax.jit
    def create(variables, hyperparameters) -> State:
        # Copies, because steps donate the state and the source is still needed.
        variables = jax.tree.map(lambda x: jnp.array(x, copy=True), variables)
        state = State.create(
            apply_fn=network.apply,
            tx=optimizer,
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            skipped=jnp.zeros([], jnp.int32),
        )
        state = state.replace(step=jnp.zeros([], jnp.int32))
        if regularizer is not None:
            opt_state = with_hyperparameters(state.opt_state, **hyperparameters)
            state = state.replace(opt_state=opt_state)
        return meshes.constrain(mesh, state)

    def init(
        variables: Variables, method: Method, strength: float, trust: float = 0.0
    ) -> State:
        number = np.int32(number_of(method))
        chosen = {"trust": np.float32(trust)} if never_hurts else {"rule": number}
        given = {"strength": np.float32(strength), **chosen}
        return create(meshes.place(mesh, variables), given)

    apply = capture_features(network, [*source.feature_layers, "pooled"])

    def forward(params, batch_stats, step, batch, known, key):
        """Returns the loss, new batch statistics, and the outputs for a regularizer."""
        (logits, updated), found = apply(
            {
                "params": network_params(params, known.source["params"]),
                "batch_stats": batch_stats,
            },
            source.preprocess(batch["image"]),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, step)},
        )
        labels, found = batch["label"], single(found)
        loss = optax.softmax_cross_entropy_with_integer_labels(single(logits), labels)
        pooled, source_logits = found.pop("pooled"), None
        if "source_head" in params:
            kept = params["source_head"]
            source_logits = pooled @ kept["kernel"] + kept["bias"][None, :]
        teacher = dict(batch.get("teacher", {}))
        teacher_logits = teacher.pop("head", None)
        outputs = BatchOutputs(
            found, pooled, source_logits, teacher, teacher_logits, labels
        )
        return jnp.mean(loss), updated.get("batch_stats", {}), outputs

    if config.remat:  # keep the outputs of products and convolutions, recompute others
        policy = jax.checkpoint_policies.dots_saveable
        forward = jax.checkpoint(forward, policy=policy)

    def step(
        state: State, batch: dict[str, Any], known: Known, key: PRNGKeyArray
    ) -> tuple[State, Metrics]:
        metrics = {}
        inputs = state.batch_stats, state.step
        if regularizer and of_batch:
            if regularizer.has_teacher and "teacher" not in batch:
                teacher = look(source, known.source, batch["image"])
                batch = {**batch, "teacher": teacher}

            def objective(params, of_batch=of_batch):
                loss, stats, outputs = forward(params, *inputs, batch, known, key)
                return (loss, of_batch(outputs, known.estimate)), stats

            ((loss, value), batch_stats), grads = dtnh_jax.value_and_gradient_pair(
                objective, has_aux=True
            )(state.params)
            metrics["regularizer"] = value
        else:

            def of_loss(params):
                loss, stats, _ = forward(params, *inputs, batch, known, key)
                return loss, stats

            (loss, batch_stats), grads = jax.value_and_grad(of_loss, has_aux=True)(
                state.params
            )
            if of_weights:
                pull = of_weights(known.source["params"], known.estimate)
                grads = GradientPair(grads, pull.gradient(state.params))
                metrics["regularizer"] = pull.value(state.params)
        updates_done = (state.step - state.skipped) // config.accumulate
        metrics["learning_rate"] = jnp.asarray(schedule(updates_done), jnp.float32)
        new = state.apply_gradients(grads=grads).replace(batch_stats=batch_stats)
        of_loss_alone = grads.loss if isinstance(grads, GradientPair) else grads
        number = _first_not_finite(loss, of_loss_alone, new.params)
        is_good = number == ALL_FINITE
        kept = jax.tree.map(lambda x, old: jnp.where(is_good, x, old), new, state)
        skipped = state.skipped + jnp.where(is_good, 0, 1)
        kept = kept.replace(step=new.step, skipped=skipped)
        if regularizer is not None:
            metrics |= dtnh_jax.conflict_metrics(new.opt_state)
            # Do not count a regularizer's failure if the loss failed too.
            metrics["skipped"] = dtnh_jax.conflict_metrics(kept.opt_state)["skipped"]
        metrics |= {"skipped_batches": skipped, "not_finite": number}
        metrics = {"loss": loss, **metrics}
        return meshes.constrain(mesh, kept), meshes.whole(mesh, metrics)

    return Trainer(init, jax.jit(step, donate_argnums=0))


def _first_not_finite(loss: Array, grads: Any, params: Any) -> Int[Array, ""]:
    """Returns the number of the first leaf that is not finite in either tree."""

    def finite(tree: Any) -> Bool[Array, " leaves"]:
        leaves = jax.tree.leaves(tree)
        return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])

    good = finite(grads) & finite(params)
    number = jnp.where(jnp.all(good), ALL_FINITE, jnp.argmin(good))
    return jnp.where(jnp.isfinite(loss) | (number >= 0), number, LOSS)
