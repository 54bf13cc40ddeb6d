"""Reads every picture of a set before use, to leave out unreadable ones."""

import concurrent.futures
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dtnh_jax.finetune.data.pictures import Look, look, quiet, white_of
from dtnh_jax.finetune.wording import some

_AT_ONCE = 256
_FULL = 65535.0  # white of integers that fill their 16 bits


class Survey(NamedTuple):
    """The result of `survey`."""

    good: list[int]  # indices of the pictures that can be read
    white: dict[str, float]  # their white, for `read_picture`
    digest: str  # of their names and files
    notes: tuple[str, ...]  # sentences on pictures left out and on the white


def survey(
    files: Iterable[str | os.PathLike[str] | bytes],
    names: Sequence[str],
    known: Mapping[str, float] | None = None,
    what: str = "files",
) -> Survey:
    """Reads pictures, in as many threads as there are cores.

    Args:
      files: paths or contents.
      names: unique names of the files, for notes.
      known: the white of the training pictures by kind of numbers, if there were any.
      what: word for the pictures in notes.
    """
    looks, waiting = [], iter(files)
    with quiet(), concurrent.futures.ThreadPoolExecutor() as pool:
        # In groups, because a pool would read all contents before the first look.
        while some_files := list(itertools.islice(waiting, _AT_ONCE)):
            looks += pool.map(look, some_files)
    known = known or {}
    broken: dict[str, list[str]] = {}
    good = []
    for number, (name, each) in enumerate(zip(names, looks)):
        top = known.get(each.kind, math.inf)
        brighter = f"have numbers above {top:g}, which was white in training,"
        if problem := each.problem or brighter * (each.highest > top):
            broken.setdefault(problem, []).append(name)
        else:
            good.append(number)
    kept = [looks[i] for i in good]
    white = {**white_of(kept), **known}
    listed = json.dumps([[names[i], looks[i].digest] for i in good])
    digest = hashlib.sha256(listed.encode()).hexdigest()
    new = {kind: number for kind, number in white.items() if kind not in known}
    notes = (*left_out(broken, what), *_on_white(kept, new))
    return Survey(good, white, digest, notes)


def left_out(broken: Mapping[str, Sequence[str]], what: str) -> list[str]:
    """Returns a sentence for each reason, with the names that are left out."""
    return [
        f"{len(names)} {what} {why} and are left out: {some(names)}."
        for why, names in broken.items()
        if names
    ]


def _on_white(kept: Sequence[Look], white: Mapping[str, float]) -> list[str]:
    sentences = []
    for kind, number in white.items():
        ours = [each.highest for each in kept if each.kind == kind]
        if (kind, number) != ("integers", _FULL):
            sentences.append(
                f"{len(ours)} pictures hold {kind} of more than 8 bits up to "
                f"{max(ours):g}: {number:g} is used as white."
            )
    return sentences
