"""What can be fine-tuned on: what is read, and from where."""

import pathlib

import grain
import jax
import numpy as np
import pictures
import pytest
from PIL import Image

from dtnh_jax.finetune import directories
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data import splitting, targets
from dtnh_jax.finetune.data.class_folders import load_folder
from dtnh_jax.finetune.data.pictures import UnreadableError
from dtnh_jax.finetune.runs.checks import check

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


def test_doubtful_labels_are_for_training_alone(elpv, tmp_path):
    doubtful = targets.load_target("elpv-doubtful", data_dir=tmp_path)
    assert np.bincount(doubtful.labels).tolist() == [1508 + 295, 715 + 106]
    assert doubtful.splits is not None
    assert sorted(np.concatenate(doubtful.splits)) == list(range(2624))
    assert "22% of the pictures for training" in doubtful.notes[0]
    config = Config(target="elpv-doubtful", train_per_class=50)
    drawn = splitting.draw(doubtful, splitting.sizes(doubtful, config))
    plain = Config(train_per_class=50, validation_per_class=100, test_per_class=300)
    known = splitting.draw(elpv, splitting.sizes(elpv, plain))
    for row in (0, -1):
        ours, theirs = int(drawn.test[row]), int(known.test[row])
        assert doubtful.examples[ours]["label"] == elpv.examples[theirs]["label"]
        np.testing.assert_array_equal(
            doubtful.examples[ours]["image"], elpv.examples[theirs]["image"]
        )
    assert np.bincount(doubtful.labels[drawn.test]).tolist() == [300, 300]
    labels = {doubtful.examples[int(i)]["label"] for i in drawn.train[:20]}
    assert labels <= {0, 1}


def test_an_unknown_target_is_told_the_known():
    with pytest.raises(ValueError, match="must be one of 'elpv', 'elpv-doubtful', 'fo"):
        targets.load_target("imagenet")


def test_without_a_home_the_folder_for_data_has_to_be_given(monkeypatch, tmp_path):
    def unknown(name):
        raise KeyError(name)

    for name in ("HOME", "DTNH_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ValueError, match=r"no home folder .* `--data-dir`, or set D"):
        targets.load_target("elpv")
    with pytest.raises(ValueError, match=r"`~/data` begins with an unknown home"):
        targets.load_target("elpv", data_dir="~/data")
    pictures.folders(tmp_path, ["a", "b"], 2)
    assert len(targets.load_target(f"folder:{tmp_path}").labels) == 4
    directories.keep_compiled(Config())  # nothing is kept
    for options in ({"run_dir": "~/run"}, {"data_dir": "~/data"}):
        places = {key: pathlib.Path(path) for key, path in options.items()}
        with pytest.raises(ValueError, match="begins with an unknown home"):
            check(Config(**places))


@pytest.mark.parametrize("name", ["caf\udce9", "two\nlines"])
def test_results_need_a_folder_of_a_name_that_all_can_write(name):
    with pytest.raises(ValueError, match=r"`--run-dir` must be .* UTF-8, got /.*\\"):
        check(Config(run_dir=pathlib.Path(name)))
    with pytest.raises(ValueError, match=r"`--data-dir` must be .* UTF-8, got /.*\\"):
        check(Config(data_dir=pathlib.Path(name)))


def test_a_damaged_elpv_is_named(tmp_path):
    targets.load_target("elpv", data_dir=tmp_path)
    (tmp_path / "elpv" / "certain" / "1.0.0" / "dataset_info.json").write_text("")
    with pytest.raises(ValueError, match=r"The target 'elpv' can not be .*/elpv is d"):
        targets.load_target("elpv", data_dir=tmp_path)


def test_a_damaged_picture_of_elpv_is_named():
    with pytest.raises(UnreadableError, match="picture 7 of elpv can not be read: "):
        targets._decode(7, {"image": b"no", "label": 0})


def test_what_is_compiled_is_marked_as_a_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir
    directories.keep_compiled(Config(data_dir=tmp_path / "photos" / "data"))
    jax.config.update("jax_compilation_cache_dir", before)
    tag = tmp_path / "photos" / "data" / "compiled" / "CACHEDIR.TAG"
    assert tag.read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    (tmp_path / "file").write_text("")
    directories.keep_compiled(Config(data_dir=tmp_path / "file"))  # nothing is kept
    assert jax.config.jax_compilation_cache_dir == before
    pictures.folders(tmp_path / "photos", ["a", "b"], 2)
    assert load_folder(tmp_path / "photos").class_names == ("a", "b")


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
