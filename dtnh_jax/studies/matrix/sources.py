"""What is fine-tuned: networks pretrained on the spot, good ones and bad ones."""

import functools
import hashlib
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from dtnh_jax.finetune import files
from dtnh_jax.studies.matrix import batches, training
from dtnh_jax.studies.matrix.catalogue import ALONE, SOURCES, Source
from dtnh_jax.studies.matrix.evaluation import Network
from dtnh_jax.studies.matrix.images import Images, load_images
from dtnh_jax.studies.matrix.networks import IMAGE_SIZE
from dtnh_jax.studies.matrix.training import Variables

_BATCH_SIZE = 64
_STEPS_OF_STATISTICS = 50
_SEED = 0


class Pretrained(NamedTuple):
    """A source in memory."""

    variables: Variables  # with the original head
    about: str  # for people: how good it is, or where it is from
    path: pathlib.Path | None = None  # of a network that was pretrained here


def load_source(
    name: str,
    network: nn.Module,
    evaluator: Network,
    steps: int,
    data_dir: pathlib.Path,
) -> Pretrained:
    """Reads a pretrained network, or trains it the first time and keeps it.

    The file's name has a digest of the recipe, the network, the length of training and
    the images: change any of them, and there will be another file.

    Args:
      name: one of `SOURCES`.
      network: to be trained.
      evaluator: of that network.
      steps: of pretraining: SGD with momentum 0.9, rate 0.1 falling to 0, 64 images.
      data_dir: where files are kept, and where images are read from.

    Raises:
      ValueError: the images can not be read.
    """
    source = SOURCES[name]
    train, held_out = _images(source, data_dir)
    made_of = [name, source._asdict(), repr(network), steps, _BATCH_SIZE]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    for part in (train, held_out):
        digest.update(part.pixels.tobytes() + part.labels.tobytes())
    path = data_dir / "matrix" / f"{name}-{digest.hexdigest()[:16]}.msgpack"
    if not path.exists():
        if source.distortion is None:
            variables = _pretrain(network, train, steps, learning_rate=0.1)
        else:
            start = _distorted(initial_variables(network, _SEED), source.distortion)
            variables = _pretrain(network, train, _STEPS_OF_STATISTICS, 0.0, start)
        kept = {
            "variables": jax.device_get(variables),
            "training_accuracy": _accuracy(evaluator, variables, train),
            "held_out_accuracy": _accuracy(evaluator, variables, held_out),
        }
        _write(path, serialization.msgpack_serialize(kept))
    # Read back even if it was just written, so that a second run has the same.
    kept: Any = serialization.msgpack_restore(path.read_bytes())
    about = (
        f"{100 * kept['held_out_accuracy']:.1f}% of held-out images, "
        f"{100 * kept['training_accuracy']:.1f}% of its training images, {path.name}"
    )
    return Pretrained(jax.tree.map(jnp.asarray, kept["variables"]), about, path)


def initial_variables(network: nn.Module, seed: int) -> Variables:
    """Random variables: LeCun normal kernels, and constants.

    Differs from `network.init` in that the normal numbers are not cut off at two
    deviations; and they come from one draw, because a CPU spends seconds on compiling
    a draw for each shape.
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
    return unflatten_dict(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found))


def _noise(leaves: dict[tuple[str, ...], Any], seed: int) -> dict[Any, np.ndarray]:
    """Standard normal numbers for every leaf."""
    sizes = [math.prod(leaf.shape) for leaf in leaves.values()]
    draw = np.asarray(jax.random.normal(jax.random.key(seed), (sum(sizes),)))
    parts = np.split(draw, np.cumsum(sizes)[:-1])
    return {
        path: part.reshape(leaf.shape)
        for (path, leaf), part in zip(leaves.items(), parts, strict=True)
    }


def with_new_head(source: Variables, fresh: Variables) -> Variables:
    """The source's variables with the head of others, to start fine-tuning from."""
    params = {**source["params"], "head": fresh["params"]["head"]}
    return {**source, "params": params}


def _images(source: Source, data_dir: pathlib.Path) -> tuple[Images, Images]:
    """What a source is trained on, and the tenth that is held out."""
    images = load_images(source.images, data_dir)
    total = min(source.examples, len(images.labels))
    # Files may be sorted by class.
    everything = batches.order(len(images.labels), 1, len(images.labels), _SEED)[0]
    images = images.pick(everything[:total])
    if source.is_shuffled:
        permutation = batches.order(total, 1, total, _SEED + 1)[0]
        images = images._replace(labels=images.labels[permutation])
    held_out = max(total // 10, 1)
    rows = np.arange(total)
    return images.pick(rows[held_out:]), images.pick(rows[:held_out])


def _pretrain(
    network: nn.Module,
    images: Images,
    steps: int,
    learning_rate: float,
    start: Variables | None = None,
) -> Variables:
    start = initial_variables(network, _SEED) if start is None else start
    trainer = training.make_trainer(network, (), None, ALONE, "sgd", steps)
    data = batches.make_data(images, len(images.labels), steps, _BATCH_SIZE, _SEED)
    settings = training.Settings(0.0, learning_rate)
    state = training.train(trainer, start, data, start["params"], settings)
    return {"params": state.params, "batch_stats": state.batch_stats}


def _distorted(variables: Variables, factor: float) -> Variables:
    params: Any = flatten_dict(variables["params"])
    moved = {
        path: jnp.asarray(factor * np.asarray(params[path]) + 0.1 * noise)
        for path, noise in _noise(params, _SEED + 2).items()
    }
    return {**variables, "params": unflatten_dict(moved)}


def _accuracy(evaluator: Network, variables: Variables, images: Images) -> float:
    return evaluator.evaluate(variables, images.inputs(), images.labels)[0]


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that readers see it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, content)
