"""The type of a language model on disk."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dtnh_jax.lm.architecture import Shape


class ModelError(ValueError):
    """A model's files are missing or damaged, or have another architecture."""


class ModelFile(NamedTuple):
    """A model's facts, and a function that reads its weights."""

    name: str
    licence: str
    shape: Shape
    # Reads a tensor in float32, `[outputs, inputs]` for linear maps, as Hugging Face
    # stores it. Names are those of `architecture`: "embedding", "norm", "head", and
    # with the number of a layer "0.q", "0.attention_norm" and so on.
    read: Callable[[str], np.ndarray]
    tokenizer: Any  # a `tokenizers.Tokenizer`
    end: int  # the token that ends a text
    chat_template: str | None = None  # in Jinja


def names_of(shape: Shape) -> list[str]:
    """Returns the names of all tensors of a network, for `ModelFile.read`."""
    of_layer = (
        "attention_norm",
        "q",
        "k",
        "v",
        "o",
        "mlp_norm",
        "gate",
        "up",
        "down",
    )
    whole = ["embedding", "norm", *([] if shape.tied else ["head"])]
    return whole + [f"{i}.{name}" for i in range(shape.layers) for name in of_layer]


def shape_of(shape: Shape, name: str) -> tuple[int, ...]:
    """Returns the required shape of a tensor."""
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    width, hidden = shape.width, shape.hidden
    return {
        "embedding": (shape.vocabulary, width),
        "head": (shape.vocabulary, width),
        "norm": (width,),
        "attention_norm": (width,),
        "mlp_norm": (width,),
        "q": (queries, width),
        "k": (keys, width),
        "v": (keys, width),
        "o": (width, queries),
        "gate": (hidden, width),
        "up": (hidden, width),
        "down": (width, hidden),
    }[name.rpartition(".")[2]]


def check_shape(shape: Shape) -> None:
    """Raises ModelError for impossible sizes of a network."""
    for name, number in shape._asdict().items():
        if name not in ("tied", "rotary_divisors") and not number > 0:
            raise ModelError(f"the model's {name} must be above 0, got {number}.")
    if shape.heads % shape.kv_heads:
        raise ModelError(
            f"the model's heads, {shape.heads}, must be a multiple of those of keys "
            f"and values, {shape.kv_heads}."
        )
    if shape.head % 2:
        raise ModelError(
            f"a head must have an even count of numbers, got {shape.head}."
        )
