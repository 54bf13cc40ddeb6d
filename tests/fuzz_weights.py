"""Damages files of weights at random: `python tests/fuzz_weights.py --files 10000`.

Whatever is in a file, reading it must end with arrays or with one clear error, run
nothing, and take no more memory than a small multiple of the file.
"""

import argparse
import pathlib
import sys
import tempfile
import tracemalloc

import numpy as np
from test_weights import SMALL, checkpoint, state, storage, tensor

from dtnh_jax.finetune.weights.torch_files import WeightsError, read_torch_checkpoint

# What a pickle would have to do to run something, as Python's audit hooks call it.
FORBIDDEN = (
    "import",
    "exec",
    "compile",
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "pickle.find_class",
    "marshal.",
)
# Of memory in bytes: what any error takes, and times the file's size. An opcode of
# one byte may make an empty dictionary, with its place on the stack.
LEAST, FACTOR = 100_000, 100

_seen: list[str] = []
_is_watching = False


def _watch(event, _):
    if _is_watching and event.startswith(FORBIDDEN):
        _seen.append(event)


def examples():
    """Files to begin with: good ones of several kinds, and bad beginnings."""
    rng = np.random.default_rng(1)
    kinds = {"DoubleStorage": "<f8", "HalfStorage": "<f2", "ByteStorage": "<u1"}
    arrays = {
        str(number): rng.normal(0, 9, 24).astype(dtype)
        for number, dtype in enumerate(kinds.values())
    }
    entries = {
        f"entry{number}": tensor(storage(str(number), kind, 24), (4, 6), (6, 1))
        for number, kind in enumerate(kinds)
    }
    attack = b"cos\nsystem\n(X\x04\x00\x00\x00truetR"
    return [
        SMALL,
        checkpoint(state(**entries), arrays),
        checkpoint(state(a=attack), {}),
        b"\x80\x02" + b"}" * 3000,
    ]


def mutated(content, rng, others):
    """Changes, removes, repeats or replaces a few stretches of bytes."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(len(content) + 1))
        length = int(rng.integers(1, 40))
        match int(rng.integers(6)):
            case 0:
                content[at : at + 1] = rng.bytes(1)
            case 1:
                del content[at : at + length]
            case 2:
                start = int(rng.integers(len(content) + 1))
                content[at:at] = content[start : start + length]
            case 3:
                other = others[rng.integers(len(others))]
                start = int(rng.integers(len(other)))
                content[at : at + length] = other[start : start + length]
            case 4:  # sizes that are not there
                size = rng.choice([-1, 2**31 - 1, 2**40, 2**62])
                content[at : at + 8] = int(size).to_bytes(8, "little", signed=True)
            case _:
                content[at : at + 1] = (
                    bytes([content[at] ^ 1 << rng.integers(8)])
                    if (at < len(content))
                    else b""
                )
    return bytes(content)


def fuzz(files, seed, folder):
    """Reads so many damaged files; returns how many were refused.

    Raises:
      AssertionError: one of them ran something, took too much memory, or was refused
        in another way than with a `WeightsError` in one line.
    """
    global _is_watching
    rng, originals = np.random.default_rng(seed), examples()
    path = pathlib.Path(folder, "weights.pth")
    refused = 0
    sys.addaudithook(_watch)
    tracemalloc.start()
    try:
        for number in range(files):
            content = mutated(originals[number % len(originals)], rng, originals)
            path.write_bytes(content)
            where = f"file {number} of seed {seed}"
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            error = None
            _is_watching = True
            try:
                tensors = read_torch_checkpoint(path)
                assert all(type(x) is np.ndarray for x in tensors.values()), where
            except WeightsError as caught:
                error = str(caught)
            finally:
                _is_watching = False
            taken = tracemalloc.get_traced_memory()[1] - before
            assert not _seen, f"{where}: {_seen}"
            assert taken < LEAST + FACTOR * len(content), f"{where}: {taken} bytes"
            if error is not None:
                refused += 1
                assert str(path) in error, f"{where}: {error}"
                assert len(error) < 1000, f"{where}: {error}"
                assert "\n" not in error, f"{where}: {error}"
    finally:
        tracemalloc.stop()
    return refused


def main():
    """Returns the exit status; a failure is an exception with the file's number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        refused = fuzz(options.files, options.seed, folder)
    print(f"{options.files} files: {refused} refused, the others read; nothing else")
    return 0


if __name__ == "__main__":
    sys.exit(main())
