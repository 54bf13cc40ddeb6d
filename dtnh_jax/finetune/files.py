"""Writes JSON and figures atomically; see `_files.replace`."""

import io
import json
import pathlib
import warnings
from typing import Any

from dtnh_jax import _files

write = _files.replace
make_folder = _files.make_folder


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON; raises ValueError for numbers that are not finite."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_figure(path: pathlib.Path, figure: Any) -> None:
    """Writes a figure in the format of the suffix.

    Characters that no installed font has are drawn as boxes, without warnings.
    """
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(drawn, format=path.suffix[1:])
    write(path, drawn.getvalue())
