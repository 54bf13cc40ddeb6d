"""Photographs of one's own: a folder for each class, `--target folder:PATH`."""

import concurrent.futures
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from dtnh_jax.finetune.data.pictures import is_readable, read_picture
from dtnh_jax.finetune.data.target import Target, published_splits

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
# Those of phones, .heic, are no format of PIL, and said to be unreadable.
_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
_NAMED = 3  # files in a note


class _Found(NamedTuple):
    """A picture."""

    split: str  # "train" if there are no splits
    class_name: str
    path: pathlib.Path


def load_folder(path: str | os.PathLike[str]) -> Target:
    """Opens a folder of pictures, in either of two layouts.

    A folder for each class, with pictures of any size in it or in folders within it; or
    folders `train` and `test`, `val` or both, each with a folder for every class. Every
    picture is decoded once, to find those that are damaged: they are left out, as are
    files that are no pictures by their suffix, and `Target.notes` says how many.

    Args:
      path: of the folder; `~` is the user's home.

    Returns:
      The target. Classes are in the order of their names, pictures in that of theirs.

    Raises:
      ValueError: the folder has neither layout, has fewer than two classes, or a class
        has no picture, in one of the splits too.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"`folder:{path}` must name a folder, and there is none.")
    found, strangers = _find(root)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        readable = list(pool.map(is_readable, [picture.path for picture in found]))
    good = [picture for picture, is_good in zip(found, readable) if is_good]
    broken = [picture.path for picture, is_good in zip(found, readable) if not is_good]
    names = _class_names(root, found, good)
    labels = np.array([names.index(picture.class_name) for picture in good])
    splits, notes = published_splits(
        *(
            np.array([i for i, x in enumerate(good) if x.split == split], int)
            for split in ("train", "validation", "test")
        )
    )

    def read(index: int) -> dict[str, Any]:
        picture = read_picture(good[index].path)
        return {"image": picture, "label": int(labels[index])}

    return Target(
        name=f"folder:{path}",
        licence="pictures of your own: what you may do with them, you know",
        class_names=names,
        examples=grain.MapDataset.range(len(good)).map(read),
        labels=labels,
        splits=splits,
        notes=(
            *_left_out(root, broken, "can not be read"),
            *_left_out(root, strangers, "are no pictures"),
            *notes,
        ),
    )


def _find(root: pathlib.Path) -> tuple[list[_Found], list[pathlib.Path]]:
    """Returns pictures with split and class, and other files."""
    folders = _folders(root)
    is_split = [folder.name.lower() in _SPLITS for folder in folders]
    has_train = any(_SPLITS.get(folder.name.lower()) == "train" for folder in folders)
    if folders and all(is_split) and not has_train:
        raise ValueError(
            f"{root} has {_list(folder.name for folder in folders)}, but no folder "
            "`train`."
        )
    if not has_train:
        return _find_classes(root, "train")
    if not all(is_split):
        others = [folder.name for folder, known in zip(folders, is_split) if not known]
        raise ValueError(
            f"{root} mixes two layouts: beside a folder for training it has "
            f"{_list(others)}. Either all its folders are classes, or they are "
            "`train`, `val` and `test`."
        )
    _refuse_pictures(root)
    found, strangers, seen = [], [], {}
    for folder in folders:
        split = _SPLITS[folder.name.lower()]
        if split in seen:
            raise ValueError(
                f"{root} has two folders for {split}: {seen[split]}, {folder.name}."
            )
        seen[split] = folder.name
        pictures, others = _find_classes(folder, split)
        found += pictures
        strangers += others
    return found, strangers


def _find_classes(
    folder: pathlib.Path, split: str
) -> tuple[list[_Found], list[pathlib.Path]]:
    """Returns what the folders of classes hold, at any depth."""
    _refuse_pictures(folder)
    classes = _folders(folder)
    if len(classes) < 2:
        raise ValueError(
            f"{folder} must have a folder for each of at least 2 classes, got "
            f"{_list(name.name for name in classes) or 'none'}."
        )
    found, strangers = [], []
    for class_folder in classes:
        files = _files(class_folder)
        pictures = [file for file in files if file.suffix.lower() in _SUFFIXES]
        if not pictures:
            raise ValueError(f"Class {class_folder} is empty: it holds no picture.")
        found += [_Found(split, class_folder.name, file) for file in pictures]
        strangers += [file for file in files if file.suffix.lower() not in _SUFFIXES]
    return found, strangers


def _class_names(
    root: pathlib.Path, found: Sequence[_Found], good: Sequence[_Found]
) -> tuple[str, ...]:
    """Returns the names of the classes, all of which have pictures in every split."""
    names = sorted({picture.class_name for picture in found})
    for split in sorted({picture.split for picture in found}):
        present = {picture.class_name for picture in found if picture.split == split}
        whole = {picture.class_name for picture in good if picture.split == split}
        if missing := [name for name in names if name not in present]:
            raise ValueError(
                f"{root} has no folder for {_list(missing)} in its split for {split}, "
                "but in another: every class must be in each."
            )
        if empty := [name for name in names if name not in whole]:
            raise ValueError(
                f"{root} has no picture that can be read of {_list(empty)} for {split}."
            )
    return tuple(names)


def _refuse_pictures(folder: pathlib.Path) -> None:
    """Raises if pictures are where folders should be."""
    loose = [
        entry.name
        for entry in sorted(folder.iterdir())
        if entry.suffix.lower() in _SUFFIXES and entry.is_file()
    ]
    if loose:
        beside = "beside its folders" if _folders(folder) else "and no folders"
        raise ValueError(
            f"{folder} has pictures {beside}, such as {loose[0]}: which class are they "
            "of? Put each into the folder of its class."
        )


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(x for x in folder.iterdir() if x.is_dir() and x.name[0] != ".")


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns files at any depth, without those that are hidden."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part[0] == "." for part in path.relative_to(folder).parts)
    )


def _left_out(
    root: pathlib.Path, paths: Sequence[pathlib.Path], why: str
) -> tuple[str, ...]:
    """Returns one sentence about files, or none if there are none."""
    if not paths:
        return ()
    shown = [str(path.relative_to(root)) for path in paths[:_NAMED]]
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return (f"{len(paths)} files {why} and are left out: {_list(shown)}{more}.",)


def _list(names: Any) -> str:
    return ", ".join(names)
