"""ResNet-18, 34 and 50 in Flax linen, with the same outputs as torchvision's.

Names of variables:

  here                             torchvision
  stem, stem_norm                  conv1, bn1
  stage_s_block_b/conv_i, norm_i   layer{s}.{b - 1}.conv{i}, layer{s}.{b - 1}.bn{i}
  stage_s_block_b/shortcut         layer{s}.{b - 1}.downsample.0
  stage_s_block_b/shortcut_norm    layer{s}.{b - 1}.downsample.1
  head                             fc
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

# Mean and deviation of ImageNet's channels, from 0 to 1, as in torchvision.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Depth(NamedTuple):
    """The blocks of a ResNet."""

    blocks: tuple[int, int, int, int]  # of each stage
    is_bottleneck: bool


DEPTHS = {
    "resnet18": Depth((2, 2, 2, 2), False),
    "resnet34": Depth((3, 4, 6, 3), False),
    "resnet50": Depth((3, 4, 6, 3), True),
}


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or a 3x3 between two 1x1 convolutions.

    The stride is in the 3x3 convolution, as in torchvision ("version 1.5"), instead of
    the first 1x1 convolution, as in the paper.
    """

    channels: int
    stride: int
    is_bottleneck: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 c2"]:
        """Returns the feature maps, in `dtype`."""
        conv, norm = _layers(train, self.dtype)
        width, stride = self.channels, self.stride
        outputs = 4 * width if self.is_bottleneck else width
        plan = (
            [(width, 1, 1), (width, 3, stride), (outputs, 1, 1)]
            if self.is_bottleneck
            else [(width, 3, stride), (width, 3, 1)]
        )
        x = inputs
        for number, (features, size, step) in enumerate(plan, start=1):
            x = nn.relu(x) if number > 1 else x
            x = conv(features, size, step, name=f"conv_{number}")(x)
            x = norm(name=f"norm_{number}")(x)
        if stride > 1 or inputs.shape[-1] != outputs:
            inputs = conv(outputs, 1, stride, name="shortcut")(inputs)
            inputs = norm(name="shortcut_norm")(inputs)
        return nn.relu(x + inputs)


class ResNet(nn.Module):
    """A residual network for ImageNet, with torchvision's layers.

    Collections: "params"; "batch_stats", updated with `train=True` if mutable; and
    "intermediates", with the classifier's input `pooled`, if mutable. Block `b` of
    stage `s` is the submodule `stage_s_block_b`, and the classifier is `head`.

    Differs from torchvision in training: running variances have no Bessel correction,
    as always in Flax.

    Args:
      num_classes: number of logits.
      depth: one of the values of `DEPTHS`.
      dtype: dtype of the computation; parameters are float32.

    Example:
      >>> import jax
      >>> model = ResNet(num_classes=10, depth=DEPTHS["resnet18"])
      >>> images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
      >>> key = jax.random.key(0)
      >>> shapes = jax.eval_shape(partial(model.init, train=False), key, images)
      >>> jax.eval_shape(partial(model.apply, train=False), shapes, images).shape
      (2, 10)

    References:
      He et al., 2015, table 1, https://arxiv.org/abs/1512.03385
    """

    num_classes: int
    depth: Depth
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"], *, train: bool
    ) -> Float[Array, "batch num_classes"]:
        """Returns the logits of preprocessed images."""
        conv, norm = _layers(train, self.dtype)
        x = conv(64, 7, 2, name="stem")(images)
        x = nn.relu(norm(name="stem_norm")(x))
        # nn.max_pool pads with minus infinity, and so does torch.
        padding: Any = ((1, 1), (1, 1))  # Flax's annotation allows only names
        x = nn.max_pool(x, (3, 3), (2, 2), padding)
        for stage, blocks in enumerate(self.depth.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage_{stage + 1}_block_{block + 1}"
                width, kind = 64 * 2**stage, self.depth.is_bottleneck
                x = Block(width, stride, kind, self.dtype, name=name)(x, train=train)
        x = x.mean((1, 2))
        self.sow("intermediates", "pooled", x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def feature_layers(depth: Depth) -> tuple[str, ...]:
    """Returns the last block of every stage, the default layers for distillation."""
    return tuple(
        f"stage_{stage}_block_{blocks}"
        for stage, blocks in enumerate(depth.blocks, start=1)
    )


def standardize(
    images: UInt8[Array, "b h w 3"] | UInt8[np.ndarray, "b h w 3"],
) -> Float[Array, "b h w 3"]:
    """Returns images with ImageNet's mean 0 and deviation 1, by channel."""
    mean = jnp.asarray(_MEAN)[None, None, None]
    deviation = jnp.asarray(_DEVIATION)[None, None, None]
    return (jnp.asarray(images, jnp.float32) / 255 - mean) / deviation


def torch_name(path: tuple[str, ...]) -> str:
    """Returns torchvision's name of a variable.

    Args:
      path: path of the variable, starting with its collection.

    Example:
      >>> torch_name(("batch_stats", "stage_2_block_1", "norm_2", "mean"))
      'layer2.0.bn2.running_mean'
    """
    *_, layer, last = path
    leaf = {"mean": "running_mean", "var": "running_var", "bias": "bias"}
    outer = {"stem": "conv1", "stem_norm": "bn1", "head": "fc"}
    name = f"{layer}.{leaf.get(last, 'weight')}"
    if layer in outer:
        return name.replace(layer, outer[layer])
    _, stage, _, block = path[1].split("_")
    for ours, theirs in (
        ("shortcut_norm", "downsample.1"),
        ("shortcut", "downsample.0"),
        ("conv_", "conv"),
        ("norm_", "bn"),
    ):
        name = name.replace(ours, theirs)
    return f"layer{stage}.{int(block) - 1}.{name}"


def _layers(train: bool, dtype: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns torch's convolution, with equal padding on both sides, and its norm."""

    def conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
        return nn.Conv(
            features,
            (size, size),
            stride,
            padding=size // 2,
            use_bias=False,
            dtype=dtype,
            name=name,
        )

    norm = partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
    )
    return conv, norm
