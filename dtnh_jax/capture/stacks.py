"""Splits stacked features of a scan or `vmap` over layers into features of each layer.

A scan stacks the output of a layer along an axis that the layer does not know. So each
output is sown with a mark: an array with as many axes, all of length 0. Outside the
scan, the axes of the mark whose length is not 0 are those of layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SUFFIX = "#axes"  # end of a mark's name; no attribute of a module can have it


def marks(tree: Any) -> Any:
    """Returns a mark for each array, inside the scan."""
    return jax.tree.map(
        lambda x: jnp.zeros((0,) * x.ndim, bool) if hasattr(x, "ndim") else x, tree
    )


def unstacked(value: Any, mark: Any) -> dict[str, Any]:
    """Splits features along the axes of layers.

    Args:
      value: a tree of arrays.
      mark: a tree of marks like `value`; any other value means that nothing is stacked.

    Returns:
      The features of each layer by its index, such as `"3"`, or `"1/3"` in nested
      scans. Features that are not stacked are at `""`.
    """
    leaves, treedef = jax.tree.flatten(value)
    if jax.tree.structure(mark) != treedef:
        return {"": value}
    shapes = [getattr(x, "shape", ()) for x in jax.tree.leaves(mark)]
    lengths = {tuple(n for n in shape if n) for shape in shapes}
    if len(lengths) != 1:
        return {"": value}
    columns = [_apart(x, shape) for x, shape in zip(leaves, shapes)]
    indices = ["/".join(map(str, index)) for index in np.ndindex(*lengths.pop())]
    return {
        index: jax.tree.unflatten(treedef, row)
        for index, row in zip(indices, zip(*columns))
    }


def _apart(x: Any, mark: tuple[int, ...]) -> list[Any]:
    """Splits an array along the axes of layers, the first axis first."""
    found = [x]
    axes = [axis for axis, length in enumerate(mark) if length]
    for done, axis in enumerate(axes):
        # The derivative of a split is one concatenation; that of slices a sum of pads.
        cut = [jax.lax.split(y, [1] * mark[axis], axis - done) for y in found]
        found = [jnp.squeeze(y, axis - done) for parts in cut for y in parts]
    return found
