"""Shards arrays over the devices of all processes.

Parameters, optimizer state and pretrained weights are sharded over the axis `fsdp`,
batches over both axes. JAX adds the communication. A single device is a mesh of one.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
    """Arranges devices in a mesh with the axes `data` and `fsdp`.

    Args:
      sizes: sizes of the axes; a missing one is 1. By default one device, or with
        several processes all their devices along `data`.

    Returns:
      A mesh with automatic axes.

    Raises:
      ValueError: there are too few devices, or the mesh leaves out a process's devices.

    Example:
      >>> dict(make_mesh({"fsdp": 1}).shape)
      {'data': 1, 'fsdp': 1}
    """
    devices = jax.devices()
    several = jax.process_count() > 1
    if not sizes:
        sizes = {"data": len(devices) if several else 1}
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    count = math.prod(shape)
    if count > len(devices) or (several and count < len(devices)):
        bound = "exactly" if several else "at most"
        raise ValueError(
            f"`--mesh` must take {bound} {len(devices)} devices, all that JAX sees "
            f"({devices[0].platform}), got {shown(dict(zip(AXES, shape)))}."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, devices=devices[:count], axis_types=kinds)


def shown(sizes: Mapping[str, int]) -> str:
    """Formats the sizes of a mesh for `--mesh`."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def sharding_of(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns an array's sharding: `fsdp` splits the longest axis that it divides.

    Only the shape matters, so a parameter, its moments and its pretrained value have
    the same sharding. An array that can not be split is replicated.
    """
    parts = mesh.shape["fsdp"]
    fitting = [axis for axis, n in enumerate(shape) if n and n % parts == 0]
    if parts == 1 or not fitting:
        return NamedSharding(mesh, P())
    longest = max(fitting, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, P(*[None] * longest, "fsdp"))


def constrain(mesh: Mesh, tree: Any) -> Any:
    """Constrains a traced tree to the sharding of `place`."""
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, sharding_of(mesh, x.shape)), tree
    )


def whole(mesh: Mesh, tree: Any) -> Any:
    """Replicates a traced tree, so that every process can read it."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def place(mesh: Mesh, tree: Any) -> Any:
    """Shards a tree of arrays that every process has."""

    def put(x):
        x = np.asarray(x)
        sharding = sharding_of(mesh, x.shape)
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

    return jax.tree.map(put, tree)


def place_rows(mesh: Mesh, batch: Any) -> Any:
    """Shards a batch that every process has; the mesh divides its length."""
    rows = NamedSharding(mesh, P(AXES))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, rows, lambda at: x[at]), batch
    )


def batches(mesh: Mesh, blocks_of: Callable[[int], Any], batch_size: int) -> Any:
    """Reads the rows of every batch that this process's devices train on.

    A batch is divided into a block for each device. For any number of devices and
    processes, the blocks together are the batch of a single device, row by row.

    Args:
      mesh: mesh over which the batch is sharded.
      blocks_of: maps the size of a block to an endless `grain.MapDataset` of blocks.
      batch_size: rows of a batch, a multiple of the number of devices.

    Returns:
      A dataset whose element at `step` is that step's batch, of arrays on the mesh.
    """
    import grain  # imported here because only pictures need it

    rows = NamedSharding(mesh, P(AXES))
    places = rows.addressable_devices_indices_map((mesh.size,)).values()
    own = sorted({at[0].start or 0 for at in places if at is not None})
    blocks = blocks_of(batch_size // mesh.size)

    def joined(*parts):
        local = parts[0] if len(parts) == 1 else np.concatenate(parts)
        shape = (batch_size, *local.shape[1:])
        return jax.make_array_from_process_local_data(rows, local, shape)

    def read(step: int) -> Any:
        found = [blocks[step * mesh.size + block] for block in own]
        return jax.tree.map(joined, *found)

    return grain.MapDataset.range(sys.maxsize // mesh.size).map(read)
