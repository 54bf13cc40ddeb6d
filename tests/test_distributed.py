"""Two processes of two devices each, over the loopback: what one process would do."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pictures
import pytest

STEPS = 8
OPTIONS = {
    "--source": "tiny",
    "--steps": str(STEPS),
    "--checkpoint-every": "3",
    "--image-size": "16",
    "--seeds": "1",
    "--batch-size": "8",
    "--train-per-class": "8",
    "--test-per-class": "5",
}
METHODS = ["feature_map+dtnh", "l2_sp"]
BOUND = 300  # seconds for whatever has to end by itself


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def start(data_dir, run_dir, *options, devices, cwd=None):
    script = pathlib.Path(__file__).parent / "tiny_network.py"
    # Of a flag that is given twice, as this one, the last counts.
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ['XLA_FLAGS']} {count}"
    places = ["--data-dir", str(data_dir), "--run-dir", str(run_dir)]
    options = [*itertools.chain(*OPTIONS.items()), *places, *options]
    return subprocess.Popen(
        [sys.executable, str(script), *options, "--methods", *METHODS],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def start_pair(data_dir, run_dir, *options, cwds=(None, None)):
    """Starts two processes that find each other at a free port."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = ["--distributed", "--coordinator", address, "--processes", "2"]
    together += ["--heartbeat", "30", "--mesh", "data=2,fsdp=2", *options]
    return [
        start(
            *(data_dir, run_dir, *together, "--process-id", str(number)),
            devices=2,
            cwd=cwd,
        )
        for number, cwd in enumerate(cwds)
    ]


def finish(*processes):
    """Returns what they print; all have to end well."""
    said = [process.communicate(timeout=BOUND) for process in processes]
    for process, (_, err) in zip(processes, said):
        assert process.returncode == 0, err
    return [out for out, _ in said]


def lines(run_dir):
    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def wait_for_lines(process, run_dir, count):
    path = run_dir / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
    """What one process with one device does."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    finish(start(data_dir, run_dir, devices=1))
    return run_dir


def assert_same_curves(run_dir, alone):
    ours, theirs = lines(run_dir), lines(alone)
    assert [(x["cell"], x["step"]) for x in ours] == [
        (x["cell"], x["step"]) for x in theirs
    ]
    assert len(ours) == STEPS * len(METHODS)
    for key in ("loss", "regularizer", "cosine", "loss_norm"):
        values = [[x[key] for x in each] for each in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-4)
    found, expected = (
        json.loads((each / "results.json").read_text())["cells"]
        for each in (run_dir, alone)
    )
    assert found == expected  # every prediction


@pytest.mark.e2e
def test_two_processes_have_the_curves_of_one(data_dir, alone, tmp_path):
    run_dir = tmp_path / "run"
    first, second = finish(*start_pair(data_dir, run_dir))
    assert "Report:" in first
    # One of them prints, beside the library that connects them.
    # Its threads write at once, so that a line may be cut from its end.
    said = [line for line in second.splitlines() if line.strip()]
    assert not [x for x in said if "[Gloo]" not in x and "peer ranks" not in x]
    assert_same_curves(run_dir, alone)
    measured = json.loads((run_dir / "results.json").read_text())["measured"]
    assert measured["mesh"] == {"data": 2, "fsdp": 2}


@pytest.mark.e2e
def test_the_loss_of_a_process_ends_the_other_and_a_new_pair_goes_on(
    data_dir, alone, tmp_path
):
    run_dir = tmp_path / "run"
    pair = start_pair(data_dir, run_dir)
    wait_for_lines(pair[0], run_dir, 5)
    pair[1].kill()
    _, err = pair[0].communicate(timeout=BOUND)
    pair[1].communicate(timeout=BOUND)
    assert pair[0].returncode not in (0, -signal.SIGKILL)
    assert not (run_dir / "results.json").exists()
    out, _ = finish(*start_pair(data_dir, run_dir))
    assert re.search(r"feature_map\+dtnh-seed0: resumes after step \d of 8", out), err
    assert_same_curves(run_dir, alone)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_one_step(data_dir, alone, tmp_path):
    run_dir = tmp_path / "run"
    pair = start_pair(data_dir, run_dir)
    wait_for_lines(pair[0], run_dir, 2)
    pair[1].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=BOUND) for process in pair]
    assert [process.returncode for process in pair] == [128 + signal.SIGINT] * 2, said
    done = len(lines(run_dir))
    # It goes on with one process and another mesh, from where both of them stopped.
    options = ["--mesh", "data=2"]
    (out,) = finish(start(data_dir, run_dir, *options, devices=2))
    if done % STEPS:
        assert f"resumes after step {done % STEPS} of {STEPS}" in out
    assert_same_curves(run_dir, alone)


@pytest.mark.e2e
def test_processes_that_have_other_pictures_are_refused(data_dir, tmp_path):
    cwds = [tmp_path / name for name in ("here", "there")]
    for cwd in cwds:
        pictures.folders(cwd / "photos", ["cup", "mug"], 13)
    (cwds[1] / "photos" / "mug" / "005.png").write_bytes(b"not copied")
    run_dir = tmp_path / "run"
    target = ["--target", "folder:photos", "--train-per-class", "7"]
    pair = start_pair(data_dir, run_dir, *target, cwds=cwds)
    said = [process.communicate(timeout=BOUND)[1] for process in pair]
    assert [process.returncode for process in pair] == [2, 2], said
    assert "folder:photos must have the same pictures in every process, got" in said[0]
    assert not run_dir.exists()
