"""What is seen of a training as it runs: how far it is, and whether terms conflict."""

import io
import json
import re

import pytest
import tiny_network
from rich.console import Console

from dtnh_jax._cli import main
from dtnh_jax.finetune.runs import progress
from dtnh_jax.finetune.weights.sources import SOURCES

LINE = {
    "step": 7,
    "loss": 0.512,
    "cosine": -0.2512,
    "conflict": 0.61,
    "images_per_second": 102.3,
}
NOTE = "loss 0.512, cosine -0.25, in conflict 61%, 102 images/s"


def plain(text):
    """Without what moves the cursor and colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bars_and_numbers_fit_on_a_terminal(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    with progress.display(console, "6 methods x 3 seeds", 18, 36) as shown:
        shown.begin("feature_map+dtnh-seed0", 0, 36)
        shown.update(LINE)
    *_, overall, cell, note = plain(console.file.getvalue()).rstrip().splitlines()
    assert re.match(r"6 methods x 3 seeds +\u2501+ +7/648 +steps", overall)
    assert re.match(r"feature_map\+dtnh-seed0 \u2501+.* 7/36 +steps", cell)
    assert note.strip() == NOTE


def test_a_log_has_the_numbers_now_and_then(monkeypatch):
    now = iter([0.0, 10.0, 40.0, 40.0, 50.0, 60.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with progress.display(console, "all", 1, 36) as shown:
        shown.begin("l2_sp-seed0", 0, 36)
        for step in (6, 7, 8):
            shown.update({**LINE, "step": step})
    assert console.file.getvalue() == f"l2_sp-seed0: step 7 of 36, {NOTE}\n"


def test_the_command_shows_cosine_and_conflict_as_it_trains(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(SOURCES, "tiny", tiny_network.TINY)
    monkeypatch.setattr("dtnh_jax.finetune.directories.keep_compiled", lambda _: None)
    monkeypatch.setenv("FORCE_COLOR", "1")  # what is captured is taken for a terminal
    monkeypatch.setenv("COLUMNS", "80")
    options = {
        "source": "tiny",
        "methods": "l2_sp+dtnh",
        "steps": "3",
        "image-size": "16",
        "seeds": "1",
        "batch-size": "4",
        "train-per-class": "4",
        "test-per-class": "5",
        "data-dir": str(tmp_path / "data"),
        "run-dir": str(tmp_path / "run"),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert main(words) == 0
    *_, last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    seen = plain(capsys.readouterr().out)
    numbers = json.loads(last)
    assert numbers["step"] == 3
    # The last step is drawn again when the cell is complete.
    assert progress.note(numbers) in seen
    assert re.search(r"cosine [+-]0\.\d\d, in conflict \d+%", seen)
