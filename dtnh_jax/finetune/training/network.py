"""The state of training, and its initial values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.training import train_state
from jaxtyping import Array, PRNGKeyArray

from dtnh_jax.finetune.methods import Method
from dtnh_jax.finetune.models.adapters import add_adapters, new_adapters
from dtnh_jax.finetune.regularizers import REGULARIZERS
from dtnh_jax.finetune.weights.sources import (
    Source,
    Variables,
    initial_variables,
    original_variables,
)
from dtnh_jax.linen import capture_features


class Known(NamedTuple):
    """Data of a regularizer that are fixed before training."""

    source: Variables  # pretrained, with the original head
    estimate: Any = None  # see `estimates`


class State(train_state.TrainState):
    """The state of training; `step` is the number of batches so far.

    The parameters are the network's, possibly with a `source_head` beside the `head`;
    or only the `head` and `adapters`.
    """

    params: Any  # `TrainState` is annotated FrozenDict, which Flax no longer returns
    batch_stats: Any
    skipped: Any  # number of batches skipped because of numbers that are not finite


def in_dtype(source: Source, dtype: str) -> Source:
    """Returns a source whose networks compute in a dtype, with float32 parameters.

    Raises:
      ValueError: the networks only compute in float32.
    """
    if dtype == "float32":
        return source

    def module(num_classes: int) -> Any:
        return source.module(num_classes).clone(dtype=jnp.dtype(dtype))

    if not hasattr(source.module(1), "dtype"):
        raise ValueError(
            f"`--dtype` must be float32 for {source.name}, which supports no other, "
            f"got {dtype}."
        )
    return source._replace(module=module)


def look(source: Source, variables: Variables, images: Any) -> dict[str, Array]:
    """Runs the pretrained network on images; returns feature maps and logits.

    Args:
      source: the network.
      variables: pretrained variables, with the original head.
      images: inputs of the source's `preprocess`.

    Returns:
      Outputs by path, in float32; `head` has the logits of the original classes.
    """
    network = source.module(len(variables["params"]["head"]["bias"]))
    apply = capture_features(network, teacher_layers(source))
    return single(apply(variables, source.preprocess(images), train=False)[1])


def single(tree: Any) -> Any:
    """Casts a tree to float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def teacher_layers(source: Source) -> list[str]:
    """Returns the teacher's layers that regularizers may use."""
    return [*source.feature_layers, "head"]


def network_params(params: Any, source_params: Any) -> Any:
    """Returns the network's parameters: the state's, or the source's with adapters."""
    if "adapters" not in params:
        return params
    adapted = add_adapters(source_params, params["adapters"])
    return {**adapted, "head": params["head"]}


def starting_variables(
    source: Source, num_classes: int, seed: int, method: Method
) -> Variables:
    """Returns a seed's initial variables; methods of one seed share the head."""
    key = jax.random.key(seed)
    variables = initial_variables(
        source, num_classes, jax.random.fold_in(key, 0), method.is_pretrained
    )
    params = variables["params"]
    if method.has_adapters:
        adapters = new_adapters(params, jax.random.fold_in(key, 2))
        params = {"head": params["head"], "adapters": adapters}
    if method.regularizer and REGULARIZERS[method.regularizer].keeps_source_head:
        kept = original_variables(source)["params"]["head"]
        params = {**params, "source_head": kept}
    return {**variables, "params": params}


def training_key(seed: int) -> PRNGKeyArray:
    """Returns the key of a seed's dropout; methods of one seed drop the same units."""
    return jax.random.fold_in(jax.random.key(seed), 1)
