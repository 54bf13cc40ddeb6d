"""Reads Hugging Face folders with safetensors, config and tokenizer."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from dtnh_jax.lm import tokenization
from dtnh_jax.lm.architecture import Shape
from dtnh_jax.lm.model_files import ModelError, ModelFile, check_shape

_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_INDEX = "model.safetensors.index.json"


def read_folder(path: pathlib.Path) -> ModelFile:
    """Opens a model, whose tensors are read on demand.

    Raises:
      ModelError: a file is missing or damaged, or the architecture is not llama.
    """
    options = _json(path / "config.json")
    kind = options.get("model_type", "none")
    if kind != "llama":
        raise ModelError(
            f"`{path}` must hold a model of the type llama, got {kind} in config.json."
        )
    for name in ("attention_bias", "mlp_bias"):
        if options.get(name):
            raise ModelError(f"`{path}` must hold a model without {name}, got one.")
    shape = _shape(path, options)
    check_shape(shape)
    files = _files(path)

    def read(name: str) -> np.ndarray:
        layer, _, kind = name.rpartition(".")
        prefix = f"model.layers.{layer}." if layer else ""
        stored = f"{prefix}{_NAMES[kind]}.weight"
        if stored not in files:
            raise ModelError(f"`{path}` must hold the tensor {stored}, got none.")
        with safetensors.safe_open(files[stored], "np") as file:
            return np.asarray(file.get_tensor(stored), np.float32)

    of_tokenizer = {}
    if (path / "tokenizer_config.json").exists():
        of_tokenizer = _json(path / "tokenizer_config.json")
    tokenizer = tokenization.from_file(path / "tokenizer.json")
    template = path / "chat_template.jinja"
    return ModelFile(
        name=path.name,
        licence="not stated in the files",
        shape=shape,
        read=read,
        tokenizer=tokenizer,
        end=_end(path, options),
        chat_template=template.read_text()
        if template.exists()
        else of_tokenizer.get("chat_template"),
    )


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"`{path}` is missing.") from error
    except (ValueError, OSError) as error:
        raise ModelError(f"`{path}` can not be read: {error}.") from error


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the file of every tensor, by name."""
    if (path / _INDEX).exists():
        parts = sorted(set(_json(path / _INDEX)["weight_map"].values()))
    else:
        parts = ["model.safetensors"]
    found = {}
    for part in parts:
        try:
            with safetensors.safe_open(path / part, "np") as file:
                found |= dict.fromkeys(file.keys(), path / part)
        except FileNotFoundError as error:
            raise ModelError(f"`{path / part}` is missing.") from error
        except Exception as error:  # readers of damaged files raise any exception
            raise ModelError(f"`{path / part}` can not be read: {error}.") from error
    return found


def _end(path: pathlib.Path, options: Mapping[str, Any]) -> int:
    end = options.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if not isinstance(end, int):
        raise ModelError(f"`{path / 'config.json'}` must say eos_token_id, got {end}.")
    return end


def _shape(path: pathlib.Path, options: Mapping[str, Any]) -> Shape:
    try:
        width, heads = options["hidden_size"], options["num_attention_heads"]
        head = options.get("head_dim") or width // heads
        rotary = options.get("rope_parameters") or options.get("rope_scaling") or {}
        base = rotary.get("rope_theta", options.get("rope_theta", 10_000.0))
        return Shape(
            vocabulary=options["vocab_size"],
            width=width,
            hidden=options["intermediate_size"],
            layers=options["num_hidden_layers"],
            heads=heads,
            kv_heads=options.get("num_key_value_heads") or heads,
            head=head,
            context=options["max_position_embeddings"],
            rotary_base=float(base),
            epsilon=float(options["rms_norm_eps"]),
            tied=bool(options.get("tie_word_embeddings", False)),
            rotary_divisors=_divisors(path, rotary, float(base), head),
        )
    except KeyError as error:
        raise ModelError(f"`{path / 'config.json'}` must say {error}.") from error


def _divisors(
    path: pathlib.Path, rotary: Mapping[str, Any], base: float, head: int
) -> tuple[float, ...] | None:
    """Returns the divisors of frequencies, which Llama 3.1 has for longer contexts."""
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(
            f"`{path}` must have rotary embeddings of the type default or llama3, got "
            f"{kind}."
        )
    names = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (float(rotary[name]) for name in names)
    old = float(rotary["original_max_position_embeddings"])
    found = []
    for i in range(0, head, 2):
        turns = old / (2 * math.pi * base ** (i / head))  # in the old context
        share = min(max((turns - low) / (high - low), 0.0), 1.0)  # of what is kept
        found.append(1 / ((1 - share) / factor + share))
    return tuple(found)
