"""Reads files of llama.cpp, with weights, shape and vocabulary in one file."""

import pathlib
from typing import Any

import gguf
import numpy as np

from dtnh_jax.lm import tokenization
from dtnh_jax.lm.architecture import Shape
from dtnh_jax.lm.model_files import ModelError, ModelFile, check_shape

_NAMES = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_DIVISORS = "rope_freqs.weight"
_UNKNOWN = "not stated in the file"


def read_gguf(path: pathlib.Path) -> ModelFile:
    """Opens a model, whose tensors are read and dequantized on demand.

    The file stores heads of queries and keys for rotary embeddings of adjacent pairs.
    They are returned in the order of Hugging Face, whose pairs are half a head apart.

    Raises:
      ModelError: the file can not be read, or its architecture is not llama.
    """
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # readers of damaged files raise any exception
        raise ModelError(f"`{path}` can not be read as GGUF: {error!s:.200}") from error
    fields = _Fields(path, reader)
    architecture = fields.get("general.architecture", "none")
    if architecture != "llama":
        raise ModelError(
            f"`{path}` must hold a model of the architecture llama, got {architecture}."
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shape = _shape(fields, tensors)
    check_shape(shape)

    def read(name: str) -> np.ndarray:
        layer, _, kind = name.rpartition(".")
        stored = (
            f"blk.{layer}.{_NAMES[kind]}.weight" if layer else f"{_NAMES[kind]}.weight"
        )
        if stored not in tensors:
            raise ModelError(f"`{path}` must hold the tensor {stored}, got none.")
        found = _dequantized(tensors[stored])
        if kind in ("q", "k"):
            return _halves(found, shape.heads if kind == "q" else shape.kv_heads)
        return found

    return ModelFile(
        name=str(fields.get("general.name", path.stem)),
        licence=str(fields.get("general.license", _UNKNOWN)),
        shape=shape,
        read=read,
        tokenizer=tokenization.from_vocabulary(fields.vocabulary()),
        end=int(fields["tokenizer.ggml.eos_token_id"]),
        chat_template=fields.get("tokenizer.chat_template"),
    )


class _Fields:
    """The named values of a file."""

    def __init__(self, path: pathlib.Path, reader: Any):
        self._path, self._fields = path, reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise ModelError(f"`{self._path}` must say {key}, got nothing.")
        return self._fields[key].contents()

    def vocabulary(self) -> tokenization.Vocabulary:
        kind = self["tokenizer.ggml.model"]
        if kind != "gpt2":
            raise ModelError(
                f"`{self._path}` must have a vocabulary of byte pairs (gpt2), got "
                f"{kind}: give the model's folder with its tokenizer.json instead."
            )
        kinds = self["tokenizer.ggml.token_type"]
        tokens = self["tokenizer.ggml.tokens"]
        control = int(gguf.TokenType.CONTROL)
        return tokenization.Vocabulary(
            tokens,
            self["tokenizer.ggml.merges"],
            [word for word, kind in zip(tokens, kinds) if kind == control],
            self.get("tokenizer.ggml.pre", "default"),
        )


def _shape(fields: _Fields, tensors: dict[str, Any]) -> Shape:
    width, heads = (
        int(fields["llama.embedding_length"]),
        int(fields["llama.attention.head_count"]),
    )
    vocabulary = fields.get("llama.vocab_size")
    if vocabulary is None:
        vocabulary = len(fields["tokenizer.ggml.tokens"])
    divisors = tensors.get(_DIVISORS)
    return Shape(
        vocabulary=int(vocabulary),
        width=width,
        hidden=int(fields["llama.feed_forward_length"]),
        layers=int(fields["llama.block_count"]),
        heads=heads,
        kv_heads=int(fields.get("llama.attention.head_count_kv", heads)),
        head=int(fields.get("llama.attention.key_length", width // max(heads, 1))),
        context=int(fields["llama.context_length"]),
        rotary_base=float(fields.get("llama.rope.freq_base", 10_000.0)),
        epsilon=float(fields["llama.attention.layer_norm_rms_epsilon"]),
        tied="output.weight" not in tensors,
        rotary_divisors=None
        if divisors is None
        else tuple(_dequantized(divisors).tolist()),
    )


def _dequantized(tensor: Any) -> np.ndarray:
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(found, np.float32)


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Moves the first entries of all pairs of a head before the second ones."""
    rows, inputs = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(rows, inputs)
