"""The study of accelerators, in tiny sizes: only the device is new on a device."""

import importlib.util
import json

import pytest

from dtnh_jax.studies.accelerator import check, study, torch_steps, tracing

TINY = study.TINY._replace(lora=(True,))


@pytest.fixture
def run(tmp_path):
    def run(seconds):
        results = study.run(
            tmp_path, seconds=seconds, workers=2, scale=TINY, dtypes=("float32",)
        )
        return results, json.loads((tmp_path / "results.json").read_text())["rows"]

    return run


@pytest.mark.e2e
def test_updates_and_rules_are_right_on_this_device(capsys):
    assert check.run(tiny=True, workers=2) == 0
    assert capsys.readouterr().out.rstrip().endswith("passed, 0 failed")


@pytest.mark.e2e
def test_every_row_is_measured_or_has_a_reason(run):
    results, rows = run(seconds=600.0)
    skipped = {row["name"]: row["skipped"] for row in rows if row["skipped"]}
    assert not skipped
    timed = [row for row in rows if row["milliseconds"]]
    assert len(timed) >= 30
    assert all(row["memory"]["peak"] > 0 for row in timed)
    by_hand = [row["more"].get("differs from by hand by") for row in rows]
    assert max(x for x in by_hand if x is not None) < 1e-6
    assert len(results.brief()) < 8_000


def test_without_time_all_rows_are_listed(run):
    _, rows = run(seconds=0.0)
    assert len(rows) >= 30
    assert all("needed" in row["skipped"] or "left" in row["skipped"] for row in rows)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="has torch")
def test_without_torch_its_rows_say_so(tmp_path):
    results = torch_steps.run(tmp_path, seconds=9.0)
    assert {row.skipped for row in results.rows.values()} == {"torch is not installed"}


def test_a_trace_tells_copies_to_the_host():
    stream = {"name": "thread_name", "args": {"name": "Stream #3(Compute,MemcpyD2H)"}}
    others = {"name": "thread_name", "args": {"name": "XLA Ops"}, "tid": 9}
    kernel = {"ph": "X", "name": "fusion", "dur": 2}
    events = [
        stream,
        others,
        {**kernel, "ts": 0},
        {**kernel, "ts": 6},
        {**kernel, "ts": 0, "tid": 9},
        {**kernel, "ts": 3, "name": "MemcpyD2H", "dur": 1},
    ]
    found = tracing.summary(events, updates=2)
    assert found["kernels per update"] == 1
    assert found["copies to the host"] == 1
    assert found["busy share"] == pytest.approx(5 / 8)
    assert found["longest gap us"] == 2
