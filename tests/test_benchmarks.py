"""Benchmarks: that they run and compare the right things, not how fast they are."""

import itertools
import json
import subprocess
import sys
import time

import pytest

from dtnh_jax.benchmarks import timing


def test_ratios_are_within_rounds_and_warm_up_does_not_count(monkeypatch):
    clock = itertools.accumulate(itertools.cycle([0.0, 5.0, 0.0, 10.0]))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls = []
    times = timing.interleaved(
        {"one": lambda: calls.append(1), "two": lambda: calls.append(2)},
        rounds=3,
        warm_up=0,
    )
    assert calls == [1, 2] * 3
    assert times["one"].median == 5
    assert times["two"].ratio == times["two"].ratio_high == 2
    with pytest.raises(ValueError, match="`calls` and `rounds` must be at least one"):
        timing.interleaved({}, rounds=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "l3"], "`--methods` must be one of scratch, "),
        (["--methods", "l2"], "`--methods` must have fine-tuning, got none"),
        (["--rounds", "0"], "`--rounds` must be at least 1"),
    ],
)
def test_the_command_names_what_is_wrong(options, message):
    command = [sys.executable, "-m", "dtnh_jax.benchmarks", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_command_writes_a_ratio_for_every_method(tmp_path):
    path = tmp_path / "times.json"
    options = "--batch-size 2 --image-size 32 --rounds 2 --methods lora lora_decay+dtnh"
    command = [sys.executable, "-m", "dtnh_jax.benchmarks", *options.split()]
    subprocess.run([*command, "--output", str(path)], check=True)
    times = json.loads(path.read_text())["times"]
    assert times["lora"]["ratio"] == 1
    assert times["lora_decay+dtnh"]["median"] > 0
