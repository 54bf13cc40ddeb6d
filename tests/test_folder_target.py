"""A folder of one's own pictures: what is read, what is refused, how many are used."""

import itertools
import json

import grain
import numpy as np
import pictures
import pytest
import tiny_network
from PIL import Image

from dtnh_jax._cli import main
from dtnh_jax.finetune.config import Config, identity
from dtnh_jax.finetune.data import loading, splitting
from dtnh_jax.finetune.data.class_folders import load_folder
from dtnh_jax.finetune.data.pictures import is_readable, read_picture
from dtnh_jax.finetune.data.target import Splits, Target
from dtnh_jax.finetune.weights.sources import SOURCES


def test_a_folder_for_each_class(tmp_path):
    pictures.folders(tmp_path, ["glass", "cup"], each=3)
    pictures.draw(tmp_path / "cup" / "more" / "deep.jpg", 200, (40, 30))
    target = load_folder(tmp_path)
    assert target.class_names == ("cup", "glass")
    assert target.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert target.splits is None
    assert target.notes == ()
    for index in range(7):
        example = target.examples[index]
        assert example["label"] == target.labels[index]
        assert (example["image"].mean() > 150) == (example["label"] == 0)
    assert target.examples[3]["image"].shape == (30, 40, 3)  # as in the file
    in_memory = loading.materialize(target, np.arange(7), 8)
    assert in_memory.images.shape == (7, 8, 8, 3)


def test_folders_of_splits(tmp_path):
    for split, each in (("train", 4), ("val", 2), ("Test", 3)):
        pictures.folders(tmp_path / split, ["a", "b"], each)
    target = load_folder(tmp_path)
    assert target.splits is not None
    assert [len(part) for part in target.splits] == [8, 4, 6]
    assert np.bincount(target.labels[target.splits.test]).tolist() == [3, 3]


def test_a_validation_split_alone_is_the_test_set(tmp_path):
    for split, each in (("train", 4), ("val", 2)):
        pictures.folders(tmp_path / split, ["a", "b"], each)
    target = load_folder(tmp_path)
    assert target.splits is not None
    assert [len(part) for part in target.splits] == [8, 0, 4]
    assert target.notes == (
        "There is no test split: the validation split is the test set.",
    )


def test_what_can_not_be_read_is_left_out_and_counted(tmp_path):
    pictures.folders(tmp_path, ["a", "b"], each=4)
    whole = (tmp_path / "a" / "000.png").read_bytes()
    (tmp_path / "a" / "000.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "001.png").write_bytes(b"")
    pictures.draw(tmp_path / "b" / "cut.jpg", 9, (90, 90))
    whole = (tmp_path / "b" / "cut.jpg").read_bytes()
    (tmp_path / "b" / "cut.jpg").write_bytes(whole[:-200])
    (tmp_path / "b" / "photo.heic").write_bytes(b"\0\0\0 ftypheic")
    (tmp_path / "b" / "notes.txt").write_text("blurred")
    (tmp_path / "b" / ".hidden").write_text("")
    target = load_folder(tmp_path)
    assert target.labels.tolist() == [0, 0, 1, 1, 1, 1]
    broken, strangers = target.notes
    assert broken == (
        "4 files can not be read and are left out: a/000.png, a/001.png, b/cut.jpg "
        "and 1 more."
    )
    assert strangers == "1 files are no pictures and are left out: b/notes.txt."


MODES = {
    "L": ([7], 1),
    "1": ([255], 1),
    "RGB": ([7, 8, 9], 3),
    "P": ([7, 8, 9], 3),
    "CMYK": ([7, 8, 9], 3),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_become_grey_or_rgb(tmp_path, mode):
    expected, channels = MODES[mode]
    size = (5, 3)
    if mode == "L":
        image = Image.new("L", size, 7)
    elif mode == "1":
        image = Image.new("1", size, 1)
    elif mode == "P":
        image = Image.new("P", size, 1)
        image.putpalette([0, 0, 0, 7, 8, 9])
    else:
        image = Image.new("RGB", size, (7, 8, 9)).convert(mode)
    path = tmp_path / "picture.tiff"
    image.save(path)
    with path.open("rb") as file:
        pixels = read_picture(file)
    assert pixels.shape == (3, 5, channels)
    np.testing.assert_array_equal(pixels, np.broadcast_to(expected, pixels.shape))


def test_what_is_transparent_becomes_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    image.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255] * 3]]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 0)
    palette.save(tmp_path / "b.png", transparency=b"\0\xff")
    assert read_picture(tmp_path / "b.png").tolist() == [[[10, 20, 30], [255] * 3]]


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    deep = np.array([[0, 256, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 255]


def test_a_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (4, 2), "white")
    image.paste("black", (0, 0, 1, 2))  # the left column
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees, clockwise
    image.save(tmp_path / "a.png", exif=exif)
    pixels = read_picture(tmp_path / "a.png")
    assert pixels.shape == (4, 2, 3)
    assert pixels[..., 0].tolist() == [[0, 0], [255, 255], [255, 255], [255, 255]]


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp"])
def test_readable_means_to_the_end(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    pictures.draw(path, 50, (64, 64))
    assert is_readable(path)
    path.write_bytes(path.read_bytes()[:-40])
    assert not is_readable(path)


def no_folder(root):
    root.rmdir()


def loose(root):
    pictures.draw(root / "a.png", 1)


def beside(root):
    pictures.folders(root, ["a", "b"], 1)
    loose(root)


def one_class(root):
    pictures.folders(root, ["a", ".hidden"], 1)


def empty_class(root):
    pictures.folders(root, ["a", "b"], 1)
    (root / "c").mkdir()


def all_broken(root):
    pictures.folders(root, ["a", "b"], 1)
    (root / "b" / "000.png").write_bytes(b"no")


def missing_class(root):
    pictures.folders(root / "train", ["a", "b", "c"], 1)
    pictures.folders(root / "test", ["a", "b"], 1)


def class_of_test_alone(root):
    pictures.folders(root / "train", ["a", "b"], 1)
    pictures.folders(root / "test", ["a", "b", "c"], 1)


def mixed_layouts(root):
    pictures.folders(root / "train", ["a", "b"], 1)
    pictures.folders(root, ["cats"], 1)


def no_training(root):
    pictures.folders(root / "test", ["a", "b"], 1)
    pictures.folders(root / "val", ["a", "b"], 1)


def splits_without_classes(root):
    pictures.folders(root, ["train", "test"], 1)


def twice(root):
    for name in ("train", "val", "valid"):
        pictures.folders(root / name, ["a", "b"], 1)


REFUSED = {
    no_folder: "must name a folder, and there is none",
    loose: "has pictures and no folders, such as a.png: which class are they of?",
    beside: "has pictures beside its folders, such as a.png",
    one_class: "must have a folder for each of at least 2 classes, got a",
    empty_class: "c is empty: it holds no picture",
    all_broken: "has no picture that can be read of b for train",
    missing_class: "has no folder for c in its split for test, but in another",
    class_of_test_alone: "has no folder for c in its split for train, but in another",
    mixed_layouts: "mixes two layouts: beside a folder for training it has cats",
    no_training: "has test, val, but no folder `train`",
    splits_without_classes: "train? has pictures and no folders|test has pictures and",
    twice: "has two folders for validation: val, valid",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_other_layouts_are_refused(tmp_path, make):
    root = tmp_path / "photos"
    root.mkdir()
    make(root)
    with pytest.raises(ValueError, match=REFUSED[make]):
        load_folder(root)


# How many pictures of each class are used.


def task(*counts, splits=None):
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple(f"class {i}" for i in range(len(counts)))
    examples = grain.MapDataset.range(len(labels))
    return Target("folder:x", "mine", names, examples, labels, splits)


def with_splits(train, validation, test):
    """A target of two classes, with so many of each in each split."""
    labels = np.concatenate([np.repeat([0, 1], n) for n in (train, validation, test)])
    ends = np.cumsum([0, 2 * train, 2 * validation, 2 * test])
    parts = Splits(*(np.arange(a, b) for a, b in itertools.pairwise(ends)))
    examples = grain.MapDataset.range(len(labels))
    return Target("tfds:x", "mine", ("a", "b"), examples, labels, parts)


FOLDER = Config(target="folder:x")


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        (task(30, 30, 30), {}, (20, 0, 10)),
        (task(30, 90, 40), {"tune": True}, (15, 5, 10)),
        (task(2, 2), {}, (1, 0, 1)),
        (task(3, 3), {"tune": True}, (1, 1, 1)),
        (task(5000, 5000), {"tune": True}, (50, 100, 300)),
        (task(30, 30), {"test_per_class": 20}, (10, 0, 20)),
        (task(30, 30), {"train_per_class": 4}, (4, 0, 10)),
        (with_splits(10, 0, 7), {}, (10, 0, 7)),
        (with_splits(12, 0, 7), {"tune": True}, (10, 2, 7)),
        (with_splits(12, 5, 7), {"tune": True}, (12, 5, 7)),
        (with_splits(500, 500, 500), {"tune": True}, (50, 100, 300)),
    ],
)
def test_numbers_follow_from_the_rarest_class(target, options, expected):
    config = Config(target="folder:x", **options)
    wanted = splitting.sizes(target, config)
    assert wanted == expected
    drawn = splitting.draw(target, wanted)
    for indices, number in zip(drawn[1:], wanted[1:]):
        counts = np.bincount(target.labels[indices], minlength=2)
        assert (counts == number).all()
    training = np.bincount(target.labels[drawn.train])
    assert len(set(training)) == 1
    assert training[0] >= wanted.train
    everything = np.concatenate(drawn)
    assert len(np.unique(everything)) == len(everything)
    if target.splits is not None:
        assert set(drawn.test) <= set(target.splits.test)
        assert set(drawn.train) <= set(target.splits.train)


def test_what_is_asked_for_must_be_there():
    with pytest.raises(ValueError, match="too few pictures of a class to leave one"):
        splitting.sizes(task(1, 9), FOLDER)
    with pytest.raises(ValueError, match="no pictures for training of: class 1"):
        splitting.sizes(task(9, 0, 9), FOLDER)
    wanted = splitting.Sizes(train=8, validation=3, test=2)
    with pytest.raises(ValueError, match="a of tfds:x has 10 pictures for training"):
        splitting.draw(with_splits(10, 0, 2), wanted)
    with pytest.raises(ValueError, match="has 1 pictures for testing, but 2"):
        splitting.draw(with_splits(90, 0, 1), wanted)


def test_the_default_run_keeps_its_numbers_and_its_name():
    options = identity(Config())
    numbers = [options[f"{x}_per_class"] for x in ("train", "validation", "test")]
    assert numbers == [50, 100, 300]
    assert Config().total_steps(100) == 36
    assert Config(target="folder:x").total_steps(60) == 36
    assert Config(target="folder:x").total_steps(320) == 120
    name = Config(target="folder:/home/me/my photos").folder.name
    assert name.startswith("folder-home-me-my-photos-")


@pytest.mark.e2e
def test_thirty_photographs_of_each_of_three_classes(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(SOURCES, "tiny", tiny_network.TINY)
    monkeypatch.setattr("dtnh_jax.finetune.directories.keep_compiled", lambda _: None)
    photos, run_dir = tmp_path / "photos", tmp_path / "run"
    pictures.folders(photos, ["cup", "glass", "mug"], each=30)
    (photos / "cup" / "029.png").write_bytes(b"broken")
    arguments = (
        "--source tiny --methods fine-tuning --seeds 1 --steps 30 --image-size 16 "
        f"--target folder:{photos} --run-dir {run_dir}"
    ).split()
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    assert out.count("1 files can not be read and are left out: cup/029.png.") == 1
    assert "Head: the source's, of 7 classes, is replaced by one of 3" in out
    assert "20 for training, 0 for validation, 9 for the test" in out
    results = json.loads((run_dir / "results.json").read_text())
    assert results["class_names"] == ["cup", "glass", "mug"]
    assert results["config"]["train_per_class"] == 20
    assert len(results["cells"][0]["predictions"]) == 27
    assert "27 photographs, 9 of each class" in (run_dir / "report.md").read_text()

    # As after a loss of power.
    (cell,) = (run_dir / "cells").iterdir()
    cell.write_text("")
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    assert f"{cell} was damaged: that training is repeated.\n" in out
    found, expected = json.loads((run_dir / "results.json").read_text()), results
    assert {**found, "measured": 0} == {**expected, "measured": 0}

    # Other pictures under the same name are another run.
    before = (run_dir / "results.json").read_bytes()
    (photos / "mug" / "029.png").unlink()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"dtnh: {run_dir} holds a run on other pictures (mug had 30 and has 29): set "
        "another `--run-dir`.\n"
    )
    assert (run_dir / "results.json").read_bytes() == before
