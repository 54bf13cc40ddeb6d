"""The gradient pair of NNX modules, and features of unmodified networks."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import filterlib

from dtnh_jax import _gradients
from dtnh_jax._gradients import GradientPair
from dtnh_jax.capture import layers as _layers
from dtnh_jax.capture import stacks
from dtnh_jax.capture.layers import Layers
from dtnh_jax.capture.nnx_adapters import without_adapters
from dtnh_jax.capture.nnx_calls import scale_features, wrapped_calls
from dtnh_jax.capture.nnx_versions import captured, modules_of, sown_by, value_of

__all__ = [
    "capture_features",
    "frozen_teacher",
    "scale_features",
    "value_and_gradient_pair",
    "without_adapters",
]

_OUTPUT = "#output"  # name of a layer's sown output; no attribute can have it
M = TypeVar("M", bound=nnx.Module)
State = Any  # nnx.State, whose type parameters runtime checkers cannot read


def value_and_gradient_pair(
    objective: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: filterlib.Filter = nnx.Param,
) -> Callable[..., tuple[Any, GradientPair]]:
    """Differentiates a loss and a regularizer of an NNX module in one forward pass.

    The counterpart of `dtnh_jax.value_and_gradient_pair` for functions of a module. The
    forward pass may change other state, such as batch statistics or dropout counters,
    of the module and of modules, random streams and metrics among the arguments. These
    changes are applied once.

    Args:
      objective: maps `(model, *args)` to `(loss, regularizer)`, or with `has_aux` to
        `((loss, regularizer), aux)`; see `dtnh_jax.value_and_gradient_pair`.
      has_aux: whether `objective` also returns auxiliary data.
      wrt: filter of the variables to differentiate; the same as the optimizer's.

    Returns:
      A function of `(model, *args)`, with or without `nnx.jit`, that returns
      `((loss, regularizer), pair)`, or with `has_aux`
      `(((loss, regularizer), aux), pair)`. The gradients are states, like those of
      `nnx.grad`, for `optimizer.update(model, pair)`, or for
      `optimizer.update(model, pair.loss, regularizer_grads=pair.regularizer)`.

    Raises:
      TypeError: at the call, `objective` does not return a pair of scalars.
      ValueError: at the call, `wrt` selects no variable of the model.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import dtnh_jax.nnx
      >>> from dtnh_jax import dtnh, regularizers
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 8, rngs=rngs),
      ...     nnx.BatchNorm(8, rngs=rngs),
      ...     nnx.Dropout(0.1, rngs=rngs),
      ...     nnx.Linear(8, 3, rngs=rngs),
      ... )
      >>> teacher = dtnh_jax.nnx.frozen_teacher(model)
      >>> tx = optax.chain(dtnh(strength=0.1), optax.sgd(0.1))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> def objective(model, teacher, x, y):
      ...     logits = model(x)
      ...     loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
      ...     return loss, regularizers.logit_distillation(logits, teacher(x))
      >>> @nnx.jit
      ... def step(model, optimizer, teacher, x, y):
      ...     value_and_pair = dtnh_jax.nnx.value_and_gradient_pair(objective)
      ...     (loss, regularizer), pair = value_and_pair(model, teacher, x, y)
      ...     optimizer.update(model, pair)
      ...     return loss, regularizer
      >>> x, y = jnp.ones((2, 4)), jnp.array([0, 2])
      >>> loss, regularizer = step(model, optimizer, teacher, x, y)
      >>> print(optimizer.step[...])
      1
    """
    is_wanted = filterlib.to_predicate(wrt)

    def is_trained(path, value):
        return path[0] == 0 and is_wanted(path[1:], value)

    def value_and_pair(model, *args, **kwargs):
        # A derivative can only change modules that are created inside it, so modules
        # among the arguments are split here and merged inside.
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
        at = [i for i, leaf in enumerate(leaves) if _is_node(leaf)]
        nodes = [model, *[leaves[i] for i in at]]
        graphdef, trained, rest = nnx.split(nodes, is_trained, ...)
        if not jax.tree.leaves(trained):
            raise ValueError(
                f"`wrt` must select variables of the model, got {wrt!r}, which selects "
                f"none in this {type(model).__name__}."
            )

        def of_trained(trained):
            inner = nnx.merge(graphdef, trained, rest, copy=True)
            filled = list(leaves)
            for i, node in zip(at, inner[1:]):
                filled[i] = node
            inner_args, inner_kwargs = jax.tree.unflatten(treedef, filled)
            outputs = objective(inner[0], *inner_args, **inner_kwargs)
            values, aux = outputs if has_aux else (outputs, None)
            _, _, new = nnx.split(inner, is_trained, ...)
            return values, (aux, _changes(rest, new))

        (values, (aux, changes)), pair = _gradients.value_and_gradient_pair(
            of_trained, has_aux=True
        )(trained)
        nnx.update(nodes, changes)
        of_regularizer = pair.regularizer
        if isinstance(values[1], dict):
            of_regularizer = {name: grads[0] for name, grads in of_regularizer.items()}
        else:
            of_regularizer = of_regularizer[0]
        pair = GradientPair(pair.loss[0], of_regularizer)
        return ((values, aux) if has_aux else values), pair

    return value_and_pair


def capture_features(model: nnx.Module, layers: Layers) -> Callable[..., Any]:
    """Makes a module also return the outputs of some of its layers.

    The network needs no changes. A value that a network sows as `nnx.Intermediate`
    counts as a layer: its path is that of the module, followed by the value's name.
    Layers in an `nnx.scan` or `nnx.vmap` are captured separately, and their paths end
    in an index: `"blocks/mlp"` has the features `"blocks/mlp/0"`, `"blocks/mlp/1"` and
    so on. Each can also be selected by itself.

    Args:
      model: the network.
      layers: paths of layers such as `"encoder/blocks/3"`, or a function that maps a
        path to whether the layer is captured.

    Returns:
      A function with the arguments of `model`. It returns the output of `model`, and a
      dict of features by path; for a layer that is called more than once, a tuple.

    Raises:
      TypeError: `layers` is a string.
      ValueError: at the call, a layer is missing; the error names similar paths.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
      >>> output, features = capture_features(model, ["layers/0"])(jnp.ones((1, 3)))
      >>> features["layers/0"].shape
      (1, 4)
    """
    _layers.check_layers(layers)

    def call(*args, **kwargs):
        # Capturing adds attributes. It does so to new modules with the same variables,
        # because a derivative cannot change modules from outside.
        network = nnx.merge(*nnx.split(model))
        modules = {
            "/".join(map(str, path)): module for path, module in modules_of(network)
        }
        wanted = {
            type(module)
            for path, module in modules.items()
            if _layers.holds_wanted(layers, path) and callable(module)
        }

        def sow(module, output):
            """Sows an output, and a mark beside each sown value, see `stacks`."""
            own = sown_by(module)
            if own is None:
                return output
            if type(module) in wanted:
                module.sow(nnx.Intermediate, _OUTPUT, output)
                own[_OUTPUT] = (*own.get(_OUTPUT, ()), output)
            for name, value in own.items():
                if not name.endswith(stacks.SUFFIX):
                    module.sow(
                        nnx.Intermediate,
                        name + stacks.SUFFIX,
                        stacks.marks(value),
                        init_fn=lambda: None,
                        reduce_fn=lambda _, new: new,
                    )
            return output

        classes = {type(module) for module in modules.values() if callable(module)}
        with wrapped_calls(classes, sow):
            output, flat = captured(network, lambda net: net(*args, **kwargs))
        found = {}
        for path, value in flat.items():
            layer = path.removesuffix(_OUTPUT).removesuffix("/")
            is_mark = path.endswith(stacks.SUFFIX)
            # Other layers of the same classes were captured too.
            is_other = layer in modules and not _layers.holds_wanted(layers, layer)
            if not is_mark and not is_other:
                parts = stacks.unstacked(value, flat.get(path + stacks.SUFFIX))
                found[layer] = {i: _layers.single(each) for i, each in parts.items()}

        def all_names():
            return sorted({*modules, *found})

        return output, _layers.pick_layers(layers, found, all_names)

    return call


def frozen_teacher(model: M) -> M:
    """Copies a module in evaluation mode, as a fixed teacher.

    The copy shares nothing with `model`, which can be trained, changed and donated.
    Pass the teacher to the train step as an argument: under `nnx.jit`, the weights of a
    module that a function closes over become constants of the compiled program.

    Args:
      model: the pretrained network.

    Returns:
      A module like `model`, without dropout and with running statistics.

    Example:
      >>> from flax import nnx
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> teacher = frozen_teacher(model)
      >>> model.use_running_average, teacher.use_running_average
      (False, True)
    """
    graphdef, state = nnx.split(model)
    teacher = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    teacher.eval()
    return teacher


def _is_node(x: Any) -> bool:
    """Returns whether an argument can hold variables."""
    return isinstance(x, (nnx.Pytree, nnx.Variable))


def _changes(old: State, new: State) -> State:
    """Returns the variables of `new` that `old` lacks or has with another value.

    Unchanged variables are left out, because they may belong to a module that cannot be
    changed here, such as a teacher from outside of `nnx.jit`.
    """
    before = dict(nnx.to_flat_state(old))
    return nnx.from_flat_state(
        [
            (path, variable)
            for path, variable in nnx.to_flat_state(new)
            if path not in before or _value(variable) is not _value(before[path])
        ]
    )


def _value(leaf: Any) -> Any:
    return value_of(leaf) if isinstance(leaf, nnx.Variable) else leaf
