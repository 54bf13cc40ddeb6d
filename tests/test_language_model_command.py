"""`dtnh lm` from options to a report, on a model of a few thousand weights.

A strength of 0 and a way back of 1 say what the losses must be: those of plain
adapters, and those of the base model.
"""

import json

import numpy as np
import pytest
import tiny_language_model as tiny

from dtnh_jax._cli import main
from dtnh_jax.lm import optimizers, paths

SMALL = ["--context", "32", "--test-rows", "4", "--rank", "2", "--batch-size", "4"]
LOSSES = ("target_loss", "kept_loss", "target_kl", "kept_kl")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The model and texts, as options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dtnh_jax.finetune.directories.keep_compiled", lambda _: None)
        path = tmp_path_factory.mktemp("language")
        tiny.write_gguf(path / "tiny.gguf")
        (path / "target.txt").write_text("\n\n".join(tiny.texts(400)))
        reversed_ = [text[::-1] for text in tiny.texts(100, seed=1)]
        (path / "kept.txt").write_text("\n\n".join(reversed_))
        yield {
            "--model": str(path / "tiny.gguf"),
            "--target": f"text:{path / 'target.txt'}",
            "--kept": f"text:{path / 'kept.txt'}",
        }


def command(files, run_dir, *options):
    """Runs it; of an option that is given twice, the last counts."""
    given = {name: [value] for name, value in files.items()}
    given["--run-dir"] = [str(run_dir)]
    for word in (*SMALL, *options):
        if word.startswith("--"):
            name = word
            given[name] = []
        else:
            given[name].append(word)
    return main(["lm", *(word for name in given for word in (name, *given[name]))])


OPTIONS = [
    *("--steps", "6", "--learning-rate", "0.05", "--held-out-every", "1"),
    *("--strength", "kl=0,1", "kl+dtnh=0,1", "wise_ft=0,0.5,1", "decay=0,2"),
]


@pytest.fixture(scope="module")
def run_dir(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    assert command(files, path, *OPTIONS) == 0
    return path


def read(path):
    return json.loads((path / "results.json").read_text())


def losses_of(found, method, strength=0.0):
    (cell,) = (
        cell
        for cell in found["cells"]
        if (cell["method"], cell["strength"]) == (method, strength)
    )
    return np.array([cell[key] for key in LOSSES])


@pytest.mark.e2e
def test_at_strength_zero_every_method_is_plain_adapters(run_dir):
    found = read(run_dir)
    plain = losses_of(found, "lora")
    for name in ("kl", "kl+dtnh", "decay", "wise_ft"):
        np.testing.assert_allclose(
            losses_of(found, name), plain, rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.e2e
def test_all_the_way_back_is_the_base_model(run_dir):
    found = read(run_dir)
    base = [found["base"][key] for key in LOSSES]
    np.testing.assert_allclose(losses_of(found, "wise_ft", 1.0), base, atol=1e-5)
    np.testing.assert_allclose(base[2:], 0.0, atol=1e-6)


@pytest.mark.e2e
def test_training_learns_and_regularizers_hold_back(run_dir):
    found = read(run_dir)
    base = np.array([found["base"][key] for key in LOSSES])
    plain = losses_of(found, "lora")
    assert plain[0] < base[0] - 0.01
    for name, strength in (("kl", 1.0), ("kl+dtnh", 1.0), ("decay", 2.0)):
        target_kl = losses_of(found, name, strength)[2]
        assert 0 < target_kl < 0.95 * plain[2], name


@pytest.mark.e2e
def test_the_report_has_a_row_for_everything_and_costs_for_what_was_trained(run_dir):
    found = read(run_dir)
    rows = [(row["method"], row["strength"]) for row in found["rows"]]
    assert rows == [
        ("lora", None),
        *(("kl", x) for x in (0.0, 1.0)),
        *(("kl+dtnh", x) for x in (0.0, 1.0)),
        ("kl+never_hurt", 100.0),
        *(("wise_ft", x) for x in (0.0, 0.5, 1.0)),
        *(("decay", x) for x in (0.0, 2.0)),
    ]
    assert list(found["costs"]) == ["lora", "kl", "kl+dtnh", "kl+never_hurt", "decay"]
    for cost in found["costs"].values():
        assert cost["step_seconds"] > 0
        assert cost["temporary_bytes"] > 0
    assert found["costs"]["kl"]["temporary_bytes_to_kl"] == 1.0
    text = (run_dir / "report.md").read_text()
    assert text.count("\n| kl+dtnh | ") == 4
    assert (run_dir / "forgetting.png").stat().st_size > 5000
    lines = [
        json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 6 * 8
    errors = [x["held_out_error"] for x in lines if x["method"] == "kl+never_hurt"]
    assert len(errors) == 6
    assert all(0 < error < 1 for error in errors)
    trusts = [x["trust"] for x in lines if x["method"] == "kl+never_hurt"]
    assert all(0.01 <= trust <= 3 for trust in trusts)
    removed = [x["removed"] for x in lines if x["method"] == "kl+dtnh"]
    assert all(0 <= share <= 1 for share in removed)


@pytest.mark.e2e
def test_a_run_goes_on_with_the_cell_it_was_at(files, run_dir, capsys):
    before = read(run_dir)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "results.json").unlink()
    (run_dir / "cells" / "lora-seed0.json").unlink()
    cut = [*lines[:4], lines[-1][:20]]  # killed in the middle of a line
    (run_dir / "metrics.jsonl").write_text("\n".join(cut))
    assert command(files, run_dir, *OPTIONS) == 0
    after = read(run_dir)
    for old, new in zip(before["cells"], after["cells"], strict=True):
        assert [old[key] for key in LOSSES] == [new[key] for key in LOSSES]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    assert command(files, run_dir, *OPTIONS, "--steps", "7") == 2
    assert "holds a run whose `--steps` is 6, got 7" in capsys.readouterr().err


@pytest.mark.slow
def test_devices_parts_and_remat_change_nothing(files, run_dir, tmp_path):
    options = [
        *OPTIONS,
        "--methods",
        "kl",
        "kl+dtnh",
        "--strength",
        "kl=1",
        "kl+dtnh=1",
    ]
    spread = ["--mesh", "data=1,fsdp=2", "--remat", "--accumulate", "2"]
    assert command(files, tmp_path / "run", *options, *spread) == 0
    ours, theirs = read(tmp_path / "run"), read(run_dir)
    for name in ("kl", "kl+dtnh"):
        np.testing.assert_allclose(
            losses_of(ours, name, 1.0), losses_of(theirs, name, 1.0), atol=2e-3
        )


def test_prompts_in_half_precision(files, tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [
        {
            "prompt": " ".join(text.split()[:4]),
            "completion": " ".join(text.split()[4:9]),
        }
        for text in tiny.texts(60)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    options = ["--methods", "masked_kl+dtnh", "--steps", "2", "--dtype", "bfloat16"]
    run = tmp_path / "run"
    assert command(files, run, *options, "--target", f"text:{path}") == 0
    found = read(run)
    assert found["tokens"]["train"] < 0.9 * 32 * found["row_counts"]["train"]
    assert np.isfinite(losses_of(found, "masked_kl+dtnh", 1.0)).all()


def test_numbers_that_are_not_finite_stop_it(files, tmp_path, capsys):
    # Twice that is more than single precision holds. The last step shows in the losses.
    for steps, where in (("4", "at step 2"), ("1", "after training")):
        options = ["--methods", "lora", "--steps", steps, "--learning-rate", "3e38"]
        assert command(files, tmp_path / steps, *options) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"lora-seed0 has numbers that are not finite {where}" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "kl+pcgrad"], "`--methods` must be one of lora, kl, kl+dtnh"),
        (["--methods", "lora", "lora"], "`--methods` must name each once"),
        (["--methods", "wise_ft"], "`--methods wise_ft` needs lora"),
        (["--adapt", "q", "w"], "`--adapt` must be one of q, k, v, o"),
        (["--strength", "masked_kl=1"], "`--strength masked_kl` has no effect: no"),
        (["--strength", "lora=1"], "has no effect: it has no strength"),
        (["--strength", "kl=1,-1"], "must be at least 0 and finite, got -1.0"),
        (["--strength", "wise_ft=2"], "must be from 0 to 1, got 2.0"),
        (["--steps", "0"], "`--steps` must be at least 1, got 0"),
        (["--learning-rate", "nan"], "`--learning-rate` must be above 0 and finite"),
        (
            ["--accumulate", "3"],
            "must be a multiple of 1 devices times 3",
        ),
        (["--mesh", "rows=2"], "`--mesh` must be one of data, fsdp, got 'rows'"),
        (["--mesh", "data=1,fsdp=16", "--batch-size", "16"], "at most 8 devices"),
        (["--context", "65"], "`--context` must be at most 64, what"),
        (["--model", "none.gguf"], "`--model` must be smollm2-135m"),
        (["--target", "text:none.txt"], "none.txt can not be read: No such file"),
        (["--kept", "novels"], "a source of text must be one of"),
    ],
)
def test_what_can_not_be_meant_is_said_in_one_line(
    files, tmp_path, capsys, options, message
):
    assert command(files, tmp_path / "run", *options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_too_long(files, tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "the cat " * 40, "completion": "sat"}))
    assert command(files, tmp_path / "run", "--target", f"text:{path}") == 2
    err = capsys.readouterr().err
    assert f"{path}, line 1 has" in err
    assert "more than `--context`, 32" in err


def test_learning_rates():
    cosine = optimizers.make_schedule("cosine", 0.1, 0, 10)
    assert [round(float(cosine(step)), 4) for step in (0, 5, 10)] == [0.1, 0.05, 0.0]
    linear = optimizers.make_schedule("linear", 0.1, 4, 14)
    steps = (0, 1, 3, 4, 9, 14)
    expected = [0.025, 0.05, 0.1, 0.1, 0.05, 0.0]
    np.testing.assert_allclose([linear(step) for step in steps], expected, atol=1e-7)
    constant = optimizers.make_schedule("constant", 0.1, 1, 5)
    np.testing.assert_allclose([constant(step) for step in (0, 1, 5)], 0.1)


def test_losses_are_compared_at_the_same_target_loss():
    def cell(method, strength, target, kept):
        return {
            "method": method,
            "strength": strength,
            "seed": 0,
            "target_loss": target,
            "kept_loss": kept,
        }

    cells = [
        cell("lora", 0.0, 3.0, 2.6),
        cell("wise_ft", 0.5, 3.5, 2.2),
        cell("kl", 1.0, 3.2, 2.3),
    ]
    base = {"target_loss": 4.0, "kept_loss": 2.0}

    def above(curve, target, kept):
        return paths.above(curve, cell("other", 1.0, target, kept), base, cells)

    assert above("wise_ft", 3.25, 2.5) == pytest.approx(0.1)  # halfway: 2.4
    assert above("wise_ft", 3.75, 2.0) == pytest.approx(-0.1)  # to the base: 2.1
    assert above("kl", 3.1, 2.4) == pytest.approx(-0.05)
    assert above("kl", 3.3, 2.4) is None
    assert above("wise_ft", 2.9, 2.4) is None
    assert paths.above("kl", cells[1], base, cells[:2]) is None


def test_what_is_forgotten_at_shares_of_the_gain():
    def cell(method, strength, seed, target, kept):
        losses = {"target_loss": target, "kept_loss": kept, "kept_kl": kept - 2}
        return {"method": method, "strength": strength, "seed": seed, **losses}

    base = {"target_loss": 4.0, "kept_loss": 2.0, "kept_kl": 0.0}
    cells = [
        cell("lora", 0.0, 0, 3.0, 2.6),
        cell("lora", 0.0, 1, 2.0, 2.8),
        cell("wise_ft", 0.5, 0, 3.5, 2.2),
        cell("wise_ft", 0.5, 1, 3.0, 2.4),
        cell("kl", 1.0, 0, 3.25, 2.2),
        cell("kl", 1.0, 1, 2.2, 2.2),
    ]
    found = paths.at_shares(("lora", "kl", "wise_ft"), base, cells)
    assert list(found) == ["kl", "wise_ft"]
    half, three_quarters, most = found["wise_ft"]
    assert (half["share"], half["target_loss"].mean) == (0.5, 3.25)
    assert half["forgotten"].mean == pytest.approx((0.2 + 0.4) / 2)
    # Halfway from the point at half of the gain to that of plain adapters.
    assert three_quarters["forgotten"].mean == pytest.approx((0.4 + 0.6) / 2)
    assert most["kept_kl"].mean == pytest.approx((0.52 + 0.72) / 2)
    half, three_quarters, most = found["kl"]
    assert half["forgotten"] is None  # no strength comes there
    assert three_quarters["forgotten"] is None  # one of the seeds does not
    assert most["forgotten"].mean == pytest.approx((0.44 + 0.2) / 2)
    assert paths.at_shares(("kl",), base, cells[4:]) == {}
