"""Folders of pictures as users have them: links, odd names, results among the classes.

What is not read is said, and never becomes a class.
"""

import os

import numpy as np
import pictures
import pytest
from PIL import Image

from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data import loading
from dtnh_jax.finetune.data.class_folders import load_folder
from dtnh_jax.finetune.data.pictures import UnreadableError
from dtnh_jax.finetune.data.target import contents
from dtnh_jax.finetune.runs.folder import open_folder


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes with three pictures each."""
    pictures.folders(tmp_path / "photos", ["cup", "mug"], 3)
    return tmp_path / "photos"


# Links


def test_folders_behind_links_are_read(photos, tmp_path):
    pictures.folders(tmp_path, ["elsewhere"], 4)
    (photos / "glass").symlink_to(tmp_path / "elsewhere")
    (photos / "cup" / "more").symlink_to(tmp_path / "elsewhere")
    (photos / "mug" / "one.png").symlink_to(tmp_path / "elsewhere" / "000.png")
    target = load_folder(photos)
    assert target.class_names == ("cup", "glass", "mug")
    assert np.bincount(target.labels).tolist() == [7, 4, 4]
    assert target.notes == ()


def test_links_to_nothing_are_counted(photos, tmp_path):
    for number in range(8):
        (photos / "cup" / f"gone{number}.png").symlink_to(tmp_path / "gone.png")
    (photos / "glass").symlink_to(tmp_path / "unmounted")
    target = load_folder(photos)
    assert target.class_names == ("cup", "mug")
    assert len(target.labels) == 6
    assert target.notes == (
        "9 files are links to nothing and are left out: glass, cup/gone0.png, "
        "cup/gone1.png and 6 more.",
    )


def test_links_in_a_circle_are_followed_once(photos):
    (photos / "cup" / "all").symlink_to(photos)
    (photos / "cup" / "further").mkdir()
    pictures.draw(photos / "cup" / "further" / "a.png", 9)
    (photos / "cup" / "further" / "back").symlink_to(photos / "cup")
    (photos / "everything").symlink_to(photos.parent)
    target = load_folder(photos)
    assert target.class_names == ("cup", "mug")
    assert np.bincount(target.labels).tolist() == [4, 3]
    assert target.notes == (
        "3 folders are links to folders that are read already and are left out: "
        "everything, cup/all, cup/further/back.",
    )


def test_a_class_of_links_to_nothing_says_so(photos, tmp_path):
    (photos / "glass").mkdir()
    (photos / "glass" / "a.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="no picture, but 1 that are links to nothing"):
        load_folder(photos)


def test_what_is_no_file_is_not_opened(photos):
    os.mkfifo(photos / "cup" / "a.png")
    os.mkfifo(photos / "b.png")
    (photos / "labels.csv").write_text("")
    target = load_folder(photos)
    assert len(target.labels) == 6
    assert target.notes == (
        "3 files are no pictures and are left out: b.png, labels.csv, cup/a.png.",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens everything")
def test_a_folder_that_can_not_be_opened_is_counted(photos):
    pictures.draw(photos / "cup" / "shut" / "a.png", 9)
    (photos / "cup" / "shut").chmod(0)
    target = load_folder(photos)
    (photos / "cup" / "shut").chmod(0o700)
    (note,) = target.notes
    assert note == "1 folders can not be opened and are left out: cup/shut."


# What this command writes


def written(path, *names):
    path.mkdir(parents=True)
    pictures.draw(path / "accuracy.png", 200)
    for name in names:
        (path / name).write_text("{}")


@pytest.mark.parametrize(
    "names",
    [
        ("config.json", "machine.json"),
        ("machine.json",),
        ("config.json", "cells.jsonl"),
        ("model.safetensors", "README.md"),
        ("CACHEDIR.TAG",),
    ],
)
def test_what_was_written_is_no_class(photos, names):
    written(photos / "runs" / "one", *names)
    written(photos / "two", *names)
    written(photos / "cup" / "three", *names)
    target = load_folder(photos)
    assert target.class_names == ("cup", "mug")
    assert len(target.labels) == 6
    assert target.notes == (
        "3 folders hold results or caches and are left out: runs, two, cup/three.",
    )


def test_a_run_in_the_folder_of_its_pictures(photos, monkeypatch):
    monkeypatch.chdir(photos)
    before = load_folder(".")
    open_folder(Config(target="folder:."), {})
    pictures.draw(Config(target="folder:.").folder / "accuracy.png", 9)
    after = load_folder(".")
    assert after.class_names == ("cup", "mug")
    assert contents(after) == contents(before)


def test_a_run_beside_folders_of_splits(tmp_path):
    for split in ("train", "test"):
        pictures.folders(tmp_path / split, ["a", "b"], 2)
    written(tmp_path / "runs" / "one", "config.json", "machine.json")
    assert load_folder(tmp_path).splits is not None


def test_a_folder_that_results_will_be_in_is_no_class(photos):
    (photos / "mine" / "cells").mkdir(parents=True)
    (photos / "data" / "elpv").mkdir(parents=True)
    target = load_folder(photos, [photos / "mine", photos / "data", photos / "none"])
    assert target.class_names == ("cup", "mug")


def test_a_class_may_have_a_folder_called_as_ours(photos):
    for name in ("cells", "weights", "runs"):
        pictures.draw(photos / "blood" / name / "a.png", 9)
    target = load_folder(photos)
    assert target.class_names == ("blood", "cup", "mug")
    assert target.notes == ()


# Names


NAMES = {
    "$0_to_$10": "$0_to_$10",
    "$": "$",
    "a\nb\tc": r"a\nb\tc",
    "caf\udce9": r"caf\xe9",  # in Latin 1
    "e\u0301": "\xe9",  # as a Mac writes it
    " [red]*_<b>|#": " [red]*_<b>|#",
    "猫 \U0001f408": "猫 \U0001f408",
}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_text_may_be_a_class_name(photos, name):
    (photos / "cup").rename(photos / name)
    (photos / name / "broken \udcff\n.png").write_bytes(b"")
    target = load_folder(photos)
    assert set(target.class_names) == {NAMES[name], "mug"}
    assert "\n".join(target.class_names + target.notes).encode()
    (note,) = target.notes
    assert "\n" not in note
    assert note.endswith(r"broken \xff\n.png.")


def test_a_name_that_is_written_in_two_ways_is_one_class(tmp_path):
    for split, name in (("train", "e\u0301"), ("test", "\xe9")):
        pictures.folders(tmp_path / split, [name, "a"], 2)
    assert load_folder(tmp_path).class_names == ("a", "\xe9")


# Which pictures


def test_the_same_pictures_have_the_same_digest(photos):
    before = contents(load_folder(photos))
    assert before["pictures"] == {"cup": 3, "mug": 3}
    os.utime(photos / "cup" / "000.png")
    (photos / "cup" / "notes.txt").write_text("blurred")
    assert contents(load_folder(photos)) == before
    moved = photos.rename(photos.with_name("moved"))
    assert contents(load_folder(moved)) == before


def added(photos):
    pictures.draw(photos / "cup" / "900.png", 9)


def removed(photos):
    (photos / "cup" / "000.png").unlink()


def renamed(photos):
    (photos / "cup" / "000.png").rename(photos / "cup" / "900.png")


def moved(photos):
    (photos / "cup" / "000.png").rename(photos / "mug" / "900.png")


def redrawn(photos):
    Image.new("RGB", (9, 9), "red").save(photos / "cup" / "000.png")


def damaged(photos):
    (photos / "cup" / "000.png").write_bytes(b"")


def class_added(photos):
    pictures.folders(photos, ["glass"], 3)


@pytest.mark.parametrize(
    "change", [added, removed, renamed, moved, redrawn, damaged, class_added]
)
def test_other_pictures_have_another_digest(photos, change):
    before = contents(load_folder(photos))
    change(photos)
    assert contents(load_folder(photos))["digest"] != before["digest"]


def test_a_picture_that_is_gone_is_named(photos):
    target = load_folder(photos)
    (photos / "mug" / "001.png").unlink()
    with pytest.raises(UnreadableError, match=r"mug/001\.png can not be read any more"):
        loading.materialize(target, np.arange(6), 8)
