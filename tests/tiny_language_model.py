"""A Llama of a few thousand random weights, in files of either kind, and texts."""

import json
import pathlib

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

WIDTH, HIDDEN, LAYERS, HEADS, KEYS, HEAD, CONTEXT = 16, 24, 2, 4, 2, 4, 64
END = "<|end|>"
WORDS = ("the", "cat", "dog", "sat", "ate", "on", "a", "mat", "and", "what", "it")


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of a small language."""
    random = np.random.default_rng(seed)
    return [
        " ".join(random.choice(WORDS, random.integers(5, 30))) + "."
        for _ in range(count)
    ]


def make_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(50), trainer)
    return tokenizer


def tensors(vocabulary: int, *, tied: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by the names of Hugging Face."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return random.normal(0, 0.3, shape).astype(np.float32)

    found = {"model.embed_tokens.weight": draw(vocabulary, WIDTH)}
    found["model.norm.weight"] = 1 + draw(WIDTH)
    if not tied:
        found["lm_head.weight"] = draw(vocabulary, WIDTH)
    for i in range(LAYERS):
        shapes = {
            "input_layernorm": (WIDTH,),
            "self_attn.q_proj": (HEADS * HEAD, WIDTH),
            "self_attn.k_proj": (KEYS * HEAD, WIDTH),
            "self_attn.v_proj": (KEYS * HEAD, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * HEAD),
            "post_attention_layernorm": (WIDTH,),
            "mlp.gate_proj": (HIDDEN, WIDTH),
            "mlp.up_proj": (HIDDEN, WIDTH),
            "mlp.down_proj": (WIDTH, HIDDEN),
        }
        for name, shape in shapes.items():
            found[f"model.layers.{i}.{name}.weight"] = draw(*shape)
    return found


def write_folder(path: pathlib.Path, *, tied: bool = True, **options) -> pathlib.Path:
    """Writes a model as Hugging Face has it; returns its folder."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 100.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.token_to_id(END),
        **options,
    }
    (path / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(path / "tokenizer.json"))
    found = tensors(tokenizer.get_vocab_size(), tied=tied)
    save_file(found, path / "model.safetensors")
    return path


_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: pathlib.Path,
    *,
    tied: bool = True,
    architecture: str = "llama",
    without: str = "",
    splitting: str = "smollm",
) -> pathlib.Path:
    """Writes the same model as one file of llama.cpp, but for the tensor `without`."""
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    model = json.loads(tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_rope_freq_base(100.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_token_list(words)
    kinds = {END: gguf.TokenType.CONTROL}
    writer.add_token_types([kinds.get(w, gguf.TokenType.NORMAL) for w in words])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(vocabulary[END])
    for name, x in tensors(len(words), tied=tied).items():
        stem = name.removesuffix(".weight")
        layer, _, kind = stem.removeprefix("model.layers.").partition(".")
        if stem.startswith("model.layers."):
            stored = f"blk.{layer}.{_GGUF[kind]}.weight"
        else:
            stored = f"{_GGUF[stem]}.weight"
        if stored == without:
            continue
        for part, heads in (("q_proj", HEADS), ("k_proj", KEYS)):
            if stem.endswith(part):  # for rotary embeddings of adjacent pairs
                x = x.reshape(heads, 2, HEAD // 2, WIDTH).swapaxes(1, 2)
                x = np.ascontiguousarray(x.reshape(heads * HEAD, WIDTH))
        writer.add_tensor(stored, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
