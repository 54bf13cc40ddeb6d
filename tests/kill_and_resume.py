"""Kills training at random moments: `python tests/kill_and_resume.py --kills 20`.

Each time a run is begun, killed without warning, and begun again. It has to end bitwise
as one that nobody killed, whatever it was doing at that moment.
"""

import argparse
import itertools
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

OPTIONS = {
    "--source": "tiny",
    "--steps": "30",
    "--checkpoint-every": "3",
    "--image-size": "16",
    "--seeds": "1",
    "--batch-size": "4",
    "--train-per-class": "4",
    "--test-per-class": "5",
}
METHODS = ["l2_sp+dtnh", "feature_map+never_hurt"]
BOUND = 300  # seconds for a whole run


def start(data_dir, run_dir):
    """Starts the command in a process of its own that knows the tiny network."""
    script = pathlib.Path(__file__).parent / "tiny_network.py"
    options = [*itertools.chain(*OPTIONS.items()), "--data-dir", str(data_dir)]
    options += ["--run-dir", str(run_dir)]
    return subprocess.Popen(
        [sys.executable, str(script), *options, "--methods", *METHODS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Waits until a process ends well; returns what it printed."""
    out, err = process.communicate(timeout=BOUND)
    assert process.returncode == 0, err
    return out


def deterministic(run_dir):
    """Everything but wall-clock times, as text, so that equality is bitwise."""
    results = json.loads((run_dir / "results.json").read_text())
    del results["measured"]
    text = (run_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        del line["seconds"], line["images_per_second"]
    return json.dumps(results), [json.dumps(line) for line in lines]


def wait_until_begun(process, run_dir):
    """Waits until a process has opened its run folder; returns when that was."""
    while not (run_dir / "config.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    return time.monotonic()


def uninterrupted(data_dir, run_dir):
    """Returns what a run comes to, and how many seconds it works on it."""
    finish(start(data_dir, run_dir))  # which also prepares the photographs
    again = run_dir.with_name(run_dir.name + "-timed")
    process = start(data_dir, again)
    begun = wait_until_begun(process, again)
    finish(process)
    seconds = time.monotonic() - begun
    assert deterministic(again) == deterministic(run_dir)
    return deterministic(run_dir), seconds


def kill_and_resume(data_dir, run_dir, seconds):
    """Kills a run after so many seconds of work; returns its result, and where."""
    process = start(data_dir, run_dir)
    wait_until_begun(process, run_dir)
    time.sleep(seconds)
    process.kill()
    process.communicate(timeout=BOUND)
    was_killed = process.returncode == -signal.SIGKILL
    metrics = run_dir / "metrics.jsonl"
    lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    finish(start(data_dir, run_dir))
    where = f"after {lines} steps" if was_killed else "too late"
    return deterministic(run_dir), where


def main():
    """Returns the exit status: 0 where all runs came to the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        data_dir, runs = pathlib.Path(folder, "data"), pathlib.Path(folder)
        expected, seconds = uninterrupted(data_dir, runs / "whole")
        print(f"whole: {len(expected[1])} steps, {seconds:.1f} s", flush=True)
        failures = 0
        for number in range(options.kills):
            after = rng.uniform(0, seconds)
            run_dir = runs / f"killed-{number}"
            found, where = kill_and_resume(data_dir, run_dir, after)
            failures += found != expected
            verdict = "the same" if found == expected else "ANOTHER RESULT"
            print(
                f"{number + 1}: killed {where} ({after:.1f} s): {verdict}", flush=True
            )
    print(f"{options.kills - failures} of {options.kills} came to the same")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
