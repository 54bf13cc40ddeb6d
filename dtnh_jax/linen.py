"""Train steps for Flax linen, and the features of unmodified networks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import core, struct
from flax.training import train_state
from jaxtyping import Array, PRNGKeyArray

from dtnh_jax._freezing import warn_of_freezing
from dtnh_jax._gradients import value_and_gradient_pair
from dtnh_jax.capture.layers import Layers
from dtnh_jax.capture.linen_adapters import without_adapters
from dtnh_jax.capture.linen_features import capture_features
from dtnh_jax.capture.linen_scaling import scale_features

__all__ = [
    "Forward",
    "TrainState",
    "capture_features",
    "scale_features",
    "train_step",
    "without_adapters",
]

Variables = Any  # collections by name, as `Module.init` returns them
Batch = Any


class TrainState(train_state.TrainState):
    """Flax's train state with batch statistics.

    Attributes:
      batch_stats: running statistics, as in the variables of the network; empty for a
        network that has none.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, optax
      >>> model = nn.BatchNorm(use_running_average=False)
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> state = TrainState.create(
      ...     apply_fn=model.apply, tx=optax.sgd(0.1), **variables
      ... )
      >>> print(state.batch_stats["mean"])
      [0. 0. 0.]
    """

    # Flax's own types exclude abstract arrays, and the dicts that `init` returns.
    step: Any
    params: Any
    batch_stats: Any = struct.field(default_factory=dict)


class Forward(NamedTuple):
    """The output and the features of a network for a batch."""

    output: Any  # the network's return value, such as logits
    features: dict[str, Any]  # the outputs of layers, by path


def train_step(
    model: nn.Module,
    forward: Callable[[Any, Batch, bool], Any],
    loss: Callable[[Any, Batch], Any],
    regularizer: Callable[[Forward, Forward | None, Batch], Any] | None = None,
    *,
    features: Layers = (),
    collection: str = "intermediates",
    teacher_model: nn.Module | None = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Builds a train step: one forward pass, one or two gradients, one update.

    The network in training runs once per step, and only that pass updates its batch
    statistics. The teacher runs with its own variables in evaluation mode and gets no
    gradient.

    Without a regularizer, the step takes the gradient of the loss alone. Use that for
    regularizers of the weights, such as `regularizers.l2_sp`, too: put them in the
    optimizer with `add_regularizer`, where they need no backward pass.

    Args:
      model: the network.
      forward: runs a network on a batch, `(network, batch, train) -> output`.
      loss: maps `(output, batch)` to a scalar, or with `has_aux` to a scalar and a
        dict of metrics.
      regularizer: maps `(student, teacher, batch)`, the first two of type `Forward`, to
        a scalar without its strength, or to a dict of scalars by name. The optimizer
        must accept a `GradientPair`, as `dtnh` does. `teacher` is None if the step gets
        no teacher.
      features: layers for `Forward.features`; see `capture_features`.
      collection: see `capture_features`.
      teacher_model: the teacher's network if it is not `model`, for example because it
        has another head.
      has_aux: whether `loss` also returns metrics.

    Returns:
      A pure function of `(state, batch, rng=None, teacher=None)`, to be jitted. It
      returns the new state and a dict of metrics before the update: `loss`,
      `regularizer` if there is one, and the metrics of `loss`.
        `state` is a `TrainState`, and may be donated.
        `rng` is the key for dropout and other random numbers: one key for the whole
        run; the step folds its number into it.
        `teacher` holds the variables of the pretrained network. If `state` is donated,
        they must be a copy.

    While it is traced, the step warns about parameters that the optimizer freezes after
    one of this library's transformations: they inflate its inner products and norms.

    Raises:
      TypeError: `regularizer` is not a function.
      ValueError: at the call, a layer is missing, or the network has batch statistics
        that the state lacks.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, optax
      >>> from dtnh_jax import dtnh, linen, regularizers
      >>> class Network(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = nn.relu(nn.Dense(8, name="body")(x))
      ...         x = nn.BatchNorm(use_running_average=not train)(x)
      ...         x = nn.Dropout(0.1, deterministic=not train)(x)
      ...         return nn.Dense(3, name="head")(x)
      >>> model = Network()
      >>> step = linen.train_step(
      ...     model,
      ...     forward=lambda network, batch, train: network(batch["x"], train),
      ...     loss=lambda logits, batch: jnp.mean(
      ...         optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
      ...     ),
      ...     regularizer=lambda student, teacher, batch: regularizers.feature_map(
      ...         student.features, teacher.features
      ...     ),
      ...     features=["body"],
      ... )
      >>> batch = {"x": jnp.ones((2, 4)), "y": jnp.array([0, 2])}
      >>> pretrained = model.init(jax.random.key(0), batch["x"], train=False)
      >>> tx = optax.chain(dtnh(strength=0.1), optax.sgd(0.1))
      >>> state = linen.TrainState.create(apply_fn=model.apply, tx=tx, **pretrained)
      >>> key = jax.random.key(1)
      >>> state, metrics = jax.jit(step)(state, batch, key, teacher=pretrained)
      >>> sorted(metrics), int(state.step)
      (['loss', 'regularizer'], 1)
    """
    if regularizer is not None and not callable(regularizer):
        raise TypeError(
            "`regularizer` must be a function of (student, teacher, batch), got "
            f"{type(regularizer).__name__}. A WeightRegularizer belongs in the "
            "optimizer: `optax.chain(add_regularizer(...), ...)`."
        )
    teacher_model = model if teacher_model is None else teacher_model
    apply = capture_features(model, features, collection=collection)
    apply_teacher = capture_features(teacher_model, features, collection=collection)

    def step(
        state: train_state.TrainState,
        batch: Batch,
        rng: PRNGKeyArray | Array | None = None,
        teacher: Variables | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        batch_stats = getattr(state, "batch_stats", {})
        rngs = None if rng is None else jax.random.fold_in(rng, state.step)
        target = None
        if regularizer is not None and teacher is not None:
            target = Forward(*apply_teacher(teacher, batch, False, method=forward))

        def run(params):
            (output, updated), found = apply(
                {"params": params, "batch_stats": batch_stats},
                batch,
                True,
                method=forward,
                mutable=["batch_stats"],
                rngs=rngs,
            )
            value = loss(output, batch)
            value, metrics = value if has_aux else (value, {})
            aux = updated.get("batch_stats", {}), metrics
            return value, Forward(output, found), aux

        if regularizer is None:

            def of_loss(params):
                value, _, aux = run(params)
                return value, aux

            value_and_grad = jax.value_and_grad(of_loss, has_aux=True)
            (value, (new_stats, metrics)), grads = value_and_grad(state.params)
            metrics = {"loss": value, **metrics}
        else:

            def objective(params, regularizer=regularizer):
                value, student, aux = run(params)
                return (value, regularizer(student, target, batch)), aux

            value_and_pair = value_and_gradient_pair(objective, has_aux=True)
            (values, (new_stats, metrics)), grads = value_and_pair(state.params)
            metrics = {"loss": values[0], "regularizer": values[1], **metrics}

        warn_of_freezing(state.tx, grads, state.opt_state, state.params)
        new_stats = _like(batch_stats, new_stats)
        state = state.apply_gradients(grads=grads)
        if jax.tree.leaves(new_stats):
            state = state.replace(batch_stats=new_stats)
        return state, metrics

    return step


def _like(batch_stats: Any, new_stats: Any) -> Any:
    """Returns the new statistics as a tree of the old type, frozen or not."""
    old, new = (
        jax.tree.structure(core.unfreeze(stats)) for stats in (batch_stats, new_stats)
    )
    if old != new:
        raise ValueError(
            "`state.batch_stats` must be the statistics of the network, as in "
            "`TrainState.create(batch_stats=variables['batch_stats'], ...)`, got "
            f"{old.num_leaves} arrays where the network has {new.num_leaves}."
        )
    structure = jax.tree.structure(batch_stats)
    return jax.tree.unflatten(structure, jax.tree.leaves(new_stats))
