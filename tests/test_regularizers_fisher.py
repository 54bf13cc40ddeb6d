"""The Fisher information against its definition in float64."""

import io
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dtnh_jax.regularizers import diagonal_fisher, l2_sp_fisher


def exact(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def assert_close(tree, like, rtol=1e-6, atol=0.0):
    leaves, wanted = jax.tree.leaves(tree), jax.tree.leaves(like)
    assert len(leaves) == len(wanted)
    for leaf, want in zip(leaves, wanted):
        np.testing.assert_allclose(
            np.asarray(leaf, np.float64), want, rtol=rtol, atol=atol
        )


class Net(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(2, 2, rngs=rngs)
        self.header = nnx.Linear(2, 2, rngs=rngs)
        self.head = nnx.Linear(2, 2, rngs=rngs)


CLASSES = 3


def softmax_regression(params, batch):
    bias = jnp.reshape(params["bias"], (1, -1))
    return batch["x"] @ params["kernel"] + bias


def regression_params():
    random = np.random.default_rng(0)
    return {
        "bias": jnp.float32(random.standard_normal(CLASSES)),
        "kernel": jnp.float32(random.standard_normal((2, CLASSES))),
    }


def examples(n):
    random = np.random.default_rng(1)
    x = np.float32(random.standard_normal((n, 2)))
    return {"x": x, "y": random.integers(0, CLASSES, n)}


def split(batch, *sizes):
    ends = np.cumsum([0, *sizes])
    return [
        {name: value[start:end] for name, value in batch.items()}
        for start, end in itertools.pairwise(ends)
    ]


def squares_by_label(params, x):
    """Squared derivatives `[n, label, ...]` of log p, and p, in float64."""
    kernel, bias, x = (
        np.asarray(v, np.float64) for v in (params["kernel"], params["bias"], x)
    )
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    of_logits = np.eye(CLASSES)[None] - p[:, None]  # [n, label, class]
    of_kernel = x[:, None, :, None] * of_logits[:, :, None, :]
    return {"bias": of_logits**2, "kernel": of_kernel**2}, p


def given_labels(batch):
    return batch["y"]


@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_with_given_labels_it_is_the_mean_of_squared_gradients(chunk_size):
    params, batch = regression_params(), examples(11)
    batches = split(batch, 4, 6, 0, 1)
    squares, _ = squares_by_label(params, batch["x"])
    fisher = diagonal_fisher(
        softmax_regression,
        params,
        iter(batches),
        labels=given_labels,
        chunk_size=chunk_size,
    )
    assert jax.tree.structure(fisher) == jax.tree.structure(params)
    for name, leaf in fisher.items():
        assert leaf.dtype == jnp.float32
        expected = squares[name][np.arange(11), batch["y"]].mean(0)
        np.testing.assert_allclose(leaf, expected, rtol=1e-5)


def test_with_sampled_labels_it_estimates_the_expectation_over_labels():
    params, batch, n = regression_params(), examples(4096), 4096
    squares, p = squares_by_label(params, batch["x"])
    fisher = diagonal_fisher(
        softmax_regression, params, [batch], key=jax.random.key(0), chunk_size=256
    )
    fitted = p.argmax(-1)
    deviations, deviations_of_fitted = [], []
    for name, leaf in fisher.items():
        by_label = squares[name]
        weights = p.reshape(*p.shape, *[1] * (by_label.ndim - 2))
        mean = np.sum(weights * by_label, 1)
        variance = np.sum(weights * by_label**2, 1) - mean**2
        error = np.sqrt(variance.sum(0)) / n
        deviations.append(np.ravel((leaf - mean.mean(0)) / error))
        of_fitted = by_label[np.arange(n), fitted].mean(0)
        deviations_of_fitted.append(np.ravel((of_fitted - mean.mean(0)) / error))
    assert np.max(np.abs(np.concatenate(deviations))) < 4
    # The labels that the network would choose make another matrix.
    assert np.min(np.abs(np.concatenate(deviations_of_fitted))) > 8


def test_sampled_labels_depend_on_the_key_and_the_example_alone():
    params, batch = regression_params(), examples(24)
    # The numbers of this generator depend on what else is drawn in a batch.
    key = jax.random.key(0, impl="rbg")

    def fisher(batches, chunk_size, key=key):
        return diagonal_fisher(
            softmax_regression, params, batches, key=key, chunk_size=chunk_size
        )

    whole = fisher([batch], 24)
    assert_close(fisher(split(batch, 7, 17), 4), exact(whole), rtol=1e-5)
    other = fisher([batch], 24, key=jax.random.PRNGKey(1))  # an old one
    assert not np.allclose(other["kernel"], whole["kernel"], rtol=1e-2)


def test_the_network_is_traced_twice_whatever_the_sizes_of_batches():
    calls = []

    def logits(params, batch):
        calls.append(batch["x"].shape)
        return softmax_regression(params, batch)

    diagonal_fisher(
        logits,
        regression_params(),
        split(examples(20), 9, 8, 3),
        labels=given_labels,
        chunk_size=4,
    )
    assert calls == [(1, 2), (1, 2)]  # for the number of classes, and to compile


def test_leaves_without_gradients_are_zero_or_missing():
    params = {**regression_params(), "step": jnp.array([3, 4]), "none": None}
    params["empty"] = jnp.zeros((0, 2))
    params["bias"] = params["bias"].astype(jnp.bfloat16)
    fisher = diagonal_fisher(
        softmax_regression, params, [examples(3)], labels=given_labels
    )
    assert fisher["none"] is None
    np.testing.assert_array_equal(fisher["step"], np.zeros(2, np.float32))
    assert fisher["empty"].shape == (0, 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(fisher)} == {np.dtype("float32")}
    squares, _ = squares_by_label(params, examples(3)["x"])
    expected = squares["bias"][np.arange(3), examples(3)["y"]].mean(0)
    np.testing.assert_allclose(fisher["bias"], expected, rtol=2e-2)


def test_the_fisher_of_an_nnx_module_weighs_its_pull():
    model = Net(nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)

    def logits(params, batch):
        model = nnx.merge(graphdef, params)
        return model.head(model.header(model.body(batch["x"])))

    fisher = diagonal_fisher(logits, params, [examples(4)], key=jax.random.key(0))
    assert jax.tree.structure(fisher) == jax.tree.structure(params)
    pull = l2_sp_fisher(params, fisher, new=["head"])
    moved = jax.tree.map(lambda x: x + 1.0, params)
    gradient = jax.jit(lambda pull, p: pull.gradient(p))(pull, moved)
    np.testing.assert_allclose(
        gradient["body"]["kernel"][...],
        fisher["body"]["kernel"][...],
        rtol=1e-5,
    )


def test_the_fisher_says_what_is_wrong():
    params, batch = regression_params(), examples(4)

    def run(logits=softmax_regression, batches=None, **options):
        options = options or {"labels": given_labels}
        batches = [batch] if batches is None else batches
        return diagonal_fisher(logits, params, batches, **options)

    with pytest.raises(ValueError, match=r"One of `labels`.*got both"):
        run(labels=given_labels, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"One of `labels`.*got neither"):
        run(chunk_size=2)
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, got 0"):
        run(labels=given_labels, chunk_size=0)
    with pytest.raises(ValueError, match="at least one example, got none"):
        run(batches=[])
    with pytest.raises(ValueError, match="at least one example, got none"):
        run(batches=split(batch, 0))
    with pytest.raises(TypeError, match=r"got one dict: write \[batch\]"):
        run(batches=batch)
    with pytest.raises(ValueError, match=r"one n, got the shapes.*'y': \(3,\)"):
        run(batches=[{"x": batch["x"], "y": batch["y"][:3]}])
    for arrays in ({}, {"x": 1.0}):
        with pytest.raises(ValueError, match=r"one n, got the shapes"):
            run(batches=[arrays])
    with pytest.raises(ValueError, match=r"\[n, classes\], got the shape \(3,\)"):
        run(lambda params, batch: softmax_regression(params, batch)[0])
    with pytest.raises(ValueError, match=r"integers of shape \(4,\), got float64"):
        run(labels=lambda batch: batch["y"] + 0.5)
    with pytest.raises(ValueError, match=r"integers of shape \(4,\).*\(3,\)"):
        run(labels=lambda batch: batch["y"][:3])
    for labels in ([0, 1, 2, 3], [0, -1, 2, 2]):
        with pytest.raises(ValueError, match="classes from 0 to 2, got labels from"):
            run(labels=lambda batch, labels=labels: np.array(labels))


def test_progress_is_shown_on_terminals_alone(monkeypatch):
    from rich import console

    make_console, written = console.Console, io.StringIO()

    def shown(is_terminal, progress, batches):
        written.seek(0)
        written.truncate(0)
        monkeypatch.setattr(
            console,
            "Console",
            lambda **_: make_console(file=written, force_terminal=is_terminal),
        )
        diagonal_fisher(
            softmax_regression,
            regression_params(),
            batches,
            labels=given_labels,
            progress=progress,
        )
        return written.getvalue()

    batches = split(examples(4), 2, 2)
    for known_length in (batches, iter(batches)):
        text = shown(True, True, known_length)
        assert "Fisher information" in text
        assert "4 examples" in text
    assert shown(False, True, batches) == ""
    assert shown(True, False, batches) == ""


def test_without_rich_there_is_no_bar(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "rich":
            monkeypatch.setitem(sys.modules, name, None)
    fisher = diagonal_fisher(
        softmax_regression, regression_params(), [examples(2)], labels=given_labels
    )
    assert np.all(fisher["bias"] > 0)
