"""The builder, over a package of six photographs made up on the spot."""

import pathlib
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from dtnh_jax.finetune.data import elpv

TABLE = """\
images/cell0001.png  1.0                 mono
images/cell0002.png  0.0                 poly
images/cell0003.png  0.3333333333333333  mono
images/cell0004.png  0.6666666666666666  poly
images/cell0005.png  0.0                 mono
images/cell0006.png  1.0                 poly
"""
PROBABILITIES = [1, 0, 1 / 3, 2 / 3, 0, 1]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Stands in for the directory of elpv-dataset; photograph i is all of grey i."""
    data = tmp_path / "package"
    (data / "images").mkdir(parents=True)
    (data / "labels.csv").write_text(TABLE)
    for i in range(6):
        pixels = np.full((300, 300), i, np.uint8)
        Image.fromarray(pixels).save(data / "images" / f"cell{i + 1:04}.png")
    monkeypatch.setattr(elpv, "_package_data", lambda: data)
    return data


def read(builder):
    return list(builder.as_data_source(split="train"))


def stamps(builder):
    files = pathlib.Path(builder.data_dir).iterdir()
    return {file.name: file.stat().st_mtime_ns for file in files}


def test_by_default_only_certain_labels_in_the_order_of_the_table(package, tmp_path):
    builder = elpv.prepare(tmp_path)
    examples = read(builder)
    assert [e["image"].shape for e in examples] == [(300, 300, 1)] * 4
    assert [int(e["image"].max()) for e in examples] == [0, 1, 4, 5]
    assert [e["label"] for e in examples] == [1, 0, 0, 1]
    assert [e["cell_type"] for e in examples] == [0, 1, 0, 1]


def test_all_keeps_the_doubtful_without_a_label(package, tmp_path):
    examples = read(elpv.prepare(tmp_path, "all"))
    assert [e["label"] for e in examples] == [1, 0, -1, -1, 0, 1]
    np.testing.assert_allclose(
        [e["probability"] for e in examples], PROBABILITIES, rtol=1e-6
    )


def test_the_metadata_says_whose_it_is_and_on_what_terms(package, tmp_path):
    info = elpv.prepare(tmp_path).info
    assert "CC BY-NC-SA 4.0" in info.redistribution_info.license
    assert "Deitsch" in info.citation
    assert "solar" in info.description
    assert info.supervised_keys == ("image", "label")


def test_it_is_written_once_and_then_needs_no_package(package, tmp_path, monkeypatch):
    before = elpv.prepare(tmp_path)
    written = stamps(before)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    again = elpv.prepare(tmp_path)
    assert len(read(again)) == 4
    assert stamps(again) == written


def test_a_missing_package_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    with pytest.raises(elpv.TargetUnavailableError, match="pip install elpv-dataset"):
        elpv.prepare(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_preparation_leaves_nothing_to_be_read(
    package, tmp_path, monkeypatch
):
    generate = elpv.Elpv._generate_examples

    def interrupted(self, data):
        yield next(generate(self, data))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(elpv.Elpv, "_generate_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            elpv.prepare(tmp_path)
    # What is left by a process that was killed and could not tidy up:
    (tmp_path / "elpv" / "certain" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)
    assert len(read(elpv.prepare(tmp_path))) == 4


def test_of_two_processes_the_slower_reads_what_the_faster_wrote(
    package, tmp_path, monkeypatch
):
    generate = elpv.Elpv._generate_examples

    def overtaken(self, data):
        with monkeypatch.context() as patch:
            patch.setattr(elpv.Elpv, "_generate_examples", generate)
            elpv.prepare(tmp_path)
        yield from generate(self, data)

    monkeypatch.setattr(elpv.Elpv, "_generate_examples", overtaken)
    assert len(read(elpv.prepare(tmp_path))) == 4


def test_a_process_that_starts_as_another_finishes_reads_what_that_one_wrote(
    package, tmp_path, monkeypatch
):
    def overtaken():
        monkeypatch.setattr(elpv, "_package_data", lambda: package)
        elpv.prepare(tmp_path)
        return package

    monkeypatch.setattr(elpv, "_package_data", overtaken)
    assert len(read(elpv.prepare(tmp_path))) == 4


def test_an_error_of_the_disk_is_not_mistaken_for_a_race(
    package, tmp_path, monkeypatch
):
    def full(self, data):
        raise OSError("No space left on device")
        yield

    monkeypatch.setattr(elpv.Elpv, "_generate_examples", full)
    with pytest.raises(OSError, match="No space left"):
        elpv.prepare(tmp_path)


def test_it_is_silent_but_hides_no_warning(package, tmp_path, monkeypatch, capfd):
    generate = elpv.Elpv._generate_examples

    def warning(self, data):
        warnings.warn("the user's own", UserWarning, stacklevel=1)
        yield from generate(self, data)

    monkeypatch.setattr(elpv.Elpv, "_generate_examples", warning)
    with pytest.warns(UserWarning, match="the user's own"):
        elpv.prepare(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_left_as_they_were(package, tmp_path, monkeypatch, shown):
    monkeypatch.setattr(elpv.tqdm_utils, "_active", shown)
    elpv.prepare(tmp_path)
    assert elpv.tqdm_utils._active == shown
