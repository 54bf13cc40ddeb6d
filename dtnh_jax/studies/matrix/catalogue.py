"""What the grid is made of, by name: sources, targets and learning rates, as data."""

from typing import NamedTuple

ALONE = "none"  # the rule without a regularizer: the loss alone
SCRATCH = "scratch"  # stands where a rule does


class Source(NamedTuple):
    """How a network is pretrained.

    Of the images a tenth is held out. With `distortion`, the network has not learned
    anything: every parameter `p` of its initialization becomes `distortion * p` plus
    normal noise of deviation 0.1, and only its batch statistics are made to match.
    """

    images: str  # one of `images.LOADERS`
    examples: int  # at most, those that are held out included
    is_shuffled: bool = False  # whether the labels are permuted at random
    distortion: float | None = None


# A new source of small networks is a row here.
SOURCES = {
    "fashion": Source("fashion-train", 22_000),
    "mnist": Source("mnist", 5_000),
    # Few enough to be learned by heart, which is all that can be learned.
    "shuffled": Source("fashion-train", 2_200, is_shuffled=True),
    "absurd": Source("fashion-train", 2_200, distortion=3.0),
}


class Target(NamedTuple):
    """A task of the grid: which images, and how many of each class are trained on."""

    images: str  # one of `images.LOADERS`
    train_per_class: int
    label_noise: float = 0.0  # share of the training images with another class's label


# A new target of the small networks is a row here; it has to have ten classes.
TARGETS = {
    "digits-5": Target("digits", 5),
    "digits-20": Target("digits", 20),
    "fashion-20": Target("fashion-test", 20),
    "mnist-5": Target("mnist", 5),
    "digits-20-noisy": Target("digits", 20, label_noise=0.4),
    "fashion-20-noisy": Target("fashion-test", 20, label_noise=0.4),
}


# The other tier: large networks with published weights, and photographs. The names are
# the fine-tuning command's, by those of the grid: each of these sources with each of
# these targets is a pair. New ones are rows here.
SOURCES_OF_PHOTOGRAPHS = {"imagenet": "efficientnet-lite0"}
TARGETS_OF_PHOTOGRAPHS = {"elpv": "elpv"}

# What the learning rate of plain fine-tuning is chosen from, by optimizer, with so many
# seeds each.
LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "adamw": (0.0003, 0.001, 0.003, 0.01),
}
TUNING_SEEDS = 2
# Others as for the small networks. A cell takes ten times as long as one of those.
_RATES_OF_PHOTOGRAPHS = {"sgd": (0.003, 0.01, 0.03)}
LEARNING_RATES_OF_PHOTOGRAPHS = {**LEARNING_RATES, **_RATES_OF_PHOTOGRAPHS}
TUNING_SEEDS_OF_PHOTOGRAPHS = 1
