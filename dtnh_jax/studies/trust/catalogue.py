"""The study's sources, pairs, methods and values, by name."""

from typing import NamedTuple


class Source(NamedTuple):
    """How a network is pretrained, on images of which a tenth is held out.

    With `distortion` there is no pretraining: every parameter `p` of the initialization
    becomes `distortion * p` plus normal noise of standard deviation 0.1.
    """

    images: str  # one of `images.LOADERS`
    examples: int  # the largest number of images, held-out ones included
    is_shuffled: bool = False  # whether the labels are permuted at random
    distortion: float | None = None


SOURCES = {
    "fashion": Source("fashion-train", 22_000),
    "mnist": Source("mnist", 5_000),
    # Labels are random, so the network can only memorize: take few enough for that.
    "shuffled": Source("fashion-train", 2_200, is_shuffled=True),
    "absurd": Source("fashion-train", 2_200, distortion=3.0),
}


class Pair(NamedTuple):
    """A source network and its target task."""

    network: str  # "dense" or "resnet"
    source: str  # one of `SOURCES`
    images: str  # one of `images.LOADERS`
    per_class: int  # training images of each class
    noise: float = 0.0  # share of the training images with another class's label
    # Whether the pair was kept for the end: run once, with other seeds, after every
    # choice was made.
    is_final: bool = False

    @property
    def name(self) -> str:
        """The pair's name in tables and in the names of files."""
        target = {"fashion-test": "fashion"}.get(self.images, self.images)
        noise = f"-{self.noise:.0%} wrong" if self.noise else ""
        return f"{self.network}: {self.source} > {target}-{self.per_class}{noise}"


PAIRS = {
    pair.name: pair
    for pair in [
        Pair("dense", "fashion", "fashion-test", 20, 0.4),
        Pair("dense", "fashion", "fashion-test", 10),
        Pair("dense", "mnist", "digits", 20, 0.2),
        Pair("dense", "fashion", "digits", 20),
        Pair("dense", "shuffled", "digits", 5),
        Pair("dense", "shuffled", "fashion-test", 20, 0.4),
        Pair("dense", "fashion", "fashion-test", 50, 0.2),
        Pair("dense", "fashion", "fashion-test", 5),
        Pair("dense", "mnist", "digits", 10, 0.4),
        Pair("dense", "fashion", "mnist", 20),
        Pair("dense", "shuffled", "mnist", 10),
        Pair("dense", "fashion", "fashion-test", 10, 0.4),
        Pair("dense", "fashion", "fashion-test", 30),
        Pair("dense", "mnist", "digits", 20, 0.4),
        Pair("dense", "mnist", "digits", 5),
        Pair("dense", "mnist", "fashion-test", 10),
        Pair("dense", "shuffled", "digits", 10, 0.2),
        Pair("dense", "absurd", "fashion-test", 10, 0.2),
        Pair("dense", "fashion", "fashion-test", 30, 0.4),
        Pair("dense", "fashion", "fashion-test", 20),
        Pair("dense", "fashion", "digits", 10),
        Pair("dense", "mnist", "digits", 10, 0.2),
        Pair("dense", "mnist", "fashion-test", 20, 0.2),
        Pair("dense", "shuffled", "fashion-test", 10, 0.2),
        Pair("dense", "absurd", "mnist", 10, 0.2),
        Pair("dense", "fashion", "fashion-test", 20, 0.2, is_final=True),
        Pair("dense", "fashion", "fashion-test", 15, is_final=True),
        Pair("dense", "fashion", "mnist", 10, 0.2, is_final=True),
        Pair("dense", "mnist", "digits", 30, 0.4, is_final=True),
        Pair("dense", "mnist", "fashion-test", 20, is_final=True),
        Pair("dense", "shuffled", "digits", 20, 0.4, is_final=True),
        Pair("dense", "absurd", "digits", 10, 0.2, is_final=True),
        Pair("resnet", "fashion", "fashion-test", 10, 0.2, is_final=True),
        Pair("resnet", "fashion", "mnist", 10, is_final=True),
    ]
}

# The usual strength of each regularizer: 0.01 for 1/2 ||w - w0||^2 over all parameters,
# as in the Transfer-Learning-Library; 0.001 for 1/2 the sum of squares of two layers,
# averaged over the batch.
REGULARIZERS = {"l2_sp": 0.01, "feature_map": 0.001}
# Common values, not tuned for plain fine-tuning. SGD has momentum 0.9; both rates fall
# to zero along a cosine.
LEARNING_RATES = {"sgd": 0.05, "adamw": 1e-3}
STEPS = {"dense": 200, "resnet": 150}
BATCH_SIZE = 32
FOLDS = 4

STRENGTHS = (1.0, 10.0, 100.0, 1e3, 1e4)


class Method(NamedTuple):
    """A way to use the regularizer, and the hyperparameter values that are tried."""

    values: tuple[float, ...]
    # Whether it uses no regularizer of a cell.
    is_alone: bool = False
    all_folds: bool = False  # whether all folds are trained, or only the first
    # Whether it never trains on the first fold, and takes a gradient on it every step.
    has_held_out: bool = False


METHODS = {
    "sum": Method(STRENGTHS),
    # The recipe uses 0.5 alone; 1 shows why.
    "trust": Method((0.5, 1.0), all_folds=True),
    "one-pass": Method((1.0,), has_held_out=True),
    "dtnh": Method(STRENGTHS[:3]),
    "bloop": Method(STRENGTHS[:3]),
    "pcgrad": Method(STRENGTHS[:3]),
    "metabalance": Method((0.2, 0.4, 0.6, 0.8, 1.0)),
    "pcd": Method((0.02, 0.1, 0.3, 0.6)),
    "cautious": Method(STRENGTHS[:4]),
    "spd": Method((0.03, 0.1, 0.3, 1.0), is_alone=True),
    "ftp": Method((0.0, 1.0), is_alone=True),
    # Shares of the way back to the source, and of training.
    "wise-ft": Method((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), is_alone=True),
    "early": Method((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), is_alone=True),
}
# Those whose values all come from the one training of plain fine-tuning.
OF_PLAIN = ("wise-ft", "early")
