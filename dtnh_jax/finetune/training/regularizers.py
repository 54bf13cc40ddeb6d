"""The regularizers of the command, as functions of the parameters or of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from dtnh_jax import regularizers

Maps = dict[str, Array]


class Seen(NamedTuple):
    """What a batch looks like to the network in training, and to its teacher."""

    maps: Maps  # of the layers that the source is distilled at
    pooled: Array  # what the head sees, [batch, channels]
    source_logits: Any  # of the original head; None where that is not kept
    teacher_maps: Maps
    teacher_logits: Array | None  # of the original classes
    labels: Array


# (parameters of the source, estimate) -> regularizer of the parameters
OfWeights = Callable[[Any, Any], regularizers.WeightRegularizer]
# (batch, estimate) -> scalar
OfBatch = Callable[[Seen, Any], Array]


def _towards_source(make: Callable[..., Any]) -> OfWeights:
    """Has a regularizer leave out the head, which has no pretrained value."""
    return lambda params, _: make(params, new=["head"])


def _of_maps(distance: Callable[[Maps, Maps], Array]) -> OfBatch:
    return lambda seen, _: distance(seen.maps, seen.teacher_maps)


def _of_logits(distance: Callable[..., Array]) -> OfBatch:
    return lambda seen, _: distance(seen.source_logits, seen.teacher_logits)


# Each of `methods.REGULARIZERS` is a row in one of these two.
OF_WEIGHTS: dict[str, OfWeights] = {
    "l2": lambda params, _: regularizers.l2(),
    "l2_sp": _towards_source(regularizers.l2_sp),
    "l1_sp": _towards_source(regularizers.l1_sp),
    "l2_sp_fisher": lambda params, fisher: regularizers.l2_sp_fisher(
        params, fisher, new=["head"]
    ),
    "lora_decay": lambda params, _: regularizers.lora_decay(),
}
OF_BATCH: dict[str, OfBatch] = {
    "feature_map": _of_maps(regularizers.feature_map),
    "attention_transfer": _of_maps(regularizers.attention_transfer),
    "delta": lambda seen, attention: regularizers.delta(
        seen.maps, seen.teacher_maps, attention
    ),
    "relational": _of_maps(regularizers.relational),
    "cka": _of_maps(regularizers.cka),
    "logit_distillation": _of_logits(regularizers.logit_distillation),
    "lwf": _of_logits(regularizers.lwf),
    "co_tuning": lambda seen, relationship: regularizers.co_tuning(
        seen.source_logits, seen.labels, relationship
    ),
    "batch_spectral_shrinkage": lambda seen, _: regularizers.batch_spectral_shrinkage(
        seen.pooled
    ),
}
