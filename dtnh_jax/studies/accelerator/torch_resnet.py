"""ResNet-50 in PyTorch, like the one in linen: strides in the 3 x 3 convolutions."""

# pyright: reportMissingImports=false
from collections.abc import Sequence
from typing import Any


def network(blocks: Sequence[int], width: int, classes: int) -> tuple[Any, Any]:
    """Builds a network of bottlenecks, in training.

    Args:
      blocks: number of blocks of each stage; ResNet-50 has 3, 4, 6 and 3.
      width: width of the first stage, 64 in ResNet-50.
      classes: number of classes.

    Returns:
      The module, and a function that maps images to logits and the features of every
      stage.
    """
    from torch import nn

    def normalized(*sizes: int, **options: Any) -> list[Any]:
        conv = nn.Conv2d(*sizes, **options, bias=False)
        return [conv, nn.BatchNorm2d(conv.out_channels)]

    class Bottleneck(nn.Module):
        """A residual block, the second of whose convolutions has strides."""

        def __init__(self, inputs: int, width: int, stride: int):
            super().__init__()
            self.body = nn.Sequential(
                *normalized(inputs, width, 1),
                nn.ReLU(),
                *normalized(width, width, 3, stride=stride, padding=1),
                nn.ReLU(),
                *normalized(width, 4 * width, 1),
            )
            self.shortcut = nn.Sequential()
            if stride != 1 or inputs != 4 * width:
                self.shortcut.extend(normalized(inputs, 4 * width, 1, stride=stride))

        def forward(self, x: Any) -> Any:
            return nn.functional.relu(self.body(x) + self.shortcut(x))

    stem = nn.Sequential(
        *normalized(3, width, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    stages, inputs = nn.ModuleList(), width
    for stage, count in enumerate(blocks):
        layers = []
        for block in range(count):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(inputs, width * 2**stage, stride))
            inputs = 4 * width * 2**stage
        stages.append(nn.Sequential(*layers))
    whole = nn.ModuleList([stem, stages, nn.Linear(inputs, classes)])

    def forward(x: Any) -> tuple[Any, list[Any]]:
        stem, stages, head = whole
        x, maps = stem(x), []
        for stage in stages:
            x = stage(x)
            maps.append(x)
        return head(x.mean(dim=(2, 3))), maps

    return whole, forward
