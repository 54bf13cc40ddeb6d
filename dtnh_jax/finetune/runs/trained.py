"""Fine-tuned weights in the run folder: one file for every method and seed.

weights/METHOD-seedN.safetensors has tensors with linen's names. Its metadata has all
facts that are needed to use them.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict

from dtnh_jax.finetune import files
from dtnh_jax.finetune.methods import METHODS, Method
from dtnh_jax.finetune.runs import processes
from dtnh_jax.finetune.runs.preparation import Experiment
from dtnh_jax.finetune.training import meshes
from dtnh_jax.finetune.training.network import in_dtype, network_params
from dtnh_jax.finetune.weights.checkpoint_sources import names_in
from dtnh_jax.finetune.weights.source import Source, Variables
from dtnh_jax.finetune.weights.sources import load_source
from dtnh_jax.finetune.weights.tensor_files import read_tensors
from dtnh_jax.finetune.weights.tensor_names import linen_name, named_variables
from dtnh_jax.finetune.wording import printable


class Facts(NamedTuple):
    """The metadata of a file of fine-tuned weights; values that are no text as JSON."""

    source: str  # value of `--source`
    target: str
    method: str
    strength: float
    seed: int
    image_size: int
    dtype: str
    class_names: list[str]
    # For pictures with more than 8 bits, see `pictures.white_of`; older files lack it.
    white: dict[str, float] = {}  # noqa: RUF012


class Trained(NamedTuple):
    """A fine-tuned network."""

    facts: Facts
    source: Source
    variables: Variables


def path_of(run: pathlib.Path, method: str, seed: int) -> pathlib.Path:
    """Returns the path of the weights of a method and a seed."""
    return run / "weights" / f"{method}-seed{seed}.safetensors"


def keep(
    experiment: Experiment,
    run: pathlib.Path,
    method: Method,
    strength: float,
    seed: int,
    state: Any,
    known: Any,
) -> None:
    """Writes the weights of a trained network.

    All processes must call it; the first writes.
    """
    config = experiment.config
    tree = network_variables(state.params, state.batch_stats, known.source["params"])
    if jax.process_count() > 1:
        tree = jax.jit(lambda tree: meshes.whole(experiment.mesh, tree))(tree)
    facts = Facts(
        config.source,
        config.target,
        method.name,
        strength,
        seed,
        config.image_size,
        config.dtype,
        list(experiment.target.class_names),
        dict(experiment.target.white),
    )
    if processes.is_first():
        write(path_of(run, method.name, seed), jax.device_get(tree), facts)


def network_variables(params: Any, batch_stats: Any, source_params: Any) -> Variables:
    """Returns the network's variables, with adapters added to its matrices."""
    params = network_params(params, source_params)
    params = {key: x for key, x in params.items() if key != "source_head"}
    return {"params": params, "batch_stats": batch_stats}


def write(path: pathlib.Path, variables: Variables, facts: Facts) -> None:
    """Writes weights with linen's names, atomically.

    Raises:
      OSError: the file can not be written, for example because the disk is full.
    """
    flat: Any = flatten_dict(variables)
    tensors = {linen_name(name): np.asarray(leaf) for name, leaf in flat.items()}
    write_tensors(path, tensors, facts)


def write_tensors(
    path: pathlib.Path, tensors: dict[str, np.ndarray], facts: Facts
) -> None:
    """Writes contiguous named tensors, and metadata as text."""
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    metadata = {
        key: printable(value) if isinstance(value, str) else json.dumps(value)
        for key, value in facts._asdict().items()
    }
    files.make_folder(path.parent)
    files.write(path, safetensors.numpy.save(tensors, metadata))


def load(path: pathlib.Path) -> Trained:
    """Reads weights of `write`.

    Raises:
      ValueError: the file is damaged or not from `write`, or its source is unknown.
    """
    tensors = read_tensors(path)
    with safetensors.safe_open(path, "np") as file:
        metadata: dict[str, str] = file.metadata() or {}
    try:
        texts = ("source", "target", "method", "dtype")
        values: Any = {
            key: metadata[key] if key in texts else json.loads(metadata[key])
            for key in Facts._fields
            if key in metadata or key not in Facts._field_defaults
        }
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} has no metadata of `dtnh`: it is not a file that `dtnh` wrote."
        ) from error
    facts = Facts(**values)
    source = in_dtype(load_source(facts.source), facts.dtype)
    network = source.module(len(facts.class_names))
    name_of = names_in(tensors, facts.source.partition(":")[0])
    variables = named_variables(tensors, network, name_of, str(path))
    return Trained(facts, source, {"batch_stats": {}, **variables})


def choose(
    run: pathlib.Path, method: str | None, seed: int
) -> tuple[pathlib.Path, str]:
    """Returns the path of a run's weights, and their method.

    Args:
      run: a run folder.
      method: a method; None takes the first that resolves conflicts, else the first.
      seed: seed, from 0.

    Raises:
      ValueError: the folder is no run folder, or has no such weights; the error names
        the existing ones.
    """
    try:
        options = json.loads((run / "config.json").read_text())
        methods = [name for name in options["methods"] if name in METHODS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is no run folder: it has no config.json.") from error
    resolved = [name for name in methods if METHODS[name].plain is not None]
    chosen = method or next(iter([*resolved, *methods]), "")
    path = path_of(run, chosen, seed)
    if not path.exists():
        there = sorted(found.stem for found in (run / "weights").glob("*.safetensors"))
        raise ValueError(
            f"{run} has no weights of {chosen}, seed {seed}; it has: "
            f"{', '.join(there) or 'none, because nothing is complete or kept'}."
        )
    return path, chosen
