"""Three measures of a network: its target, shifted target images, and its source."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from scipy import ndimage

from dtnh_jax.studies.trust.images import Images

Axes = dict[str, Any]
AXES = ("target", "shift", "kept", "kl")
_FAR = 100.0  # nats; only networks that diverged come near it


def shifted(images: Images) -> Images:
    """Returns four versions of each test image: noisy, blurred, pale and rotated.

    Noise has a standard deviation of 0.25 of the range; the Gaussian blur is 0.9 pixels
    wide; contrast is reduced to a third; rotation is 15 degrees to either side.
    """
    rng = np.random.default_rng(5)
    x = images.pixels.astype(np.float32)
    turned = [
        ndimage.rotate(each, angle, axes=(0, 1), reshape=False, order=1, mode="nearest")
        for each, angle in zip(x, rng.choice([-15, 15], len(x)))
    ]
    found = [
        x + 0.25 * 255 * rng.standard_normal(x.shape),
        ndimage.gaussian_filter(x, (0, 0.9, 0.9)),
        x.mean((1, 2), keepdims=True) + (x - x.mean((1, 2), keepdims=True)) / 3,
        np.stack(turned),
    ]
    pixels = np.clip(np.round(np.concatenate(found)), 0, 255).astype(np.uint8)
    return images._replace(pixels=pixels, labels=np.tile(images.labels, len(found)))


def make_measure(
    network: nn.Module, source: Any, test: Images, unseen: Images
) -> Callable[[Any], Axes]:
    """Returns a function from variables `[R ...]` of networks to axes `[R]`.

    Args:
      network: the architecture of all networks.
      source: variables of the source, with its own head.
      test: test images of the target.
      unseen: held-out images of the source.

    Returns:
      A function. Its axes are accuracies in percent: on the target's test images, on
      the shifted ones, and on the source's held-out images with the source's head; and
      the KL divergence of the latter predictions from those of the source, in nats per
      image, at most 100.
    """
    under_shift = shifted(test)

    def logits(variables, inputs) -> Any:
        return network.apply(variables, inputs, train=False)

    reference = jax.nn.log_softmax(jax.jit(logits)(source, unseen.inputs()))

    def of_one(variables, inputs, others, own):
        def share(variables, x, images):
            right = jnp.argmax(logits(variables, x), axis=-1) == images
            return 100 * jnp.mean(right)

        params = {**variables["params"], "head": source["params"]["head"]}
        back = {**variables, "params": params}
        log_p = jax.nn.log_softmax(logits(back, own))
        kl = jnp.sum(jnp.exp(reference) * (reference - log_p), axis=-1)
        kept = 100 * jnp.mean(jnp.argmax(log_p, axis=-1) == unseen.labels)
        return {
            "target": share(variables, inputs, test.labels),
            "shift": share(variables, others, under_shift.labels),
            "kept": kept,
            "kl": jnp.mean(kl),
        }

    compiled = jax.jit(of_one)
    inputs = [jnp.asarray(x.inputs()) for x in (test, under_shift, unseen)]

    def measure(variables):
        count = len(jax.tree.leaves(variables)[0])
        each = (jax.tree.map(lambda x, i=i: x[i], variables) for i in range(count))
        found = [jax.device_get(compiled(one, *inputs)) for one in each]
        axes = {name: np.array([each[name] for each in found]) for name in AXES}
        # A network that diverged is infinitely far; JSON has no infinity.
        axes["kl"] = np.nan_to_num(np.minimum(axes["kl"], _FAR), nan=_FAR)
        return axes

    return measure


def make_logits(network: nn.Module) -> Callable[[Any, Any], Any]:
    """Returns a compiled function from variables and inputs to logits."""
    return jax.jit(lambda variables, x: network.apply(variables, x, train=False))
