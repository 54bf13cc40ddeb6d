"""Divides texts into training, held-out and test rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dtnh_jax.lm.model_files import ModelFile
from dtnh_jax.lm.packing import Encoded, Rows, encode, pack
from dtnh_jax.lm.texts import Source, TextError

_SEED = 20191108  # of the order of texts, the same for all seeds of a run
_HELD_OUT = 0.1  # share of the texts that are not for tests


class Splits(NamedTuple):
    """Rows of tokens from disjoint texts."""

    train: Rows
    held_out: Rows  # for gradients that a trust is learned from
    test: Rows  # of the target
    kept: Rows  # test rows of the text that may be forgotten


def make_splits(
    model: ModelFile, target: Source, kept: Source, length: int, test_rows: int
) -> Splits:
    """Encodes and packs texts.

    Args:
      model: the model, for its tokenizer.
      target: text to learn.
      kept: text that may be forgotten; it is never trained on.
      length: tokens of a row.
      test_rows: largest number of test rows of each of the two.

    Raises:
      TextError: there is too little text; the message says how much there is.
    """

    def shuffled(source: Source) -> list[Encoded]:
        parts = model.tokenizer, model.end, model.chat_template
        texts = encode(source.texts, *parts)
        order = np.random.default_rng(_SEED).permutation(len(texts))
        return [texts[i] for i in order]

    ours, theirs = shuffled(target), shuffled(kept)
    count = min(_enough(ours, length * test_rows), max(len(ours) // 3, 1))
    test, rest = ours[:count], ours[count:]
    held_out_count = max(round(_HELD_OUT * len(rest)), 1)
    held_out, train = rest[:held_out_count], rest[held_out_count:]
    packed = Splits(
        train=pack(train, length),
        held_out=pack(held_out, length),
        test=pack(test, length).at(slice(test_rows)),
        kept=pack(theirs[: _enough(theirs, length * test_rows)], length).at(
            slice(test_rows)
        ),
    )
    for name, rows in packed._asdict().items():
        if not rows.weights.any():
            source = kept if name == "kept" else target
            raise TextError(
                f"{source.name} has too few texts, {len(source.texts)}: none is left "
                f"for {name.replace('_', '-')} rows."
            )
    return packed


def _enough(texts: Sequence[Encoded], tokens: int) -> int:
    """Returns how many texts contain a number of tokens; all if there are too few."""
    sizes = np.cumsum([len(text.tokens) - 1 for text in texts])
    return int(np.searchsorted(sizes, tokens)) + 1
