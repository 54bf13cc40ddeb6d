"""What TensorBoard would read."""

import struct

import pytest
from tensorboardX.proto import event_pb2

from dtnh_jax.finetune.runs import progress, tensorboard


class Seen:
    """A display that remembers what it is told."""

    def __init__(self):
        self.told = []

    def say(self, text):
        self.told.append(text)

    def begin(self, cell, step, steps):
        self.told.append((cell, step, steps))

    def update(self, line):
        self.told.append(line["step"])

    def end(self, summary):
        self.told.append(summary)

    def skip(self, cells):
        self.told.append(cells)


def events(folder):
    """Reads the records of all files: a length, a checksum, an event, a checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            found.append(event_pb2.Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def line(step, **numbers):
    return {"cell": "a", "method": "a", "seed": 0, "step": step, **numbers}


def test_every_scalar_of_every_step_is_written_and_shown(tmp_path):
    seen = Seen()
    with tensorboard.logging(seen, tmp_path) as display:
        assert isinstance(display, progress.Display)
        display.say("first")
        display.begin("l2_sp+dtnh-seed0", 0, 2)
        display.update(line(1, loss=0.5, cosine=-0.25, regularizer=None))
        display.update(line(2, loss=float("inf"), cosine=0.25))
        display.end("done")
    assert seen.told == ["first", ("l2_sp+dtnh-seed0", 0, 2), 1, 2, "done"]
    scalars = {
        (value.tag, event.step): value.simple_value
        for event in events(tmp_path / "l2_sp+dtnh-seed0")
        for value in event.summary.value
    }
    assert scalars == {("loss", 1): 0.5, ("cosine", 1): -0.25, ("cosine", 2): 0.25}


def test_steps_that_are_trained_again_are_forgotten(tmp_path):
    with tensorboard.logging(Seen(), tmp_path) as display:
        display.begin("a", 5, 9)
        display.update(line(6, loss=1.0))
    starts = [
        event.step
        for event in events(tmp_path / "a")
        if event.session_log.status == event_pb2.SessionLog.START
    ]
    assert starts == [6]


def test_what_was_logged_is_kept_when_training_stops(tmp_path):
    def stopped():
        with tensorboard.logging(Seen(), tmp_path) as display:
            display.begin("a", 0, 9)
            display.update(line(1, loss=1.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert any(event.summary.value for event in events(tmp_path / "a"))


def test_progress_shows_cosine_and_conflict():
    note = progress.note(
        line(3, loss=0.5, cosine=-0.25, conflict=0.61, images_per_second=12.0)
    )
    assert note == "loss 0.500, cosine -0.25, in conflict 61%, 12 images/s"
