"""One cell of the study: a pair, an optimizer and a regularizer, all methods."""

import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special

from dtnh_jax import smooth_accuracy
from dtnh_jax.linen import capture_features
from dtnh_jax.studies.trust import catalogue, measure, tasks
from dtnh_jax.studies.trust.catalogue import FOLDS, METHODS, OF_PLAIN, PAIRS
from dtnh_jax.studies.trust.networks import NETWORKS
from dtnh_jax.studies.trust.training import Data, make_trainer, train


class Cell(NamedTuple):
    """The setting of one file of results."""

    pair: str
    optimizer: str
    regularizer: str | None  # None for the methods that use none

    @property
    def file(self) -> str:
        """The name of the cell's file."""
        name = "-".join([*self[:2], self.regularizer or "alone"])
        kept = [c if c.isalnum() or c in "-_" else " " for c in name]
        return "_".join("".join(kept).split()) + ".json"


class Setting(NamedTuple):
    """Networks, data and measures that all methods of a pair share."""

    source: Any
    starts: Any  # variables [S ...]
    data: Data
    folds: list[list[np.ndarray]]  # rows held out, by seed and fold
    measure: Callable[[Any], measure.Axes]
    logits: Callable[[Any, Any], Any]


@functools.lru_cache(maxsize=1)
def setting(name: str, seeds: tuple[int, ...], data_dir: pathlib.Path) -> Setting:
    """Reads or creates the source, the data and the measures of a pair.

    Raises:
      ValueError: images can not be read.
    """
    pair = PAIRS[name]
    network, layers = NETWORKS[pair.network]
    source = tasks.load_source(pair.source, pair.network, data_dir)
    test, pool = tasks.split(pair, data_dir)
    _, unseen = tasks.source_images(pair.source, data_dir)
    unseen = unseen.pick(np.arange(min(tasks.UNSEEN_IMAGES, len(unseen.labels))))
    drawn = [tasks.draw(pair, pool, seed) for seed in seeds]
    steps, size = catalogue.STEPS[pair.network], catalogue.BATCH_SIZE

    def order(task, seed, fold):
        rows = np.arange(len(task.train.labels))
        if fold < FOLDS:
            rows = np.setdiff1d(rows, task.folds[fold])
        return rows[tasks.batches(len(rows), steps, size, [seed, fold])]

    def start(seed):
        head = tasks.random_variables(network, 1000 + seed)["params"]["head"]
        return {**source, "params": {**source["params"], "head": head}}

    look = jax.jit(functools.partial(capture_features(network, layers), train=False))
    inputs = [task.train.inputs() for task in drawn]
    teachers = [jax.device_get(look(source, x)[1]) for x in inputs]
    return Setting(
        source,
        jax.tree.map(lambda *x: np.stack(x), *map(start, seeds)),
        Data(
            np.stack(inputs),
            np.stack([task.train.labels for task in drawn]),
            {name: np.stack([t[name] for t in teachers]) for name in layers},
            np.stack(
                [
                    [order(task, seed, fold) for fold in range(FOLDS + 1)]
                    for task, seed in zip(drawn, seeds)
                ]
            ),
        ),
        [task.folds for task in drawn],
        measure.make_measure(network, source, test, unseen),
        measure.make_logits(network),
    )


def run(
    cell: Cell,
    seeds: tuple[int, ...],
    data_dir: pathlib.Path,
    known: dict[str, Any] | None = None,
    wanted: Collection[str] = (),
) -> dict[str, Any]:
    """Trains all networks of a cell.

    Args:
      cell: pair, optimizer and regularizer.
      seeds: seeds of training sets, heads, orders and folds.
      data_dir: folder of the sources.
      known: an earlier result, whose methods are not trained again.
      wanted: methods, or none for all.

    Returns:
      By method: `values`; each axis `[V][S]`; `right` `[V][S][folds]`, a string with 1
      for every held-out example that is classified as its label and 0 for the others,
      in the order of rows. Methods that train all folds also have `smooth` and
      `probability`, other scores of the same examples, in thousandths.
    """
    place, start = setting(cell.pair, seeds, data_dir), time.monotonic()
    known = known or {"methods": {}, "seconds": 0.0}
    found: dict[str, Any] = dict(known["methods"])
    if cell.regularizer is None and not found:
        found["plain"], states = _run_method(cell, place, "plain", [0.0])
        early = METHODS["early"].values
        found["early"] = _joined(early, [_judge(place, s, [0.0]) for s in states[:-1]])
        ways = METHODS["wise-ft"].values
        back = [_towards(states[-1], place.source, way) for way in ways]
        found["wise-ft"] = _joined(ways, [_judge(place, s, [0.0]) for s in back])
    for name in missing(cell, {"methods": found}, wanted):
        values = list(METHODS[name].values)
        found[name], _ = _run_method(cell, place, name, values)
    return {
        **cell._asdict(),
        "seeds": list(seeds),
        "examples": len(place.data.labels[0]),
        "seconds": round(known["seconds"] + time.monotonic() - start, 1),
        "methods": found,
    }


def _run_method(cell, place, name, values):
    pair = PAIRS[cell.pair]
    network, layers = NETWORKS[pair.network]
    trainer = make_trainer(
        network,
        layers,
        cell.regularizer,
        name,
        cell.optimizer,
        catalogue.LEARNING_RATES[cell.optimizer],
        catalogue.STEPS[pair.network],
    )
    has_all = name == "plain" or METHODS[name].all_folds
    kept = [*range(FOLDS if has_all else 1), FOLDS]
    order = place.data.order[:, kept]
    if name in METHODS and METHODS[name].has_held_out:
        steps, size = order.shape[2:]
        held_out = [
            folds[0][tasks.batches(len(folds[0]), steps, size, [seed])]
            for seed, folds in enumerate(place.folds)
        ]
        order = np.concatenate([order[:, :1], np.stack(held_out)[:, None]], axis=-1)
    data = place.data._replace(order=order)
    parts = 10 if name == "plain" else 1
    states = train(
        trainer,
        place.starts,
        values,
        place.source["params"],
        data,
        is_mapped=pair.network == "dense",
        parts=parts,
    )
    return _judge(place, states[-1], values), states


def _judge(place: Setting, variables: Any, values: list[float]) -> dict[str, Any]:
    """Returns the axes and the held-out scores of networks `[S F V ...]`."""
    seeds, folds = jax.tree.leaves(variables)[0].shape[:2]
    judged: dict[str, Any] = {"right": []}
    if folds > 2:
        judged |= {"smooth": [], "probability": []}
    for v in range(len(values)):
        for found in judged.values():
            found.append([[] for _ in range(seeds)])
        for s, f in itertools.product(range(seeds), range(folds - 1)):
            rows = place.folds[s][f]
            one = jax.tree.map(lambda x: x[s, f, v], variables)  # noqa: B023
            logits = np.asarray(place.logits(one, place.data.images[s][rows]))
            for name, found in judged.items():
                found[v][s].append(_JUDGES[name](logits, place.data.labels[s][rows]))
    flat = jax.tree.map(lambda x: x[:, -1].reshape(-1, *x.shape[3:]), variables)
    axes = place.measure(flat)
    return {
        "values": list(values),
        **judged,
        **{
            name: np.round(x.reshape(seeds, -1).T, 4).tolist()
            for name, x in axes.items()
        },
    }


def _right(logits: np.ndarray, labels: np.ndarray) -> str:
    return "".join(map(str, (logits.argmax(axis=1) == labels).astype(int)))


def _smooth(logits: np.ndarray, labels: np.ndarray) -> list[int]:
    return _thousandths(smooth_accuracy(np.nan_to_num(logits), labels))


def _probability(logits: np.ndarray, labels: np.ndarray) -> list[int]:
    shares = special.softmax(np.nan_to_num(logits).astype(np.float64), axis=1)
    return _thousandths(shares[np.arange(len(labels)), labels])


def _thousandths(x: np.ndarray) -> list[int]:
    return np.round(1000 * x).astype(int).tolist()


_JUDGES = {"right": _right, "smooth": _smooth, "probability": _probability}


def _joined(values: tuple[float, ...], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the results of single values to one result with a row for each value."""
    names = [name for name in found[0] if name != "values"]
    joined = {name: [each[name][0] for each in found] for name in names}
    return {"values": list(values), **joined}


def _towards(variables: Any, source: Any, way: float) -> Any:
    """Interpolates parameters and statistics, except the head, towards the source."""

    def mixed(x, s):
        return (1 - way) * x + way * np.asarray(s)

    found = jax.tree.map(mixed, variables, source)
    found["params"]["head"] = variables["params"]["head"]
    return found


def missing(
    cell: Cell, found: dict[str, Any], wanted: Collection[str] = ()
) -> list[str]:
    """Returns the methods of a cell that a result does not have.

    Args:
      cell: what they belong to.
      found: the result.
      wanted: methods, or none for all. What comes with plain fine-tuning is always.
    """
    return [
        name
        for name, method in METHODS.items()
        if method.is_alone == (cell.regularizer is None)
        and name not in found["methods"]
        and (not wanted or name in wanted or name in OF_PLAIN)
    ]


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reads all results in a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
