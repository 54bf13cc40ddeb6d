"""Benchmarks: that they run and compare the right things, not how fast they are."""

import itertools
import json
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_language_model
import tiny_network

from dtnh_jax import regularizers
from dtnh_jax.finetune.weights.sources import SOURCES
from dtnh_jax.studies.benchmarks import (
    contests,
    mlp,
    networks,
    peers,
    programs,
    rows,
    steps,
    timing,
    transformation,
)
from dtnh_jax.studies.benchmarks.command import run as main


@pytest.fixture(scope="module")
def encoder():
    return networks.encoder(batch_size=2, layers=1, width=8, tokens=4)


@pytest.fixture(scope="module")
def perceptron():
    """As the benchmarks' networks, but compiled in no time."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    params = {"body": draw(3, 4), "head": draw(4, 2)}

    def objective(params, batch_stats, batch):
        hidden = jnp.tanh(batch["inputs"] @ params["body"])
        loss = jnp.mean((hidden @ params["head"] - 1) ** 2)
        return (loss, jnp.mean((hidden - batch["teacher"]["body"]) ** 2)), batch_stats

    batch = {"inputs": draw(5, 3), "teacher": {"body": draw(5, 4)}}
    source = {"body": draw(3, 4), "head": draw(4, 2)}
    return networks.Network("perceptron", params, {}, source, batch, objective)


@pytest.fixture(scope="module")
def compiled():
    return contests.Compiled()


# Times


def test_rounds_are_interleaved_and_warm_up_does_not_count(monkeypatch):
    clock = itertools.accumulate(itertools.cycle([0.0, 5.0, 0.0, 10.0]))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls = []
    seconds = timing.interleaved(
        {"one": lambda: calls.append(1), "two": lambda: calls.append(2)},
        rounds=3,
        warm_up=1,
    )
    assert calls == [1, 2] * 4
    assert seconds["one"].tolist() == [5] * 3
    assert seconds["two"].tolist() == [10] * 3
    with pytest.raises(ValueError, match="`calls` and `rounds` must be at least one"):
        timing.interleaved({}, rounds=3)


def test_a_pause_is_no_part_of_what_it_precedes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda pause: now.__setitem__(0, now[0] + pause))
    seconds = timing.interleaved({"one": lambda: 0}, rounds=2, pause=7.0)
    assert now == [28.0]
    assert seconds["one"].tolist() == [0, 0]


def test_ratios_are_taken_within_rounds():
    # As often slow as fast: the ratio of the medians would be 1.
    seconds = {"plain": np.array([1.0, 2.0, 8.0]), "ours": np.array([2.0, 4.0, 4.0])}
    plain, ours, free = rows.timed(
        "steps",
        "net",
        seconds,
        {"ours": [rows.one("plain", target=2.0), rows.one("plain")]},
    )
    assert plain.value.median == 2000
    assert plain.is_met is None
    assert ours.ratio == (2.0, 1.25, 2.0)
    assert ours.is_met is True
    assert free.is_met is None
    assert ours._replace(target=1.99).is_met is False
    record = ours.plain()
    assert (record["ratio"], record["ratio_low"], record["is_met"]) == (2, 1.25, True)
    assert plain.plain()["ratio"] is plain.plain()["ratio_high"] is None


def test_costs_over_a_plain_step_are_compared_framework_by_framework():
    seconds = {
        peers.PLAIN: np.array([10.0]),
        peers.RESOLVED: np.array([13.0]),  # 1.3 times
        peers.TORCH_PLAIN: np.array([4.0]),
        "TorchJD PCGrad": np.array([10.4]),  # 2.6 times
    }
    cost, absolute = peers._against("TorchJD PCGrad", None)
    ours = seconds[peers.RESOLVED]
    np.testing.assert_allclose(ours / cost.seconds(seconds), 0.5)
    np.testing.assert_allclose(ours / absolute.seconds(seconds), 1.25)
    assert (cost.target, absolute.target) == (0.5, None)


# What is timed


@pytest.fixture
def one_block(monkeypatch):
    """Trees of four leaves, which take no time to compile."""
    monkeypatch.setattr(transformation, "_BLOCKS", 1)


@pytest.mark.usefixtures("one_block")
def test_the_transformation_alone_is_compared_with_a_copy_of_the_same_size():
    found = transformation.measure(sizes=(20_000, 10_000), rounds=1)
    subjects = [row.subject for row in found]
    assert subjects == ["0.01M parameters"] * 5 + ["0.02M parameters"] * 7
    floors = [row for row in found if row.against and "passes" in row.against]
    assert [(row.name, row.against, row.target) for row in floors] == [
        ("DTNH by hand", "5 passes over memory", None),
        ("DTNH", "5 passes over memory", 1.25),
        ("L2-SP with DTNH", "7 passes over memory", 1.25),
    ] * 2
    # Bytes moved a second by a copy, of two passes, and by 5 passes: per floor.
    copied, ours = found[0].value.median, floors[0].value.median
    np.testing.assert_allclose(floors[0].ratio.median, copied / ours, rtol=1e-6)
    others = [row.against for row in found if row not in floors and row.against]
    growth = "in proportion to 0.01M parameters"
    assert others == ["DTNH by hand", growth, "DTNH by hand", growth]


@pytest.mark.usefixtures("one_block")
def test_what_is_timed_alone_is_the_transformation():
    calls = transformation.contestants(10_000)
    calls["DTNH"]()
    updates, _ = calls["DTNH"]()  # into the memory of the first
    by_hand, _ = calls["DTNH by hand"]()
    rng = np.random.default_rng(0)
    loss, other = (
        {
            name: rng.standard_normal(shape, np.float32)
            for name, shape in transformation.shapes(10_000).items()
        }
        for _ in range(2)
    )
    inner = sum(np.sum(loss[name] * other[name]) for name in loss)
    square = sum(np.sum(x * x) for x in loss.values())
    share = 1 - 0.1 * min(0, inner / square)
    expected = {name: share * loss[name] + 0.1 * other[name] for name in loss}
    for name, each in expected.items():
        np.testing.assert_allclose(updates[name], each, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(by_hand[name], each, rtol=1e-4, atol=1e-5)


def test_every_method_takes_steps_of_its_own(perceptron, compiled):
    after = {}
    for name, call in compiled.calls(perceptron, steps.METHODS).items():
        call()
        state = call()
        if steps.METHODS[name].has_optimizer:
            after[name] = np.concatenate([x.ravel() for x in state.params.values()])
    before = np.concatenate([x.ravel() for x in perceptron.params.values()])
    moved = {name: np.linalg.norm(x - before) for name, x in after.items()}
    assert all(0 < distance < 1 for distance in moved.values()), moved


def test_a_call_that_takes_several_steps_is_timed_by_the_step(
    perceptron, compiled, monkeypatch
):
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    names = [steps.PLAIN, steps.DISTILLATION, steps.REFRESHED]
    *_, row = contests.contest("steps", perceptron, names, compiled, rounds=1)
    # Every call takes a second here, whether of one step or of eight.
    assert (row.name, row.value.median) == (steps.REFRESHED, 125)
    assert (row.against, row.ratio.median) == (steps.DISTILLATION, 1 / 8)
    call = compiled.calls(perceptron, [steps.REFRESHED])[steps.REFRESHED]
    refreshed, _ = call().opt_state
    assert refreshed.step == 8


def test_methods_give_the_gradients_that_they_name(perceptron):
    made = steps.program(perceptron, steps.L2_SP)

    def grads(gradients):
        found, _ = gradients(perceptron, made.state, made.data)
        return found

    loss = grads(steps._of_loss)
    pull = {
        "body": perceptron.params["body"] - perceptron.source_params["body"],
        "head": perceptron.params["head"],  # new, so pulled to zero
    }
    expected = {name: g + steps.STRENGTH * pull[name] for name, g in loss.items()}
    pair, two = grads(steps._of_pair), grads(steps._of_two_calls)
    total = {
        name: g + steps.STRENGTH * pair.regularizer[name] for name, g in loss.items()
    }
    for ours, theirs in (
        (grads(steps._of_loss_and_pull), expected),
        (pair.loss, loss),
        (grads(steps._of_sum), total),
        (two, pair),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            ours,
            theirs,
        )
    assert float(jnp.abs(pair.regularizer["body"]).max()) > 0.01


def test_bloop_and_what_it_is_compared_with_are_one_rule(perceptron):
    made = steps.program(perceptron, steps.BLOOP)
    pair, _ = steps._of_two_calls(perceptron, made.state, made.data)
    # At the first step, after which only this library's average is without a bias.
    theirs, ours = (
        tx.update(pair, tx.init(perceptron.params))[0]
        for tx in (steps.METHODS[name].resolve(made.data) for name in steps.OF_BLOOP)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7),
        jax.tree.map(lambda a, g: a - g, theirs, pair.loss),
        jax.tree.map(lambda a, g: a - g, ours, pair.loss),
    )


def test_programs_are_compiled_once_for_all_groups(perceptron, compiled):
    first = compiled.of(perceptron, steps.PLAIN)[1]
    assert compiled.of(perceptron, steps.PLAIN)[1] is first


def test_compile_times_are_those_of_compiling(perceptron, monkeypatch):
    compiled = []
    lower = steps.Program.lower

    class Counted:
        def __init__(self, lowered):
            self.lowered = lowered

        def compile(self):
            compiled.append(1)
            return self.lowered.compile()

    def counted(self):
        return {step: Counted(traced) for step, traced in lower(self).items()}

    monkeypatch.setattr(steps.Program, "lower", counted)
    found = programs.compile_times(perceptron, rounds=1)
    assert len(compiled) == 6
    assert [row.target for row in found] == [None, None, 1.2, None] * 2
    assert all(row.unit == "s" and row.value.median > 0 for row in found)


def test_memory_is_what_the_compiler_says(perceptron, compiled):
    found = {row.name: row for row in programs.memory(perceptron, compiled)}
    params = sum(x.nbytes for x in jax.tree.leaves(perceptron.params))
    # At the least: parameters, their momentum, their source.
    assert found[steps.L2_SP].value.median > 3e-6 * params
    # And two moving averages more.
    more = found["L2-SP, never_hurt"].value.median - found[steps.L2_SP].value.median
    assert more > 2e-6 * params


def test_what_many_parameters_cost_is_compared_with_plain_and_by_hand(monkeypatch):
    monkeypatch.setattr(mlp, "NAMES", (*mlp.NAMES[:3], steps.L2_SP_ELEMENT))
    monkeypatch.setattr(
        mlp, "_OF_COMPILING", {x: mlp._OF_COMPILING[x] for x in mlp.NAMES[:3]}
    )
    network = networks.perceptron(batch_size=4, layers=2, width=8)
    targets = mlp.Targets(time=1.1, memory=1.5)
    found = mlp.measure(network, targets, contests.Compiled(), 1, 1)
    assert {row.subject for row in found} == {"MLP 2 x 8 x 8, batch 4"}
    by_group = {}
    for row in found:
        each = (row.name, row.against, row.target, row.unit)
        by_group.setdefault(row.group, []).append(each)
    plain, by_hand, ours, element = mlp.NAMES
    assert by_group["mlp"] == [
        (plain, None, None, "ms"),
        (by_hand, plain, None, "ms"),
        (ours, plain, 1.1, "ms"),
        (ours, by_hand, None, "ms"),
        (element, plain, None, "ms"),
        (element, by_hand, None, "ms"),
        (element, ours, 1.25, "ms"),
    ]
    trees = f"{plain} and 2 trees like the parameters"
    assert by_group["mlp: temporary memory"] == [
        (plain, None, None, "MB"),
        (by_hand, plain, None, "MB"),
        (ours, plain, 1.5, "MB"),
        (ours, by_hand, None, "MB"),
        (element, plain, None, "MB"),
        (element, by_hand, None, "MB"),
        (element, trees, 1.0, "MB"),
    ]
    assert by_group["mlp: trace and compile"] == [
        (plain, None, None, "s"),
        (by_hand, plain, None, "s"),
        (ours, plain, None, "s"),
        (ours, by_hand, 1.3, "s"),
    ]


def test_labels_are_those_of_layers():
    params = {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(1)}, "b": jnp.ones(3)}
    labels = steps._by_layer(params)
    assert labels == {"a": {"kernel": "a", "bias": "a"}, "b": "b"}


def test_networks_are_away_from_their_source(encoder):
    pull = regularizers.l2_sp(encoder.source_params, new=["head"])
    assert float(pull.value(encoder.params)) > 0
    (_, distance), pair = steps.pair_of(encoder)
    assert distance > 0
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(pair.regularizer)) > 0


# The command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--groups regularizers --methods l3",
            "`--methods` must be one of scratch, ",
        ),
        (
            "--groups regularizers --methods l2",
            "`--methods` must have fine-tuning, got none",
        ),
        ("--rounds 0", "`--rounds` must be at least 1, got 0"),
        ("--compile-rounds 0", "`--compile-rounds` must be at least 1, got 0"),
        ("--sizes 0", "`--sizes` must be at least 1, got 0"),
        (
            "--mlp-widths 8 --mlp-batch-sizes 4 4",
            "`--mlp-widths` must have as many numbers as `--mlp-batch-sizes`, got 1",
        ),
        ("--width 6", "`--width` must be a multiple of 4, got 6"),
        ("--source resnet", "`--source` must be one of efficientnet-lite0, eff"),
        ("--report-only --output nowhere.json", "nowhere.json holds no benchmarks: "),
    ],
)
def test_the_command_names_what_is_wrong(options, message, capsys):
    assert main(options.split()) == 2
    assert message in capsys.readouterr().err


def test_without_the_peers_the_command_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(peers, "PACKAGES", ("json", "no_such_package"))
    assert main(["--peers"]) == 2
    message = capsys.readouterr().err
    assert "`--peers` needs no_such_package, which is not installed" in message
    assert "pip install 'dtnh-jax[peers]'" in message


TINY = (
    "--source tiny --batch-size 2 --image-size 16 --residual-size 5 --layers 1 "
    "--width 8 --tokens 4 --rounds 1 --compile-rounds 1 --sizes 5000"
)


@pytest.mark.e2e
def test_the_command_writes_a_ratio_for_every_method(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SOURCES, "tiny", tiny_network.TINY)
    path = tmp_path / "times.json"
    methods = "fine-tuning l2_sp+never_hurt l2_sp_fisher+dtnh lora_decay+dtnh lora"
    command = f"{TINY} --groups regularizers --methods {methods} --output {path}"
    assert main(command.split()) == 0
    results = json.loads(path.read_text())
    found = {row["name"]: row for row in results["rows"]}
    assert sorted(found) == sorted(methods.split())
    assert found["l2_sp_fisher+dtnh"]["against"] == "fine-tuning"
    assert found["lora_decay+dtnh"]["against"] == "lora"
    assert all(row["value"] > 0 for row in found.values())


@pytest.mark.e2e
def test_steps_of_a_language_model(tmp_path, capsys):
    tiny_language_model.write_gguf(tmp_path / "tiny.gguf")
    for name, seed in (("target", 0), ("kept", 1)):
        texts = tiny_language_model.texts(60, seed)
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    path = tmp_path / "times.json"
    options = [
        *("--groups", "language", "--rounds", "1", "--output", str(path)),
        *("--language-model", str(tmp_path / "tiny.gguf")),
        *("--language-target", f"text:{tmp_path / 'target.txt'}"),
        *("--language-kept", f"text:{tmp_path / 'kept.txt'}"),
        *("--language-tokens", "2", "16"),
    ]
    assert main(options) == 0
    found = json.loads(path.read_text())["rows"]
    assert all(row["value"] > 0 for row in found)
    aimed = [
        (row["unit"], row["name"], row["against"], row["target"])
        for row in found
        if row["target"]
    ]
    assert aimed == [
        (unit, name, against, target)
        for unit, against, target in (("ms", "kl", 1.4), ("MB", "kl and lora", 1.0))
        for name in ("kl+dtnh", "kl+never_hurt")
    ]
    ms = {row["name"]: row["value"] for row in found if row["unit"] == "ms"}
    ours, judge = ms["kl+never_hurt"], ms["gradient of held-out text"]
    for every in (1, 4):
        learned = ms[f"kl+never_hurt, held out every {every}"]
        np.testing.assert_allclose(learned, ours + judge / every, rtol=1e-6)


@pytest.mark.usefixtures("one_block")
def test_the_table_is_drawn_again_from_its_file(tmp_path, capsys):
    path = tmp_path / "folder" / "speed.json"
    command = f"{TINY} --source efficientnet-lite0 --groups transformation"
    assert main([*command.split(), "--output", str(path)]) == 0
    first = capsys.readouterr().out
    page, picture = path.with_suffix(".md"), path.with_suffix(".png")
    before = page.read_text()
    assert picture.stat().st_size > 10_000
    page.unlink()
    picture.unlink()
    assert main(["--report-only", "--output", str(path)]) == 0
    assert page.read_text() == before
    assert picture.stat().st_size > 10_000
    second = capsys.readouterr().out
    assert second.splitlines() == first.splitlines()[-len(second.splitlines()) :]
    results = json.loads(path.read_text())
    assert {"cpu_count", "memory_gib", "jax", "optax"} <= results["machine"].keys()
    assert str(tmp_path) not in path.read_text()
    for word in ("target", "met", "5 passes over memory", "1.25"):
        assert word in before


# Against PyTorch, where it is installed


def test_pytorch_computes_the_same_and_the_command_compares(tmp_path, monkeypatch):
    pytest.importorskip("torchjd")
    monkeypatch.setitem(SOURCES, "tiny", tiny_network.TINY)
    path = tmp_path / "peers.json"
    command = f"{TINY} --groups peers --output {path}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of vmap
        assert main(command.split()) == 0
    results = json.loads(path.read_text())
    assert {"torch", "torchjd"} <= results["machine"].keys()
    (cost,) = (
        row
        for row in results["rows"]
        if row["subject"] == "transformer encoder"
        and row["against"] == "TorchJD PCGrad, each over its plain step"
    )
    assert cost["target"] == 0.5


def test_another_network_in_pytorch_is_noticed(encoder):
    pytest.importorskip("torchjd")
    other = {**encoder.batch, "inputs": 2 * encoder.batch["inputs"]}

    def objective(params, batch_stats, batch):
        return encoder.objective(params, batch_stats, other)

    with pytest.raises(ValueError, match="for the value of the loss"):
        peers.check_same(encoder._replace(objective=objective))


def test_torchjd_resolves_as_this_library_does(encoder):
    pytest.importorskip("torchjd")
    from torchjd import aggregation, autojac

    from dtnh_jax import resolve_conflicts, rules

    params, terms = peers.translated_terms(encoder)
    loss, distance = terms()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        autojac.backward([loss, 0.1 * distance])
    autojac.jac_to_grad(params, aggregation.PCGrad())
    theirs = np.sqrt(sum(float((x.grad**2).sum()) for x in params))
    _, pair = steps.pair_of(encoder)
    tx = resolve_conflicts(rules.pcgrad, 0.1)
    ours, _ = tx.update(pair, tx.init(encoder.params), encoder.params)
    np.testing.assert_allclose(peers._norm(ours), theirs, rtol=1e-3)
