"""Measures learning and forgetting, on texts that were not trained on."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dtnh_jax.finetune.training import meshes
from dtnh_jax.lm import objectives
from dtnh_jax.lm.networks import Network, Tree
from dtnh_jax.lm.packing import Rows
from dtnh_jax.lm.splits import Splits


class Evaluator:
    """Measures losses and divergences in nats per token."""

    def __init__(self, network: Network, base: Tree, batch: int, mesh: Mesh):
        self._base, self._batch, self._mesh = base, batch, mesh
        of_rows = functools.partial(objectives.measures, network)
        self._of_rows = jax.jit(lambda *args: meshes.whole(mesh, of_rows(*args)))

    def __call__(self, adapters: Tree, splits: Splits) -> dict[str, float]:
        """Returns the loss and the KL to the base model, for both kinds of text."""
        found = {}
        for name, rows in (("target", splits.test), ("kept", splits.kept)):
            sums = self._sums(adapters, rows)
            for key in ("loss", "kl"):
                found[f"{name}_{key}"] = sums[key] / sums["tokens"]
        return found

    def _sums(self, adapters: Tree, rows: Rows) -> dict[str, float]:
        parts = []
        for start in range(0, len(rows.tokens), self._batch):
            batch = rows.at(slice(start, start + self._batch))
            batch = _filled(batch, self._batch)
            batch = meshes.place_rows(self._mesh, batch)
            parts.append(self._of_rows(adapters, self._base, batch))
        parts = jax.device_get(parts)
        return {key: float(sum(part[key] for part in parts)) for key in parts[0]}


def _filled(rows: Rows, count: int) -> Rows:
    """Pads with rows of weight 0, so that all batches have one shape."""
    missing = count - len(rows.tokens)
    return Rows(*[_padded(x, missing) for x in rows])


def _padded(x: Any, missing: int) -> np.ndarray:
    return np.pad(np.asarray(x), ((0, missing), (0, 0)))
