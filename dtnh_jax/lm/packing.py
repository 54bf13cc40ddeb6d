"""Packs texts into rows of tokens of one length.

A row holds several texts in sequence. Attention stays within a text, and its positions
start at 0; see `architecture.Llama`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dtnh_jax.lm.texts import Text, TextError
from dtnh_jax.lm.tokenization import encoded


class Rows(NamedTuple):
    """Rows to train on, or a batch of them."""

    tokens: Int[Any, "N T"]
    labels: Int[Any, "N T"]  # the next token
    weights: Float[Any, "N T"]  # 1 where the label is learned, 0 elsewhere
    segments: Int[Any, "N T"]  # the number of a text in its row
    positions: Int[Any, "N T"]  # in a text, or a part of one

    def at(self, index: Any) -> "Rows":
        """Returns the rows at an index."""
        return Rows(*[x[index] for x in self])


class Encoded(NamedTuple):
    """A text as tokens, including the end token."""

    tokens: list[int]
    learned: int  # index of the first learned token
    where: str
    may_be_cut: bool  # whether it may continue in another row


def encode(
    texts: Sequence[Text], tokenizer: Any, end: int, chat_template: str | None
) -> list[Encoded]:
    """Tokenizes texts; prompts are formatted by the model's chat template, if any."""
    form = None
    if chat_template is not None and any(text.prompt is not None for text in texts):
        form = _chat_form(chat_template)
    found = []
    for text in texts:
        prompt = text.prompt
        if prompt is None:
            tokens = encoded(tokenizer, text.text)
            found.append(Encoded([*tokens, end], 1, text.where, True))
            continue
        read = encoded(tokenizer, prompt if form is None else form(prompt))
        answer = encoded(tokenizer, text.text)
        learned = max(len(read), 1)
        found.append(Encoded([*read, *answer, end], learned, text.where, False))
    return found


def _chat_form(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string(template)

    def form(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return compiled.render(messages=messages, add_generation_prompt=True)

    return form


def pack(texts: Sequence[Encoded], length: int) -> Rows:
    """Fills rows with texts in their order.

    A plain text is split at the end of a row and continues in the next one. An answer
    is never split; if it does not fit, the rest of the row stays empty.

    Raises:
      TextError: an answer and its prompt are longer than a row.
    """
    rows: list[list[np.ndarray]] = []
    for text in texts:
        if not text.may_be_cut and len(text.tokens) - 1 > length:
            raise TextError(
                f"{text.where} has {len(text.tokens)} tokens, more than `--context`, "
                f"{length}, and the one that follows."
            )
        for part in _parts(text, rows, length):
            rows[-1].append(part)
    joined = [np.concatenate(row, axis=1) for row in rows]
    padded = [np.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in joined]
    stacked = np.stack(padded, axis=1) if padded else np.zeros((5, 0, length), np.int32)
    tokens, labels, weights, segments, positions = stacked
    return Rows(tokens, labels, weights.astype(np.float32), segments, positions)


def _parts(
    text: Encoded, rows: list[list[np.ndarray]], length: int
) -> Iterator[np.ndarray]:
    """Yields the parts of a text that fill the ends of the growing rows."""
    tokens = np.asarray(text.tokens, np.int32)
    learned = np.arange(1, len(tokens)) >= text.learned
    pairs = np.stack([tokens[:-1], tokens[1:], learned]).astype(np.int32)
    while pairs.shape[1]:
        room = length - sum(x.shape[1] for x in rows[-1]) if rows else 0
        if not room or (not text.may_be_cut and pairs.shape[1] > room):
            rows.append([])
            room = length
        part, pairs = pairs[:, :room], pairs[:, room:]
        segment = np.full_like(part[0], len(rows[-1]) + 1)
        yield np.stack([*part, segment, np.arange(part.shape[1], dtype=np.int32)])


class Stream:
    """Endless batches of rows, shuffled in every pass; a function of the step."""

    def __init__(self, rows: Rows, batch: int, seed: int):
        self._rows, self._batch, self._seed = rows, batch, seed
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, step: int) -> Rows:
        """Returns the batch of a step."""
        count = len(self._rows.tokens)
        places = range(step * self._batch, (step + 1) * self._batch)
        return self._rows.at([self._order(i // count)[i % count] for i in places])

    def _order(self, number: int) -> np.ndarray:
        if number not in self._orders:
            random = np.random.default_rng([self._seed, number])
            self._orders = {
                key: order for key, order in self._orders.items() if key == number - 1
            }
            self._orders[number] = random.permutation(len(self._rows.tokens))
        return self._orders[number]
