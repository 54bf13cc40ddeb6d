"""The model, the texts and the compiled programs that all cells of a run share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dtnh_jax.finetune.training import meshes
from dtnh_jax.lm import model_files, networks, opening, optimizers, splits, step, texts
from dtnh_jax.lm.architecture import Adapters
from dtnh_jax.lm.config import Config
from dtnh_jax.lm.evaluation import Evaluator
from dtnh_jax.lm.methods import METHODS
from dtnh_jax.lm.networks import Network, Tree
from dtnh_jax.lm.programs import Programs


class Experiment(NamedTuple):
    """A prepared run."""

    config: Config
    model: model_files.ModelFile
    network: Network
    base: Tree  # on the devices of the mesh
    sources: dict[str, texts.Source]  # "target" and "kept"
    splits: splits.Splits
    mesh: Mesh
    evaluate: Evaluator
    trainers: dict[str, tuple[step.Trainer, Programs]]  # by method
    held_out: Programs  # of `step.held_out_gradient`


def prepare(config: Config, model: model_files.ModelFile | None = None) -> Experiment:
    """Reads the model and the texts.

    Args:
      config: the options.
      model: an open model; by default the model of the options.

    Raises:
      ValueError: the model or a text can not be used; the message has one line.
    """
    mesh = meshes.make_mesh(config.mesh)
    model = opening.open_model(config.model) if model is None else model
    if config.context > model.shape.context:
        raise ValueError(
            f"`--context` must be at most {model.shape.context}, what {model.name} was "
            f"trained for, got {config.context}."
        )
    sources = {
        "target": texts.open_source(config.target),
        "kept": texts.open_source(config.kept),
    }
    rows = splits.make_splits(
        model, sources["target"], sources["kept"], config.context, config.test_rows
    )
    network = networks.read_network(
        model,
        dtype=jnp.dtype(config.dtype),
        adapters=Adapters(config.rank, tuple(config.adapt)),
        remat=config.remat,
    )
    base = meshes.place(mesh, network.base)
    network = network._replace(base=None)
    batch = config.batch_size // config.accumulate
    return Experiment(
        config,
        model,
        network,
        base,
        sources,
        rows,
        mesh,
        Evaluator(network, base, batch, mesh),
        {name: _trainer(config, network, mesh, name) for name in config.methods},
        Programs(step.held_out_gradient(network, config.accumulate, mesh)),
    )


def _trainer(
    config: Config, network: Network, mesh: Mesh, name: str
) -> tuple[step.Trainer, Programs]:
    schedule = optimizers.make_schedule(
        config.schedule, config.learning_rate, config.warmup, config.steps
    )
    trainer = step.make_trainer(
        METHODS[name],
        network,
        optimizers.make_optimizer(METHODS[name], schedule),
        optimizers.with_strength,
        accumulate=config.accumulate,
        mesh=mesh,
    )
    return trainer, Programs(trainer.step, donate=(0,))


def initial_adapters(experiment: Experiment, seed: int) -> Tree:
    """Returns the initial adapters of a seed, the same for all methods."""
    drawn = networks.initial_adapters(experiment.network, jax.random.key(seed))
    return meshes.place(experiment.mesh, drawn)


def described(experiment: Experiment) -> dict[str, Any]:
    """Returns a description of model and texts, for the results."""
    rows = experiment.splits._asdict()
    return {
        "model": {
            "name": experiment.model.name,
            "licence": experiment.model.licence,
            **experiment.model.shape._asdict(),
        },
        "texts": {
            role: {"name": source.name, "licence": source.licence}
            for role, source in experiment.sources.items()
        },
        "row_counts": {name: len(x.tokens) for name, x in rows.items()},
        "tokens": {name: int(x.weights.sum()) for name, x in rows.items()},
        "trained_parameters": sum(
            x.size for x in jax.tree.leaves(experiment.network.adapters)
        ),
    }
