"""A perceptron of square matrices: many parameters, and little to do for each."""

import flax.linen as nn
from jaxtyping import Array, Float


class Perceptron(nn.Module):
    """Equal layers, and a classifier.

    Args:
      num_classes: number of logits.
      layers: their number; they are the submodules `layer_1`, `layer_2` and so on.
      width: numbers that go into a layer, and come out.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> inputs, model = jnp.zeros((2, 16)), Perceptron(3, layers=8, width=16)
      >>> params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
      >>> params["layer_8"]["kernel"].shape, params["head"]["kernel"].shape
      ((16, 16), (16, 3))
    """

    num_classes: int
    layers: int
    width: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch width"], *, train: bool = False
    ) -> Float[Array, "batch num_classes"]:
        """Returns the logits; training is no different, for there is no dropout."""
        del train
        for number in range(1, self.layers + 1):
            x = nn.relu(nn.Dense(self.width, name=f"layer_{number}")(x))
        return nn.Dense(self.num_classes, name="head")(x)
