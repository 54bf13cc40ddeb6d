"""torchvision's ResNets beside ours: names, shapes, and the layers in NumPy.

Written from torch's definitions of the layers, channels first and in float64; nothing
here knows of the port.
"""

import numpy as np


def shapes(blocks, is_bottleneck, classes=1000):
    """Returns the shape of every tensor of a state dictionary, by name."""
    found = {"conv1.weight": (64, 3, 7, 7), **_norm("bn1", 64)}
    expansion = 4 if is_bottleneck else 1
    inputs = 64
    for stage, count in enumerate(blocks, start=1):
        width = 32 * 2**stage
        for block in range(count):
            name = f"layer{stage}.{block}"
            if is_bottleneck:
                plan = [(inputs, width, 1), (width, width, 3), (width, 4 * width, 1)]
            else:
                plan = [(inputs, width, 3), (width, width, 3)]
            for i, (a, b, size) in enumerate(plan, start=1):
                found[f"{name}.conv{i}.weight"] = (b, a, size, size)
                found |= _norm(f"{name}.bn{i}", b)
            if block == 0 and (stage > 1 or is_bottleneck):
                outputs = expansion * width
                found[f"{name}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                found |= _norm(f"{name}.downsample.1", outputs)
            inputs = expansion * width
    return {**found, "fc.weight": (classes, inputs), "fc.bias": (classes,)}


def _norm(name, channels):
    vectors = ("weight", "bias", "running_mean", "running_var")
    found = {f"{name}.{vector}": (channels,) for vector in vectors}
    return {**found, f"{name}.num_batches_tracked": ()}


def draw(blocks, is_bottleneck, classes):
    """Returns random tensors, of sizes that neither vanish nor explode."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes(blocks, is_bottleneck, classes).items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(7)
        elif name.endswith("running_var"):
            tensors[name] = rng.uniform(0.5, 2, shape).astype(np.float32)
        elif len(shape) > 1:
            scale = (2 / np.prod(shape[1:])) ** 0.5
            tensors[name] = (scale * rng.normal(size=shape)).astype(np.float32)
        else:
            tensors[name] = rng.normal(0.5, 0.3, shape).astype(np.float32)
    return tensors


def logits(tensors, images, blocks, is_bottleneck):
    """Returns what torch would in evaluation mode; images are [n, 3, h, w]."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x, name):
        mean, var, scale, shift = (
            t[f"{name}.{leaf}"][None, :, None, None]
            for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + shift

    x = norm(convolve(images, t["conv1.weight"], 2, 3), "bn1")
    x = max_pool(np.maximum(x, 0))
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            step = 2 if stage > 1 and block == 0 else 1
            # Stride and padding of each convolution: the one of 3x3 has the stride.
            plan = [(1, 0), (step, 1), (1, 0)] if is_bottleneck else [(step, 1), (1, 1)]
            y = x
            for i, (stride, pad) in enumerate(plan, start=1):
                y = convolve(y, t[f"{name}.conv{i}.weight"], stride, pad)
                y = norm(y, f"{name}.bn{i}")
                y = np.maximum(y, 0) if i < len(plan) else y
            if f"{name}.downsample.0.weight" in t:
                x = convolve(x, t[f"{name}.downsample.0.weight"], step, 0)
                x = norm(x, f"{name}.downsample.1")
            x = np.maximum(x + y, 0)
    return x.mean((2, 3)) @ t["fc.weight"].T + t["fc.bias"]


def convolve(x, kernel, stride, pad):
    """Cross-correlates [n, c, h, w] with [out, c, k, k], zeros around."""
    size = kernel.shape[-1]
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
    windows = windows[:, :, ::stride, ::stride]
    return np.einsum("nchwij,ocij->nohw", windows, kernel, optimize=True)


def max_pool(x):
    """Takes the largest of each 3x3, two apart; the border counts for nothing."""
    around = [(0, 0), (0, 0), (1, 1), (1, 1)]
    x = np.pad(x, around, constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    return windows[:, :, ::2, ::2].max((-2, -1))
