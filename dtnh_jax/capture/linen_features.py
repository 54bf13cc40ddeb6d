"""Captures the outputs of layers of unmodified Flax linen networks."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import core, traverse_util
from flax.core.scope import in_filter, union_filters

from dtnh_jax.capture import layers as _layers
from dtnh_jax.capture import stacks
from dtnh_jax.capture.layers import Layers


def capture_features(
    model: nn.Module, layers: Layers, *, collection: str = "intermediates"
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Makes `model.apply` also return the outputs of some layers.

    The network needs no changes. A value that a network sows counts as a layer: its
    path is that of the module, followed by the value's name.

    Layers in an `nn.scan` or `nn.vmap` are captured separately, and their paths end in
    an index: `"blocks/mlp"` has the features `"blocks/mlp/0"`, `"blocks/mlp/1"` and so
    on. Each can also be selected by itself. The transformation must pass them on:
    `variable_axes={"params": 0, "intermediates": 0}`. If a body returns
    `(carry, None)`, the feature is the carry.

    Args:
      model: the network.
      layers: paths of layers such as `"encoder/block_3"`, or a function that maps a
        path without an index to whether the layer is captured.
      collection: name of the collection in which the network sows values.

    Returns:
      A function with the arguments of `model.apply`. It returns the output of
      `model.apply`, and a dict of features by path; for a layer that is called more
      than once, a tuple.

    Raises:
      TypeError: `layers` is a string.
      ValueError: at the call, a layer is missing; the error names similar paths.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> apply = capture_features(model, ["layers_0"])
      >>> logits, features = apply(variables, jnp.ones((1, 3)))
      >>> features["layers_0"].shape
      (1, 4)
    """
    _layers.check_layers(layers)
    sown = {"intermediates", collection}

    def apply(variables, *args, mutable: Any = False, **kwargs):
        # If they were passed in, linen would append to the features of earlier calls.
        variables = {name: x for name, x in variables.items() if name not in sown}

        def run(is_wanted):
            return _run(model, variables, args, kwargs, mutable, sown, is_wanted)

        ran = run(lambda path: _layers.holds_wanted(layers, path))
        found = {
            _layers.without_call(path): {
                index: _layers.single(_carries(each) if index else each)
                for index, each in stacks.unstacked(value, mark).items()
            }
            for path, (value, mark) in ran.captured.items()
        }

        def all_names():
            names = set(found)

            def note(path):
                names.add(path)
                return False

            jax.eval_shape(lambda: run(note).updated)
            return sorted(names)

        lost = (
            ", which runs inside a transformation such as `nn.scan` that does not pass "
            f"it on. Add {collection!r} to that transformation's `variable_axes`."
        )
        features = _layers.pick_layers(layers, found, all_names, lost)
        if mutable is False:
            return ran.output, features
        kept = {k: v for k, v in ran.updated.items() if in_filter(mutable, k)}
        return (ran.output, kept), features

    return apply


class _Ran(NamedTuple):
    output: Any  # of the network
    updated: dict[str, Any]  # collections
    captured: dict[str, tuple[Any, Any]]  # values and their marks, by path


def _run(
    model: nn.Module,
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    mutable: Any,
    sown: set[str],
    is_wanted: Callable[[str], bool],
) -> _Ran:
    """Runs a network; captures layers by path, and sown values of some collections."""

    def mark(method, args, kwargs, context):
        """Sows a mark beside each captured value of a module, see `stacks`."""
        module, output = context.module, method(*args, **kwargs)
        if module.scope is None or context.method_name == "setup":
            return output
        if context.method_name == "__call__" and is_wanted("/".join(module.path)):
            name = f"__call__{stacks.SUFFIX}"
            module.sow("intermediates", name, stacks.marks(output))
        for collection, name, value in list(_own(module, sown)):
            if is_wanted("/".join((*module.path, name))):
                module.sow(
                    collection,
                    name + stacks.SUFFIX,
                    stacks.marks(value),
                    init_fn=lambda: None,
                    reduce_fn=lambda _, new: new,
                )
        return output

    with nn.intercept_methods(mark):
        output, updated = model.apply(
            variables,
            *args,
            mutable=union_filters(mutable, list(sown)),
            capture_intermediates=lambda module, method: (
                method == "__call__" and is_wanted("/".join(module.path))
            ),
            **kwargs,
        )
    captured, kept = {}, {}
    for name, tree in updated.items():
        flat = traverse_util.flatten_dict(core.unfreeze(tree), sep="/")
        values = {p: x for p, x in flat.items() if not p.endswith(stacks.SUFFIX)}
        kept[name] = traverse_util.unflatten_dict(values, sep="/")
        if name in sown:
            for path, value in values.items():
                captured[path] = value, flat.get(path + stacks.SUFFIX)
    return _Ran(output, kept, captured)


def _own(module: nn.Module, sown: set[str]) -> Iterator[tuple[str, str, Any]]:
    """Yields collection, name and value of a module's own sown values."""
    variables = module.scope.variables() if module.scope else {}
    for collection in sown & set(variables):
        for name, value in variables[collection].items():
            is_layer = name == "__call__" or isinstance(value, Mapping)
            if not is_layer and not name.endswith(stacks.SUFFIX):
                yield collection, name, value


def _carries(outputs: Any) -> Any:
    """Returns the outputs of a scan's body; only the carry if the rest is None."""
    if not isinstance(outputs, tuple):
        return outputs
    return tuple(
        x[0] if isinstance(x, tuple) and len(x) == 2 and x[1] is None else x
        for x in outputs
    )
