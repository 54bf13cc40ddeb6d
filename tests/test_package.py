"""The package as its users meet it: names, imports, README."""

import pathlib
import re
import subprocess
import sys

import dtnh_jax
from dtnh_jax import regularizers, rules
from dtnh_jax.finetune.methods import REGULARIZERS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| `(\w+)", text, re.MULTILINE)


def test_the_readme_lists_every_public_name_and_no_other():
    names = first_column(section("The API at a glance"))
    assert sorted(set(names) - set(rules.__all__) | {"dtnh"}) == sorted(
        dtnh_jax.__all__
    )


def test_the_readme_lists_every_rule():
    public = {name for name in rules.__all__ if name[0].islower()}
    assert public <= set(first_column(section("The API at a glance")))


def test_the_readme_lists_every_regularizer_and_the_command_knows_it():
    listed = set(first_column(section("The regularizers")))
    assert listed == set(REGULARIZERS)
    assert listed <= set(regularizers.__all__)


def test_every_public_name_has_a_docstring():
    for module in (dtnh_jax, regularizers):
        for name in module.__all__:
            assert getattr(module, name).__doc__


def test_the_core_imports_no_flax_no_data_and_no_figures():
    heavy = ["flax", "tensorflow_datasets", "grain", "matplotlib", "orbax", "tyro"]
    code = f"import sys, dtnh_jax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
