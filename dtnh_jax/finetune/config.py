"""The options of a run, and the checks that cost nothing."""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from dtnh_jax.finetune.methods import (
    ADDED,
    DEFAULT_METHODS,
    METHODS,
    REGULARIZERS,
    RULES,
)


def _read_strengths(words: Sequence[str]) -> dict[str, float]:
    """Returns the strengths in `l2_sp=0.1 feature_map=0.001`."""
    pairs = [word.partition("=") for word in words]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("strengths are written NAME=NUMBER, such as l2_sp=0.1")
    return {name: float(number) for name, _, number in pairs}


_Strengths = Annotated[
    dict[str, float],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=NUMBER",
        instance_from_str=_read_strengths,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{k}={v:g}" for k, v in value.items()],
    ),
]
_DEFAULT_STEPS = 36
_DEFAULT_RATES = {"sgd": 0.01, "adamw": 0.001}
# These say where and how often files are written, and change no result.
_OF_NO_CONSEQUENCE = ("run_dir", "data_dir", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tunes a pretrained network on photographs, with and without DTNH.

    Every method is trained with every seed and tested once, after its training. The
    report, its figures and all numbers are written to the run folder. An interrupted
    run goes on where it was when the same command is given again.
    """

    source: str = "efficientnet-lite0"
    """Pretrained network to start from: efficientnet-lite0 (ImageNet)."""
    target: str = "elpv"
    """Task to fine-tune on: elpv (solar cells, functional or defective)."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """What to compare: REGULARIZER adds the gradients, REGULARIZER+RULE resolves; or
    `all`."""
    strength: _Strengths = dataclasses.field(default_factory=dict)
    """Strengths to use instead of the default ones, such as l2_sp=0.1."""
    tune: bool = False
    """Choose every strength that is not given by validation accuracy first."""
    scope: Literal["global", "leaf", "unit", "element"] = "global"
    """Resolve over all parameters, each tensor, each output channel, each number."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum 0.9, or AdamW."""
    learning_rate: float | None = None
    """Falls to 0 along a cosine. By default 0.01 for sgd and 0.001 for adamw."""
    steps: int | None = None
    """Training steps of each method and seed. By default 36."""
    epochs: float | None = None
    """Passes over the training images, instead of --steps."""
    batch_size: int = 32
    """Images in a training step."""
    image_size: int = 64
    """Height and width that photographs are resized to, in pixels."""
    train_per_class: int = 50
    """Training images of each class; every seed draws others."""
    validation_per_class: int = 100
    """Validation images of each class, for --tune; the same for all seeds."""
    test_per_class: int = 300
    """Test images of each class; the same for all seeds."""
    cache_teacher: bool = True
    """Keep what the teacher makes of the training images, instead of asking it anew."""
    seeds: int = 3
    """Repetitions, with other training images, head, order and dropout each."""
    tuning_seeds: int | None = None
    """Repetitions of --tune. By default as many as --seeds."""
    checkpoint_every: int = 25
    """Steps between checkpoints, from which an interrupted run goes on."""
    run_dir: pathlib.Path | None = None
    """Folder for results. By default runs/default, or another for other options."""
    data_dir: pathlib.Path | None = None
    """Folder for prepared data. By default DTNH_DATA_DIR, or the user's cache."""

    def __post_init__(self):
        if tuple(self.methods) == ("all",):
            object.__setattr__(self, "methods", tuple(METHODS))

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of every regularizer in use, before any tuning."""
        return {
            name: float(self.strength.get(name, REGULARIZERS[name].strength))
            for name in self.regularizers
        }

    @property
    def regularizers(self) -> tuple[str, ...]:
        """The regularizers that the methods use."""
        used = [METHODS[name].regularizer for name in self.methods]
        return tuple(dict.fromkeys(name for name in used if name is not None))

    def rules(self, regularizer: str | None) -> tuple[str, ...]:
        """The rules that the methods use on a regularizer; tuning needs the sum."""
        used = {
            METHODS[name].rule
            for name in self.methods
            if METHODS[name].regularizer == regularizer
        }
        return tuple(rule for rule in RULES if rule in used | {ADDED})

    @property
    def initial_learning_rate(self) -> float:
        """The learning rate at the first step."""
        if self.learning_rate is None:
            return _DEFAULT_RATES[self.optimizer]
        return self.learning_rate

    def total_steps(self, training_images: int) -> int:
        """The length of training, whichever way it was given."""
        if self.epochs is not None:
            return math.ceil(self.epochs * training_images / self.batch_size)
        return _DEFAULT_STEPS if self.steps is None else self.steps

    @property
    def folder(self) -> pathlib.Path:
        """The run folder."""
        if self.run_dir is not None:
            return self.run_dir.expanduser()
        ours, plain = identity(self), identity(Config())
        if ours == plain:
            return pathlib.Path("runs", "default")
        changed = {key: value for key, value in ours.items() if value != plain[key]}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode())
        return pathlib.Path("runs", f"{self.target}-{digest.hexdigest()[:8]}")


def identity(config: Config) -> dict[str, Any]:
    """The options that decide the results, ready for JSON: one identity, one folder."""
    options = dataclasses.asdict(config)
    for name in _OF_NO_CONSEQUENCE:
        del options[name]
    options["methods"] = list(config.methods)
    if not config.tune:  # a given strength says no more than the same default
        options["strength"] = config.strengths
    return options


def check(config: Config) -> None:
    """Raises ValueError, in one line, for options that can not be meant."""
    # Here, because these import Flax and TFDS, for which `--help` should not wait.
    from dtnh_jax.finetune.sources import SOURCES
    from dtnh_jax.finetune.targets import TARGETS

    one_of("source", config.source, SOURCES)
    one_of("target", config.target, TARGETS)
    if not config.methods:
        raise ValueError("`--methods` must name at least one method, got none.")
    for name in config.methods:
        one_of("methods", name, METHODS)
    if len(set(config.methods)) < len(config.methods):
        raise ValueError(
            f"`--methods` must name each method once, got {' '.join(config.methods)}."
        )
    for name, strength in config.strength.items():
        one_of("strength", name, REGULARIZERS)
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(
                f"`--strength {name}` must be at least 0 and finite, got {strength}."
            )
        if name not in config.regularizers:
            raise ValueError(f"`--strength {name}` is of no use: no method has it.")
    if config.tune and not set(config.regularizers) - set(config.strength):
        raise ValueError("`--tune` is of no use: there is no strength left to choose.")
    if config.steps is not None and config.epochs is not None:
        raise ValueError("`--steps` and `--epochs` must not be given together.")
    whole = ("batch_size", "image_size", "train_per_class", "test_per_class", "seeds")
    if config.tuning_seeds is not None and not config.tune:
        raise ValueError("`--tuning-seeds` is of no use without `--tune`.")
    for name in (*whole, "steps", "checkpoint_every", "tuning_seeds"):
        _at_least(name, getattr(config, name), 1)
    _at_least("validation_per_class", config.validation_per_class, int(config.tune))
    for name in ("learning_rate", "epochs"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"`{_flag(name)}` must be above 0 and finite, got {value}."
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def one_of(name: str, value: str, known: Any) -> None:
    """Raises ValueError unless an option has a value that is known."""
    if value not in known:
        raise ValueError(
            f"`{_flag(name)}` must be one of {', '.join(known)}, got {value!r}."
        )


def _at_least(name: str, value: int | None, bound: int) -> None:
    if value is not None and value < bound:
        raise ValueError(f"`{_flag(name)}` must be at least {bound}, got {value}.")
