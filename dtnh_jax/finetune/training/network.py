"""What is trained, and what it starts from."""

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
    """What a regularizer knows before training begins."""

    source: Variables  # pretrained, with the original head
    estimate: Any = None  # see `estimates`


class State(train_state.TrainState):
    """All that changes in training; `step` is how many batches are done.

    The parameters are the network's; with a `source_head` beside the `head`; or the
    `head` and `adapters` alone.
    """

    params: Any  # `TrainState` says FrozenDict, which Flax has ceased to return
    batch_stats: Any
    skipped: Any  # batches that were left out, because of numbers that are not finite


def in_dtype(source: Source, dtype: str) -> Source:
    """Has a source's networks compute in a dtype; their parameters stay float32.

    Raises:
      ValueError: they compute in float32 alone.
    """
    if dtype == "float32":
        return source

    def module(num_classes: int) -> Any:
        return source.module(num_classes).clone(dtype=jnp.dtype(dtype))

    if not hasattr(source.module(1), "dtype"):
        raise ValueError(
            f"`--dtype` must be float32 for {source.name}, which computes in no other, "
            f"got {dtype}."
        )
    return source._replace(module=module)


def look(source: Source, variables: Variables, images: Any) -> dict[str, Array]:
    """What the pretrained network makes of images: its maps by layer, and logits.

    Args:
      source: the network.
      variables: pretrained, with the original head.
      images: as the source's `preprocess` takes them.

    Returns:
      Outputs by path, in float32; those of `head` are the logits of the original
      classes.
    """
    network = source.module(len(variables["params"]["head"]["bias"]))
    apply = capture_features(network, teacher_layers(source))
    return single(apply(variables, source.preprocess(images), train=False)[1])


def single(tree: Any) -> Any:
    """A tree in float32, whatever a network computes in."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def teacher_layers(source: Source) -> list[str]:
    """The layers whose outputs regularizers may want of the teacher."""
    return [*source.feature_layers, "head"]


def network_params(params: Any, source_params: Any) -> Any:
    """The network's parameters: those of a state, or the source's with adapters."""
    if "adapters" not in params:
        return params
    adapted = add_adapters(source_params, params["adapters"])
    return {**adapted, "head": params["head"]}


def starting_variables(
    source: Source, num_classes: int, seed: int, method: Method
) -> Variables:
    """What a seed starts from; methods of one seed have the same head."""
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
    """The key of a seed's dropout; methods of one seed drop the same units."""
    return jax.random.fold_in(jax.random.key(seed), 1)
