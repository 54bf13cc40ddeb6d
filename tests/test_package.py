"""The package as its users meet it: names, imports, README."""

import pathlib
import re
import subprocess
import sys

import pytest

import dtnh_jax
from dtnh_jax import regularizers, rules
from dtnh_jax.finetune.regularizers import REGULARIZERS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "notebooks" / "docs"


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| `(\w+)", text, re.MULTILINE)


def test_the_documents_list_every_public_name_and_no_other():
    assert sorted(first_column(page("names"))) == sorted(dtnh_jax.__all__)


def test_the_documents_list_every_regularizer_and_the_command_knows_it():
    listed = set(first_column(page("regularizers")))
    assert listed == set(REGULARIZERS)
    assert listed <= set(regularizers.__all__)


def test_every_public_name_has_a_docstring():
    for module in (dtnh_jax, regularizers, rules):
        for name in set(module.__all__) - {"Rule"}:  # a type
            assert getattr(module, name).__doc__


@pytest.mark.e2e
def test_the_core_imports_no_flax_no_data_and_no_figures():
    heavy = ["flax", "tensorflow_datasets", "grain", "matplotlib", "orbax", "tyro"]
    code = f"import sys, dtnh_jax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.e2e
def test_the_readme_fits_a_few_screens_and_its_first_lines_run():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    code = readme.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_links_between_documents_lead_somewhere():
    documents = [
        ROOT / "README.md",
        *DOCS.glob("*.md"),
        *(ROOT / ".github").glob("*.md"),
    ]
    documents += [*(ROOT / ".github" / "results").glob("*.md")]
    for document in documents:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), (document.name, link)


def test_every_public_name_has_a_place_in_the_reference():
    pages = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    for name in set(dtnh_jax.__all__) - {"regularizers", "rules"}:
        assert f"::: dtnh_jax.{name}\n" in pages
