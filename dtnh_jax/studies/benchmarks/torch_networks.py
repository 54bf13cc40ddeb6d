"""The benchmarks' networks in PyTorch, with the weights of the linen networks.

PyTorch is imported on demand, because it is an extra.
"""

# pyright: reportMissingImports=false
from collections.abc import Callable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from dtnh_jax.studies.benchmarks.encoder import Layer

Tensors = dict[str, Any]  # by the path of a variable, such as "stage_1/conv_1/kernel"
# inputs -> logits, and by layer what is distilled
Forward = Callable[[Any], tuple[Any, dict[str, Any]]]


def translated(params: Any, batch_stats: Any) -> tuple[Forward, list[Any]]:
    """A network of `benchmarks.networks` in training, in PyTorch.

    Args:
      params: of `matrix.networks.ResNet8` or `benchmarks.encoder.Encoder`.
      batch_stats: its statistics; every call updates copies of them.

    Returns:
      The network, and copies of the trained tensors.
    """
    trained = _tensors(params)
    for each in trained.values():
        each.requires_grad_()
    tensors = trained | _tensors(batch_stats)

    def forward(x):
        return (_encoder if "embed" in params else _residual)(tensors, x)

    return forward, list(trained.values())


def tensor(values: Any) -> Any:
    """Copies an array; images get channels as the second axis, but last in memory."""
    import torch

    made = torch.from_numpy(np.array(values))
    return made.permute(0, 3, 1, 2) if made.ndim == 4 else made


def _tensors(variables: Any) -> Tensors:
    import torch

    found = {}
    for path, value in flatten_dict(variables, sep="/").items():
        made = torch.from_numpy(np.array(value))
        if made.ndim == 4:  # height, width, inputs, outputs
            made = made.permute(3, 2, 0, 1)
            made = made.contiguous(memory_format=torch.channels_last)
        elif made.ndim == 2:
            made = made.T.contiguous()
        found[path] = made
    return found


def _residual(tensors: Tensors, x: Any) -> tuple[Any, dict[str, Any]]:
    """As `matrix.networks.ResNet8`."""
    from torch.nn import functional

    def convolution(name, x, stride=1):
        weight = tensors[f"{name}/kernel"]
        pads = [
            pad
            for length, size in zip(reversed(x.shape[2:]), reversed(weight.shape[2:]))
            for pad in _same_pads(length, size, stride)
        ]
        if len(set(pads)) == 1:  # as PyTorch itself pads
            return functional.conv2d(x, weight, None, stride, pads[0])
        return functional.conv2d(functional.pad(x, pads), weight, None, stride)

    def norm(name, x):
        kinds = ("mean", "var", "scale", "bias")
        values = [tensors[f"{name}/{kind}"] for kind in kinds]
        return functional.batch_norm(x, *values, training=True)

    x = functional.relu(norm("stem_norm", convolution("stem", x)))
    maps = {}
    for stage in ("stage_1", "stage_2", "stage_3"):
        stride = 1 if stage == "stage_1" else 2
        y = convolution(f"{stage}/conv_1", x, stride)
        y = functional.relu(norm(f"{stage}/norm_1", y))
        y = norm(f"{stage}/norm_2", convolution(f"{stage}/conv_2", y))
        if f"{stage}/shortcut/kernel" in tensors:
            x = convolution(f"{stage}/shortcut", x, stride)
            x = norm(f"{stage}/shortcut_norm", x)
        x = maps[stage] = functional.relu(x + y)
    del maps["stage_1"]
    return _dense(tensors, "head", x.mean((2, 3))), maps


def _encoder(tensors: Tensors, x: Any) -> tuple[Any, dict[str, Any]]:
    """As `benchmarks.encoder.Encoder`."""
    from torch.nn import functional

    def norm(name, x):
        scale, bias = tensors[f"{name}/scale"], tensors[f"{name}/bias"]
        return functional.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)

    x = _dense(tensors, "embed", x)
    batch, tokens, width = x.shape
    outputs = {}
    names = dict.fromkeys(path.partition("/")[0] for path in tensors)
    for layer in sorted(name for name in names if name.startswith("layer_")):
        y = _dense(tensors, f"{layer}/qkv", norm(f"{layer}/norm_1", x))
        y = y.view(batch, tokens, 3, Layer.heads, width // Layer.heads)
        y = functional.scaled_dot_product_attention(*y.permute(2, 0, 3, 1, 4))
        y = y.transpose(1, 2).reshape(batch, tokens, width)
        x = x + _dense(tensors, f"{layer}/out", y)
        y = _dense(tensors, f"{layer}/widen", norm(f"{layer}/norm_2", x))
        y = functional.gelu(y, approximate="tanh")
        x = outputs[layer] = x + _dense(tensors, f"{layer}/narrow", y)
    return _dense(tensors, "head", x.mean(1)), outputs


def _dense(tensors: Tensors, name: str, x: Any) -> Any:
    from torch.nn import functional

    return functional.linear(x, tensors[f"{name}/kernel"], tensors[f"{name}/bias"])


def _same_pads(length: int, size: int, stride: int) -> tuple[int, int]:
    """Returns linen's padding before and after for "SAME".

    Example:
      >>> _same_pads(29, 3, 2), _same_pads(28, 3, 2)
      ((1, 1), (0, 1))
    """
    total = max((-(-length // stride) - 1) * stride + size - length, 0)
    return total // 2, total - total // 2
