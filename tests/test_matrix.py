"""The grid of small fine-tunings: what is trained, what is kept, what is refused."""

import dataclasses
import io
import itertools
import json
import pathlib
import signal

import pytest
import tiny_matrix
from rich.console import Console
from tiny_matrix import TINY

from dtnh_jax import plots
from dtnh_jax._cli import main
from dtnh_jax.finetune.runs.interrupt import Interrupted
from dtnh_jax.studies.matrix import (
    catalogue,
    cells,
    progress,
    records,
    rules,
    study,
    summary,
)
from dtnh_jax.studies.matrix.cells import Cell
from dtnh_jax.studies.matrix.config import Config


@pytest.fixture(scope="module", autouse=True)
def fashion(tmp_path_factory):
    with tiny_matrix.fashion(tmp_path_factory.mktemp("fashion")):
        yield


TINY_WORDS = [
    *("--sources", "fashion", "--targets", "fashion-20", "digits-5"),
    *("--regularizers", "feature_map", "--strengths", "0.01", "100"),
    *("--rules", "none", "sum", "--seeds", "2", "--steps", "3", "--batch-size", "4"),
    *("--source-steps", "2", "--widths", "2", "3", "4"),
    *("--validation-per-class", "2", "--test-per-class", "3"),
    *("--photographs.steps", "2", "--photographs.batch-size", "4"),
    *("--photographs.image-size", "16", "--photographs.train-per-class", "5"),
    *("--photographs.validation-per-class", "2"),
    *("--photographs.test-per-class", "3"),
]
# Of two pairs: four learning rates with two seeds, of which one is what the grid needs
# too, and two seeds of scratch and two strengths.
TINY_CELLS = 2 * (4 * 2 + 2 * (1 + 2))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def tiny(data_dir):
    return study.prepare(TINY, data_dir)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A file of records to which nobody adds."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    path = records.open_folder(dataclasses.replace(TINY, run_dir=folder))
    study.run(tiny, path, Console(quiet=True))
    return path


def without_seconds(found):
    return {
        cell: {key: value for key, value in record.items() if key != "seconds"}
        for cell, record in found.items()
    }


def stop_after(monkeypatch, count, action):
    """Does something once so many records have been written."""
    written = []
    append = records.append

    def spy(path, record):
        append(path, record)
        written.append(record)
        if len(written) == count:
            action(path)

    monkeypatch.setattr(records, "append", spy)


class Killed(Exception):
    """Stands for a process that is gone."""


def test_a_killed_and_interrupted_run_comes_to_the_same(
    tiny, finished, tmp_path, monkeypatch
):
    whole = records.read(finished)
    assert len(whole) == TINY_CELLS
    config = dataclasses.replace(TINY, run_dir=tmp_path / "run")
    path = records.open_folder(config)
    quiet = Console(quiet=True)

    def kill(path):
        with path.open("a") as file:
            file.write('{"source": "fash')
        raise Killed

    with monkeypatch.context() as patch:
        stop_after(patch, 3, kill)
        with pytest.raises(Killed):
            study.run(tiny, path, quiet)
    assert path.read_text().endswith("fash")
    assert records.open_folder(config) == path
    assert path.read_text().endswith("\n")
    assert cells.count(TINY, records.read(path)) == (TINY_CELLS, 3)

    with monkeypatch.context() as patch:
        stop_after(patch, 14, lambda path: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted) as stopped:
            study.run(tiny, path, quiet)
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    assert cells.count(TINY, records.read(path)) == (TINY_CELLS, 17)

    study.run(tiny, path, quiet)
    assert without_seconds(records.read(path)) == without_seconds(whole)
    assert list(records.read(path)) == list(whole)
    assert len(path.read_text().splitlines()) == TINY_CELLS


def test_strengths_targets_and_seeds_share_a_compilation(tiny, finished):
    del finished
    trainer = tiny.family("fashion", "digits-5").trainer
    assert trainer("feature_map", "sum", "sgd").step._cache_size() == 1
    assert trainer(None, "none", "sgd").step._cache_size() == 1


def test_a_record_tells_what_it_is_of(finished):
    for cell, record in records.read(finished).items():
        assert 0 <= record["validation"] <= 1
        assert 0 <= record["test"] <= 1
        assert record["loss"] > 0
        has_regularizer = cell.regularizer != "none"
        assert (record["cosine"] is not None) == has_regularizer
        if has_regularizer:
            assert -1 <= record["cosine"] <= 1
            assert 0 <= record["conflict"] <= 1
    strongest = [
        record["loss"]
        for cell, record in records.read(finished).items()
        if (cell.strength, cell.target, cell.seed) == (100.0, "digits-5", 0)
    ]
    weakest = [
        record["loss"]
        for cell, record in records.read(finished).items()
        if (cell.strength, cell.target, cell.seed) == (0.01, "digits-5", 0)
    ]
    assert strongest != weakest  # the strength arrives


def test_a_training_that_diverges_is_a_result(tiny):
    cell = Cell("fashion", "digits-5", "feature_map", 1.0, "sum", "sgd", 0, 1e30)
    record = study.run_cell(tiny, cell)
    assert record["loss"] is None
    assert record["test"] == 0.1  # whatever the network is shown
    assert Cell.of(json.loads(json.dumps(record, allow_nan=False))) == cell


def test_another_rule_adds_to_the_same_folder(tiny, finished, tmp_path):
    run_dir = tmp_path / "run"
    more = dataclasses.replace(
        TINY, rules=("dtnh",), regularizers=("l2_sp",), seeds=1, run_dir=run_dir
    )
    path = records.open_folder(more)
    path.write_bytes(finished.read_bytes())
    before = records.read(path)
    assert cells.count(more, before) == (2 * (4 * 2 + 2), 2 * 4 * 2)
    study.run(tiny._replace(config=more), path, Console(quiet=True))
    after = records.read(path)
    assert {cell.rule for cell in after.keys() - before.keys()} == {"dtnh"}
    assert len(after) == TINY_CELLS + 4
    tables = summary.summarize(after, "test")["tables"]
    assert sorted(
        (row["rule"], row["seeds"], table["cells"], *table["regularizers"])
        for table in tables
        for row in table["rules"]
    ) == [("dtnh", 1, 4, "l2_sp"), ("sum", 2, 4, "feature_map")]


@pytest.fixture
def nothing_kept(monkeypatch):
    """Leaves jax's configuration as it is: this process runs other tests too."""
    monkeypatch.setattr("dtnh_jax.finetune.directories.keep_compiled", lambda _: None)


def test_the_command(capsys, finished, data_dir, tmp_path, nothing_kept):
    folder = tmp_path / "run"
    where = ["--run-dir", str(folder), "--data-dir", str(data_dir)]
    records.open_folder(dataclasses.replace(TINY, run_dir=folder))
    (folder / "cells.jsonl").write_bytes(finished.read_bytes())
    assert main(["matrix", *TINY_WORDS, *where]) == 0  # nothing is left to train
    out, err = capsys.readouterr()
    assert f"{TINY_CELLS} cells: 2 pairs of source and target, 2 seeds" in out
    assert f"{TINY_CELLS} done, 0 to do" in out
    assert "Source fashion: " in out
    assert not err
    report = (folder / "report.md").read_text()
    assert "### fashion > digits-5, feature_map with sgd" in report
    assert "on test images" in report
    assert (folder / "feature_map-sgd.png").stat().st_size > 10_000
    results = json.loads((folder / "results.json").read_text())
    assert [row["rule"] for row in results["tables"][0]["rules"]] == ["sum"]

    only = ["matrix", "--report-only", "--run-dir", str(folder)]
    (folder / "config.json").unlink()
    assert main(only) == 0  # from the records alone
    assert json.loads((folder / "results.json").read_text()) == results
    assert main([*only, "--split", "validation"]) == 0
    assert "on validation images" in (folder / "report.md").read_text()


def test_learning_rates_are_chosen_on_validation_images():
    rates = catalogue.LEARNING_RATES["sgd"]
    found = {
        cell: {
            "validation": 0.5 + (0.1 if cell.learning_rate in rates[1:3] else 0.0),
            "test": float(cell.learning_rate == rates[-1]),
        }
        for cell in cells.tuning_cells("a", "b", "sgd")
    }
    assert cells.chosen_rate(found, "a", "b", "sgd") == rates[1]  # the smaller of two
    other = next(name for name in rules.OPTIMIZERS if name != "sgd")
    assert cells.chosen_rate(found, "a", "b", other) is None
    del found[next(iter(found))]
    assert cells.chosen_rate(found, "a", "b", "sgd") is None


def test_no_source_has_seen_images_of_its_target():
    pairs = cells.pairs(Config())
    assert len(pairs) == 15
    assert ("mnist", "mnist-5") not in pairs
    for source, target in pairs:
        assert catalogue.SOURCES[source].images != catalogue.TARGETS[target].images


def test_photographs_are_for_the_large_network_alone():
    config = Config(sources=("fashion", "imagenet"), targets=("elpv", "digits-5"))
    assert cells.pairs(config) == [("fashion", "digits-5"), ("imagenet", "elpv")]
    assert not {"imagenet", "elpv"} & {*Config().sources, *Config().targets}
    tuning = cells.tuning_cells("imagenet", "elpv", "sgd")
    assert [cell.learning_rate for cell in tuning] == [0.003, 0.01, 0.03]
    assert {cell.seed for cell in tuning} == {0}
    counts = cells.count_by_target(config, {})
    assert counts.keys() == {"elpv", "digits-5"}
    # The large network has fewer learning rates and tuning seeds: of 4 times 2 and of
    # 3 times 1, the grid wants two and one.
    assert counts["digits-5"][0] - counts["elpv"][0] == (8 - 2) - (3 - 1)
    assert cells.count(config, {}) == (sum(n for n, _ in counts.values()), 0)


def test_the_budget_is_by_what_cells_of_a_kind_took(tiny, tmp_path):
    config = dataclasses.replace(TINY, sources=("fashion", "imagenet"))
    config = dataclasses.replace(config, targets=("digits-5", "elpv"))
    grid = tiny._replace(config=config)
    taken = {"digits-5": 10.0, "elpv": 100.0}
    done = {
        cell: {**cell._asdict(), "validation": 0.0, "seconds": taken[cell.target]}
        for pair in cells.pairs(config)
        for cell in cells.tuning_cells(*pair, "sgd")
    }
    assert records.seconds(done) == 8 * 10 + 3 * 100
    left = {
        target: total - complete
        for target, (total, complete) in cells.count_by_target(config, done).items()
    }
    path = tmp_path / "cells.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in done.values()))
    seconds = 10.0 * left["digits-5"] + 100.0 * left["elpv"]
    _, line, licence = study.introduction(grid, path)
    assert f"11 done, {sum(left.values())} to do: about 0:" in line
    assert progress.duration(seconds) in line
    assert progress.duration(seconds / 2) in line
    assert licence.startswith("Images of elpv: CC BY-NC-SA 4.0")


def refused(capsys, *arguments):
    """Returns the one line that a command is refused with."""
    try:
        status = main(["matrix", *arguments])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sources letters", "`--sources` must be of fashion, mnist, shuffled, abs"),
        ("--targets digits", "`--targets` must be of digits-5, digits-20, fashion-20"),
        ("--sources imagenet", "`--sources` and `--targets` must have a pair that fi"),
        ("--sources mnist --targets mnist-5 elpv", "`--sources` and `--targets` must"),
        ("--photographs.steps 0", "`--photographs.steps` must be at least 1, got 0"),
        ("--rules sum sum", "`--rules` must name each once, got sum sum"),
        ("--rules mgda", "`--rules` must be of none, sum, dtnh, bloop, pcgrad, spd, c"),
        ("--optimizers lion", "`--optimizers` must be of sgd, adamw, got 'lion'"),
        ("--regularizers", "`--regularizers` must name at least 1, got none"),
        ("--strengths 1 0", "`--strengths` must be above 0 and finite, got 0.0"),
        ("--seeds 0", "`--seeds` must be at least 1, got 0"),
        ("--widths 8 16", "`--widths` must be 3 numbers of at least 1, got 8 16"),
        ("--test-per-class 150", "Target digits-5: Class 0 has 178 examples, but"),
        ("--report-only", "{run}/cells.jsonl is not readable"),
        ("--run-dir {file}", "{file} is no folder of `dtnh matrix` and not empty"),
    ],
)
def test_what_can_not_be_meant_is_refused_in_one_line(
    capsys, tmp_path, data_dir, nothing_kept, arguments, message
):
    names = {"file": tmp_path / "file", "run": tmp_path / "run"}
    names["file"].write_text("")
    words = [word.format(**names) for word in arguments.split()]
    if "--run-dir" not in words:
        words += ["--run-dir", str(names["run"])]
    if "--targets" not in words:
        words += ["--targets", "digits-5"]
    err = refused(capsys, *words, "--data-dir", str(data_dir))
    assert err.startswith("dtnh: " + message.format(**names))
    assert err.count("\n") == 1
    assert not names["run"].exists()


def test_a_folder_of_other_cells_is_refused(tmp_path):
    config = dataclasses.replace(TINY, run_dir=tmp_path / "run")
    path = records.open_folder(config)
    records.open_folder(dataclasses.replace(config, seeds=9, rules=("dtnh",)))
    with pytest.raises(ValueError, match="whose `--steps` is 3, got 4: give another"):
        records.open_folder(dataclasses.replace(config, steps=4))
    with pytest.raises(ValueError, match="whose `--widths` is 2 3 4, got 2 2 2"):
        records.open_folder(dataclasses.replace(config, widths=(2, 2, 2)))
    other = dataclasses.replace(TINY.photographs, steps=7)
    with pytest.raises(ValueError, match=r"whose `--photographs\.steps` is 2, got 7"):
        records.open_folder(dataclasses.replace(config, photographs=other))
    path.write_text('{"source": 3}\n')
    with pytest.raises(ValueError, match=r"must have a cell in every line, .* line 1"):
        records.read(path)


def test_a_folder_from_before_there_were_photographs_goes_on(tmp_path):
    config = dataclasses.replace(TINY, run_dir=tmp_path / "run")
    path = records.open_folder(config)
    options = path.with_name("config.json")
    now = json.loads(options.read_text())
    before = {key: value for key, value in now.items() if "photographs" not in key}
    assert len(before) < len(now)
    options.write_text(json.dumps({**before, "learning rates of lion": [0.1]}))
    assert records.open_folder(config) == path
    after = json.loads(options.read_text())
    assert after == {**now, "learning rates of lion": [0.1]}


def test_progress_on_a_terminal_and_in_a_log(monkeypatch):
    def shown(**options):
        file = io.StringIO()
        console = Console(file=file, width=120, **options)
        with progress.display(console, total=5, done=2) as show:
            for name in ("one", "two", "three"):
                show(name, "validation 50.0%")
        return file.getvalue()

    bar = shown(force_terminal=True)
    assert "5/5" in bar
    assert "three: validation 50.0%" in bar
    (line,) = shown().splitlines()  # not one for each
    assert line == "[5/5] three: validation 50.0%; 0:00:00 left"
    now = itertools.count(step=40.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    first, *_ = shown().splitlines()
    assert first == "[3/5] one: validation 50.0%; 0:01:20 left"


def test_the_figure_has_a_panel_for_each_pair(tmp_path):
    points = [(0.01, 0.02, None, None), (1.0, -0.3, -0.4, -0.2)]
    figure = plots.strength_sweep({"a": {"sum": points}, "b": {"dtnh": points}})
    figure.savefig(tmp_path / "sweep.png")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["a", "b"]
    assert figure.axes[0].lines[1].get_ydata().tolist() == [2.0, -30.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "sum",
        "dtnh",
    ]
    with pytest.raises(ValueError, match="must have strengths above 0, got 0"):
        plots.strength_sweep({"a": {"sum": [(0.0, 0.0, None, None)]}})
    with pytest.raises(ValueError, match="at least 1 panel, got 0"):
        plots.strength_sweep({})


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["matrix", "--help"])
    assert exit_info.value.code == 0
    out, _ = capsys.readouterr()
    for option in ("--sources", "--strengths", "--rules", "--split", "--report-only"):
        assert option in out
    assert str(pathlib.Path.home()) not in out
