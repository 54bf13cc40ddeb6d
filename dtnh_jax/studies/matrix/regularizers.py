"""The regularizers of the grid, and how strong they usually are."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from dtnh_jax import regularizers


class Regularizer(NamedTuple):
    """A regularizer of the grid; one of the three functions is given."""

    reference: float  # the usual strength, of which the grid has multiples
    on_photographs: float  # that of the large network
    # Parameters of the source -> regularizer of the parameters.
    of_weights: Callable[[Any], regularizers.WeightRegularizer] | None = None
    # (maps of the student, maps of the teacher) -> scalar.
    of_maps: Callable[[Any, Any], Array] | None = None
    # (logits of the source's classes, those of the teacher) -> scalar. The student's
    # are what the source's head, as it was, makes of the student's pooled features.
    of_logits: Callable[[Array, Array], Array] | None = None


# A new regularizer is a row here.
REGULARIZERS = {
    # As in the Transfer-Learning-Library: 0.01, for the pretrained part and for plain
    # L2 on the new head; of 1/2 the sum of squares over all parameters.
    "l2_sp": Regularizer(
        0.01, 0.1, of_weights=lambda source: regularizers.l2_sp(source, new=["head"])
    ),
    # Of 1/2 the sum of squares over positions and channels of two layers, 3072 values,
    # averaged over the batch. Libraries differ in what they average over, so this is
    # no one's default: in first trials 0.001 helped a little, and 0.1 was ruin.
    "feature_map": Regularizer(0.001, 1e-4, of_maps=regularizers.feature_map),
    # On validation images of two pairs 1e-4 cost nothing, 0.01 12 and 4 points.
    "l1_sp": Regularizer(
        1e-4, 1e-4, of_weights=lambda source: regularizers.l1_sp(source, new=["head"])
    ),
    # On validation images of a good source, 10 cost nothing, and 1000 cost 23 points.
    "attention_transfer": Regularizer(
        10.0, 10.0, of_maps=regularizers.attention_transfer
    ),
    # Learning without Forgetting, but for the old head, which is not trained. On those
    # images 1 and 10 both cost 4 points, and no more: the new head learns anyway.
    "logit_distillation": Regularizer(
        0.1, 0.1, of_logits=regularizers.logit_distillation
    ),
}
