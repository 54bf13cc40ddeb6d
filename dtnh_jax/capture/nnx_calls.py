"""Wraps calls of NNX layers and scales their channels, in unmodified networks."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array

from dtnh_jax.capture import layers as _layers
from dtnh_jax.capture import scales as _scales
from dtnh_jax.capture.layers import Layers
from dtnh_jax.capture.nnx_versions import modules_of

# Methods of classes are replaced while a network runs: one network at a time.
_lock = threading.RLock()


def scale_features(model: nnx.Module, layers: Layers) -> Callable[..., Any]:
    """Makes a module multiply the outputs of some of its layers, channel by channel.

    The network needs no changes. A scale of 1 keeps a channel, 0 drops it;
    `regularizers.channel_attention` uses that to measure each channel's importance. The
    output of a layer that is called more than once is multiplied each time.

    Args:
      model: the network.
      layers: paths of layers such as `"encoder/blocks/3"`, or a function that maps a
        path to whether the layer is scaled.

    Returns:
      A function of `(scales, ...)` with the other arguments of `model`, that returns
      the output of `model`. `scales` is a dict of `[channels]` by path, for the last
      axis of each layer's output.

    Raises:
      TypeError: `layers` is a string; at the call, the output of a layer is no array.
      ValueError: at the call, a layer is missing (the error names similar paths), or
        the scales do not match the layers and channels.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.relu)
      >>> call = scale_features(model, ["layers/0"])
      >>> print(call({"layers/0": jnp.zeros(2)}, jnp.ones((1, 3))))
      [[0. 0.]]
    """
    _layers.check_layers(layers)

    def call(scales: Mapping[str, Array], *args, **kwargs):
        paths = {
            id(module): "/".join(map(str, path)) for path, module in modules_of(model)
        }
        wanted = {
            type(module)
            for _, module in modules_of(model)
            if _layers.is_wanted(layers, paths[id(module)]) and callable(module)
        }
        scaled = {}

        def after(module, output):
            path = paths.get(id(module), "")
            if not _layers.is_wanted(layers, path):
                return output
            scaled[path] = {"": True}
            return _scales.scale(output, scales, path)

        with wrapped_calls(wanted, after):
            output = model(*args, **kwargs)
        _layers.pick_layers(layers, scaled, lambda: sorted(paths.values()))
        _scales.check_all_used(scales, scaled)
        return output

    return call


@contextlib.contextmanager
def wrapped_calls(
    classes: set[type], after: Callable[[Any, Any], Any]
) -> Iterator[None]:
    """Makes instances of classes return `after(instance, output)` when called.

    Differs from the `method_outputs` of `nnx.capture`, which wraps all public methods
    of all classes: that misses inherited ones and breaks static ones.
    """
    with _lock:
        own = {cls: vars(cls).get("__call__") for cls in classes}
        # Look up all methods before replacing any: a class may inherit from another.
        wrapped = {cls: _wrapped(cls, cls.__call__, after) for cls in classes}
        try:
            for cls in classes:
                cls.__call__ = wrapped[cls]
            yield
        finally:
            for cls, method in own.items():
                if method is None:
                    del cls.__call__
                else:
                    cls.__call__ = method


def _wrapped(
    cls: type, method: Callable[..., Any], after: Callable[[Any, Any], Any]
) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        output = method(self, *args, **kwargs)
        # Not for a subclass's call of its base class.
        return after(self, output) if type(self) is cls else output

    return call
