"""EfficientNet-Lite0 in Flax linen, fast enough to fine-tune on a CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Implementation = Literal["platform", "shifted", "grouped"]


class Stage(NamedTuple):
    """Blocks of one width; only the first of them has the stride."""

    blocks: int
    kernel_size: int
    stride: int
    expansion: int  # hidden channels of a block are this many times its input's
    channels: int


LITE0_STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def depthwise_convolution(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "size size 1 channels"],
    stride: int = 1,
    implementation: Implementation = "platform",
) -> Float[Array, "batch out_height out_width channels"]:
    """Convolves every channel with its own kernel, with "SAME" padding.

    XLA's grouped convolution is right for accelerators, but on a CPU its gradient is
    many times slower than adding up `size * size` shifted slices of `x`, each times
    one row of the kernel. Values and gradients are the same up to rounding.

    "platform" chooses when the code is lowered, not when it is traced: a function
    exported from a CPU for a GPU or TPU contains the grouped convolution. "platform"
    and "shifted" define their own gradient, because XLA compiles slow code for the
    automatic one. So they have reverse mode but no `jax.jvp`; "grouped" has both.

    Args:
      x: images or feature maps.
      kernel: one `size * size` kernel per channel, shaped as in `nn.Conv`.
      stride: step of the windows in both directions, at least 1.
      implementation: "shifted", "grouped", or "platform": shifted on CPUs and
        grouped elsewhere.

    Returns:
      Feature maps whose height and width are divided by `stride`, rounded up.

    Raises:
      ValueError: `stride` is below 1, or `implementation` is unknown.

    Example:
      >>> x, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
      >>> depthwise_convolution(x, kernel, stride=2).reshape(2, 2)
      Array([[9., 6.],
             [6., 4.]], dtype=float32)
    """
    if stride < 1:
        raise ValueError(f"`stride` must be at least 1, got {stride}.")
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"`implementation` must be one of {get_args(Implementation)}, "
            f"got {implementation!r}."
        )
    if implementation == "grouped":
        return _grouped(stride, x, kernel)
    return _with_own_gradient(stride, implementation, x, kernel)


def _on_platform(
    implementation: Implementation,
    shifted: Callable[..., Any],
    grouped: Callable[..., Any],
    *operands: Array,
) -> Any:
    """Returns `shifted(*operands)` if on a CPU or selected, else `grouped`."""
    if implementation == "shifted":
        return shifted(*operands)
    return lax.platform_dependent(*operands, cpu=shifted, default=grouped)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_own_gradient(stride, implementation, x, kernel):
    shifted, grouped = partial(_shifted, stride), partial(_grouped, stride)
    return _on_platform(implementation, shifted, grouped, x, kernel)


def _forward(stride, implementation, x, kernel):
    return _with_own_gradient(stride, implementation, x, kernel), (x, kernel)


def _backward(stride, implementation, residuals, cotangent):
    def grouped(x, kernel, cotangent):
        return jax.vjp(partial(_grouped, stride), x, kernel)[1](cotangent)

    shifted = partial(_shifted_gradient, stride)
    return _on_platform(implementation, shifted, grouped, *residuals, cotangent)


_with_own_gradient.defvjp(_forward, _backward)


def _grouped(stride, x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _shifted(stride, x, kernel):
    size = len(kernel)
    padded = _pad(x, _same_pads(stride, x, size))
    return _weighted_sum(_windows(padded, size, stride), kernel)


def _shifted_gradient(stride, x, kernel, cotangent):
    """Returns the cotangents of `x` and `kernel`."""
    size, channels = len(kernel), x.shape[-1]
    pads = _same_pads(stride, x, size)
    # For x: zeros fill the gaps of the stride, then windows meet the flipped kernel.
    spans = [(n - 1) * stride + 1 for n in cotangent.shape[1:3]]
    before = [size - 1 - low for low, _ in pads]
    after = [n + low - m for n, m, (low, _) in zip(x.shape[1:3], spans, pads)]
    spread = _pad(cotangent, zip(before, after), gaps=stride - 1)
    x_grad = _weighted_sum(_windows(spread, size, 1), kernel[::-1, ::-1])
    # For the kernel: one reduction with many results reads its inputs once; separate
    # reductions take twice the time to run and to compile.
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    windows = _windows(_pad(x, pads), size, stride)
    products = [w.astype(dtype) * cotangent.astype(dtype) for w in windows]
    zeros = [jnp.zeros((), dtype)] * len(products)
    sums = lax.reduce(products, zeros, _add, (0, 1, 2))
    kernel_grad = jnp.stack(sums).reshape(size, size, 1, channels)
    return x_grad, kernel_grad.astype(kernel.dtype)


def _add(left, right):
    return [a + b for a, b in zip(left, right)]


def _same_pads(stride, x, size):
    """Returns (low, high) of height and width; "SAME" pads an odd pixel high."""
    return lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")


def _pad(x, pads, gaps=0):
    config = [(0, 0, 0), *((low, high, gaps) for low, high in pads), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _windows(padded, size, stride):
    """Returns, for every element of a kernel, the part of `padded` it multiplies."""
    height, width = ((n - size) // stride * stride + 1 for n in padded.shape[1:3])
    return [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(size)
        for j in range(size)
    ]


def _weighted_sum(windows, kernel):
    weights = kernel.reshape(len(windows), 1, 1, 1, -1)
    total = windows[0] * weights[0]
    for window, weight in zip(windows[1:], weights[1:]):
        total += window * weight
    return total


class DepthwiseConvolution(nn.Module):
    """`depthwise_convolution` with a kernel of its own and no bias."""

    kernel_size: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Returns the feature maps, in `dtype`."""
        shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = jnp.asarray(kernel, self.dtype)
        return depthwise_convolution(x.astype(self.dtype), kernel, self.stride)


class InvertedResidual(nn.Module):
    """Expands pointwise, convolves depthwise, projects pointwise; adds its input."""

    stage: Stage
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 c2"]:
        """Returns the feature maps, in `dtype`."""
        # On CPUs a matrix product is faster than XLA's 1x1 convolution.
        pointwise = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        norm = _norm(train, self.dtype)
        x = inputs
        if self.stage.expansion > 1:
            x = pointwise(self.stage.expansion * x.shape[-1], name="expand")(x)
            x = nn.relu6(norm(name="expand_norm")(x))
        size = self.stage.kernel_size
        x = DepthwiseConvolution(size, self.stride, self.dtype, name="depthwise")(x)
        x = nn.relu6(norm(name="depthwise_norm")(x))
        x = norm(name="project_norm")(pointwise(self.stage.channels, name="project")(x))
        return x + inputs if x.shape == inputs.shape else x


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: EfficientNet-B0 with relu6, without squeeze-and-excitation.

    With `lite.STAGES["efficientnet-lite1"]` it is EfficientNet-Lite1, which is deeper.

    Collections: "params"; "batch_stats", updated with `train=True` if mutable; and
    "intermediates", with the classifier's input `pooled`, if mutable. Block `b` of
    stage `s` is the submodule `stage_s_block_b`, and the classifier is `head`:
    `linen.capture_features` finds their outputs.

    Differs from the official network: no stochastic depth in training.

    Args:
      num_classes: number of logits.
      dropout_rate: dropout rate of the pooled features in training, with the stream
        "dropout".
      dtype: dtype of the computation; parameters are float32.
      stages: the blocks, from the images to the head.

    Example:
      >>> model = EfficientNetLite0(num_classes=10)
      >>> images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
      >>> key = jax.random.key(0)
      >>> shapes = jax.eval_shape(partial(model.init, train=False), key, images)
      >>> jax.eval_shape(partial(model.apply, train=False), shapes, images).shape
      (2, 10)

    References:
      Tan and Le, 2019, https://arxiv.org/abs/1905.11946
    """

    num_classes: int
    dropout_rate: float = 0.2
    dtype: Any = jnp.float32
    stages: tuple[Stage, ...] = LITE0_STAGES

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"], *, train: bool
    ) -> Float[Array, "batch num_classes"]:
        """Returns the logits of preprocessed images."""
        norm = _norm(train, self.dtype)
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, padding="SAME")
        x = conv(32, (3, 3), strides=2, name="stem")(images)
        x = nn.relu6(norm(name="stem_norm")(x))
        for number, stage in enumerate(self.stages, start=1):
            for block in range(stage.blocks):
                stride = stage.stride if block == 0 else 1
                name = f"stage_{number}_block_{block + 1}"
                x = InvertedResidual(stage, stride, self.dtype, name=name)(
                    x, train=train
                )
        x = nn.Dense(1280, use_bias=False, dtype=self.dtype, name="top")(x)
        x = nn.relu6(norm(name="top_norm")(x))
        x = x.mean((1, 2))
        self.sow("intermediates", "pooled", x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def _norm(train: bool, dtype: Any) -> Callable[..., nn.BatchNorm]:
    # The original's momentum, 0.99, suits long training: after 50 steps of fine-tuning,
    # running statistics would still be mostly those of the source's images.
    return partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-3,
        dtype=dtype,
    )
