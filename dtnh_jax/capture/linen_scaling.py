"""Scales channels of layers in unmodified Flax linen networks."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from dtnh_jax.capture import layers as _layers
from dtnh_jax.capture import scales as _scales
from dtnh_jax.capture.layers import Layers


def scale_features(model: nn.Module, layers: Layers) -> Callable[..., Any]:
    """Makes `model.apply` multiply the outputs of some layers, channel by channel.

    The network needs no changes. A scale of 1 keeps a channel, 0 drops it;
    `regularizers.channel_attention` uses that to measure each channel's importance. The
    output of a layer that is called more than once is multiplied each time.

    Args:
      model: the network.
      layers: paths of layers such as `"encoder/block_3"`, or a function that maps a
        path to whether the layer is scaled.

    Returns:
      A function of `(variables, scales, ...)` with the other arguments of
      `model.apply`, that returns the output of `model.apply`. `scales` is a dict of
      `[channels]` by path, for the last axis of each layer's output.

    Raises:
      TypeError: `layers` is a string; at the call, the output of a layer is no array.
      ValueError: at the call, a layer is missing (the error names similar paths), or
        the scales do not match the layers and channels.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model = nn.Sequential([nn.Dense(2), nn.relu, nn.Dense(2)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> apply = scale_features(model, ["layers_0"])
      >>> print(apply(variables, {"layers_0": jnp.zeros(2)}, jnp.ones((1, 3))))
      [[0. 0.]]
    """
    _layers.check_layers(layers)

    def apply(variables, scales: Mapping[str, Array], *args, **kwargs):
        called, scaled, running = set(), {}, set()

        def intercept(method, args, kwargs, context):
            path = "/".join(context.module.path)
            # A layer's call of its base class is not another layer.
            if context.method_name != "__call__" or path in running:
                return method(*args, **kwargs)
            running.add(path)
            try:
                output = method(*args, **kwargs)
            finally:
                running.remove(path)
            called.add(path)
            if not _layers.is_wanted(layers, path):
                return output
            scaled[path] = {"": True}
            return _scales.scale(output, scales, path)

        with nn.intercept_methods(intercept):
            output = model.apply(variables, *args, **kwargs)
        _layers.pick_layers(layers, scaled, lambda: sorted(called))
        _scales.check_all_used(scales, scaled)
        return output

    return apply
