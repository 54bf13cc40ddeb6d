"""From a run folder to weights, a card and predictions."""

import functools
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import pytest
import safetensors.numpy
import tiny_network
from flax.traverse_util import unflatten_dict
from PIL import Image
from test_pictures import with_exif_chunk

from dtnh_jax._cli import main
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data import loading, splitting, targets
from dtnh_jax.finetune.data.pictures import read_picture
from dtnh_jax.finetune.methods import METHODS
from dtnh_jax.finetune.models.adapters import RANK
from dtnh_jax.finetune.models.efficientnet import EfficientNetLite0
from dtnh_jax.finetune.reports.export import model_card
from dtnh_jax.finetune.runs import trained
from dtnh_jax.finetune.training import network
from dtnh_jax.finetune.weights.checkpoint_sources import ARCHITECTURES
from dtnh_jax.finetune.weights.lite import STAGES, torch_name
from dtnh_jax.finetune.weights.sources import SOURCES, load_source
from dtnh_jax.finetune.weights.tensor_names import torch_tensors, variable_shapes

CLASSES = ["bright", "dark"]  # in the order of names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two methods on pictures that are easy to tell apart."""
    root = tmp_path_factory.mktemp("hand_over")
    for number in range(8):
        pictures.draw(root / "photos" / "dark" / f"{number}.png", number)
        pictures.draw(root / "photos" / "bright" / f"{number}.png", 200 + number)
    options = {
        "--source": "tiny",
        "--target": f"folder:{root / 'photos'}",
        "--steps": "25",
        "--seeds": "2",
        "--image-size": "16",
        "--batch-size": "8",
        "--learning-rate": "0.1",
        "--run-dir": str(root / "run"),
    }
    methods = ["--methods", "fine-tuning", "l2_sp+dtnh"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "tiny", tiny_network.TINY)
        patch.setattr("dtnh_jax.finetune.directories.keep_compiled", lambda _: None)
        assert main([*itertools.chain(*options.items()), *methods]) == 0
        yield root / "run"


def results_of(run):
    return json.loads((run / "results.json").read_text())


def test_every_cell_keeps_its_weights(run):
    names = {path.stem for path in (run / "weights").iterdir()}
    assert names == {
        f"{method}-seed{seed}"
        for method in ("fine-tuning", "l2_sp+dtnh")
        for seed in (0, 1)
    }


def test_the_kept_weights_predict_what_the_run_did(run):
    results = results_of(run)
    cell = next(x for x in results["cells"] if x["method"] == "l2_sp+dtnh")
    facts, source, variables = trained.load(trained.path_of(run, "l2_sp+dtnh", 0))
    assert facts.class_names == CLASSES
    assert facts.image_size == 16
    assert facts.strength == results["strengths"]["l2_sp"] == cell["strength"]
    target = targets.load_target(facts.target)
    wanted = splitting.sizes(target, Config(target=facts.target))
    test = loading.materialize(target, splitting.draw(target, wanted).test, 16)
    logits = source.module(2).apply(
        variables, source.preprocess(test.images), train=False
    )
    assert jnp.argmax(logits, 1).tolist() == cell["predictions"]


def test_export_writes_weights_and_card(run, tmp_path, capsys):
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.split()
    assert [pathlib.Path(path).name for path in written] == [
        "model.safetensors",
        "README.md",
    ]
    kept = trained.path_of(run, "l2_sp+dtnh", 0)  # the one that resolves, seed 0
    tensors = safetensors.numpy.load_file(kept)
    exported = safetensors.numpy.load_file(written[0])
    assert tensors.keys() == exported.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor)

    card = pathlib.Path(written[1]).read_text()
    results = results_of(run)
    numbers = results["methods"]["l2_sp+dtnh"]
    accuracy = numbers["accuracy"]
    assert "Licence: your own pictures" in card
    assert "Licence: none" in card  # of the tiny network
    assert (
        "l2_sp+dtnh: fine-tuned with the regularizer l2_sp, whose gradient is " in card
    )
    assert "Strength of the regularizer:** 0.1" in card
    assert (
        f"{100 * accuracy['mean']:.1f}%, mean of 2 seeds, 95% interval "
        f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}"
    ) in card
    assert f"in conflict:** {100 * numbers['conflict']:.1f}%" in card
    assert "Against fine-tuning, seed by seed" in card
    assert "bright, dark" in card


def test_a_card_of_one_seed_has_no_interval(run):
    results = results_of(run)
    for key in ("low", "high", "std"):
        results["methods"]["fine-tuning"]["accuracy"][key] = None
    card = model_card(results, "fine-tuning", 1)
    assert "of one seed, without an interval" in card
    assert card.count("interval") == 1
    assert "conflict" not in card
    assert "without a regularizer" in card


def test_predict_prints_class_and_probability(run, tmp_path, capsys):
    pictures.draw(tmp_path / "night.png", 5, (50, 30), mode="L")
    pictures.draw(tmp_path / "day.jpg", 210, (31, 17))
    files = [str(tmp_path / "night.png"), str(tmp_path / "day.jpg")]
    assert main(["predict", str(run), *files]) == 0
    night, day = capsys.readouterr().out.splitlines()
    assert night.startswith(f"{files[0]}: dark ")
    assert day.startswith(f"{files[1]}: bright ")
    assert main(["predict", str(run), *files, "--json", "--seed", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["class"] for line in found] == ["dark", "bright"]
    for line in found:
        assert list(line["probabilities"]) == CLASSES
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["probability"] == max(line["probabilities"].values())
    assert read_picture(files[0]).shape == (30, 50, 1)


def test_predict_takes_an_exported_file(run, tmp_path, capsys):
    pictures.draw(tmp_path / "a.png", 5)
    main(["export", str(run), "--output", str(tmp_path), "--method", "fine-tuning"])
    capsys.readouterr()
    for where in ("model.safetensors",):
        assert main(["predict", str(tmp_path / where), str(tmp_path / "a.png")]) == 0
        assert ": dark " in capsys.readouterr().out


def test_predict_leaves_out_what_can_not_be_read(run, tmp_path, capsys):
    pictures.draw(tmp_path / "night.png", 5)
    pictures.draw(tmp_path / "two\nlines.png", 5)
    (tmp_path / "cut.png").write_bytes((tmp_path / "night.png").read_bytes()[:90])
    turned = with_exif_chunk((tmp_path / "night.png").read_bytes())
    (tmp_path / "exif.png").write_bytes(turned)
    files = [str(tmp_path / f"{name}.png") for name in ("cut", "night", "exif", "none")]
    files.append(str(tmp_path / "two\nlines.png"))
    assert main(["predict", str(run), *files]) == 0
    out, err = capsys.readouterr()
    night, exif, lines = out.splitlines()
    assert lines.startswith(f"{tmp_path}/two\\nlines.png: dark ")
    assert night.startswith(f"{files[1]}: dark ")
    assert exif.startswith(f"{files[2]}: dark ")
    assert err == (
        f"dtnh: 2 files can not be read and are left out: {files[0]}, {files[3]}.\n"
    )


def test_white_is_kept_with_the_weights(run, tmp_path, capsys):
    _, source, variables = found = trained.load(trained.path_of(run, "fine-tuning", 0))
    assert found.facts.white == {}
    facts = found.facts._replace(white={"floats": 1.0})
    trained.write(tmp_path / "a.safetensors", variables, facts)
    assert trained.load(tmp_path / "a.safetensors").facts == facts
    for name, value in {"dark": 0.02, "bright": 0.85, "other": 220}.items():
        image = Image.fromarray(np.full((16, 16), value, np.float32))
        image.save(tmp_path / f"{name}.tif")
    files = [str(tmp_path / f"{name}.tif") for name in ("dark", "bright", "other")]
    assert main(["predict", str(tmp_path / "a.safetensors"), *files]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()] == ["dark", "bright"]
    assert "have numbers above 1, which was white in training" in err
    assert source.name == "tiny"


def test_damaged_results_are_named(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text("")
    err = refused(capsys, "export", tmp_path / "run")
    assert f"{tmp_path / 'run' / 'results.json'} is damaged" in err


def test_a_card_shows_names_as_they_are(run):
    results = results_of(run)
    results["class_names"] = ["$0_to_$10", "<b>|*"]
    card = model_card(results, "fine-tuning", 0)
    assert r"2 classes: \$0\_to\_\$10, \<b\>\|\*" in card


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dtnh: ")
    assert err.count("\n") == 1
    return err


def test_what_can_not_be_handed_over_is_refused(run, tmp_path, capsys):
    err = refused(capsys, "export", tmp_path)
    assert "is no run folder: it has no config.json" in err
    err = refused(capsys, "export", run, "--method", "delta", "--seed", 7)
    assert "no weights of delta, seed 7; it has: fine-tuning-seed0, " in err
    err = refused(capsys, "export", run, "--names", "torch", "--output", tmp_path / "x")
    assert "`--names` must be linen for tiny" in err
    assert not (tmp_path / "x").exists()
    (tmp_path / "no.png").write_bytes(b"no")
    err = refused(capsys, "predict", run, tmp_path / "no.png", tmp_path / "none.png")
    assert "Not a picture that can be read: " in err
    assert "none.png" in err
    pictures.draw(tmp_path / "a.png", 5)
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "b.safetensors")
    err = refused(capsys, "predict", tmp_path / "b.safetensors", tmp_path / "a.png")
    assert "has no metadata of" in err


def test_a_run_that_is_not_complete_is_refused(run, tmp_path, capsys):
    for name in ("config.json", "weights/fine-tuning-seed0.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((run / name).read_bytes())
    err = refused(capsys, "export", tmp_path, "--method", "fine-tuning")
    assert "is not complete" in err


@pytest.mark.parametrize("names", ["linen", "torch"])
def test_what_was_fine_tuned_once_is_a_source(tmp_path, monkeypatch, names):
    stages = STAGES["efficientnet-lite0"][:2]
    rng = np.random.default_rng(0)
    flat = {
        path: rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in variable_shapes(EfficientNetLite0(3, stages=stages)).items()
    }
    variables = unflatten_dict(flat)
    short = ARCHITECTURES["efficientnet-lite0"]._replace(
        module=functools.partial(EfficientNetLite0, stages=stages),
        torch_name=functools.partial(torch_name, stages),
    )
    monkeypatch.setitem(ARCHITECTURES, "efficientnet-lite0", short)
    path = tmp_path / "model.safetensors"
    spec = f"efficientnet-lite0:{path}"
    facts = trained.Facts(spec, "x", "lora", 0.0, 0, 16, "float32", ["a", "b", "c"])
    if names == "linen":
        trained.write(path, variables, facts)
    else:
        tensors = torch_tensors(variables, short.torch_name)
        assert tensors["_fc.weight"].shape == (3, 1280)
        assert tensors["_conv_head.weight"].shape == (1280, 24, 1, 1)
        assert tensors["_blocks.0._depthwise_conv.weight"].shape == (32, 1, 3, 3)
        trained.write_tensors(path, tensors, facts)
    found = trained.load(path)
    assert found.facts == facts
    for again in (load_source(spec).load(), found.variables):
        jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_adapters_are_added_and_the_source_head_is_left_out():
    original = tiny_network.TINY.load()["params"]
    started = network.starting_variables(tiny_network.TINY, 2, 0, METHODS["lora"])
    ones = jax.tree.map(jnp.ones_like, started["params"]["adapters"])
    params = {**started["params"], "adapters": ones, "source_head": original["head"]}
    kept = trained.network_variables(params, started["batch_stats"], original)
    assert kept["params"].keys() == {"stem", "norm", "mix", "head"}
    # The product of adapters of ones is their rank, everywhere.
    expected = original["mix"]["kernel"] + RANK
    np.testing.assert_allclose(kept["params"]["mix"]["kernel"], expected, rtol=1e-6)
    assert kept["params"]["head"]["bias"].shape == (2,)
    assert kept["batch_stats"] is started["batch_stats"]
