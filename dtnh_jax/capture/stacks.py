"""Features that came out of a scan or `vmap` over layers, as one array, taken apart.

What a layer inside returns has the shape that the layer knows, and is stacked along
some axis on its way out. A mark goes beside it: an array of as many axes, all of length
0. Outside, the axes of the mark that have a length are those of layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SUFFIX = "#axes"  # of the name of a mark; no attribute of a module has it


def marks(tree: Any) -> Any:
    """Returns a mark for each array, inside of the scan."""
    return jax.tree.map(
        lambda x: jnp.zeros((0,) * x.ndim, bool) if hasattr(x, "ndim") else x, tree
    )


def unstacked(value: Any, mark: Any) -> dict[str, Any]:
    """Takes features apart where they are stacked.

    Args:
      value: a tree of arrays.
      mark: a tree like it, of marks; anything else is the mark of no stack.

    Returns:
      The features of each layer by its index, such as `"3"`, or `"1/3"` in nested
      scans. Of what is not stacked, and has no index, the only one is at `""`.
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
    """Cuts an array along the axes of layers, the first one first."""
    found = [x]
    axes = [axis for axis, length in enumerate(mark) if length]
    for done, axis in enumerate(axes):
        # Of one split the derivative is one concatenation; of slices, a sum of pads.
        cut = [jax.lax.split(y, [1] * mark[axis], axis - done) for y in found]
        found = [jnp.squeeze(y, axis - done) for parts in cut for y in parts]
    return found
