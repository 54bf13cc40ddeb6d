"""A small transformer encoder, which consists mostly of matrix products."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class Layer(nn.Module):
    """Self-attention and a perceptron, each with a normalisation and a residual.

    Args:
      heads: number of attention heads, which divides the width.
    """

    heads: int = 4

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the layer's output."""
        batch, tokens, width = x.shape
        y = nn.LayerNorm(epsilon=1e-5, name="norm_1")(x)
        y = nn.Dense(3 * width, name="qkv")(y)
        y = y.reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = jnp.moveaxis(y, 2, 0)
        y = nn.dot_product_attention(query, key, value)
        x = x + nn.Dense(width, name="out")(y.reshape(batch, tokens, width))
        y = nn.LayerNorm(epsilon=1e-5, name="norm_2")(x)
        y = nn.gelu(nn.Dense(4 * width, name="widen")(y))
        return x + nn.Dense(width, name="narrow")(y)


class Encoder(nn.Module):
    """Layers between an embedding and a classifier of the mean over tokens.

    Args:
      num_classes: number of logits.
      layers: their number; they are the submodules `layer_1`, `layer_2` and so on.
      width: channels of a token, a multiple of 4.

    Example:
      >>> import jax
      >>> tokens = jnp.zeros((2, 8, 16))
      >>> init = jax.eval_shape(Encoder(3).init, jax.random.key(0), tokens)
      >>> jax.eval_shape(Encoder(3).apply, init, tokens).shape
      (2, 3)
    """

    num_classes: int
    layers: int = 2
    width: int = 256

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch tokens channels"], *, train: bool = False
    ) -> Float[Array, "batch num_classes"]:
        """Returns the logits; training is no different, for there is no dropout."""
        del train
        x = nn.Dense(self.width, name="embed")(tokens)
        for number in range(1, self.layers + 1):
            x = Layer(name=f"layer_{number}")(x)
        return nn.Dense(self.num_classes, name="head")(x.mean(1))
