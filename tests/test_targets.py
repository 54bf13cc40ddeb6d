"""What can be fine-tuned on: what is read, and from where."""

import pathlib

import grain
import numpy as np
import pytest
from PIL import Image

from dtnh_jax.finetune.data import targets

EMPTY = targets.Target(
    name="empty",
    licence="none",
    class_names=("only",),
    examples=grain.MapDataset.source([]),
    labels=np.zeros(0, int),
)


@pytest.fixture(scope="session")
def elpv(tmp_path_factory):
    return targets.load_target("elpv", data_dir=tmp_path_factory.mktemp("data"))


def test_elpv_is_what_its_authors_published(elpv):
    assert elpv.class_names == ("functional", "defective")
    assert "CC BY-NC-SA 4.0" in elpv.licence
    assert len(elpv.examples) == 2223
    assert np.bincount(elpv.labels).tolist() == [1508, 715]


def test_elpv_reads_as_the_package_does(elpv):
    import elpv_dataset

    directory = pathlib.Path(elpv_dataset.__file__).parent / "data"
    rows = [row.split() for row in (directory / "labels.csv").read_text().splitlines()]
    certain = [row for row in rows if row[1] in ("0.0", "1.0")]
    for index in (0, 7, 2222):
        path, probability, _ = certain[index]
        example = elpv.examples[index]
        with Image.open(directory / path) as image:
            np.testing.assert_array_equal(
                example["image"], np.asarray(image)[..., None]
            )
        assert example["image"].dtype == np.uint8
        assert example["label"] == elpv.labels[index] == float(probability)


def test_an_unknown_target_is_told_the_known():
    with pytest.raises(ValueError, match="must be one of 'elpv', 'folder:PATH', 'tfds"):
        targets.load_target("imagenet")


def test_where_data_is_prepared(monkeypatch, tmp_path):
    loaded_from = []

    def spy(directory):
        loaded_from.append(directory)
        return EMPTY

    monkeypatch.setitem(targets.TARGETS, "spy", spy)

    def directory(data_dir=None, **environment):
        for name in ("DTNH_DATA_DIR", "XDG_CACHE_HOME"):
            monkeypatch.setenv(name, str(environment.get(name, "")))
        targets.load_target("spy", data_dir=data_dir)
        return loaded_from.pop()

    chosen, cache = tmp_path / "chosen", tmp_path / "cache"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert directory() == tmp_path / ".cache" / "dtnh_jax"
    assert directory(XDG_CACHE_HOME=cache) == cache / "dtnh_jax"
    assert directory(XDG_CACHE_HOME=cache, DTNH_DATA_DIR=chosen) == chosen
    assert directory("~/given", DTNH_DATA_DIR=chosen) == tmp_path / "given"
