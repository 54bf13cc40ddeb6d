"""A Llama-architecture language model as pure functions, scanned over its layers.

Shape letters: B batch, T tokens, D width, H heads, E width of a head, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dtnh_jax.studies.accelerator.devices import host_normal

_ROTARY_BASE = 10_000.0
_EPSILON = 1e-5


class Size(NamedTuple):
    """The sizes of a model; by default SmolLM2's with 135M parameters."""

    layers: int = 30
    width: int = 576
    heads: int = 9
    kv_heads: int = 3
    mlp: int = 1536
    vocabulary: int = 49_152

    @property
    def head(self) -> int:
        """The width of a head."""
        return self.width // self.heads


@functools.cache
def weights(size: Size, dtype: Any, seed: int = 0) -> dict[str, Any]:
    """Returns random weights on the host; those of layers are stacked.

    They are cached: do not change them.

    Example:
      >>> tiny = weights(Size(layers=2, vocabulary=9), np.float32)
      >>> sum(x.size for x in jax.tree.leaves(tiny))
      7085952
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return host_normal(rng, shape, 0.02, dtype, alike=len(shape) > 2)

    layers, width, kv = size.layers, size.width, size.kv_heads * size.head
    return {
        "embedding": normal(size.vocabulary, width),
        "layers": {
            "q": normal(layers, width, width),
            "k": normal(layers, width, kv),
            "v": normal(layers, width, kv),
            "o": normal(layers, width, width),
            "gate": normal(layers, width, size.mlp),
            "up": normal(layers, width, size.mlp),
            "down": normal(layers, size.mlp, width),
            "attention_norm": np.ones([layers, width], dtype),
            "mlp_norm": np.ones([layers, width], dtype),
        },
        "norm": np.ones([width], dtype),
    }


def adapters(size: Size, rank: int, dtype: Any) -> dict[str, Any]:
    """Returns LoRA's factors of the projections q and v, all nonzero."""
    rng = np.random.default_rng(1)
    outputs = {"q": size.width, "v": size.kv_heads * size.head}
    return {
        name: {
            "a": host_normal(rng, (size.layers, size.width, rank), 0.02, dtype),
            "b": host_normal(rng, (size.layers, rank, out), 0.002, dtype),
        }
        for name, out in outputs.items()
    }


def logits(
    size: Size, params: Any, tokens: Int[Array, "B T"], lora: Any = None
) -> Float[Array, "B T V"]:
    """Returns the logits of every next token, in single precision."""
    x = params["embedding"][tokens]
    rotation = _rotation(tokens.shape[1], size.head)

    def layer(x, weights):
        w, factors = weights
        x = x + _attention(size, w, factors, _normed(x, w["attention_norm"]), rotation)
        y = _normed(x, w["mlp_norm"])
        y = (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]
        return x + y, None

    x, _ = jax.lax.scan(layer, x, (params["layers"], lora or {}))
    x = _normed(x, params["norm"])
    return (x @ params["embedding"].T).astype(jnp.float32)


def _attention(
    size: Size, w: Any, lora: Any, x: Float[Array, "B T D"], rotation: tuple[Any, Any]
) -> Float[Array, "B T D"]:
    batch, tokens, _ = x.shape

    def projected(name: str, heads: int) -> Array:
        y = x @ w[name]
        if name in lora:
            y = y + 2 * ((x @ lora[name]["a"]) @ lora[name]["b"])
        return y.reshape(batch, tokens, heads, size.head)

    q = _rotated(projected("q", size.heads), rotation)
    k = _rotated(projected("k", size.kv_heads), rotation)
    v = projected("v", size.kv_heads)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
    return out.reshape(batch, tokens, size.width) @ w["o"]


def _rotation(tokens: int, head: int) -> tuple[Array, Array]:
    """Cosines and sines of the rotary embedding, `[T, 1, E / 2]`."""
    rates = _ROTARY_BASE ** -(np.arange(0, head, 2, dtype=np.float32) / head)
    angles = np.arange(tokens, dtype=np.float32)[:, None, None] * rates[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _rotated(
    x: Float[Array, "B T H E"], rotation: tuple[Any, Any]
) -> Float[Array, "B T H E"]:
    cos, sin = (each[None] for each in rotation)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [left * cos - right * sin, right * cos + left * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _normed(x: Array, scale: Array) -> Array:
    """RMSNorm, in single precision inside."""
    single = x.astype(jnp.float32)
    mean = jnp.mean(single * single, axis=-1, keepdims=True)
    return (single * jax.lax.rsqrt(mean + _EPSILON)).astype(x.dtype) * scale[None, None]
