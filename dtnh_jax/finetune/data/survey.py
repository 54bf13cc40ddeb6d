"""A look at every picture of a set, before any is used: which to leave out, and why."""

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
    """What is found out about pictures in an order."""

    good: list[int]  # the numbers of those that can be read
    white: dict[str, float]  # of these, for `read_picture`
    digest: str  # of their names and files
    notes: tuple[str, ...]  # which are left out, and what is taken for white


def survey(
    files: Iterable[str | os.PathLike[str] | bytes],
    names: Sequence[str],
    known: Mapping[str, float] | None = None,
    what: str = "files",
) -> Survey:
    """Looks at pictures, in as many threads as there are cores.

    Args:
      files: paths or contents.
      names: of the files, for notes; no two are the same.
      known: what is white, by kind of numbers, because a network was trained so.
      what: they are called in notes.
    """
    looks, waiting = [], iter(files)
    with quiet(), concurrent.futures.ThreadPoolExecutor() as pool:
        # Some at a time: a pool would read all contents before it looked at the first.
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
    """Returns a sentence for each reason to leave out the files of those names."""
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
                f"{max(ours):g}: {number:g} is taken for white."
            )
    return sentences
