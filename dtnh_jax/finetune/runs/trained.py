"""Fine-tuned weights in the run folder: one file for every method and seed.

weights/METHOD-seedN.safetensors, with tensors called as linen does and, as its
metadata, all that is needed to use them.
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
    """What a file of fine-tuned weights says about itself; all but text as JSON."""

    source: str  # as `--source` takes it
    target: str
    method: str
    strength: float
    seed: int
    image_size: int
    dtype: str
    class_names: list[str]
    # In pictures of more than 8 bits, see `pictures.white_of`; older files do not say.
    white: dict[str, float] = {}  # noqa: RUF012


class Trained(NamedTuple):
    """A fine-tuned network."""

    facts: Facts
    source: Source
    variables: Variables


def path_of(run: pathlib.Path, method: str, seed: int) -> pathlib.Path:
    """Where a run folder has the weights of a method and a seed."""
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
    """Writes the weights of a network that is trained.

    All processes have to call it; the first one writes.
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
    """What of a state the network itself needs, with adapters added to its matrices."""
    params = network_params(params, source_params)
    params = {key: x for key, x in params.items() if key != "source_head"}
    return {"params": params, "batch_stats": batch_stats}


def write(path: pathlib.Path, variables: Variables, facts: Facts) -> None:
    """Writes weights with linen's names, whole or not at all.

    Raises:
      OSError: the disk is full, or the like.
    """
    flat: Any = flatten_dict(variables)
    tensors = {linen_name(name): np.asarray(leaf) for name, leaf in flat.items()}
    write_tensors(path, tensors, facts)


def write_tensors(
    path: pathlib.Path, tensors: dict[str, np.ndarray], facts: Facts
) -> None:
    """Writes named tensors; the format knows neither strides nor what is not text."""
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    metadata = {
        key: printable(value) if isinstance(value, str) else json.dumps(value)
        for key, value in facts._asdict().items()
    }
    files.make_folder(path.parent)
    files.write(path, safetensors.numpy.save(tensors, metadata))


def load(path: pathlib.Path) -> Trained:
    """Reads weights that `write` wrote.

    Raises:
      ValueError: the file is damaged, or somebody else's; or its source is not known
        here.
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
            f"{path} does not say how it was made: it is no file that `dtnh` kept."
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
    """Which weights of a run are meant, and the method that they are of.

    Args:
      run: a run folder.
      method: None takes the first that resolves conflicts, else the first of all.
      seed: from 0.

    Raises:
      ValueError: it is no run folder, or has no such weights; it names those there are.
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
            f"{run} has no weights of {chosen}, seed {seed}; there are: "
            f"{', '.join(there) or 'none, because nothing is complete or kept'}."
        )
    return path, chosen
