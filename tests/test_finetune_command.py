"""The command as its users meet it: real weights, real photographs, tiny settings."""

import itertools
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import tiny_network
from kill_and_resume import deterministic

from dtnh_jax._cli import main
from dtnh_jax.finetune.regularizers import REGULARIZERS
from dtnh_jax.finetune.weights.sources import SOURCES

TINY = {
    "--source": "tiny",
    "--steps": "12",
    "--checkpoint-every": "5",
    "--image-size": "16",
    "--seeds": "2",
    "--batch-size": "4",
    "--train-per-class": "4",
    "--test-per-class": "5",
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def start(data_dir, run_dir):
    """Starts the command in a process of its own that knows the tiny network."""
    script = pathlib.Path(__file__).parent / "tiny_network.py"
    command = [
        sys.executable,
        "-W",
        "error",
        str(script),
        *itertools.chain(*TINY.items()),
    ]
    return subprocess.Popen(
        [*command, "--data-dir", str(data_dir), "--run-dir", str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert not err
    return out


def wait_for_lines(process, path, count):
    """Waits until a process has logged so many steps."""
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.e2e
def test_an_interrupted_run_goes_on_to_bitwise_the_same_results(data_dir, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    out = finish(start(data_dir, whole))
    assert "CC BY-NC-SA 4.0" in out

    process = start(data_dir, stopped)
    wait_for_lines(process, stopped / "metrics.jsonl", 2 * 12 + 8)
    process.kill()
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL

    process = start(data_dir, stopped)
    wait_for_lines(process, stopped / "metrics.jsonl", 6 * 12 + 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "l2_sp+dtnh-seed0: resumes after step 5 of 12" in out
    assert err == (
        f"Interrupted; finished work is in {stopped}. "
        "The same command resumes from there.\n"
    )
    assert not (stopped / "results.json").exists()

    out = finish(start(data_dir, stopped))
    assert re.search(r"seed1: resumes after step \d+ of 12", out)
    assert deterministic(stopped) == deterministic(whole)
    written = {path.name for path in stopped.iterdir()}
    assert written >= {"report.md", "accuracy.png", "conflict.png", "predictions.png"}
    assert not any((stopped / "checkpoints").iterdir())


@pytest.fixture
def nothing_kept(monkeypatch):
    """Leaves jax's configuration as it is: this process runs other tests too."""
    monkeypatch.setattr("dtnh_jax.finetune.directories.keep_compiled", lambda _: None)


@pytest.mark.e2e
def test_the_real_network_and_photographs(capsys, data_dir, tmp_path, nothing_kept):
    run_dir = tmp_path / "run"
    arguments = (
        "--methods fine-tuning --steps 2 --image-size 32 --seeds 1 --batch-size 4 "
        f"--train-per-class 4 --test-per-class 5 --run-dir {run_dir} "
        f"--data-dir {data_dir}"
    ).split()
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    assert "efficientnet-lite0" in out
    before = (run_dir / "results.json").read_bytes()
    assert main(arguments) == 0  # nothing is left to do
    assert (run_dir / "results.json").read_bytes() == before


@pytest.mark.e2e
def test_trust_is_chosen_by_a_race_over_folds(capsys, data_dir, tmp_path):
    SOURCES["tiny"] = tiny_network.TINY
    options = {**TINY, "--seeds": "1", "--data-dir": str(data_dir)}
    arguments = [*itertools.chain(*options.items()), "--run-dir", str(tmp_path)]
    arguments += ["--methods", "fine-tuning", "l2_sp+never_hurt"]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    plain, cell = results["cells"]
    assert "trust" not in plain
    trained = [
        json.loads(path.read_text()) for path in (tmp_path / "trust/cells").iterdir()
    ]
    assert cell["trainings"] == len(trained) + 1
    assert 2 <= len(trained) <= 8
    # Of eight training photographs, four folds hold out two each.
    assert {len(each["predictions"]) for each in trained} == {2}
    assert len(cell["predictions"]) == 10
    out = capsys.readouterr().out
    assert f"trust {cell['trust']:g}" in out
    assert f"in {cell['trainings']} trainings" in (tmp_path / "report.md").read_text()
    # What is complete is not trained again.
    (tmp_path / "cells/l2_sp+never_hurt-seed0.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "trust").rglob("*")}
    assert main(arguments) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["cells"] == results["cells"]
    cells = [path for path in before if path.parent.name == "cells"]
    assert all(path.stat().st_mtime_ns == before[path] for path in cells)


def test_tuning_chooses_on_validation_and_both_forms_get_it(
    capsys, monkeypatch, data_dir, tmp_path, nothing_kept
):
    monkeypatch.setitem(SOURCES, "tiny", tiny_network.TINY)
    options = {**TINY, "--seeds": "1", "--steps": "2", "--validation-per-class": "9"}
    options |= {"--run-dir": str(tmp_path / "run"), "--data-dir": str(data_dir)}
    methods = ["--methods", "l2_sp", "l2_sp+dtnh", "--tune"]
    assert main([*itertools.chain(*options.items()), *methods]) == 0
    assert "chosen" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    plain, *rows = results["tuning"]
    assert plain["method"] == "fine-tuning"
    assert tuple(row["strength"] for row in rows) == REGULARIZERS["l2_sp"].grid
    chosen = max(rows, key=lambda row: row["accuracies"])
    assert results["strengths"] == {"l2_sp": chosen["strength"]}
    assert {cell["strength"] for cell in results["cells"]} == {chosen["strength"]}
    assert "## Strengths" in (tmp_path / "run" / "report.md").read_text()


def refused(capsys, *arguments):
    """Returns the one line that a command is refused with."""
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--source resnet", "`--source` must be one of efficientnet-lite0, eff"),
        ("--target mnist", "`--target` must be one of elpv, elpv-doubtful, folder:"),
        ("--methods l2_sp+ntk", "`--methods` must be one of scratch, fine-tuning"),
        ("--methods l2_sp l2_sp", "`--methods` must name each method once"),
        ("--methods", "`--methods` must name at least one method"),
        ("--strength l3=1", "`--strength` must be one of l2, l2_sp, l1_sp, "),
        ("--tuning-seeds 2", "`--tuning-seeds` has no effect without `--tune`"),
        ("--tune --tuning-seeds 0", "`--tuning-seeds` must be at least 1, got 0"),
        ("--strength l2_sp=-1", "`--strength l2_sp` must be at least 0 and finite"),
        ("--strength l2_sp=inf", "`--strength l2_sp` must be at least 0 and finite"),
        ("--methods scratch --strength l2_sp=1", "`--strength l2_sp` has no effect"),
        ("--methods scratch --tune", "`--tune` has no effect"),
        ("--steps 3 --epochs 2", "`--steps` and `--epochs` must not be given together"),
        ("--steps 0", "`--steps` must be at least 1, got 0"),
        ("--seeds 0", "`--seeds` must be at least 1, got 0"),
        ("--tune --validation-per-class 0", "`--validation-per-class` must be at le"),
        ("--learning-rate 0", "`--learning-rate` must be above 0 and finite, got 0.0"),
        ("--epochs nan", "`--epochs` must be above 0 and finite, got nan"),
        ("--run-dir {file}", "{file} is no run folder and not empty"),
        ("--train-per-class 700 --data-dir {data}", "Class 1 has 715 examples, but 1"),
    ],
)
def test_what_can_not_be_meant_is_refused_in_one_line(
    capsys, tmp_path, data_dir, nothing_kept, arguments, message
):
    file = tmp_path / "file"
    file.write_text("")
    names = {"file": file, "data": data_dir}
    words = [word.format(**names) for word in arguments.split()]
    if "--run-dir" not in words:
        words += ["--run-dir", str(tmp_path / "run")]
    err = refused(capsys, *words)
    assert err.startswith("dtnh: " + message.format(**names))
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--stpes", "3"], ["--steps", "three"], ["--strength", "l2_sp"], ["--scope", "x"]],
)
def test_what_can_not_be_read_is_refused(capsys, arguments):
    assert arguments[0] in refused(capsys, *arguments)


def test_a_folder_of_another_configuration_is_refused(capsys, tmp_path):
    from dtnh_jax.finetune.config import Config
    from dtnh_jax.finetune.runs.folder import open_folder

    open_folder(Config(run_dir=tmp_path / "run"), {})
    run_dir = ["--run-dir", str(tmp_path / "run")]
    err = refused(capsys, *run_dir, "--steps", "7", "--seeds", "9")
    assert "whose `--steps` is None, got 7: set another `--run-dir`" in err
    err = refused(capsys, *run_dir, "--strength", "l2_sp=0.5")
    assert "whose `--strength` is l2_sp=" in err


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "dtnh_jax.finetune.command", raising=False)
    monkeypatch.setitem(sys.modules, "tyro", None)
    err = refused(capsys, "--steps", "3")
    assert err.startswith("dtnh: the package tyro is missing: pip install")


def test_studies_that_are_not_installed_are_in_the_repository(capsys, monkeypatch):
    for name in [x for x in sys.modules if x.startswith("dtnh_jax.studies.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dtnh_jax.studies", None)
    err = refused(capsys, "study")
    assert err.startswith("dtnh: the study and the benchmarks are only in the")
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    monkeypatch.delitem(sys.modules, "dtnh_jax.benchmarks", raising=False)
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module("dtnh_jax.benchmarks", run_name="__main__")
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == err


@pytest.mark.e2e
def test_output_that_nobody_reads_ends_the_command_without_a_word():
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "dtnh_jax.finetune", "--help"],
        stdout=writes,
        stderr=subprocess.PIPE,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


def test_missing_photographs_are_named(capsys, monkeypatch, tmp_path, nothing_kept):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    err = refused(
        capsys, "--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")
    )
    assert "pip install elpv-dataset" in err
    assert err.count("\n") == 1


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    out, _ = capsys.readouterr()
    for option in ("--methods", "--strength", "--tune", "--scope", "--seeds"):
        assert option in out
    assert str(pathlib.Path.home()) not in out
