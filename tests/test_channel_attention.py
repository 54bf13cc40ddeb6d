"""What each channel is worth: scaled layers, weights from losses, files that resume."""

import io
import json
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dtnh_jax.nnx
from dtnh_jax import linen
from dtnh_jax.regularizers import attention_from_losses, channel_attention, delta


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(self.width, name="dense")(x))


class Narrow(Block):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x)  # one more call of the same layer


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Block(4, name="first")(x)
        x = nn.remat(Narrow)(3, name="second")(x)
        return nn.Dense(2, name="head")(x)


class NnxBlock(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.dense = nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.dense(x))


class NnxNarrow(NnxBlock):
    def __call__(self, x):
        return super().__call__(x)


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NnxBlock(3, 4, rngs), NnxNarrow(4, 3, rngs)])
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = jax.random.normal(jax.random.key(0), (6, 3))
MODEL = Network()
VARIABLES = MODEL.init(jax.random.key(1), X)
NNX_MODEL = NnxNetwork(nnx.Rngs(1))


def linen_case(layers):
    apply = linen.scale_features(MODEL, layers)
    return lambda scales: apply(VARIABLES, scales, X)


def nnx_case(layers):
    call = dtnh_jax.nnx.scale_features(NNX_MODEL, layers)
    return lambda scales: call(scales, X)


# Of each kind: how to scale, the layers, and what the network makes of the batch.
KINDS = {
    "linen": (linen_case, ("first", "second"), MODEL.apply(VARIABLES, X)),
    "nnx": (nnx_case, ("blocks/0", "blocks/1"), NNX_MODEL(X)),
}
each_kind = pytest.mark.parametrize(
    ("case", "layers", "output"), KINDS.values(), ids=KINDS.keys()
)


def ones(layers):
    return {layers[0]: jnp.ones(4), layers[1]: jnp.ones(3)}


@each_kind
def test_scales_of_one_change_nothing(case, layers, output):
    np.testing.assert_array_equal(case(layers)(ones(layers)), output)


def test_a_scale_of_zero_is_a_channel_without_weights_in_linen():
    scales = ones(("first/dense", "second")) | {
        "first/dense": jnp.array([1.0, 0, 1, 0])
    }
    got = linen_case(["first/dense", "second"])(scales)
    params = jax.tree.map(jnp.copy, VARIABLES["params"])
    first = params["first"]["dense"]
    first["kernel"] = first["kernel"].at[:, 1::2].set(0.0)
    first["bias"] = first["bias"].at[1::2].set(0.0)
    np.testing.assert_allclose(got, MODEL.apply({"params": params}, X), rtol=1e-6)


def test_a_scale_of_zero_is_a_channel_without_weights_in_nnx():
    got = nnx_case(["blocks/1/dense"])({"blocks/1/dense": jnp.array([0.0, 1.0, 1.0])})
    model = nnx.clone(NNX_MODEL)
    dense = model.blocks[1].dense
    dense.kernel[...] = dense.kernel[...].at[:, 0].set(0.0)
    dense.bias[...] = dense.bias[...].at[0].set(0.0)
    np.testing.assert_allclose(got, model(X), rtol=1e-6)


@each_kind
def test_layers_are_scaled_once_whoever_calls_whom(case, layers, output):
    scales = {layers[0]: jnp.full(4, 2.0), layers[1]: jnp.array([2.0, 3.0, 0.5])}
    got = case(layers)(scales)
    if case is linen_case:
        params = VARIABLES["params"]
        modules = {"first": Block(4), "second": Block(3), "head": nn.Dense(2)}
        first, second, head = (
            lambda x, name=name: modules[name].apply({"params": params[name]}, x)
            for name in modules
        )
    else:
        (first, second), head = NNX_MODEL.blocks, NNX_MODEL.head
    expected = head(second(2 * first(X)) * scales[layers[1]][None])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@each_kind
def test_scaling_under_jit_and_vmap(case, layers, output):
    run = case(layers)
    several = ones(layers) | {layers[0]: jnp.eye(4)[:2]} | {layers[1]: jnp.eye(3)[:2]}
    got = jax.jit(jax.vmap(run))(several)
    for i in range(2):
        expected = run(jax.tree.map(lambda x, i=i: x[i], several))
        np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-6)
        assert np.any(np.abs(got[i] - output) > 1e-3)


@each_kind
def test_layers_may_be_a_predicate(case, layers, output):
    got = case(lambda path: path == layers[0])({layers[0]: jnp.ones(4)})
    np.testing.assert_array_equal(got, output)


@each_kind
def test_scaling_says_what_is_wrong(case, layers, output):
    del output
    with pytest.raises(ValueError, match=f"Near it are .*'{layers[0]}'"):
        case([layers[0] + "x"])({layers[0] + "x": jnp.ones(4)})
    with pytest.raises(ValueError, match="`layers` must select a layer"):
        case(lambda path: False)({})
    with pytest.raises(TypeError, match="must be a sequence of paths"):
        case("first")
    with pytest.raises(ValueError, match=f"none for '{layers[1]}' among"):
        case(layers)({layers[0]: jnp.ones(4)})
    with pytest.raises(ValueError, match=r"got \['other'\] too"):
        case(layers)(ones(layers) | {"other": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"got shape \(3,\) for 4 channels"):
        case(layers)(ones(layers) | {layers[0]: jnp.ones(3)})


def test_layers_that_return_no_array_cannot_be_scaled():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x, x

    apply = linen.scale_features(nn.Sequential([Two(), lambda a, b: a]), ["layers_0"])
    with pytest.raises(TypeError, match="'layers_0', which returns tuple"):
        apply({}, {"layers_0": jnp.ones(3)}, X)


def test_half_precision_stays_half():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, dtype=jnp.bfloat16, name="body")(x)

    variables = Half().init(jax.random.key(0), X)
    apply = linen.scale_features(Half(), ["body"])
    assert apply(variables, {"body": jnp.ones(2)}, X).dtype == jnp.bfloat16


def test_scaling_leaves_nnx_classes_as_they_were():
    before = [dict(vars(cls)) for cls in (NnxBlock, NnxNarrow)]
    nnx_case(["blocks/0", "blocks/1"])(ones(["blocks/0", "blocks/1"]))
    with pytest.raises(ValueError, match="`scales`"):
        nnx_case(["blocks/0"])({})
    assert [dict(vars(cls)) for cls in (NnxBlock, NnxNarrow)] == before


# Weights from losses.


def test_attention_is_the_softmax_of_z_scores():
    rises = np.random.default_rng(0).standard_normal(9)
    scores = (rises - rises.mean()) / np.sqrt(np.mean((rises - rises.mean()) ** 2)) / 2
    expected = np.exp(scores) / np.exp(scores).sum()
    got = attention_from_losses(rises, temperature=2.0)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    for scale, shift in ((1e-9, 0.0), (1e9, 0.0), (1.0, 100.0)):
        moved = attention_from_losses(scale * rises + shift, temperature=2.0)
        np.testing.assert_allclose(moved, expected, rtol=1e-6)
    assert np.sum(attention_from_losses(jnp.arange(4.0), temperature=1e-3)) == 1


@pytest.mark.parametrize("rises", [[0.0], [7.0], [0.1] * 3, [0.0] * 5, [-2.5] * 7])
def test_channels_that_matter_alike_have_uniform_attention(rises):
    got = attention_from_losses(np.array(rises))
    np.testing.assert_allclose(got, 1 / len(rises), rtol=1e-6)


def test_attention_says_what_is_wrong():
    for rises in ([], [1.0, np.nan], [np.inf, 0.0]):
        with pytest.raises(ValueError, match="`rises` must be finite and at least one"):
            attention_from_losses(np.array(rises))
    with pytest.raises(ValueError, match="`temperature` must be above 0, got 0"):
        attention_from_losses(np.ones(2), temperature=0.0)


# From a network to its attention.

CHANNELS = {"first": 4, "second": 3}
BATCHES = [
    {"x": np.asarray(X), "y": np.ones(6, np.float32)},
    {"x": np.asarray(X[:2]) + 1, "y": np.zeros(2, np.float32)},
]


def loss_and_traces(variables=VARIABLES):
    apply, traces = linen.scale_features(MODEL, list(CHANNELS)), []

    def loss(scales, batch):
        traces.append(1)
        output = apply(variables, scales, batch["x"])
        return jnp.mean(jnp.square(output[:, 0] - batch["y"]))

    return loss, traces


LOSS, _ = loss_and_traces()


def rises_oracle(loss):
    """One channel after the other, over all examples at once."""
    plain = ones(list(CHANNELS))

    def mean(scales):
        return sum(float(loss(scales, b)) * len(b["y"]) for b in BATCHES) / 8

    return {
        name: np.array(
            [mean(plain | {name: plain[name].at[i].set(0.0)}) for i in range(count)]
        )
        - mean(plain)
        for name, count in CHANNELS.items()
    }


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_losses_are_those_without_each_channel(chunk_size, tmp_path):
    path = tmp_path / "new" / "losses.jsonl"
    got = channel_attention(LOSS, CHANNELS, BATCHES, chunk_size=chunk_size, path=path)
    expected = rises_oracle(LOSS)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rises = np.concatenate([line["rises"] for line in lines[1:]])
    assert len(lines) - 1 == -(-7 // chunk_size)
    both = np.concatenate(list(expected.values()))
    np.testing.assert_allclose(rises, both, rtol=1e-4, atol=1e-6)
    assert list(got) == list(CHANNELS)
    for name, weights in got.items():
        assert weights.dtype == np.float32
        expected_weights = attention_from_losses(expected[name])
        np.testing.assert_allclose(weights, expected_weights, rtol=1e-4)


def test_the_loss_is_compiled_once_for_batches_of_one_shape():
    loss, traces = loss_and_traces()
    channel_attention(loss, CHANNELS, BATCHES[:1] * 3, chunk_size=2)
    assert len(traces) == 1


def test_the_one_channel_that_matters_has_the_greatest_weight():
    params = jax.tree.map(jnp.copy, VARIABLES["params"])
    # The head sees channel 1 of the second layer alone, and that is far above 0.
    params["head"]["kernel"] = jnp.zeros((3, 2)).at[1].set(1.0)
    params["second"]["dense"]["bias"] = jnp.full(3, 5.0)
    variables = {"params": params}
    y = np.asarray(MODEL.apply(variables, X)[:, 0])
    loss, _ = loss_and_traces(variables)
    got = channel_attention(loss, CHANNELS, [{"x": X, "y": y}])["second"]
    assert np.argmax(got) == 1
    np.testing.assert_allclose(got[0], got[2], rtol=1e-6)
    # So the others are nearly free to move.
    start = {"second": jnp.zeros((1, 3))}
    costs = [
        delta({"second": jnp.eye(3)[i][None]}, start, {"second": got}) for i in range(3)
    ]
    assert costs[1] > costs[0] == costs[2]


class Stop(Exception):
    pass


class Stopping(list):
    """Batches that can be gone through so many times."""

    passes = 10**6

    def __iter__(self):
        self.passes -= 1
        if self.passes < 0:
            raise Stop
        return super().__iter__()


def stopped(path, after):
    """A call with four chunks that is stopped after some."""
    batches = Stopping(BATCHES)
    channel_attention(LOSS, CHANNELS, batches, chunk_size=2)
    batches.passes = Stopping.passes - batches.passes - 4 + after
    with pytest.raises(Stop):
        channel_attention(LOSS, CHANNELS, batches, chunk_size=2, path=path)


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_stopped_call_goes_on_and_ends_the_same(chunks, tmp_path):
    path, whole = tmp_path / "losses.jsonl", tmp_path / "whole.jsonl"
    expected = channel_attention(LOSS, CHANNELS, BATCHES, chunk_size=2, path=whole)
    stopped(path, chunks)
    kept = path.read_bytes()
    assert kept.count(b"\n") == 1 + chunks
    assert whole.read_bytes().startswith(kept)
    got = channel_attention(LOSS, CHANNELS, BATCHES, chunk_size=2, path=path)
    chex.assert_trees_all_equal(got, expected)
    assert path.read_bytes() == whole.read_bytes()


def test_a_file_that_was_cut_off_anywhere_is_completed(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "losses.jsonl"
    expected = channel_attention(LOSS, CHANNELS, BATCHES, chunk_size=4, path=whole)
    content = whole.read_bytes()
    header = content.index(b"\n")
    for end in (0, 5, header - 3, header, header + 1, header + 9, len(content) - 1):
        path.write_bytes(content[:end])
        got = channel_attention(LOSS, CHANNELS, BATCHES, chunk_size=4, path=path)
        chex.assert_trees_all_equal(got, expected)
        assert path.read_bytes() == content


def test_a_complete_file_is_read_with_any_temperature_and_chunk_size(tmp_path):
    path = tmp_path / "losses.jsonl"
    first = channel_attention(LOSS, CHANNELS, BATCHES, path=path)
    content = path.read_bytes()
    loss, traces = loss_and_traces()
    sharper = channel_attention(
        loss, CHANNELS, BATCHES, path=path, chunk_size=3, temperature=1.0
    )
    assert len(traces) == 2  # the loss with all channels, of either shape of batch
    assert path.read_bytes() == content
    assert np.max(sharper["first"]) > np.max(first["first"])


def others():
    moved = {"params": jax.tree.map(lambda p: 1.1 * p, VARIABLES["params"])}
    changed = [{**BATCHES[0], "x": BATCHES[0]["x"] + 1e-3}, BATCHES[1]]
    return {
        "network": (loss_and_traces(moved)[0], CHANNELS, BATCHES),
        "data": (LOSS, CHANNELS, changed),
        "order": (LOSS, CHANNELS, BATCHES[::-1]),
        "number": (LOSS, CHANNELS, BATCHES[:1]),
        "layers": (LOSS, {"second": 3, "first": 4}, BATCHES),
    }


@pytest.mark.parametrize("what", others())
def test_files_of_other_calls_are_refused_and_left(what, tmp_path):
    path = tmp_path / "losses.jsonl"
    channel_attention(LOSS, CHANNELS, BATCHES, path=path)
    content = path.read_bytes()[:-5]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`path` must be a new file.*losses\.jsonl"):
        channel_attention(*others()[what], path=path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [b"notes\n", b"notes", b"[1]\n", b"{}\n", b'{"fingerprint": 1, "baseline": 2}\n',
     b"\xff\xfe\n", b"\n"],
)  # fmt: skip
def test_files_of_something_else_are_refused_and_left(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    loss, traces = loss_and_traces()
    with pytest.raises(ValueError, match="`path` must be a new file"):
        channel_attention(loss, CHANNELS, BATCHES, path=path)
    assert path.read_bytes() == content
    assert not traces


def test_lines_that_are_missing_or_too_many_are_refused(tmp_path):
    path = tmp_path / "losses.jsonl"
    channel_attention(LOSS, CHANNELS, BATCHES, chunk_size=3, path=path)
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in ([lines[0], *lines[2:]], [*lines, lines[-1]], [*lines, b"{}\n"]):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(ValueError, match="`path` must be a new file"):
            channel_attention(LOSS, CHANNELS, BATCHES, path=path)


def never(scales, batch):
    raise AssertionError("computed")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"batches": iter(BATCHES)}, TypeError, "more than once.*got list_iterator"),
        ({"batches": (b for b in BATCHES)}, TypeError, "more than once.*got generator"),
        ({"batches": []}, ValueError, "`batches` must have at least one"),
        ({"batches": [np.float32(1)]}, ValueError, r"leading axis.*\[\(\)\]"),
        ({"batches": [{"x": X, "y": X[:2]}]}, ValueError, "share a leading axis"),
        ({"batches": [X[:0]]}, ValueError, "share a leading axis"),
        ({"batches": [()]}, ValueError, "share a leading axis"),
        ({"channels": {}}, ValueError, "`channels` must have a layer"),
        ({"channels": {"first": 0}}, ValueError, "at least one channel.*'first': 0"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1, got 0"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be above 0, got -1"),
    ],
)
def test_arguments_are_checked_before_anything_is_computed(change, error, says):
    arguments = {"loss": never, "channels": CHANNELS, "batches": BATCHES} | change
    with pytest.raises(error, match=says):
        channel_attention(**arguments)


def test_batches_have_to_be_the_same_each_time():
    class Shuffled:
        def __init__(self):
            self.random = np.random.default_rng(0)

        def __iter__(self):
            return iter([{"x": self.random.random((2, 3)), "y": np.ones(2)}])

    with pytest.raises(ValueError, match="`batches` must be the same in every"):
        channel_attention(LOSS, CHANNELS, Shuffled())


def test_losses_have_to_be_finite_scalars(tmp_path):
    x, path = [np.ones(3, np.float32)], tmp_path / "losses.jsonl"
    with pytest.raises(TypeError, match=r"must return a scalar.*got shape \(3,\)"):
        channel_attention(lambda scales, batch: batch, {"a": 2}, x, path=path)
    with pytest.raises(ValueError, match=r"must be finite, got \[inf\]"):
        channel_attention(lambda s, b: jnp.sum(b) / 0.0, {"a": 2}, x, path=path)
    assert not path.exists()

    def undefined_without_b(scales, batch):
        return jnp.sum(batch) + 1 / jnp.sum(scales["b"])

    with pytest.raises(ValueError, match="got inf more without a channel of layer 'b'"):
        channel_attention(undefined_without_b, {"a": 2, "b": 1}, x, path=path)
    assert len(path.read_text().splitlines()) == 1  # what is not finite is not kept


def test_the_progress_bar_is_for_terminals_with_rich(monkeypatch):
    import rich.console

    shown = []

    def console(terminal):
        def make(**kwargs):
            del kwargs
            shown.append(io.StringIO())
            return made(file=shown[-1], force_terminal=terminal)

        return make

    made = rich.console.Console
    run = {"loss": LOSS, "channels": CHANNELS, "batches": BATCHES[:1]}
    monkeypatch.setattr(rich.console, "Console", console(True))
    expected = channel_attention(**run)
    total = sum(CHANNELS.values())
    assert f"{total}/{total}" in shown[-1].getvalue()
    monkeypatch.setattr(rich.console, "Console", console(False))
    channel_attention(**run)
    assert not shown[-1].getvalue()
    channel_attention(**run, progress=False)
    assert len(shown) == 2
    monkeypatch.setitem(sys.modules, "rich.console", None)
    chex.assert_trees_all_equal(channel_attention(**run), expected)
