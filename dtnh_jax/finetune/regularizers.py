"""The regularizers of the command: defaults, requirements and functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from dtnh_jax import regularizers

Maps = dict[str, Array]


class BatchOutputs(NamedTuple):
    """Outputs of a batch, of the network in training and of its teacher."""

    maps: Maps  # of the layers that are distilled
    pooled: Array  # inputs of the head, [batch, channels]
    source_logits: Any  # of the original head; None if that is not kept
    teacher_maps: Maps
    teacher_logits: Array | None  # of the original classes
    labels: Array


class Regularizer(NamedTuple):
    """A regularizer of the command, with its default strength and requirements."""

    strength: float  # the default, as `--tune` chose it
    grid: tuple[float, ...]  # candidates of `--tune`
    has_teacher: bool = False  # whether the teacher needs a forward pass of the batch
    estimate: str | None = None  # one of `estimates.ESTIMATES`
    keeps_source_head: bool = False  # beside the new one, and trained with it
    has_adapters: bool = False  # whether only adapters and the head are trained
    # Exactly one of these two:
    # (parameters of the source, estimate) -> regularizer of the parameters
    of_weights: Callable[[Any, Any], regularizers.WeightRegularizer] | None = None
    # (batch, estimate) -> scalar
    of_batch: Callable[[BatchOutputs, Any], Array] | None = None


def _towards_source(make: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """Leaves out the head, which has no pretrained value."""
    return lambda params, _: make(params, new=["head"])


def _of_maps(distance: Callable[[Maps, Maps], Array]) -> Callable[..., Array]:
    return lambda batch, _: distance(batch.maps, batch.teacher_maps)


def _of_logits(distance: Callable[..., Array]) -> Callable[..., Array]:
    return lambda batch, _: distance(batch.source_logits, batch.teacher_logits)


# A new regularizer of the command is a row here.
REGULARIZERS = {
    "l2": Regularizer(
        0.0001, (0.0001, 0.001, 0.01), of_weights=lambda params, _: regularizers.l2()
    ),
    "l2_sp": Regularizer(
        0.1, (0.01, 0.1, 1.0), of_weights=_towards_source(regularizers.l2_sp)
    ),
    "l1_sp": Regularizer(
        1e-4, (1e-4, 1e-3, 1e-2), of_weights=_towards_source(regularizers.l1_sp)
    ),
    "l2_sp_fisher": Regularizer(
        0.1,
        (0.01, 0.1, 1.0),
        estimate="fisher",
        of_weights=lambda params, fisher: regularizers.l2_sp_fisher(
            params, fisher, new=["head"]
        ),
    ),
    "lora_decay": Regularizer(
        0.1,
        (0.1, 1.0, 10.0),
        has_adapters=True,
        of_weights=lambda params, _: regularizers.lora_decay(),
    ),
    "feature_map": Regularizer(
        1e-4,
        (1e-5, 1e-4, 1e-3),
        has_teacher=True,
        of_batch=_of_maps(regularizers.feature_map),
    ),
    "attention_transfer": Regularizer(
        1.0,
        (1.0, 10.0, 100.0),
        has_teacher=True,
        of_batch=_of_maps(regularizers.attention_transfer),
    ),
    "delta": Regularizer(
        1.0,
        (0.01, 0.1, 1.0),
        has_teacher=True,
        estimate="channel_attention",
        of_batch=lambda batch, attention: regularizers.delta(
            batch.maps, batch.teacher_maps, attention
        ),
    ),
    "relational": Regularizer(
        10.0,
        (0.1, 1.0, 10.0),
        has_teacher=True,
        of_batch=_of_maps(regularizers.relational),
    ),
    "cka": Regularizer(
        10.0, (0.1, 1.0, 10.0), has_teacher=True, of_batch=_of_maps(regularizers.cka)
    ),
    "logit_distillation": Regularizer(
        0.01,
        (0.01, 0.1, 1.0),
        has_teacher=True,
        keeps_source_head=True,
        of_batch=_of_logits(regularizers.logit_distillation),
    ),
    "lwf": Regularizer(
        1.0,
        (0.1, 1.0, 10.0),
        has_teacher=True,
        keeps_source_head=True,
        of_batch=_of_logits(regularizers.lwf),
    ),
    "co_tuning": Regularizer(
        0.1,
        (0.01, 0.1, 1.0),
        estimate="relationship",
        keeps_source_head=True,
        of_batch=lambda batch, relationship: regularizers.co_tuning(
            batch.source_logits, batch.labels, relationship
        ),
    ),
    "batch_spectral_shrinkage": Regularizer(
        0.0001,
        (0.0001, 0.001, 0.01),
        of_batch=lambda batch, _: regularizers.batch_spectral_shrinkage(batch.pooled),
    ),
}
