"""Searches folders for pictures; skips broken links, other files and our own output."""

import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

# PIL can not read .heic, the format of phones; such files are reported as unreadable.
_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
# Reasons to leave out files and folders, as `survey.left_out` words them.
STRANGE, LOST = "are no pictures", "are links to nothing"
SHUT, AGAIN = "can not be opened", "are links to folders that are read already"
OURS = "hold results or caches"
OF_FOLDERS = (SHUT, AGAIN, OURS)


class Tree(NamedTuple):
    """A folder that is searched, with the files and folders that are left out."""

    root: pathlib.Path
    outputs: tuple[pathlib.Path, ...]  # folders for results, which are not classes
    left: dict[str, list[pathlib.Path]]  # by reason

    def leave(self, why: str, path: pathlib.Path) -> None:
        """Records that a file or a folder is left out."""
        self.left.setdefault(why, []).append(path)


def walk(
    tree: Tree, folder: pathlib.Path, seen: set[tuple[int, int]]
) -> Iterator[tuple[pathlib.Path, str]]:
    """Yields files at any depth with the reason to leave them out, "" for pictures.

    Args:
      tree: the tree that is searched.
      folder: the folder to start from.
      seen: keys of folders that are already read, including `folder`.
    """
    try:
        paths = listed(folder)
    except OSError:
        yield folder, SHUT
        return
    for path in paths:
        why = what_is_wrong(tree, path)
        if why or not os.path.isdir(path):
            yield path, why
        elif (key := key_of(path)) in seen:
            yield path, AGAIN
        else:
            seen.add(key)
            yield from walk(tree, path, seen)


def what_is_wrong(tree: Tree, path: pathlib.Path) -> str:
    """Returns the reason to leave out a file or a folder, or ""."""
    if os.path.isdir(path):
        return OURS if _is_output(tree, path) else ""
    if not os.path.exists(path):
        return LOST
    is_picture = os.path.isfile(path) and path.suffix.lower() in _SUFFIXES
    return "" if is_picture else STRANGE


def _is_output(tree: Tree, folder: pathlib.Path) -> bool:
    """Returns whether a folder holds a run, an export or a cache."""
    if any(os.path.exists(x) and os.path.samefile(x, folder) for x in tree.outputs):
        return True

    def has(*names: str) -> bool:
        return all(os.path.isfile(folder / name) for name in names)

    return (
        has("machine.json")  # a run writes this file first
        or has("config.json", "cells.jsonl")
        or has("model.safetensors", "README.md")
        or has("CACHEDIR.TAG")
    )


def is_ours_alone(tree: Tree, folder: pathlib.Path) -> bool:
    """Returns whether a folder, such as `runs`, only has our output folders."""
    has_ours = False
    for _, why in walk(tree, folder, above(tree, folder)):
        if not why:
            return False
        has_ours |= why == OURS
    return has_ours


def above(tree: Tree, folder: pathlib.Path) -> set[tuple[int, int]]:
    """Returns the keys of a folder and of its parents within the tree."""
    real, within = tree.root.resolve(), [folder, *folder.parents]
    within = within[: within.index(tree.root)]
    return {key_of(x) for x in (*within, real, *real.parents)}


def key_of(folder: pathlib.Path) -> tuple[int, int]:
    """Returns a folder's identity, which does not depend on its name."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def listed(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the visible entries of a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".")
