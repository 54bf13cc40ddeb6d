"""The Llama architecture as a module of Flax NNX, with or without adapters.

Shape letters: B sequences, T tokens, D width, H heads, E size of a head, V size of the
vocabulary. Layers are stacked and run in one loop, so that thirty layers compile as
fast as one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

# Linear maps that can have adapters; the values of `--adapt`.
LINEAR = ("q", "k", "v", "o", "gate", "up", "down")


class Shape(NamedTuple):
    """The sizes of a network."""

    vocabulary: int
    width: int
    hidden: int  # width between the two linear maps of a feed-forward layer
    layers: int
    heads: int
    kv_heads: int  # heads of keys and values, each shared by several query heads
    head: int  # size of a head
    context: int  # largest number of tokens in its training
    rotary_base: float
    epsilon: float
    tied: bool  # whether embedding and output share their weights
    rotary_divisors: tuple[float, ...] | None = None  # of frequencies, `[head / 2]`


class Adapters(NamedTuple):
    """Low-rank adapters of linear maps."""

    rank: int
    names: tuple[str, ...]  # of `LINEAR`


class Llama(nnx.Module):
    """A decoder that predicts every next token.

    Attributes:
      embedding: `[V, D]`.
      blocks: all layers, stacked along the first axis of every variable.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        dtype: Any = jnp.float32,
        adapters: Adapters | None = None,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.shape, self.dtype, self.remat = shape, dtype, remat
        words, width = shape.vocabulary, shape.width
        normal = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(normal(rngs.params(), (words, width), dtype))

        @nnx.split_rngs(splits=shape.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Block(shape, dtype, adapters, rngs)

        self.blocks = blocks(rngs)
        self.norm = _norm(shape, dtype, rngs)
        if not shape.tied:
            self.head = nnx.Param(normal(rngs.params(), (words, width), dtype))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the logits of every next token.

        Args:
          tokens: tokens of the vocabulary.
          segments: the number of each token's text in its row; attention stays within
            a text. By default a row is one text.
          positions: position of each token in its text.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = _mask(segments, tokens.shape[1])
        rotation = _rotation(self.shape, positions)
        x = self.embedding[...][tokens]
        graphdef, state = nnx.split(self.blocks)

        def layer(x, state):
            return nnx.merge(graphdef, state)(x, rotation, mask), None

        x, _ = jax.lax.scan(jax.checkpoint(layer) if self.remat else layer, x, state)
        words = self.embedding if self.shape.tied else self.head
        return self.norm(x) @ words[...].T


class Block(nnx.Module):
    """A layer: attention and a gated feed-forward network, each with its residual."""

    def __init__(
        self, shape: Shape, dtype: Any, adapters: Adapters | None, rngs: nnx.Rngs
    ):
        def linear(name: str, inputs: int, outputs: int) -> nnx.Module:
            map_ = nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                dtype=dtype,
                param_dtype=dtype,
                rngs=rngs,
            )
            if adapters is None or name not in adapters.names:
                return map_
            return nnx.LoRA(
                inputs,
                adapters.rank,
                outputs,
                base_module=map_,
                dtype=dtype,
                rngs=rngs,
            )

        width, hidden = shape.width, shape.hidden
        queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
        self.head = shape.head
        self.attention_norm = _norm(shape, dtype, rngs)
        self.q = linear("q", width, queries)
        self.k = linear("k", width, keys)
        self.v = linear("v", width, keys)
        self.o = linear("o", queries, width)
        self.mlp_norm = _norm(shape, dtype, rngs)
        self.gate = linear("gate", width, hidden)
        self.up = linear("up", width, hidden)
        self.down = linear("down", hidden, width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: tuple[Any, Any],
        mask: Bool[Array, "..."],
    ) -> Float[Array, "B T D"]:
        """Returns the layer's output, with the shape of its input."""
        y = self.attention_norm(x)
        heads = (*x.shape[:2], -1, self.head)
        q = _rotated(self.q(y).reshape(heads), rotation)
        k = _rotated(self.k(y).reshape(heads), rotation)
        v = self.v(y).reshape(heads)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
        x = x + self.o(y.reshape(*x.shape[:2], -1))
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


def _norm(shape: Shape, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        shape.width, epsilon=shape.epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs
    )


def _mask(segments: Array | None, tokens: int) -> Bool[Array, "B 1 T T"]:
    """Returns the attention mask: earlier tokens of the same text, and the token."""
    past = jnp.tril(jnp.ones((1, 1, tokens, tokens), bool))
    if segments is None:
        return past
    return past & (segments[:, None, :, None] == segments[:, None, None, :])


def _rotation(shape: Shape, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Returns cosines and sines of the rotary embedding, `[B, T, 1, E / 2]`."""
    at = np.arange(0, shape.head, 2, dtype=np.float32) / shape.head
    rates = np.float32(shape.rotary_base) ** -at
    if shape.rotary_divisors is not None:
        rates = rates / np.asarray(shape.rotary_divisors, np.float32)
    angles = positions.astype(jnp.float32)[..., None, None] * rates[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _rotated(
    x: Float[Array, "B T H E"], rotation: tuple[Any, Any]
) -> Float[Array, "B T H E"]:
    """Rotates pairs of entries, one from each half of a head."""
    cos, sin = rotation
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [left * cos - right * sin, right * cos + left * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
