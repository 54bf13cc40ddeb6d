"""Files and command lines that nobody meant: refused in one line, and nothing else."""

import contextlib
import io
import math

import fuzz_weights
import pytest
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtnh_jax.finetune.config import Config, identity
from dtnh_jax.finetune.methods import METHODS
from dtnh_jax.finetune.regularizers import REGULARIZERS
from dtnh_jax.finetune.runs.checks import check


def test_damaged_weights_are_read_or_refused(tmp_path):
    refused = fuzz_weights.fuzz(120, 0, tmp_path)  # as a script it reads thousands
    assert 60 < refused < 120  # both happen


def test_the_watch_sees_what_is_run(monkeypatch):
    # Else the test above could not fail.
    monkeypatch.setattr(fuzz_weights, "_is_watching", True)
    fuzz_weights._watch("os.system", ())
    fuzz_weights._watch("open", ())
    assert fuzz_weights._seen.pop() == "os.system"
    assert not fuzz_weights._seen


whole = st.integers(-3, 3) | st.sampled_from([8, 32, 64, 100, 10**9])
number = st.floats() | st.sampled_from([0.01, 0.1, 1.0])
word = st.text("abcd_=,+ -.0é\n\0", max_size=8) | st.sampled_from(
    ["l2_sp", "l2_sp+dtnh", "l2=1", "data=2,fsdp=2", "elpv", "all", "sgd", "nan"]
)
name = st.sampled_from([*METHODS, "all"]) | word
mesh = st.lists(
    st.tuples(st.sampled_from(["data", "fsdp", "model"]), whole), max_size=3
).map(lambda sizes: ",".join(f"{axis}={size}" for axis, size in sizes))
strength = st.tuples(st.sampled_from([*REGULARIZERS, "l3"]), number).map(
    lambda pair: f"{pair[0]}={pair[1]}"
)
OPTIONS = {
    "--source": word | st.just("efficientnet-lite0"),
    "--target": word | st.just("elpv"),
    "--methods": st.lists(name, max_size=4),
    "--strength": st.lists(strength | word, max_size=3),
    "--mesh": mesh | word,
    "--dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
    "--scope": st.sampled_from(["global", "unit", "row"]),
    "--optimizer": st.sampled_from(["sgd", "adamw", "adam"]),
    "--coordinator": word,
    **{option: number.map(str) for option in ("--learning-rate", "--epochs")},
    **{
        option: whole.map(str) | word
        for option in (
            "--steps",
            "--batch-size",
            "--accumulate",
            "--seeds",
            "--tuning-seeds",
            "--checkpoint-every",
            "--train-per-class",
            "--image-size",
            "--processes",
            "--process-id",
            "--heartbeat",
        )
    },
    **{option: st.just([]) for option in ("--tune", "--remat", "--distributed")},
}


@st.composite
def command_lines(draw):
    words = []
    for option in draw(st.lists(st.sampled_from([*OPTIONS]), max_size=6, unique=True)):
        value = draw(OPTIONS[option])
        words += [option, *([value] if isinstance(value, str) else value)]
    return words


def answered(words):
    """Returns a configuration, or what the command line is refused with."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(Config, prog="dtnh", args=words)
    except SystemExit as error:
        assert error.code == 2  # noqa: PT017
        return None, said.getvalue()
    try:
        check(config)
    except ValueError as error:
        return None, str(error)
    return config, ""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(command_lines())
def test_any_command_line_is_understood_or_refused(words):
    config, said = answered(words)
    if config is None:
        assert said
        return
    # What is let through can be run: its parts fit each other.
    assert (
        config.batch_size % (config.accumulate * math.prod(config.mesh.values())) == 0
    )
    assert set(config.methods) <= set(METHODS)
    assert config.total_steps(100) >= 1
    assert all(math.isfinite(x) and x >= 0 for x in config.strengths.values())
    assert identity(config)
    assert config.folder.parts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mesh model=2", "`--mesh` must be one of data, fsdp, got 'model'"),
        ("--mesh data=0", "`--mesh data` must be at least 1, got 0"),
        ("--mesh data=3", "`--batch-size` must be a multiple of 3 devices times 1"),
        ("--accumulate 0", "`--accumulate` must be at least 1, got 0"),
        ("--accumulate 5", "`--batch-size` must be a multiple of 1 devices times 5"),
        ("--processes 2", "`--processes` has no effect without `--distributed`"),
        (
            "--distributed --processes 2 --process-id 2",
            "`--process-id` must be below `--processes`, 2, got 2",
        ),
        ("--heartbeat 0", "`--heartbeat` must be at least 1, got 0"),
        ("--mesh data", "a mesh is written AXIS=SIZE,AXIS=SIZE"),
        ("--mesh data=2,data=2", "a mesh has each of its axes once"),
    ],
)
def test_devices_that_can_not_be_meant_are_refused(arguments, message):
    config, said = answered(arguments.split())
    assert config is None
    assert message in " ".join(said.replace("│", " ").split())


def test_where_it_runs_is_no_part_of_what_is_run():
    one = identity(Config())
    assert one == identity(Config(mesh={"data": 4}, remat=True, distributed=True))
    assert one != identity(Config(accumulate=2))
    assert one != identity(Config(dtype="bfloat16"))
