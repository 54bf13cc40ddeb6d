"""Benchmarks: that they run and compare the right things, not how fast they are."""

import itertools
import json
import time

import pytest
import tiny_network

from dtnh_jax.benchmarks import timing
from dtnh_jax.benchmarks.__main__ import main
from dtnh_jax.finetune.sources import SOURCES


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
        ("--methods l3", "`--methods` must be one of scratch, "),
        ("--methods l2", "`--methods` must have fine-tuning, got none"),
        ("--rounds 0", "`--rounds` must be at least 1, got 0"),
        ("--source resnet", "`--source` must be one of efficientnet-lite0, got"),
    ],
)
def test_the_command_names_what_is_wrong(options, message, capsys):
    assert main(options.split()) == 2
    assert message in capsys.readouterr().err


def test_the_command_writes_a_ratio_for_every_method(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "tiny", tiny_network.TINY)
    path = tmp_path / "times.json"
    methods = "fine-tuning l2_sp_fisher+dtnh lora_decay+dtnh lora"
    options = "--source tiny --batch-size 2 --image-size 16 --rounds 2"
    command = f"{options} --methods {methods} --output {path}"
    assert main(command.split()) == 0
    times = json.loads(path.read_text())["times"]
    assert sorted(times) == sorted(methods.split())
    assert times["lora"]["ratio"] == times["fine-tuning"]["ratio"] == 1
    assert times["lora_decay+dtnh"]["median"] > 0
