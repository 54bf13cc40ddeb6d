"""Pretrains the sources, and draws the target tasks."""

import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from dtnh_jax import _files
from dtnh_jax.studies.trust.catalogue import FOLDS, SOURCES, Pair
from dtnh_jax.studies.trust.images import Images, load_images
from dtnh_jax.studies.trust.networks import IMAGE_SIZE, NETWORKS

_SOURCE_STEPS, _SOURCE_BATCH = 1500, 64
TEST_IMAGES, UNSEEN_IMAGES = 1000, 1000


class Task(NamedTuple):
    """The training set of one seed, with its folds."""

    train: Images
    folds: list[np.ndarray]  # rows of the training set that each fold holds out


def random_variables(network: nn.Module, seed: int) -> Any:
    """Returns random variables: LeCun normal kernels; constants elsewhere.

    All normal numbers come from one draw, because a CPU spends seconds on compiling a
    draw for each shape.
    """
    images = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 1))
    init = functools.partial(network.init, train=False)
    shapes: Any = flatten_dict(jax.eval_shape(init, jax.random.key(0), images))
    constants = {"scale": 1, "var": 1, "bias": 0, "mean": 0}
    found = {}
    for path, noise in _noise(shapes, seed).items():
        if path[-1] == "kernel":
            found[path] = noise / np.sqrt(math.prod(noise.shape[:-1]))
        else:
            found[path] = np.full(noise.shape, constants[path[-1]])
    return unflatten_dict(jax.tree.map(np.float32, found))


def _noise(leaves: dict[Any, Any], seed: int) -> dict[Any, np.ndarray]:
    sizes = [math.prod(leaf.shape) for leaf in leaves.values()]
    draw = np.random.default_rng(seed).standard_normal(sum(sizes))
    parts = np.split(draw, np.cumsum(sizes)[:-1])
    return {
        path: part.reshape(leaf.shape)
        for (path, leaf), part in zip(leaves.items(), parts, strict=True)
    }


def load_source(name: str, kind: str, data_dir: pathlib.Path) -> Any:
    """Reads a source; the first time, trains and saves it.

    Args:
      name: one of `SOURCES`.
      kind: one of `NETWORKS`.
      data_dir: folder of the sources.
    """
    path = data_dir / "study" / f"{kind}-{name}-{_SOURCE_STEPS}.msgpack"
    if not path.exists():
        variables = _pretrained(name, NETWORKS[kind][0], data_dir)
        _files.make_folder(path.parent)
        content = serialization.msgpack_serialize(jax.device_get(variables))
        _files.replace(path, content)
    # Read even if it was just written, so that a second run gets the same arrays.
    return serialization.msgpack_restore(path.read_bytes())


def source_images(name: str, data_dir: pathlib.Path) -> tuple[Images, Images]:
    """Returns a source's training images and its held-out tenth."""
    source = SOURCES[name]
    images = load_images(source.images, data_dir)
    rng = np.random.default_rng(0)
    chosen = images.pick(rng.permutation(len(images.labels))[: source.examples])
    if source.is_shuffled:
        chosen = chosen._replace(labels=rng.permutation(chosen.labels))
    unseen, rows = len(chosen.labels) // 10, np.arange(len(chosen.labels))
    return chosen.pick(rows[unseen:]), chosen.pick(rows[:unseen])


def _pretrained(name: str, network: nn.Module, data_dir: pathlib.Path) -> Any:
    """Trains by SGD with momentum 0.9, batches of 64; the rate falls from 0.05 to 0."""
    train, _ = source_images(name, data_dir)
    variables, steps, rate = random_variables(network, 0), _SOURCE_STEPS, 0.05
    if SOURCES[name].is_shuffled:
        steps *= 2
    distortion = SOURCES[name].distortion
    if distortion is not None:  # only batch statistics are made to match
        steps, rate = 50, 0.0
        leaves: Any = flatten_dict(variables["params"])
        moved = {
            path: np.float32(distortion * leaves[path] + 0.1 * noise)
            for path, noise in _noise(leaves, 2).items()
        }
        variables = {**variables, "params": unflatten_dict(moved)}
    tx = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)

    @jax.jit
    def step(variables, state, images, labels):
        others = {k: v for k, v in variables.items() if k != "params"}

        def loss(params):
            logits, new = network.apply(
                {"params": params, **others},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(each), dict(new)

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state)
        return {
            "params": optax.apply_updates(variables["params"], updates),
            **new,
        }, state

    state, inputs = tx.init(variables["params"]), train.inputs()
    for rows in batches(len(train.labels), steps, _SOURCE_BATCH, 0):
        variables, state = step(variables, state, inputs[rows], train.labels[rows])
    return variables


def batches(
    examples: int, steps: int, batch_size: int, seed: int | list[int]
) -> np.ndarray:
    """Returns the rows of every batch, shuffled each epoch; a batch may span two."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch_size // examples)
    rows = np.concatenate([rng.permutation(examples) for _ in range(epochs)])
    return rows[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def split(pair: Pair, data_dir: pathlib.Path) -> tuple[Images, Images]:
    """Returns a target's test images and the pool of its training images."""
    images = load_images(pair.images, data_dir)
    rows = np.random.default_rng(99).permutation(len(images.labels))
    tests = min(TEST_IMAGES, len(rows) // 2)
    return images.pick(rows[:tests]), images.pick(rows[tests:])


def draw(pair: Pair, pool: Images, seed: int) -> Task:
    """Draws a seed's training set and folds, with some labels of a wrong class."""
    rng = np.random.default_rng([7, seed])
    rows = rng.permutation(len(pool.labels))
    classes = range(int(pool.labels.max()) + 1)
    of_class = [rows[pool.labels[rows] == label][: pair.per_class] for label in classes]
    train = pool.pick(rng.permutation(np.concatenate(of_class)))
    labels = train.labels.copy()
    wrong = rng.permutation(len(labels))[: round(pair.noise * len(labels))]
    labels[wrong] += rng.integers(1, len(classes), len(wrong), labels.dtype)
    labels %= len(classes)
    order = rng.permutation(len(labels))
    return Task(
        train._replace(labels=labels), [np.sort(order[k::FOLDS]) for k in range(FOLDS)]
    )
