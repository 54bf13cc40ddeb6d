"""`diagonal_fisher`: how much a network's predictions depend on each parameter."""

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from dtnh_jax import _trees
from dtnh_jax.regularizers.estimators._progress import progress_bar

Batch = Any  # a tree of arrays `[n, ...]`


def diagonal_fisher(
    logits: Callable[[optax.Params, Batch], Array],
    params: optax.Params,
    batches: Iterable[Batch],
    *,
    labels: Callable[[Batch], Any] | None = None,
    key: PRNGKeyArray | Array | None = None,
    chunk_size: int = 8,
    progress: bool = True,
) -> optax.Params:
    """Estimates the Fisher diagonal: `F_j = mean of (d log p(y | x) / d w_j)^2`.

    The mean is over examples `x` with one label `y` each. With a `key`, labels are
    sampled from the network's own distribution, which estimates the Fisher information
    without bias. With `labels`, the result is the empirical Fisher, which is another
    matrix (Kunstner et al., 2019) and small if the network fits its labels well.

    It runs `chunk_size` forward and backward passes at once; their gradients take
    `chunk_size` times the memory of the parameters. The sums take one more copy in
    float32.

    Args:
      logits: maps parameters and a batch of `n` examples to logits `[n, classes]`. It
        is called on batches of one, so turn off dropout and batch statistics.
      params: parameters of the pretrained network.
      batches: batches of examples, trees of arrays `[n, ...]`; `n` may change. A
        multiple of `chunk_size` avoids padding.
      labels: maps a batch to the labels `[n]` of its examples, integers.
      key: key for sampling labels. The label of an example depends on the key and the
        example's number, not on the division into batches and chunks.
      chunk_size: number of examples whose gradients are computed at once, at least 1.
      progress: whether to show a progress bar on a terminal, if `rich` is installed.

    Returns:
      A tree like `params` in float32, for `l2_sp_fisher`; zero for leaves that are not
      floating or complex.

    Raises:
      TypeError: `batches` is a single batch.
      ValueError: both or neither of `labels` and `key` are given, there are no
        examples, `chunk_size` is below 1, or shapes or labels are not as above.

    Example:
      >>> params = {"kernel": jnp.zeros((2, 2))}
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> def logits(params, batch):
      ...     return batch @ params["kernel"]
      >>> fisher = diagonal_fisher(logits, params, [x], key=jax.random.key(0))
      >>> print(fisher["kernel"])  # the mean of x^2, times p (1 - p) of two classes
      [[0.25 0.25]
       [0.5  0.5 ]]

      With NNX, split the module, in evaluation mode:

      >>> from flax import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> graphdef, params, rest = nnx.split(model, nnx.Param, ...)
      >>> def logits(params, batch):
      ...     return nnx.merge(graphdef, params, rest)(batch["x"])
      >>> batch = {"x": x, "y": jnp.array([0, 2])}
      >>> fisher = diagonal_fisher(
      ...     logits, params, [batch], labels=lambda batch: batch["y"]
      ... )
      >>> fisher["kernel"][...].shape
      (2, 3)

    References:
      Li et al., 2018, section 3, "L2-SP-Fisher", https://arxiv.org/abs/1802.01483;
      Kirkpatrick et al., 2017, https://arxiv.org/abs/1612.00796; Kunstner et al.,
      2019, https://arxiv.org/abs/1905.12558

    Differs from Li et al., who average over all classes, weighted by the network's
    probabilities. One sampled label has the same expectation and needs one backward
    pass instead of one for every class.
    """
    _check_arguments(batches, labels, key, chunk_size)
    leaves, treedef = _trees.flatten(params)
    at = [i for i, leaf in enumerate(leaves) if _trees.is_trainable(leaf)]
    if key is not None:
        # Only this generator of JAX draws the same numbers with and without `vmap`.
        key = jax.random.key(jax.random.bits(key), impl="threefry2x32")

    def log_likelihood(trained, leaves, example, label, number, key):
        leaves = list(leaves)
        for i, leaf in zip(at, trained):
            leaves[i] = leaf
        batch = jax.tree.map(lambda x: x[None], example)
        row = logits(jax.tree.unflatten(treedef, leaves), batch)[0].astype(jnp.float32)
        if key is not None:
            label = jax.random.categorical(jax.random.fold_in(key, number), row)
        return jax.nn.log_softmax(row)[label]

    def add(sums, leaves, chunk, chosen, numbers, is_real, key):
        gradients = jax.vmap(jax.grad(log_likelihood), (None, None, 0, 0, 0, None))(
            [leaves[i] for i in at], leaves, chunk, chosen, numbers, key
        )

        def with_squares(total, gradient):
            squares = jnp.square(jnp.abs(gradient).astype(jnp.float32))
            is_counted = is_real.reshape(-1, *[1] * total.ndim)
            return total + jnp.sum(jnp.where(is_counted, squares, 0), axis=0)

        return jax.tree.map(with_squares, sums, gradients)

    # Arrays as large as the parameters are arguments, not constants of the program.
    add = jax.jit(add, donate_argnums=0)
    sums = [jnp.zeros(jnp.shape(leaves[i]), jnp.float32) for i in at]
    count, classes = 0, 0
    total = len(batches) if isinstance(batches, Sized) else None
    with progress_bar("Fisher information", total, shown=progress) as advance:
        for batch in batches:
            size = _size(batch)
            if size:
                classes = classes or _classes(logits, params, batch)
                chosen = _chosen(labels, batch, size, classes)
                for start in range(0, size, chunk_size):
                    # Repeats of its last example fill the last chunk.
                    numbers = start + np.arange(chunk_size)
                    rows = np.minimum(numbers, size - 1)
                    chunk = jax.tree.map(lambda x, rows=rows: x[rows], batch)
                    is_real = numbers < size
                    numbers = (count + numbers).astype(np.uint32)
                    sums = add(sums, leaves, chunk, chosen[rows], numbers, is_real, key)
                count += size
            jax.block_until_ready(sums)  # else chunks of many batches would queue up
            advance(1, f"{count} examples")
    if not count:
        raise ValueError("`batches` must hold at least one example, got none.")
    means = [
        None if _trees.is_missing(leaf) else jnp.zeros(jnp.shape(leaf), jnp.float32)
        for leaf in leaves
    ]
    for i, total in zip(at, sums):
        means[i] = total / count
    return jax.tree.unflatten(treedef, means)


def _check_arguments(batches: Any, labels: Any, key: Any, chunk_size: int) -> None:
    if (labels is None) == (key is None):
        got = "neither" if key is None else "both"
        raise ValueError(
            "One of `labels`, to use given labels, and `key`, to sample them, must be "
            f"given, got {got}."
        )
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    if isinstance(batches, (Mapping, jax.Array, np.ndarray)):
        raise TypeError(
            f"`batches` must be an iterable of batches, got one "
            f"{type(batches).__name__}: write [batch] for a single batch."
        )


def _size(batch: Batch) -> int:
    """Returns the number of examples of a batch.

    Raises:
      ValueError: the batch has no arrays, or arrays of different lengths.
    """
    arrays = {
        path: leaf
        for path, leaf in zip(_trees.names(batch), _trees.flatten(batch)[0])
        if not _trees.is_missing(leaf)
    }
    sizes = {jnp.shape(leaf)[:1] for leaf in arrays.values()}
    if len(sizes) != 1 or sizes == {()}:
        shapes = {path: jnp.shape(leaf) for path, leaf in arrays.items()}
        raise ValueError(
            "`batches` must hold trees of arrays [n, ...] with one n, got the shapes "
            f"{shapes}."
        )
    ((size,),) = sizes
    return size


def _classes(logits: Callable, params: optax.Params, batch: Batch) -> int:
    """Returns the number of classes, without running the network.

    Raises:
      ValueError: `logits` does not return `[n, classes]`.
    """
    one = jax.tree.map(lambda x: x[:1], batch)
    shape = jnp.shape(jax.eval_shape(logits, params, one))
    if len(shape) != 2 or shape[0] != 1 or not shape[1]:
        raise ValueError(
            "`logits` must return an array [n, classes], got the shape "
            f"{shape} for a batch of one."
        )
    return shape[1]


def _chosen(labels: Any, batch: Batch, size: int, classes: int) -> np.ndarray:
    """Returns the given labels, or zeros if labels are sampled later.

    Raises:
      ValueError: labels are no integers `[n]`, or out of range.
    """
    if labels is None:
        return np.zeros(size, np.int32)
    chosen = np.asarray(labels(batch))
    if chosen.shape != (size,) or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(
            f"`labels` must return integers of shape ({size},), got {chosen.dtype} of "
            f"shape {chosen.shape}."
        )
    if chosen.min() < 0 or chosen.max() >= classes:
        raise ValueError(
            f"`labels` must return classes from 0 to {classes - 1}, got labels from "
            f"{chosen.min()} to {chosen.max()}."
        )
    return chosen.astype(np.int32)
