"""Estimates that some regularizers need, from the training images."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.serialization import msgpack_restore, msgpack_serialize
from jaxtyping import Array, Float

from dtnh_jax import regularizers
from dtnh_jax.finetune import files
from dtnh_jax.finetune.data.loading import Examples
from dtnh_jax.finetune.training.loop import look
from dtnh_jax.finetune.weights.sources import Source, Variables
from dtnh_jax.linen import capture_features, scale_features


class Question(NamedTuple):
    """The data of an estimate."""

    source: Source
    variables: Variables  # pretrained, with the original head
    examples: Examples  # training examples of the target
    classes: int  # number of classes of the target
    seed: int
    path: pathlib.Path  # file for intermediate results


def is_known(question: Question) -> bool:
    """Returns whether an earlier call stored the estimate."""
    return _kept(question).exists()


def _kept(question: Question) -> pathlib.Path:
    return question.path.with_suffix(".msgpack")


def estimate(name: str, question: Question) -> Any:
    """Computes an estimate, or reads a stored one.

    Args:
      name: one of `ESTIMATES`.
      question: the data. The result is stored at its `path`.

    Returns:
      A tree of NumPy arrays.
    """
    kept = _kept(question)
    try:
        return msgpack_restore(kept.read_bytes())
    except Exception:  # no file, or a damaged one, whose reader raises any exception
        files.make_folder(kept.parent)
    measured = jax.tree.map(np.asarray, ESTIMATES[name](question))
    content = msgpack_serialize(measured)
    files.write(kept, content)
    return msgpack_restore(content)


def _fisher(question: Question) -> Any:
    """Returns the Fisher information of the source's classes on the target's images.

    Labels are sampled from the pretrained network; the target's labels are not used.
    """
    source, variables = question.source, question.variables
    network = source.module(len(variables["params"]["head"]["bias"]))

    def logits(params, batch):
        images = source.preprocess(batch["image"])
        outputs: Any = network.apply(
            {**variables, "params": params}, images, train=False
        )
        return outputs

    fisher: Any = regularizers.diagonal_fisher(
        logits,
        variables["params"],
        [{"image": question.examples.images}],
        key=jax.random.key(question.seed),
        progress=False,
    )
    return {**fisher, "head": None}  # the new head has no pretrained value


def _channel_attention(question: Question) -> dict[str, Any]:
    """Returns every distilled channel's importance for a separately trained head."""
    source, variables, examples = question.source, question.variables, question.examples
    layers = list(source.feature_layers)
    original = source.module(len(variables["params"]["head"]["bias"]))
    observe = capture_features(original, [*layers, "pooled"])

    @jax.jit
    def observed(images):
        return observe(variables, source.preprocess(images), train=False)[1]

    found = observed(examples.images)
    channels = {layer: found[layer].shape[-1] for layer in layers}
    labels = jnp.asarray(examples.labels)
    head = linear_probe(found["pooled"], labels, question.classes)
    probed = {**variables, "params": {**variables["params"], "head": head}}
    apply = scale_features(source.module(question.classes), layers)

    def loss(scales, batch):
        images = source.preprocess(batch["image"])
        logits = apply(probed, scales, images, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses)

    batches = [{"image": examples.images, "label": examples.labels}]
    path = question.path.with_suffix(".jsonl")
    return regularizers.channel_attention(
        loss, channels, batches, path=path, progress=False
    )


def _relationship(question: Question) -> Array | np.ndarray:
    """Returns the probability of each source class in each target class.

    Differs from the paper: the source's probabilities are not calibrated, because that
    needs images of the source's own task.
    """
    see = jax.jit(functools.partial(look, question.source))
    logits = see(question.variables, question.examples.images)["head"]
    labels = question.examples.labels
    return regularizers.category_relationship(logits, labels, question.classes)


@functools.partial(jax.jit, static_argnames=("classes", "steps"))
def linear_probe(
    features: Float[Array, "n channels"],
    labels: Array,
    classes: int,
    decay: float = 1e-3,
    steps: int = 100,
) -> dict[str, Array]:
    """Trains a head on fixed features.

    Args:
      features: inputs of the head.
      labels: `[n]`, integers.
      classes: number of classes.
      decay: weight decay of the kernel, relative to the mean loss.
      steps: number of steps of L-BFGS.

    Returns:
      `kernel` and `bias` of a dense layer.
    """

    def objective(head):
        logits = features @ head["kernel"] + head["bias"][None, :]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean() + 0.5 * decay * jnp.sum(head["kernel"] ** 2)

    head: Any = {
        "kernel": jnp.zeros((features.shape[1], classes)),
        "bias": jnp.zeros(classes),
    }
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry, _):
        head, state = carry
        value, grads = value_and_grad(head, state=state)
        updates, state = optimizer.update(
            grads, state, head, value=value, grad=grads, value_fn=objective
        )
        return (optax.apply_updates(head, updates), state), None

    start = (head, optimizer.init(head))
    (head, _), _ = jax.lax.scan(step, start, length=steps)
    return head


ESTIMATES: dict[str, Callable[[Question], Any]] = {
    "fisher": _fisher,
    "channel_attention": _channel_attention,
    "relationship": _relationship,
}
