"""What the report makes of the records of a grid, worked out by hand."""

import json

import numpy as np
import pytest
from scipy import stats

from dtnh_jax.studies.matrix import (
    comparison,
    harm,
    report,
    results,
    significance,
    summary,
)
from dtnh_jax.studies.matrix.cells import Cell


def record(rule, strength, seed, accuracy, **changes):
    regularizer = "none" if rule in ("none", "scratch") else "l2_sp"
    cell = Cell("a", "b", regularizer, strength, rule, "sgd", seed, 0.1)
    seen = {"cosine": None, "conflict": None}
    if regularizer == "l2_sp":
        seen = {"cosine": -0.25, "conflict": 0.5}
    cell = cell._replace(**changes)
    accuracies = {"test": accuracy, "validation": 1 - accuracy}
    return cell, {**cell._asdict(), **accuracies, **seen, "loss": 1.0, "seconds": 2.0}


def test_numbers_of_the_report_are_those_worked_out_by_hand():
    found = dict(
        record(rule, strength, seed, plain + difference)
        for rule, strength, differences in [
            ("none", 0.0, (0.0, 0.0, 0.0)),
            ("scratch", 0.0, (-0.2, -0.3, -0.4)),
            ("sum", 1.0, (0.02, 0.0, 0.01)),
            ("sum", 100.0, (-0.10, -0.11, -0.12)),
            ("dtnh", 1.0, (0.01, 0.01, 0.01)),
            ("dtnh", 100.0, (-0.04, 0.01, 0.0)),
        ]
        for seed, (plain, difference) in enumerate(zip((0.7, 0.8, 0.75), differences))
    )
    # Neither has a partner: another learning rate, another seed.
    found |= [record("sum", 1.0, 0, 0.1, learning_rate=0.3), record("sum", 1.0, 7, 0.1)]
    results = summary.summarize(found, "test")

    (table,) = results["tables"]
    assert (table["cells"], table["pairs"]) == (2, ["a > b"])
    assert (table["regularizers"], table["strengths"]) == (["l2_sp"], [1.0, 100.0])
    sum_, dtnh = table["rules"]
    assert (sum_["rule"], dtnh["rule"]) == ("sum", "dtnh")
    near = pytest.approx
    # The t of -0.10, -0.11 and -0.12 is -19, which is beyond Holm's 0.0125 for two.
    assert (sum_["harmed"], sum_["surely_harmed"], sum_["helped"]) == (1, 1, 0)
    assert (dtnh["harmed"], dtnh["surely_harmed"], dtnh["helped"]) == (0, 0, 1)
    assert sum_["mean"]["mean"] == near((0.01 - 0.11) / 2)
    # Over seeds: of the mean of both cells, -0.04, -0.055 and -0.055.
    spread = 4.302653 * np.std([-0.04, -0.055, -0.055], ddof=1) / 3**0.5
    assert sum_["mean"]["high"] == near(-0.05 + spread)
    assert sum_["strongest"]["mean"] == sum_["worst"]["mean"] == near(-0.11)
    # `record` has validation mirror test, so that the worst strength is chosen.
    assert sum_["chosen"]["mean"] == near(-0.11)
    assert sum_["chosen"]["high"] == near(-0.11 + 4.302653 * 0.01 / 3**0.5)
    assert [x["strength"] for x in table["sweeps"]] == [1.0, 100.0] * 2
    assert table["sweeps"][1]["mean"] == near(-0.11)
    assert (sum_["cosine"], sum_["conflict"]) == (-0.25, 0.5)

    assert results["seconds"] == 2.0 * len(found)

    row = results["rows"][0]
    assert row["rule"] == "sum"
    assert [each["strength"] for each in row["strengths"]] == [1.0, 100.0]
    # Student's 0.975 quantile with 2 degrees of freedom is 4.302653.
    half = 4.302653 * 0.01 / 3**0.5
    worst = row["worst"]
    assert (worst["strength"], worst["mean"]) == (100.0, near(-0.11))
    assert (worst["low"], worst["high"]) == (near(-0.11 - half), near(-0.11 + half))
    assert row["chosen"]["strength"] == 100.0

    (pair,) = [pair for pair in results["pairs"] if pair["learning_rate"] == 0.1]
    assert pair["fine_tuning"]["mean"] == near(0.75)
    assert pair["scratch"]["mean"] == near(0.45)
    assert pair["fine_tuning_minus_scratch"]["mean"] == near(0.3)

    mirrored = summary.summarize(found, "validation")["tables"][0]["rules"][0]
    assert mirrored["mean"]["mean"] == near(-sum_["mean"]["mean"])
    alone = {cell: found[cell] for cell in found if cell.seed == 0}
    (first, *_) = summary.summarize(alone, "test")["tables"][0]["rules"]
    assert (first["harmed"], first["seeds"]) == (0, 1)  # one seed says nothing


def test_only_rules_with_the_same_cells_are_in_one_table():
    def cells(rule, strengths):
        return dict(
            record(rule, strength, seed, 0.5 + strength * seed / 1000)
            for strength in strengths
            for seed in (0, 1)
        )

    found = cells("sum", (1.0, 10.0)) | cells("dtnh", (1.0, 10.0))
    found |= cells("bloop", (10.0,)) | cells("none", (0.0,))
    large, small = summary.summarize(found, "test")["tables"]
    assert [rule["rule"] for rule in large["rules"]] == ["sum", "dtnh"]
    assert [rule["rule"] for rule in small["rules"]] == ["sum", "dtnh", "bloop"]
    assert (large["strengths"], small["strengths"]) == ([1.0, 10.0], [10.0])
    for rule in small["rules"]:
        assert rule["mean"]["mean"] == pytest.approx(0.005)


@pytest.mark.parametrize(
    "values", [(0.01, -0.02, 0.03), (-0.1, -0.2), (0.3, 0.2, 0.1, 0.2)]
)
def test_the_chance_is_that_of_the_paired_t_test(values):
    expected = stats.ttest_1samp(values, 0, alternative="less").pvalue
    assert significance.chance_of_harm(values) == pytest.approx(expected)


def test_the_chance_of_differences_that_do_not_differ():
    found = [significance.chance_of_harm([x, x]) for x in (-0.1, 0.0, 0.1)]
    assert found == [0.0, 0.5, 1.0]
    assert significance.chance_of_harm([0.1]) is None


def test_many_looks_are_taken_into_account():
    # Holm's limits for four tests at 0.025: 0.00625, 0.00833, 0.0125 and 0.025.
    assert significance.surely_below([0.5, 0.008, 0.006, None, 0.02]) == 2
    assert significance.surely_below([0.02, 0.012, 0.008, 0.006]) == 4
    assert significance.surely_below([0.007, 0.001 + 0.006, 0.008, 0.009]) == 0
    assert significance.surely_below([None]) == 0


def test_rules_are_compared_at_the_strength_that_suits_the_plain_sum():
    # `record` has validation mirror test, so the plain sum is validated best at 10.
    found = dict(
        record(rule, strength, seed, accuracy + seed / 100)
        for rule, strength, accuracies in [
            ("none", 0.0, (0.70, 0.71)),
            ("sum", 1.0, (0.80, 0.80)),
            ("sum", 10.0, (0.60, 0.62)),
            ("dtnh", 1.0, (0.10, 0.10)),
            ("dtnh", 10.0, (0.65, 0.66)),
        ]
        for seed, accuracy in enumerate(accuracies)
    )
    compared = comparison.compare(found, ["dtnh", "never-hurt"], "test")
    (row,) = compared["rows"]
    near = pytest.approx
    assert row["strength"] == 10.0
    assert row["fine_tuning"]["mean"] == near(0.71)
    assert row["sum"]["mean"] == near(0.615)
    difference = row["rules"]["dtnh"]["difference"]
    assert difference["mean"] == near(0.045)
    half = stats.t.ppf(0.975, 1) * 0.01 / 2
    assert difference["low"] == near(0.045 - half)
    (total,) = compared["totals"].values()
    assert total["mean"] == near(0.045)
    assert [total[key] for key in ("better", "worse", "surely_better")] == [1, 0, 0]


def test_all_of_it_is_in_the_report(tmp_path):
    lines = [
        record(rule, strength, seed, 0.5 + offset + seed / 100)[1]
        for rule, strength, offset in [
            ("none", 0.0, 0.0),
            ("sum", 1.0, -0.1),
            ("dtnh", 1.0, 0.1),
        ]
        for seed in (0, 1)
    ]
    write = lambda name, rows: (tmp_path / name).write_text(  # noqa: E731
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    write("cells.jsonl", lines)
    seen = {"fresh_harm": 0.5, "raised": 0.75, "fresh_raised": 1.0}
    seen |= {"change": 1e-3, "fresh_change": None}
    write("harm.jsonl", [{**lines[2], **seen, "harm": 0.25}])
    found = results.gather(tmp_path, "test")
    assert found["harm"] == [
        {"rule": "sum", "optimizer": "sgd", "cells": 1, "harm": 0.25, **seen}
    ]
    report.write(tmp_path, found)
    text = (tmp_path / "report.md").read_text()
    assert "| sum | sgd | 1 | 25.0 | 50.0 | 75.0 | 100.0 | +1.0e-03 |  |" in text
    assert "6 trainings, which took 0:00:12 of one" in text
    for name in ("harm.png", "worst-sgd-0.png", "sweep-sgd-0.png", "l2_sp-sgd.png"):
        assert f"]({name})" in text
        assert (tmp_path / name).stat().st_size > 5_000


def test_harm_is_counted_beyond_rounding():
    g = {"w": np.float32([1.0, -1.0])}
    update = {"w": np.float32([-1.0, 1.0])}
    for worse, expected in [(1e-7, False), (1e-3, True), (-1e-3, False)]:
        with_part = {"w": update["w"] + np.float32([worse, 0.0])}
        assert bool(harm._is_harm(g, with_part, update)) is expected


def test_rules_that_are_no_longer_known_come_last_and_are_drawn(tmp_path):
    found = dict(
        record(rule, strength, seed, accuracy)
        for rule, strength in [("none", 0.0), ("forgotten", 1.0), ("sum", 1.0)]
        for seed, accuracy in enumerate((0.5, 0.6))
    )
    lines = [json.dumps(each) + "\n" for each in found.values()]
    (tmp_path / "cells.jsonl").write_text("".join(lines))
    made = results.gather(tmp_path, "test")
    (table,) = made["tables"]
    assert [row["rule"] for row in table["rules"]] == ["sum", "forgotten"]
    report.write(tmp_path, made)
    assert "| forgotten | 2 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "l2_sp-sgd.png").stat().st_size > 10_000
