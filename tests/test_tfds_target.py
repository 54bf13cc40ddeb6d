"""Sets of TFDS: those of its catalogue mocked, and one that is prepared on the spot."""

import contextlib
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data import loading, splitting
from dtnh_jax.finetune.data.elpv import TargetUnavailableError
from dtnh_jax.finetune.data.targets import load_target


class Blocks(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Arrays of one colour, as sets give them that ask TensorFlow to encode them."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    counts = ({"train": 6}, {"train": 4})  # of each of two classes
    label: tfds.features.FeatureConnector = tfds.features.ClassLabel(names=["a", "b"])

    def _info(self):
        features = {
            "picture": tfds.features.Image(shape=(None, None, 3)),
            "kind": self.label,
            "name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            license="CC0\nno rights reserved",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        names = list(dict.fromkeys(name for count in self.counts for name in count))
        return {name: self._generate_examples(name) for name in names}

    def _generate_examples(self, split):
        for label, count in enumerate(self.counts):
            for index in range(count.get(split, 0)):
                colour = 100 * label + index
                pixels = np.full((4 + index, 5, 3), colour, np.uint8)
                kind = -1 if split == "test" and index == 0 else label
                yield (
                    100 * label + index,
                    {"picture": pixels, "kind": kind, "name": f"{split} {index}"},
                )


@contextlib.contextmanager
def known_as(name, builder_class, monkeypatch):
    """Has TFDS find a class by a name, without its registry."""
    with monkeypatch.context() as patch:
        found = tfds.core.load.builder_cls
        patch.setattr(
            tfds.core.load,
            "builder_cls",
            lambda asked: builder_class if asked == name else found(asked),
        )
        yield


def prepare(tmp_path, monkeypatch, **attributes):
    builder_class = type("Blocks", (Blocks,), attributes, skip_registration=True)
    with known_as("blocks", builder_class, monkeypatch):
        return load_target("tfds:blocks", data_dir=tmp_path)


def test_a_set_prepared_on_the_spot(tmp_path, monkeypatch):
    target = prepare(tmp_path, monkeypatch)
    assert (tmp_path / "blocks" / "1.0.0" / "dataset_info.json").exists()
    assert target.name == "tfds:blocks"
    assert target.licence == "CC0"
    assert target.class_names == ("a", "b")
    assert target.labels.tolist() == [0] * 6 + [1] * 4
    assert target.splits is None
    example = target.examples[7]
    assert example["label"] == 1
    np.testing.assert_array_equal(example["image"], np.full((5, 5, 3), 101))
    # What is prepared needs neither the code nor the network.
    again = load_target("tfds:blocks:1.0.0", data_dir=tmp_path)
    assert again.labels.tolist() == target.labels.tolist()
    wanted = splitting.sizes(target, Config(target="tfds:blocks"))
    drawn = splitting.draw(target, wanted)
    assert wanted == (3, 0, 1)
    images = loading.materialize(again, drawn.test, 3).images
    assert images.shape == (2, 3, 3, 3)
    assert sorted(images[:, 0, 0, 0] // 100) == [0, 1]


def test_published_splits_are_kept_and_examples_without_label_left_out(
    tmp_path, monkeypatch
):
    counts = ({"train": 5, "test": 3, "extra": 2}, {"train": 4, "test": 4, "extra": 1})
    target = prepare(tmp_path, monkeypatch, counts=counts)
    assert target.splits is not None
    assert [len(part) for part in target.splits] == [9, 0, 5]
    assert target.labels[target.splits.test].tolist() == [0, 0, 1, 1, 1]
    for index in target.splits.test:
        example = target.examples[int(index)]
        assert example["label"] == example["image"][0, 0, 0] // 100
        assert len(example["image"]) > 4  # index 0 is the one without label


def test_without_labels_the_test_split_is_none(tmp_path, monkeypatch):
    counts = ({"train": 5, "validation": 2, "test": 1},) * 2
    target = prepare(tmp_path, monkeypatch, counts=counts)
    assert target.splits is not None
    assert [len(part) for part in target.splits] == [10, 0, 4]
    assert "the validation split is the test set" in target.notes[0]


class Files(Blocks, skip_registration=True):
    """Pictures as files, which TFDS does not look into."""

    def _generate_examples(self, split):
        for key, example in super()._generate_examples(split):
            file = io.BytesIO()
            Image.fromarray(example["picture"]).save(file, "jpeg")
            end = 150 if key in (2, 101) else None  # in the middle of the tables
            yield key, {**example, "picture": io.BytesIO(file.getvalue()[:end])}


def test_pictures_that_can_not_be_read_are_left_out_and_named(tmp_path, monkeypatch):
    with known_as("files", Files, monkeypatch):
        target = load_target("tfds:files", data_dir=tmp_path)
    assert target.labels.tolist() == [0] * 5 + [1] * 3
    (note,) = target.notes
    assert note == ("2 pictures can not be read and are left out: train[2], train[7].")
    means = [target.examples[i]["image"].mean() for i in range(8)]
    np.testing.assert_allclose(means, [0, 1, 3, 4, 5, 100, 102, 103], atol=1)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "*record*"])
def test_a_set_that_is_damaged_on_disk_is_refused(tmp_path, monkeypatch, name):
    prepare(tmp_path, monkeypatch)
    (path,) = (tmp_path / "blocks" / "1.0.0").glob(name)
    for content in (b"", path.read_bytes()[:65536][:-9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tfds:blocks.* can not be") as caught:
            load_target("tfds:blocks:1.0.0", data_dir=tmp_path)
        assert len(str(caught.value)) < 600


def test_other_pictures_of_the_same_name_have_another_digest(tmp_path, monkeypatch):
    first = prepare(tmp_path / "a", monkeypatch)
    again = prepare(tmp_path / "b", monkeypatch)
    fewer = prepare(tmp_path / "c", monkeypatch, counts=({"train": 6}, {"train": 3}))
    assert first.digest == again.digest != fewer.digest


def test_what_is_no_classification_of_images_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"got picture \(Image\), kind \(Scalar\)"):
        prepare(tmp_path, monkeypatch, label=tfds.features.Scalar(np.int64))
    counts = ({"test": 3}, {"test": 3})
    with pytest.raises(ValueError, match="must have a split train, got test"):
        prepare(tmp_path, monkeypatch, counts=counts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_set", "neither known to TFDS nor prepared in"),
        ("cifar10/no_such_config", "can not be opened: .*no_such_config not found"),
        ("cifar10:9.9.9", "can not be opened: .*9.9.9"),
    ],
)
def test_unknown_sets_are_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_target(f"tfds:{name}", data_dir=tmp_path)
    assert len(str(caught.value)) < 600


def test_a_download_that_fails_says_how_to_do_without(tmp_path, monkeypatch):
    def fail(self):
        del self
        raise OSError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(TargetUnavailableError) as caught:
        load_target("tfds:cifar10", data_dir=tmp_path)
    assert "no route to host" in str(caught.value)
    assert "`--data-dir`" in str(caught.value)


# Of the catalogue: features and names as in TFDS, examples made up.

CATALOGUE = {
    "cifar10": (10, {"train": 30, "test": 20}),
    "caltech101": (102, {"train": 204, "test": 102}),
    "oxford_flowers102": (102, {"train": 204, "test": 102, "validation": 102}),
    "stanford_dogs": (120, {"train": 240, "test": 120}),
}


def encoded(feature, index):
    """Returns a picture as a file of the format and shape that a feature has."""
    height, width, channels = (9 if n is None else n for n in feature.shape)
    pixels = np.full((height, width, channels), index % 200, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, feature.encoding_format or "png")
    return file.getvalue()


@pytest.mark.parametrize("name", CATALOGUE)
def test_sets_of_the_catalogue(tmp_path, name):
    classes, sizes = CATALOGUE[name]

    def as_data_source(builder, split, decoders):
        assert isinstance(decoders["image"], tfds.decode.SkipDecoding)
        feature = builder.info.features["image"]
        return [
            {"image": encoded(feature, index), "label": np.int64(index % classes)}
            for index in range(sizes[split])
        ]

    builder = tfds.builder(name, data_dir=tmp_path, file_format="array_record")
    builder.info.set_splits(
        tfds.core.SplitDict(
            [
                tfds.core.SplitInfo(name=split, shard_lengths=[size], num_bytes=0)
                for split, size in sizes.items()
            ]
        )
    )
    builder.data_path.mkdir(parents=True)
    builder.info.write_to_directory(builder.data_path)
    with tfds.testing.mock_data(
        as_data_source_fn=as_data_source, data_dir=str(tmp_path)
    ):
        target = load_target(f"tfds:{name}", data_dir=tmp_path)
    assert len(target.class_names) == classes
    assert len(set(target.class_names)) == classes
    assert target.licence
    assert target.splits is not None
    assert [len(part) for part in target.splits] == [
        sizes.get(split, 0) for split in ("train", "validation", "test")
    ]
    last = len(target.labels) - 1
    example = target.examples[last]
    assert example["image"].dtype == np.uint8
    assert example["image"].shape[-1] == 3
    assert example["label"] == target.labels[last]
    wanted = splitting.sizes(target, Config(target=f"tfds:{name}", tune=True))
    drawn = splitting.draw(target, wanted)
    counts = np.bincount(target.labels[drawn.test], minlength=classes)
    assert (counts == wanted.test).all()
