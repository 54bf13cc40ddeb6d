"""Weights of one's own: every kind of file, and networks that the library knows not."""

import functools
import json
import re
import struct
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch_resnet

from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.models import resnet
from dtnh_jax.finetune.runs.checks import check
from dtnh_jax.finetune.weights.checkpoint_sources import (
    ARCHITECTURES,
    source_of_function,
)
from dtnh_jax.finetune.weights.sources import initial_variables, load_source
from dtnh_jax.finetune.weights.tensor_files import read_tensors
from dtnh_jax.finetune.weights.tensor_names import named_variables
from dtnh_jax.finetune.weights.torch_files import WeightsError

# Of a ResNet with one block a stage, which is a tenth of the smallest that is known.
SHORT = resnet.Depth((1, 1, 1, 1), is_bottleneck=False)
TENSORS = torch_resnet.draw(SHORT.blocks, SHORT.is_bottleneck, classes=7)
# Of the kinds of file, small.
SOME = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b/c": np.ones(2, np.int64)}


@pytest.fixture(autouse=True)
def short_resnet(monkeypatch):
    known = ARCHITECTURES["resnet18"]
    short = known._replace(
        module=functools.partial(resnet.ResNet, depth=SHORT),
        feature_layers=resnet.feature_layers(SHORT),
    )
    monkeypatch.setitem(ARCHITECTURES, "resnet18", short)


def saved(path, tensors):
    path.write_bytes(safetensors.numpy.save(tensors))
    return f"resnet18:{path}"


def test_torchvision_weights_in_safetensors(tmp_path):
    source = load_source(saved(tmp_path / "w.safetensors", TENSORS))
    assert "w.safetensors" in source.licence
    variables = source.load()
    np.testing.assert_array_equal(
        variables["params"]["stage_1_block_1"]["conv_1"]["kernel"],
        TENSORS["layer1.0.conv1.weight"].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(
        variables["batch_stats"]["stem_norm"]["var"], TENSORS["bn1.running_var"]
    )
    started = initial_variables(source, 4, jax.random.key(0), pretrained=True)
    assert started["params"]["head"]["kernel"].shape == (512, 4)
    scratch = initial_variables(source, 4, jax.random.key(0), pretrained=False)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (started, scratch)]
    assert shapes[0] == shapes[1]


def test_wrong_tensors_are_named(tmp_path):
    wrong = dict(TENSORS)
    del wrong["layer2.0.bn1.running_mean"]
    wrong["layer1.1.conv1.weight"] = np.zeros((64, 64, 3, 3), np.float32)
    wrong["conv1.weight"] = np.zeros((64, 3, 3, 3), np.float32)
    source = load_source(saved(tmp_path / "w.safetensors", wrong))
    with pytest.raises(
        WeightsError, match="Not the tensors of resnet18, in "
    ) as caught:
        source.load()
    message = str(caught.value)
    named = re.findall(r"(\S+) (is missing|is unknown|has shape)", message)
    assert dict(named) == {
        "layer2.0.bn1.running_mean": "is missing",
        "layer1.1.conv1.weight": "is unknown",
        "conv1.weight": "has shape",
    }
    assert "(64, 3, 3, 3), which does not give the (7, 7, 3, 64)" in message


def test_hundreds_of_wrong_names_are_counted(tmp_path):
    path = tmp_path / "w.safetensors"
    source = load_source(saved(path, {f"t{i}": np.zeros(1) for i in range(100)}))
    with pytest.raises(WeightsError, match=r"; and \d+ more\.$") as caught:
        source.load()
    assert len(str(caught.value)) < 2000


@pytest.fixture(scope="module")
def tree():
    network = resnet.ResNet(7, SHORT)
    return named_variables(TENSORS, network, resnet.torch_name, "the test")


@pytest.mark.parametrize("kind", ["msgpack", "orbax", "manager", "safetensors"])
def test_weights_with_the_names_of_linen(tmp_path, tree, kind):
    whole = {**tree, "step": np.array(3), "opt_state": {"mu": tree["params"]["head"]}}
    if kind == "msgpack":
        path = tmp_path / "w.msgpack"
        path.write_bytes(flax.serialization.to_bytes(whole))
    elif kind == "safetensors":
        path = tmp_path / "w.safetensors"
        flat = flax.traverse_util.flatten_dict(tree, sep="/")
        path.write_bytes(safetensors.numpy.save(flat))
    elif kind == "orbax":
        path = tmp_path / "w"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, whole)
    else:
        with ocp.CheckpointManager(tmp_path / "all") as manager:
            manager.save(3, args=ocp.args.StandardSave(whole))
        path = tmp_path / "all" / "3"
    loaded = load_source(f"resnet18:{path}").load()
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)


def test_half_and_double_precision_become_single(tmp_path):
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        tensors = {n: x.astype(dtype) for n, x in TENSORS.items() if x.ndim}
        source = load_source(saved(tmp_path / "w.safetensors", tensors))
        kernel = source.load()["params"]["head"]["kernel"]
        assert kernel.dtype == np.float32
        np.testing.assert_allclose(kernel, TENSORS["fc.weight"].T, rtol=1e-2)


def header(text, data=b""):
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype, shape, end):
    value = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}
    return json.dumps(value).encode()


DAMAGED = {
    "empty": b"",
    "no length": b"\1\2\3",
    "header longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "no JSON": header(b"{nonsense"),
    "no tensors": header(b"[]"),
    "data missing": header(entry("F32", [4], 16), b"\0" * 8),
    "data left over": header(entry("F32", [4], 16), b"\0" * 20),
    "shape and size differ": header(entry("F32", [5], 16), b"\0" * 16),
    "unknown type": header(entry("F7", [4], 16), b"\0" * 16),
    "huge shape": header(entry("F32", [2**40, 2**40], 16), b"\0" * 16),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_safetensors_are_refused(tmp_path, name):
    path = tmp_path / "w.safetensors"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(WeightsError, match=r"w\.safetensors` can not be read"):
        read_tensors(path)


def test_other_damage_and_other_files_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="There is no file of weights"):
        read_tensors(tmp_path / "none.safetensors")
    (tmp_path / "w.onnx").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"must end in one of \.safetensors, \.pth"):
        read_tensors(tmp_path / "w.onnx")
    (tmp_path / "w.pth").write_bytes(b"nonsense")
    with pytest.raises(WeightsError, match="magic number"):
        read_tensors(tmp_path / "w.pth")
    (tmp_path / "w.msgpack").write_bytes(b"\xc1")
    with pytest.raises(WeightsError, match="msgpack` can not be read"):
        read_tensors(tmp_path / "w.msgpack")
    (tmp_path / "w.msgpack").write_bytes(flax.serialization.msgpack_serialize(3))
    with pytest.raises(WeightsError, match="no dictionary of tensors"):
        read_tensors(tmp_path / "w.msgpack")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match="folder`"):
        read_tensors(tmp_path / "folder")


def test_lite1_takes_its_package():
    source = load_source("efficientnet-lite1")
    variables = source.load()
    sizes = jax.tree.map(np.size, variables["params"])
    assert jax.tree.reduce(int.__add__, sizes) == 5_416_680
    blocks = [name for name in variables["params"] if name.startswith("stage_")]
    assert len(blocks) == 21
    assert set(source.feature_layers) <= set(blocks)


# Networks of the user's.


def write_module(tmp_path, monkeypatch, body):
    name = f"own_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


OWN = """
import flax.linen as nn, jax, jax.numpy as jnp
from dtnh_jax.finetune.weights.sources import Source

class Net(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, *, train):
        scale = self.param("gain", nn.initializers.ones, (3,))
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(images * scale[None, None, None]))
        x = nn.LayerNorm(name="norm")(x).mean((1, 2))
        self.sow("intermediates", "pooled", x)
        return nn.Dense(self.num_classes, name="head")(x)

def load():
    v = Net(5).init(jax.random.key(1), jnp.ones((1, 8, 8, 3)), train=False)
    return {"params": v["params"]}

def source():
    return Source("mine", "my own", Net, lambda x: jnp.asarray(x, jnp.float32) / 255,
                  ("norm",), load)

number = 3
"""


def test_a_network_of_the_users_own(tmp_path, monkeypatch):
    name = write_module(tmp_path, monkeypatch, OWN)
    check(Config(source=f"{name}:source"))
    source = load_source(f"{name}:source")
    assert source.licence == "my own"
    assert source.name == f"{name}:source"
    started = initial_variables(source, 2, jax.random.key(0), pretrained=True)
    scratch = initial_variables(source, 2, jax.random.key(0), pretrained=False)
    assert jax.tree.map(jnp.shape, started) == jax.tree.map(jnp.shape, scratch)
    assert started["batch_stats"] == {}
    assert started["params"]["head"]["bias"].shape == (2,)


WRONG = {
    'sow("intermediates"': ('sow("x"', "must sow the input of its head"),
    'name="head"': ('name="top"', "must have a dense submodule `head`"),
    "nn.relu(nn": ("nn.rulu(nn", "does not run: "),
    "return Source(": (
        "return print(",
        "must return a `dtnh_jax.finetune.weights.sources.S",
    ),
    "def source": ("def sauce", "can not be imported: "),
}


@pytest.mark.parametrize("old", WRONG)
def test_what_a_network_of_ones_own_lacks_is_said(tmp_path, monkeypatch, old):
    new, message = WRONG[old]
    name = write_module(tmp_path, monkeypatch, OWN.replace(old, new))
    with pytest.raises(ValueError, match=message):
        source_of_function(name, "source")


def test_sources_that_can_not_be_meant():
    for name in ("resnet18", "resnet18:", "no such", "a:b c", ":f"):
        with pytest.raises(ValueError, match="`--source` must be one of efficientnet-"):
            check(Config(source=name))
    with pytest.raises(ValueError, match="no_such_module:f` can not be imported"):
        load_source("no_such_module:f")
