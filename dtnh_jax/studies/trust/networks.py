"""Two networks that train on an image in a fraction of a millisecond."""

from functools import partial
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

IMAGE_SIZE = 16
NUM_CLASSES = 10


class HiddenLayer(nn.Module):
    """A dense layer with ReLU."""

    units: int

    @nn.compact
    def __call__(self, inputs: Float[Array, "b n"]) -> Float[Array, "b units"]:
        """Returns the activations."""
        return nn.relu(nn.Dense(self.units, name="dense")(inputs))


class Dense(nn.Module):
    """Two hidden layers, `stage_1` and `stage_2`, and the classifier `head`."""

    num_classes: int = NUM_CLASSES
    units: int = 128

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 1"], *, train: bool
    ) -> Float[Array, "batch num_classes"]:
        """Returns the logits of images whose pixels are between -1 and 1."""
        del train  # the same in training
        x = images.reshape(len(images), -1)
        for number in (1, 2):
            x = HiddenLayer(self.units, name=f"stage_{number}")(x)
        return nn.Dense(self.num_classes, name="head")(x)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is pointwise where shapes differ.

    Args:
      channels: of the output.
      stride: of the first convolution and the shortcut.
    """

    channels: int
    stride: int

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 c2"]:
        """Returns the feature maps."""
        conv, norm = partial(nn.Conv, use_bias=False), _norm(train)
        strides = (self.stride, self.stride)
        x = conv(self.channels, (3, 3), strides, name="conv_1")(inputs)
        x = nn.relu(norm(name="norm_1")(x))
        x = norm(name="norm_2")(conv(self.channels, (3, 3), name="conv_2")(x))
        if x.shape != inputs.shape:
            inputs = conv(self.channels, (1, 1), strides, name="shortcut")(inputs)
            inputs = norm(name="shortcut_norm")(inputs)
        return nn.relu(x + inputs)


class ResNet8(nn.Module):
    """ResNet-8 for small grey images: a block each of 16, 32 and 64 channels.

    Collections: "params"; "batch_stats", updated with `train=True` if mutable. Blocks
    are the submodules `stage_1` to `stage_3`, and the classifier is `head`.

    Differs from the family in the reference, whose shortcuts have no parameters.

    Args:
      num_classes: number of logits.
      widths: channels of each block; all but the first halve height and width.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.zeros((2, 16, 16, 1))
      >>> init = partial(ResNet8().init, train=False)
      >>> params = jax.eval_shape(init, jax.random.key(0), images)["params"]
      >>> sum(x.size for x in jax.tree.leaves(params))
      77754

    References:
      He et al., 2016, section 4.2, https://arxiv.org/abs/1512.03385
    """

    num_classes: int = NUM_CLASSES
    widths: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 1"], *, train: bool
    ) -> Float[Array, "batch num_classes"]:
        """Returns the logits of images whose pixels are between -1 and 1."""
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False, name="stem")(images)
        x = nn.relu(_norm(train)(name="stem_norm")(x))
        for number, width in enumerate(self.widths, start=1):
            stride = 1 if number == 1 else 2
            x = ResidualBlock(width, stride, name=f"stage_{number}")(x, train=train)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, name="head")(x)


def _norm(train: bool) -> Any:
    # An average over about ten steps, because fine-tuning has only 150.
    return partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)


# Each with the layers whose outputs are regularized, by path.
NETWORKS: dict[str, tuple[nn.Module, tuple[str, ...]]] = {
    "dense": (Dense(), ("stage_1", "stage_2")),
    "resnet": (ResNet8(), ("stage_2", "stage_3")),
}
