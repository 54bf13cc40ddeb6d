"""The options of the benchmarks."""

import dataclasses
import pathlib
from typing import Literal, get_args

Group = Literal[
    "transformation",
    "steps",
    "bloop",
    "peers",
    "compile",
    "memory",
    "mlp",
    "regularizers",
    "language",
]
DEFAULT_GROUPS: tuple[Group, ...] = (
    "transformation",
    "steps",
    "bloop",
    "compile",
    "memory",
    "mlp",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the cost of resolving conflicts, and reports which targets are met.

    Programs that are compared run in turn, in every round. A ratio is the median of the
    ratios within rounds, and its range is the middle half of the rounds. Results, table
    and picture are written to files with the same name.
    """

    groups: tuple[Group, ...] = DEFAULT_GROUPS
    """Groups to measure: the `transformation` alone, at several sizes; whole training
    `steps`; steps with the rule of `bloop`, here and in its authors' code; TorchJD in
    PyTorch (`peers`); times to `compile`, and `memory`; all three on an `mlp`;
    `regularizers` of the fine-tuning command; `language`, the steps of `dtnh lm`."""
    peers: bool = False
    """Also measure the group `peers`: pip install 'dtnh-jax[peers]'."""
    rounds: int = 15
    """Rounds in which everything is timed."""
    compile_rounds: int = 3
    """Rounds in which every step is compiled, for the groups `compile` and `mlp`."""
    sizes: tuple[int, ...] = (1_000_000, 10_000_000, 100_000_000)
    """Numbers of parameters, for the group `transformation`."""
    batch_size: int = 64
    """Examples in a batch."""
    source: str = "efficientnet-lite0"
    """Pretrained network of the fine-tuning command."""
    image_size: int = 64
    """Height and width of its images, in pixels."""
    residual_size: int = 29
    """Height and width of the small residual network's images, in pixels. With 29, both
    frameworks use the same padding."""
    layers: int = 2
    """Layers of the transformer encoder."""
    width: int = 256
    """Channels of its tokens, a multiple of 4."""
    tokens: int = 64
    """Tokens of an example."""
    mlp_layers: int = 8
    """Square matrices of the perceptrons of the group `mlp`."""
    mlp_widths: tuple[int, ...] = (512, 1024)
    """Their heights and widths, one for each perceptron."""
    mlp_batch_sizes: tuple[int, ...] = (256, 64)
    """Examples in a batch, one number for each perceptron."""
    methods: tuple[str, ...] = (
        "fine-tuning",
        "l2",
        "l2_sp",
        "l2_sp+dtnh",
        "l1_sp+dtnh",
        "l2_sp_fisher+dtnh",
        "lora",
        "lora_decay",
        "lora_decay+dtnh",
    )
    """Methods of the fine-tuning command, for the group `regularizers`. Each is
    compared with its baseline, `fine-tuning` or `lora`, which must be among them."""
    language_model: str = "smollm2-135m"
    """Model of the group `language`, as `dtnh lm --model`."""
    language_target: str = "fortunes-de"
    """Its text, as `dtnh lm --target`."""
    language_kept: str = "python-docs"
    """As `dtnh lm --kept`; nothing is measured on it."""
    language_tokens: tuple[int, int] = (4, 64)
    """Rows of its batch, and tokens of a row."""
    output: pathlib.Path = pathlib.Path("runs", "benchmarks", "benchmarks.json")
    """File for the results; picture and table are written beside it."""
    report_only: bool = False
    """Measure nothing: show and draw the results in --output again."""

    @property
    def wanted(self) -> tuple[str, ...]:
        """The groups to measure, in the order of `Group`."""
        chosen = {*self.groups, *(["peers"] if self.peers else [])}
        return tuple(group for group in get_args(Group) if group in chosen)
