"""What is made of results: numbers, tables, figures and files."""

import errno
import json
import math
import os

import numpy as np
import pytest
from rich.console import Console

from dtnh_jax import plots
from dtnh_jax.finetune import config, files
from dtnh_jax.finetune.methods import METHODS
from dtnh_jax.finetune.reports import report, results
from dtnh_jax.finetune.runs import folder, progress, statistics

# Statistics


def test_the_interval_is_student_s():
    # Golden: three differences, t(2, 0.975) = 4.303.
    mean, std, low, high = statistics.estimate([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert std == pytest.approx(math.sqrt(7))
    assert high - mean == pytest.approx(4.30265 * std / math.sqrt(3), rel=1e-5)
    assert mean - low == pytest.approx(high - mean)


def test_the_interval_covers_in_95_of_100():
    draws = np.random.default_rng(0).normal(size=(2000, 4))
    intervals = [statistics.estimate(draw.tolist()) for draw in draws]
    covered = np.mean([low < 0 < high for _, _, low, high in intervals])
    assert abs(covered - 0.95) < 0.02  # four standard errors


def test_one_seed_has_no_interval():
    mean, *rest = statistics.estimate([0.5])
    assert mean == 0.5
    assert all(math.isnan(value) for value in rest)
    with pytest.raises(ValueError, match="`values` must hold at least 1 number"):
        statistics.estimate([])


def test_balanced_accuracy_is_the_mean_over_classes():
    assert statistics.accuracies([0, 0, 0, 2], [0, 0, 1, 2]) == (
        0.75,
        pytest.approx(5 / 6),
    )


# Options


def test_defaults_are_in_runs_default():
    assert config.Config().folder.as_posix() == "runs/default"
    other = config.Config(steps=7).folder
    assert other != config.Config(steps=8).folder
    assert other == config.Config(steps=7, checkpoint_every=3).folder


def test_the_length_of_training():
    assert config.Config(steps=7).total_steps(100) == 7
    assert config.Config(epochs=2.5, batch_size=30).total_steps(100) == 9


def test_methods_are_regularizers_and_rules():
    assert METHODS["l2_sp+dtnh"].plain == "l2_sp"
    assert METHODS["l2_sp"].plain is None
    assert METHODS["fine-tuning"].plain is None
    assert not METHODS["scratch"].is_pretrained


# The run folder


def test_metrics_are_rewound_to_a_step(tmp_path):
    ours = folder.Folder(tmp_path)
    lines = [
        {"cell": cell, "step": step, "seconds": 1.5 * step}
        for cell in ("a", "b")
        for step in (1, 2, 3)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    ours.metrics_path.write_text(text + '{"cell": "b", "st')  # killed while writing
    assert ours.rewind("b", 2) == 3.0
    assert ours.metrics() == lines[:5]
    assert ours.rewind("b", 0) == 0.0
    assert ours.metrics() == lines[:3]


def test_a_folder_opens_again_and_with_other_folders_of_data(tmp_path):
    ours = config.Config(run_dir=tmp_path / "run")
    folder.check_folder(ours)
    folder.open_folder(ours, {"date": "first"})
    elsewhere = config.Config(run_dir=tmp_path / "run", data_dir=tmp_path)
    folder.check_folder(elsewhere)
    folder.open_folder(elsewhere, {"date": "second"})
    machine = json.loads((tmp_path / "run" / "machine.json").read_text())
    assert machine == {"date": "first"}


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_damaged_folder_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not readable"):
        folder.check_folder(config.Config(run_dir=tmp_path))


DATA = {"digest": "1", "pictures": {"cup": 3, "mug": 3}}


@pytest.mark.parametrize(
    ("digest", "pictures", "message"),
    [
        ("2", {"cup": 4, "mug": 3}, r"\(cup had 3 and has 4\): set another"),
        ("2", {"cup": 3}, r"\(mug had 3 and has none\)"),
        ("2", {**DATA["pictures"], "jar": 1}, r"\(jar had none and has 1\)"),
        ("2", DATA["pictures"], r"\(equal numbers, but other pictures\)"),
    ],
)
def test_a_run_on_other_pictures_is_refused(tmp_path, digest, pictures, message):
    ours = config.Config(run_dir=tmp_path / "run")
    folder.open_folder(ours, {}, DATA)
    folder.open_folder(ours, {}, dict(DATA))
    (ours.folder / "machine.json").write_text("")
    with pytest.raises(folder.OtherConfigurationError, match=message) as caught:
        folder.open_folder(ours, {}, {"digest": digest, "pictures": pictures})
    assert str(caught.value).startswith(f"{ours.folder} holds a run on other pictures")
    assert (ours.folder / "machine.json").read_text() == ""  # nothing is changed
    assert len(folder.open_folder(ours, {}, DATA)) == 1


def test_an_older_run_learns_its_data(tmp_path):
    ours = config.Config(run_dir=tmp_path / "run")
    folder.open_folder(ours, {})
    folder.open_folder(ours, {}, DATA)
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == DATA
    (tmp_path / "run" / "data.json").write_text("")
    with pytest.raises(ValueError, match=r"data\.json is not readable: delete it if"):
        folder.open_folder(ours, {}, DATA)


RESULT = dict.fromkeys(
    ("method", "seed", "strength", "accuracy", "balanced_accuracy", "predictions")
)


@pytest.mark.parametrize("text", ["", "{", "\0" * 9, "[]", "{}", '{"accuracy": 1}'])
def test_damaged_results_are_not_complete(tmp_path, text):
    ours = config.Config(run_dir=tmp_path / "run")
    folder.open_folder(ours, {"date": "first"})
    made = folder.Folder(tmp_path / "run")
    for each in (made, made.of_tuning()):
        for cell in ("a", "b"):
            each.finish(cell, {**RESULT, "seconds": 1.0})
        (each.path / "cells" / "a.json").write_text(text)
        assert each.result("a") is None
    assert folder.open_folder(ours, {}) == [
        f"{path / 'cells' / 'a.json'} was damaged: that training is repeated."
        for path in (made.path, made.path / "tune")
    ]
    assert folder.open_folder(ours, {}) == []
    assert made.result("b") is not None


@pytest.mark.parametrize("text", ["", "{", "\0\0", "[]", "{}", None])
def test_a_damaged_machine_is_the_present_one(tmp_path, text):
    ours, path = config.Config(run_dir=tmp_path), tmp_path / "machine.json"
    folder.open_folder(ours, {"date": "first"})
    path.unlink() if text is None else path.write_text(text)
    note = f"{path} was damaged and replaced."
    assert folder.open_folder(ours, {"date": "second"}) == [note]
    assert json.loads(path.read_text()) == {"date": "second"}


def test_damaged_metrics_are_left_out(tmp_path):
    ours = folder.Folder(tmp_path)
    lines = [{"cell": "a", "step": step, "seconds": 1.0} for step in (1, 2)]
    first, second = (json.dumps(line).encode() for line in lines)
    ours.metrics_path.write_bytes(first + b"\n\0\0\xff\n{}\n7\n" + second + b"\n\0")
    assert ours.metrics() == lines
    assert ours.rewind("a", 1) == 1.0
    assert ours.metrics_path.read_bytes() == first + b"\n"


# Files that last


def test_a_file_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    done, path = [], tmp_path / "a.json"
    path.write_text("old")
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def call(*arguments, name=name, real=real):
            done.append((name, path.read_text()))
            return real(*arguments)

        monkeypatch.setattr(os, name, call)
    files.write_json(path, [1])
    # The content, its name, and the folder that has the name.
    assert done == [("fsync", "old"), ("replace", "old"), ("fsync", "[\n 1\n]\n")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_folders_are_on_disk_with_the_one_above(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("dtnh_jax._files.sync", synced.append)
    for _ in range(2):
        files.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path / "a", tmp_path]


def test_a_file_that_can_not_be_written_is_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_links_are_followed_and_no_letter_stops_a_file(tmp_path):
    (tmp_path / "link.md").symlink_to(tmp_path / "real.md")
    files.write(tmp_path / "link.md", "caf\udce9 \u732b")
    assert (tmp_path / "link.md").is_symlink()
    assert (tmp_path / "real.md").read_text("utf-8") == r"caf\udce9 \u732b".replace(
        r"\u732b", "\u732b"
    )
    files.write("/dev/null", "text")


# Tables


def outcome(seeds=2, even=True):
    cells = [
        {
            "method": name,
            "seed": seed,
            "accuracy": 0.5 + 0.1 * number + 0.05 * seed,
            "balanced_accuracy": 0.5 + 0.1 * number + 0.05 * seed * even,
            "predictions": [0, 1],
        }
        for number, name in enumerate(("fine-tuning", "l2_sp", "l2_sp+dtnh"))
        for seed in range(seeds)
    ]
    by_method = {}
    for cell in cells:
        by_method.setdefault(cell["method"], []).append(cell)
    methods: dict[str, dict] = {
        name: {
            key: results.plain(statistics.estimate([cell[key] for cell in ours]))
            for key in ("accuracy", "balanced_accuracy")
        }
        for name, ours in by_method.items()
    }
    methods["l2_sp"] |= {"cosine": -0.25, "conflict": 1.0, "removed": 0.0}
    return {
        "config": {"seeds": seeds},
        "strengths": {"l2_sp": 0.1},
        "methods": methods,
        "differences": results.differences(by_method),
        "cells": cells,
    }


def test_the_table_of_several_seeds():
    header, body = report.rows(outcome())
    assert header[:4] == ["method", "strength", "accuracy", "vs plain sum"]
    by_name = {row[0]: row[1:] for row in body}
    assert by_name["fine-tuning"] == ["", "52.5 ± 3.5", "", "", "", ""]
    assert by_name["l2_sp"][3:] == ["+10.0 [+10.0, +10.0]", "-0.250", "100%"]
    assert by_name["l2_sp+dtnh"][2:4] == [
        "+10.0 [+10.0, +10.0]",
        "+20.0 [+20.0, +20.0]",
    ]


def test_the_table_of_one_seed_has_no_intervals():
    _, body = report.rows(outcome(seeds=1))
    assert body[2][:4] == ["l2_sp+dtnh", "0.1", "70.0", "+10.0"]


def test_balanced_accuracy_is_shown_where_it_differs():
    header, _ = report.rows(outcome(even=False))
    assert "balanced" in header


def test_tuning_marks_what_was_chosen():
    tuning = [
        {"method": "fine-tuning", "strength": 0.0, "accuracies": [0.5]},
        {"method": "l2_sp", "strength": 0.1, "accuracies": [0.75]},
    ]
    _, body = report._tuning_rows(tuning, {"l2_sp": 0.1})
    assert body == [
        ["fine-tuning", "", "50.0", ""],
        ["l2_sp", "0.1", "75.0", "chosen"],
    ]


# Progress


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_names_what_is_done(is_terminal):
    console = Console(
        record=True, force_terminal=is_terminal, width=120, quiet=False, stderr=True
    )
    line = {"step": 1, "loss": 0.5, "cosine": -0.25, "images_per_second": 99.7}
    with progress.display(console, "all", 2, 3) as shown:
        shown.begin("l2_sp-seed0", 0, 3)
        shown.update(line)
        shown.end("l2_sp-seed0: accuracy 50.0%")
        shown.end("l2_sp-seed1: accuracy 51.0%")
    text = console.export_text()
    assert "l2_sp-seed0: accuracy 50.0%" in text
    assert progress.note(line) == "loss 0.500, cosine -0.25, 100 images/s"


# Figures


def test_figures_are_drawn(tmp_path):
    figures = {
        "accuracy": plots.accuracy_by_method(
            {"l2_sp": [0.5, 0.6], "l2_sp+dtnh": [0.7]}, {"l2_sp": (0.4, 0.7)}
        ),
        "conflict": plots.conflict_over_steps(
            [{"method": "m", "seed": 0, "step": 1, "cosine": 0.1, "conflict": 0.5}]
        ),
        "grid": plots.prediction_grid(
            np.zeros((7, 8, 8, 3), np.uint8), [0] * 7, {"m": [0, 1] * 3 + [0]}, ["a"]
        ),
    }
    (axes,) = figures["accuracy"].axes
    assert "95% interval" in axes.get_xlabel()
    (axes,) = plots.accuracy_by_method({"l2_sp": [0.5]}).axes
    assert "interval" not in axes.get_xlabel()
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.accuracy_by_method({}), "`accuracies` must hold at least 1"),
        (lambda: plots.conflict_over_steps([{"step": 1}]), "`metrics` must hold a l"),
        (lambda: plots.prediction_grid(np.zeros((0, 1, 1, 3)), [], {}, []), "`images`"),
        (
            lambda: plots.prediction_grid(np.zeros((1, 1, 1, 3)), [0], {"m": []}, []),
            "`images` and 'm' must have one length, got 1 and 0",
        ),
    ],
)
def test_figures_name_what_is_wrong(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
