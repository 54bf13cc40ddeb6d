"""Builds tokenizers from a vocabulary and its merges, or reads them from a file."""

import pathlib
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from dtnh_jax.lm.model_files import ModelError

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Vocabulary(NamedTuple):
    """The vocabulary of a byte-pair tokenizer."""

    tokens: list[str]  # a token's number is its index
    merges: list[str]  # pairs of tokens, separated by a space, in order of priority
    special: list[str]  # tokens that are never split
    splitting: str  # llama.cpp's name of the rule that splits text before merges


def _splitting() -> dict[str, Any]:
    """Returns the rules that split text before merges, by llama.cpp's names."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.Split(Regex(_LLAMA_3), behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        "default": byte_level,
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([digits, byte_level]),
        "llama-bpe": pre_tokenizers.Sequence([words, plain]),
    }


def from_vocabulary(vocabulary: Vocabulary) -> Any:
    """Builds a byte-pair tokenizer.

    Returns:
      A `tokenizers.Tokenizer` that adds no special tokens to a text.

    Raises:
      ModelError: the splitting rule is unknown.
    """
    known = _splitting()
    if vocabulary.splitting not in known:
        raise ModelError(
            f"the tokenizer must split text in one of the ways {', '.join(known)}, "
            f"got {vocabulary.splitting}."
        )
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    merges = [
        (first, second)
        for first, _, second in (merge.partition(" ") for merge in vocabulary.merges)
    ]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=numbers, merges=merges))
    tokenizer.pre_tokenizer = known[vocabulary.splitting]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(word, special=True) for word in vocabulary.special]
    )
    return tokenizer


def from_file(path: pathlib.Path) -> Any:
    """Reads a `tokenizer.json`.

    Raises:
      ModelError: the file is missing, or has another format.
    """
    if not path.exists():
        raise ModelError(f"`{path}` is missing: the tokenizer of the model.")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # of a type of its own kind
        raise ModelError(f"`{path}` can not be read: {error!s:.200}") from error


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text, without special tokens."""
    return tokenizer.encode(text, add_special_tokens=False).ids
