"""The importance of a pretrained network's channels for a task, for `delta`."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dtnh_jax.regularizers.estimators import _loss_file
from dtnh_jax.regularizers.estimators._progress import progress_bar

Batch = Any
Scales = dict[str, Float[Array, "_"]]  # [channels] by layer


def attention_from_losses(
    rises: Float[Array | np.ndarray, "channels"], temperature: float = 5.0
) -> Float[np.ndarray, "channels"]:
    """Returns weights of a layer's channels from the rise of the loss without each.

    They are `softmax(z / temperature)` with `z = (rises - mean) / std` over the layer,
    where `std` divides by the number of channels. Equal rises give `1 / channels` to
    each channel.

    Args:
      rises: `[channels]`, the loss without a channel minus the loss with all.
      temperature: above 0; a higher temperature makes the weights more equal.

    Returns:
      `[channels]` in float32, above 0, which sum to 1.

    Raises:
      ValueError: there are no rises, they are not finite, or the temperature is not
        positive.

    Example:
      >>> print(attention_from_losses(np.array([0.0, 0.0, 3.0])).round(3))
      [0.283 0.283 0.433]
      >>> print(attention_from_losses(np.array([0.5, 0.5])))
      [0.5 0.5]

    References:
      Li et al., 2019, "DELTA", https://arxiv.org/abs/1901.09229. The z-score and the
      temperature of 5 are those of its code, https://github.com/lixingjian/DELTA

    Differs from DELTA's code if all rises are equal: that code divides 0 by 0.
    """
    _check_temperature(temperature)
    exact = np.asarray(rises, np.float64)
    if not exact.size or not np.all(np.isfinite(exact)):
        raise ValueError(
            f"`rises` must be finite and at least one, got {exact.tolist()}."
        )
    spread = np.std(exact)
    scores = (exact - np.mean(exact)) / (spread if spread > 0 else 1.0)
    # The largest becomes 0, so that `exp` can not overflow at low temperatures.
    weights = np.exp((scores - np.max(scores)) / temperature)
    return (weights / np.sum(weights)).astype(np.float32)


def channel_attention(
    loss: Callable[[Scales, Batch], Any],
    channels: Mapping[str, int],
    batches: Iterable[Batch],
    *,
    temperature: float = 5.0,
    chunk_size: int = 8,
    path: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, Float[np.ndarray, "_"]]:
    """Measures each channel's importance: the loss without it, minus that with all.

    This takes a forward pass over all batches for every channel of every layer, so use
    few batches: DELTA's authors take four of 64 images. First train the network, at
    least its head, briefly on the task. Run it in evaluation mode.

    Args:
      loss: maps `(scales, batch)` to the mean loss of a batch. `scales` has factors
        `[channels]` for the output of each layer: 1, or 0 for a dropped channel.
        `linen.scale_features` and `nnx.scale_features` apply them to an unmodified
        network.
      channels: number of channels by layer.
      batches: arrays, or trees of arrays, with the examples on the leading axis. They
        are iterated repeatedly in the same order, and weighted by their numbers of
        examples. A batch of another shape compiles the loss again.
      temperature: as in `attention_from_losses`.
      chunk_size: number of channels that one compiled call drops, each in its own copy
        of the forward pass.
      path: file for the losses, with a line of JSON for each chunk. A later call with
        the same layers and batches resumes from it, whatever its temperature and chunk
        size; another network is recognized by its loss.
      progress: whether to show a progress bar on a terminal, if `rich` is installed.

    Returns:
      Weights `[channels]` in float32 by layer, which sum to 1, for `delta`.

    Raises:
      TypeError: `batches` can be iterated only once, or `loss` returns no scalar.
      ValueError: an argument is out of range, a loss is not finite, the batches change
        between iterations, or the file at `path` belongs to other layers, batches or
        networks; the file is then unchanged.

    Example:
      >>> def loss(scales, batch):  # the second channel alone matters
      ...     return jnp.mean(jnp.square(1.0 - batch * scales["body"][1]))
      >>> attention = channel_attention(loss, {"body": 2}, [jnp.ones(3)])
      >>> print(attention["body"].round(3))
      [0.401 0.599]

    References:
      Li et al., 2019, "DELTA", https://arxiv.org/abs/1901.09229

    Differs from DELTA's code, which zeroes the filter of a convolution before its
    normalization, so that the normalization's bias remains. Here the channel of the
    layer's output is zero, for any layer.
    """
    _check_temperature(temperature)
    if not channels or any(count < 1 for count in channels.values()):
        raise ValueError(
            "`channels` must have a layer, and at least one channel in each, got "
            f"{dict(channels)}."
        )
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    if isinstance(batches, Iterator) or iter(batches) is batches:
        raise TypeError(
            "`batches` must be iterable more than once, such as a list, got "
            f"{type(batches).__name__}."
        )
    total = sum(channels.values())
    ends = np.cumsum(list(channels.values()))[:-1]
    layer_of = np.repeat(list(channels), list(channels.values()))

    @jax.jit
    def losses_without(dropped, batch):  # [chunk], `total` to drop none
        def without(channel):
            flat = jnp.where(jnp.arange(total) == channel, 0.0, 1.0)
            scales = dict(zip(channels, jnp.split(flat, ends)))
            value = jnp.asarray(loss(scales, batch))
            if value.shape != ():
                raise TypeError(
                    "`loss` must return a scalar, the mean over the batch, got shape "
                    f"{value.shape}."
                )
            return value

        return jax.vmap(without)(dropped)

    chunk = min(chunk_size, total)

    def losses(channel_numbers, batch):
        padded = np.full(chunk, total)
        padded[: len(channel_numbers)] = channel_numbers
        return np.asarray(losses_without(padded, batch), np.float64)

    digest, sizes = _fingerprint(channels, batches)
    record = _loss_file.read(path, digest, total)
    # Use the function that measures the rest: it is compiled once and rounds alike.
    full = np.array([losses([], batch)[0] for batch in batches])
    if not np.all(np.isfinite(full)):
        raise ValueError(f"`loss` must be finite, got {full.tolist()} on the batches.")
    if _fingerprint(channels, batches) != (digest, sizes):
        raise ValueError(
            "`batches` must be the same in every iteration, got others in the second: "
            "make a list of them."
        )
    weights = np.array(sizes) / sum(sizes)
    _loss_file.begin(path, record, digest, float(weights @ full))
    rises = record.rises
    with progress_bar("channels", total, len(rises), shown=progress) as advance:
        while len(rises) < total:
            numbers = range(len(rises), min(len(rises) + chunk, total))
            new = np.zeros(len(numbers))
            for weight, with_all, batch in zip(weights, full, batches, strict=True):
                without = losses(numbers, batch)[: len(numbers)]
                new += weight * (without - with_all)
            if not np.all(np.isfinite(new)):
                at = int(np.argmin(np.isfinite(new)))
                raise ValueError(
                    f"`loss` must be finite, got {new[at]} more without a channel of "
                    f"layer {str(layer_of[numbers[at]])!r}."
                )
            _loss_file.append(path, {"first": numbers[0], "rises": new.tolist()})
            rises.extend(new.tolist())
            advance(len(numbers))
    by_layer = zip(channels, np.split(np.array(rises), ends))
    return {name: attention_from_losses(x, temperature) for name, x in by_layer}


def _fingerprint(
    channels: Mapping[str, int], batches: Iterable[Batch]
) -> tuple[str, list[int]]:
    """Returns a digest of layers and batches, and the numbers of examples."""
    digest = hashlib.sha256(json.dumps(list(channels.items())).encode())
    sizes = []
    for batch in batches:
        leaves, treedef = jax.tree.flatten(batch)
        arrays = [np.asarray(leaf) for leaf in leaves]
        lengths = {array.shape[:1] for array in arrays}
        if len(lengths) != 1 or lengths & {(), (0,)}:
            raise ValueError(
                "`batches` must be arrays that share a leading axis, that of the "
                f"examples, got shapes {[array.shape for array in arrays]}."
            )
        digest.update(str(treedef).encode())
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        sizes.append(len(arrays[0]))
    if not sizes:
        raise ValueError("`batches` must have at least one batch, got none.")
    return digest.hexdigest(), sizes


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
