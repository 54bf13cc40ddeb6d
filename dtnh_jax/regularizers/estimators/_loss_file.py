"""The file of `channel_attention`: a line that identifies it, and one for each chunk.

Every function accepts the path None, which stands for no file.
"""

import json
import math
import os
import pathlib
from typing import Any, NamedTuple

from dtnh_jax import _files


class Record(NamedTuple):
    """The content of a file."""

    rises: list[float]  # of the first channels, counted over all layers
    baseline: float | None  # loss with all channels; None if the file has none
    size: int  # bytes of the complete lines


def read(path: str | os.PathLike | None, digest: str, total: int) -> Record:
    """Reads the losses of an earlier call, without an incomplete last line.

    Raises:
      ValueError: the file has no such lines, or another digest.
    """
    nothing = Record([], None, 0)
    if path is None or not os.path.exists(path):
        return nothing
    content = pathlib.Path(path).read_bytes()
    start = _first_line(digest, 0.0).split(b"0.0")[0]
    if b"\n" not in content and content[: len(start)] == start[: len(content)]:
        return nothing  # an empty file, or an incomplete first line
    *lines, cut_off = content.split(b"\n")
    rises = []
    try:
        header, *chunks = [json.loads(line) for line in lines]
        is_ours = header["fingerprint"] == digest
        baseline = float(header["baseline"])
        for line in chunks:
            is_ours &= line["first"] == len(rises)
            rises.extend(float(x) for x in line["rises"])
        is_ours &= len(rises) <= total
    except (ValueError, TypeError, KeyError):
        is_ours, baseline = False, None
    if not is_ours:
        raise ValueError(
            "`path` must be a new file, or the file of the same layers and batches, "
            f"got {os.fspath(path)!r}, which belongs to others."
        )
    return Record(rises, baseline, len(content) - len(cut_off))


def begin(
    path: str | os.PathLike | None, record: Record, digest: str, baseline: float
) -> None:
    """Prepares a file for appending lines.

    Raises:
      ValueError: the file belongs to a network with another loss.
    """
    if path is None:
        return
    if record.baseline is None:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        _files.replace(path, _first_line(digest, baseline))
        return
    # Other chunk sizes round differently.
    if not math.isclose(record.baseline, baseline, rel_tol=1e-5, abs_tol=1e-6):
        raise ValueError(
            f"`path` must be a new file, or the file of the same network, got "
            f"{os.fspath(path)!r}, where the loss with all channels is "
            f"{record.baseline:.6g} instead of {baseline:.6g}."
        )
    os.truncate(path, record.size)


def _first_line(digest: str, baseline: float) -> bytes:
    return json.dumps({"fingerprint": digest, "baseline": baseline}).encode() + b"\n"


def append(path: str | os.PathLike | None, line: dict[str, Any]) -> None:
    """Appends a line for one chunk."""
    if path is not None:
        with open(path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
