"""The notebooks run from top to bottom, and are committed as they ran.

Each is executed in its fast mode, `DTNH_FAST=1`, in a kernel of its own. The outputs
that are committed are those of the full mode.
"""

import base64
import io
import os
import pathlib

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NAMES = (
    "anatomy_of_conflict",
    "fine_tuning_flax",
    "language_models",
    "never_hurts",
    "quickstart",
    "tpu_and_sharding",
)
each_notebook = pytest.mark.parametrize("name", NAMES)


def load(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    """The pictures among the outputs of a cell, decoded."""
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))))
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


def test_there_are_no_other_notebooks():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.mark.e2e
@each_notebook
def test_a_notebook_runs_in_its_fast_mode(name):
    notebook = load(name)
    committed = [len(pictures(cell)) for cell in code_of(notebook)]
    # As a user's kernel, which no flags of these tests have prepared.
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env={**env, "DTNH_FAST": "1"})
    assert [len(pictures(cell)) for cell in code_of(notebook)] == committed


@each_notebook
def test_a_notebook_says_how_to_run_it(name):
    notebook = load(name)
    title, code = notebook.cells[0], code_of(notebook)
    assert title.cell_type == "markdown"
    assert title.source.startswith("# ")
    assert "(https://colab.research.google.com/" in title.source
    note = title.source.partition("**Runtime.**")[2]
    assert all(kind in note for kind in ("CPU", "GPU", "TPU"))
    assert notebook.cells[1] is code[0]
    assert "%pip install" in code[0].source
    assert "DTNH_FAST" in code[0].source
    assert not any("%pip" in cell.source for cell in code[1:])


@each_notebook
def test_outputs_are_those_of_one_run_without_errors(name):
    code = code_of(load(name))
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    kinds = {output.output_type for output in outputs}
    assert kinds <= {"display_data", "execute_result"}  # nor prints and warnings
    found = [picture for cell in code for picture in pictures(cell)]
    assert found
    for picture in found:
        assert min(picture.shape[:2]) > 100
        assert len(np.unique(picture)) > 10  # more than an empty frame


@each_notebook
def test_outputs_tell_nothing_of_where_they_were_made(name):
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < 2_000_000
    notebook = load(name)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)
    for cell in code_of(notebook):
        for output in cell.outputs:
            texts = [v for k, v in output.data.items() if k.startswith("text/")]
            for start in ("/home/", "/root/", "/tmp/", "/work/", "/usr/"):
                assert not any(start in text for text in texts), texts
