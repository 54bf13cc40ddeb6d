"""Models in files: the same network from both kinds, and one line for what is wrong."""

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_language_model as tiny
from safetensors.numpy import save_file

from dtnh_jax.lm import networks, opening, tokenization
from dtnh_jax.lm.architecture import Adapters
from dtnh_jax.lm.gguf_files import read_gguf
from dtnh_jax.lm.model_files import ModelError, names_of
from dtnh_jax.lm.networks import read_network
from dtnh_jax.lm.safetensors_folders import read_folder

ADAPTERS = Adapters(2, ("q", "v"))


def expected_logits(weights, tokens, *, head=None, base=100.0):
    """The network in float64, written from its definition, token by token."""
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}

    def normed(x, scale):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * scale

    def rotated(x):  # [tokens, heads, numbers]: pairs as complex numbers
        half = tiny.HEAD // 2
        pairs = x[..., :half] + 1j * x[..., half:]
        rates = base ** (-np.arange(half) / half)
        turned = pairs * np.exp(1j * np.arange(len(x))[:, None, None] * rates)
        return np.concatenate([turned.real, turned.imag], -1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(tiny.LAYERS):

        def of(name, i=i):
            return w[f"model.layers.{i}.{name}.weight"]

        y = normed(x, of("input_layernorm"))
        q, k, v = (y @ of(f"self_attn.{n}_proj").T for n in "qkv")
        q = rotated(q.reshape(len(x), tiny.HEADS, tiny.HEAD))
        k = rotated(k.reshape(len(x), tiny.KEYS, tiny.HEAD))
        v = v.reshape(len(x), tiny.KEYS, tiny.HEAD)
        out = np.zeros_like(q)
        for h in range(tiny.HEADS):
            of_keys = h * tiny.KEYS // tiny.HEADS
            for t in range(len(x)):
                scores = k[: t + 1, of_keys] @ q[t, h] / np.sqrt(tiny.HEAD)
                p = np.exp(scores - scores.max())
                out[t, h] = p @ v[: t + 1, of_keys] / p.sum()
        x = x + out.reshape(len(x), -1) @ of("self_attn.o_proj").T
        y = normed(x, of("post_attention_layernorm"))
        gate = y @ of("mlp.gate_proj").T
        gate = gate / (1 + np.exp(-gate))
        x = x + (gate * (y @ of("mlp.up_proj").T)) @ of("mlp.down_proj").T
    words = w["model.embed_tokens.weight"] if head is None else head
    return normed(x, w["model.norm.weight"]) @ np.asarray(words, np.float64).T


def logits_of(model, tokens, **options):
    network = read_network(model, dtype=jnp.float32, adapters=ADAPTERS, **options)
    adapters = networks.initial_adapters(network, jax.random.key(0))
    run = jax.jit(lambda *parts: network.module(*parts)(jnp.asarray(tokens)[None]))
    return np.asarray(run(adapters, network.base)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny.write_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


def test_logits_are_those_of_the_definition(folder, file):
    model = read_folder(folder)
    tokens = tokenization.encoded(model.tokenizer, "the cat sat on 12 mats.")
    weights = tiny.tensors(model.shape.vocabulary, tied=True)
    expected = expected_logits(weights, tokens)
    np.testing.assert_allclose(logits_of(model, tokens), expected, atol=1e-4)
    same = read_gguf(file)
    epsilon = pytest.approx(model.shape.epsilon)  # stored in single precision
    assert same.shape == model.shape._replace(epsilon=epsilon)
    assert same.end == model.end
    for name in names_of(model.shape):
        np.testing.assert_array_equal(same.read(name), model.read(name))


def test_a_head_of_its_own(tmp_path):
    folder = tiny.write_folder(tmp_path / "tiny", tied=False)
    file = tiny.write_gguf(tmp_path / "tiny.gguf", tied=False)
    model, same = read_folder(folder), read_gguf(file)
    weights = tiny.tensors(model.shape.vocabulary, tied=False)
    tokens = [1, 5, 9]
    expected = expected_logits(weights, tokens, head=weights["lm_head.weight"])
    np.testing.assert_allclose(logits_of(model, tokens), expected, atol=1e-4)
    assert not same.shape.tied
    np.testing.assert_array_equal(same.read("head"), model.read("head"))


def test_a_tokenizer_that_is_rebuilt_cuts_like_the_one_that_was_trained(file):
    ours, theirs = read_gguf(file).tokenizer, tiny.make_tokenizer()
    for text in ("the cat", f"dog{tiny.END}mat", "Äpfel, 1234\n\n  und Öl", ""):
        found = tokenization.encoded(ours, text)
        assert found == tokenization.encoded(theirs, text)
        assert ours.decode(found, skip_special_tokens=False) == text


def test_rotary_frequencies_of_llama_3(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = tiny.write_folder(
        tmp_path / "tiny", rope_scaling=scaling, head_dim=8, rope_theta=10_000.0
    )
    divisors = np.array(read_folder(folder).shape.rotary_divisors)
    lengths = 2 * np.pi * 10_000.0 ** (np.arange(4) / 4)  # of a whole turn, in tokens
    assert lengths[0] < 64 / 4
    assert lengths[2] > 64
    np.testing.assert_allclose(divisors[[0, 2, 3]], [1, 8, 8])
    share = (64 / lengths[1] - 1) / 3
    np.testing.assert_allclose(1 / divisors[1], share + (1 - share) / 8)


def test_shards_and_half_precision(tmp_path):
    folder = tiny.write_folder(tmp_path / "tiny")
    model = read_folder(folder)
    weights = tiny.tensors(model.shape.vocabulary, tied=True)
    halves = {name: x.astype(jnp.bfloat16) for name, x in weights.items()}
    names = sorted(halves)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for part, inside in parts.items():
        save_file({name: halves[name] for name in inside}, folder / part)
    (folder / "model.safetensors").unlink()
    index = {name: part for part, inside in parts.items() for name in inside}
    text = json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    found = read_folder(folder).read("1.up")
    assert found.dtype == np.float32
    expected = halves["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    network = read_network(
        model._replace(read=read_folder(folder).read),
        dtype=jnp.bfloat16,
        adapters=ADAPTERS,
    )
    for tree, dtype in ((network.base, jnp.bfloat16), (network.adapters, jnp.float32)):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}


def test_quantized_tensors_are_dequantized(file):
    model = read_gguf(file)
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 64)).astype(np.float32)
    packed = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    from dtnh_jax.lm.gguf_files import _dequantized

    class Tensor:
        data, tensor_type = packed, gguf.GGMLQuantizationType.Q8_0

    np.testing.assert_allclose(_dequantized(Tensor), x, atol=0.02)
    assert model.read("norm").dtype == np.float32


def test_texts_of_a_row_do_not_see_each_other(folder):
    model = read_folder(folder)
    network = read_network(model, dtype=jnp.float32, adapters=ADAPTERS)
    adapters = networks.initial_adapters(network, jax.random.key(0))
    first, second = [3, 7, 8], [9, 4, 11, 5]
    tokens = jnp.array([first + second])
    segments = jnp.array([[1] * 3 + [2] * 4])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3]])
    module = network.module(adapters, network.base)
    both = module(tokens, segments, positions)[0]
    alone = module(jnp.array([second]))[0]
    np.testing.assert_allclose(both[3:], alone, atol=1e-5)
    assert np.abs(module(tokens)[0][3:] - alone).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "qwen2"}, "architecture llama, got qwen2"),
        (
            {"without": "blk.1.ffn_up.weight"},
            "tensor blk.1.ffn_up.weight, got none",
        ),
        ({"splitting": "deepseek"}, "must split text in one of the ways .* deepseek"),
    ],
)
def test_a_gguf_file_that_can_not_be_used(tmp_path, change, message):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", **change)
    with pytest.raises(ModelError, match=message):
        read_network(read_gguf(path), dtype=jnp.float32, adapters=ADAPTERS)


def test_what_is_no_gguf_file(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF, or is it?")
    with pytest.raises(ModelError, match="can not be read as GGUF"):
        opening.open_model(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "gpt2"}, "of the type llama, got gpt2"),
        ({"attention_bias": True}, "without attention_bias"),
        ({"hidden_size": 32}, r"attention_norm of tiny must have the shape \(32,\)"),
        ({"num_key_value_heads": 3}, "must be a multiple of those of keys"),
        ({"vocab_size": 0}, "vocabulary must be above 0"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "default or llama3, got yarn"),
        ({"eos_token_id": None}, "must say eos_token_id"),
        ({"num_hidden_layers": 3}, "layers.2.input_layernorm.weight, got none"),
    ],
)
def test_a_folder_that_can_not_be_used(folder, tmp_path, options, message):
    for name in ("tokenizer.json", "model.safetensors"):
        tmp_path.joinpath("tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny" / name).symlink_to(folder / name)
    config = json.loads((folder / "config.json").read_text()) | options
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        read_network(
            read_folder(tmp_path / "tiny"), dtype=jnp.float32, adapters=ADAPTERS
        )


def test_files_that_are_missing(tmp_path):
    with pytest.raises(ModelError, match=r"config.json` is missing"):
        opening.open_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"`--model` must be smollm2-135m, a \.gguf"):
        opening.open_model("gpt5")
    folder = tiny.write_folder(tmp_path / "tiny")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="the tokenizer of the model"):
        read_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model.safetensors` is missing"):
        read_folder(folder)


def test_a_tokenizer_of_another_model(tmp_path):
    folder = tiny.write_folder(tmp_path / "tiny", vocab_size=100)
    with pytest.raises(ModelError, match="must have at most 100 tokens"):
        opening.open_model(str(folder))
