"""Profiles updates: the device's work, and whether it waits for the host.

Two checks show that an update never waits for the host. JAX's transfer guard fails on
transfers from Python; the trace shows transfers inside programs.
"""

import gzip
import json
import pathlib
import re
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from dtnh_jax.studies.accelerator.contest import Contest, Steps, ready
from dtnh_jax.studies.accelerator.programs import Found, first_line
from dtnh_jax.studies.accelerator.rows import Results

GROUP = "profile"
_TO_HOST, _COPY = re.compile("memcpy ?d(to|2)h", re.I), re.compile("memcpy", re.I)


def measure(
    contest: Contest, name: str, found: Found, results: Results, updates: int = 20
) -> None:
    """Traces steps of one entry, and adds a row with a summary of the trace."""
    row = results.row(GROUP, f"{contest.group}: {name}", contest.dtype)
    (entry,) = contest.only([name]).entries
    calls, reason = ready(entry, found)
    if reason is not None:
        results.skip(row, reason)
        return
    try:
        steps = Steps(entry, calls, contest.data())
        for _ in range(3):
            jax.block_until_ready(steps())
        row.more["transfer guard"] = _guarded(steps, updates)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(updates):
                    steps()
                jax.block_until_ready((steps.state, steps.report))
            row.more |= summary(_events(pathlib.Path(folder)), updates)
    except Exception as error:  # profilers may be forbidden or missing
        results.skip(row, f"{type(error).__name__}: {first_line(error)}")
        return
    row.skipped = None
    results.write()
    print(f"profile of {row.name}, {row.dtype}: {row.more}", flush=True)


def _guarded(steps: Steps, updates: int) -> str:
    """Checks that updates run when every transfer to or from the host is forbidden."""
    try:
        with jax.transfer_guard("disallow"):
            for _ in range(updates):
                steps()
    except Exception as error:  # whatever JAX raises, it is the result
        return f"{type(error).__name__}: {first_line(error)}"
    jax.block_until_ready((steps.state, steps.report))
    return f"no transfer in {updates} updates"


def summary(events: Iterable[Mapping[str, Any]], updates: int) -> dict[str, Any]:
    """Summarizes the device's streams of a trace in Chrome's format.

    Args:
      events: events of the trace.
      updates: number of updates.

    Returns:
      Kernels and copies for each update, the total of copies to the host, and the
      division of the device's time between work and gaps.

    Example:
      >>> stream = {"name": "thread_name", "args": {"name": "Stream #1(Compute)"}}
      >>> ran = {"ph": "X", "name": "fusion"}
      >>> events = [stream, {**ran, "ts": 0, "dur": 3}, {**ran, "ts": 4, "dur": 6}]
      >>> summary(events, updates=2)["busy share"]
      0.9
    """
    events = list(events)
    streams = {
        (e.get("pid"), e.get("tid"))
        for e in events
        if e.get("name") == "thread_name"
        and str(e.get("args", {}).get("name", "")).startswith("Stream")
    }
    ran = [
        e
        for e in events
        if e.get("ph") == "X" and (e.get("pid"), e.get("tid")) in streams
    ]
    if not ran:
        names = {e["args"]["name"] for e in events if e.get("name") == "thread_name"}
        threads = ", ".join(sorted(names)[:8])
        return {"trace": f"no events of a device's streams; threads are {threads}"}
    copies = [e for e in ran if _COPY.search(str(e["name"]))]
    kernels = [e for e in ran if not _COPY.search(str(e["name"]))]
    spans = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in ran)
    gaps, busy, end = [], 0.0, spans[0][0]
    for start, stop in spans:
        if start > end:
            gaps.append(start - end)
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - spans[0][0]
    return {
        "kernels per update": len(kernels) / updates,
        "copies per update": len(copies) / updates,
        "copies to the host": sum(bool(_TO_HOST.search(str(e["name"]))) for e in ran),
        "busy us per update": busy / updates,
        "busy share": busy / whole if whole else 1.0,
        "longest gap us": max(gaps, default=0.0),
        "median gap us": statistics.median(gaps) if gaps else 0.0,
    }


def _events(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the events of the trace that the profiler wrote below a folder.

    JAX writes Chrome's format as well as its own; if not, its own is converted.
    """
    for file in folder.rglob("*.trace.json.gz"):
        with gzip.open(file, "rt") as text:
            return json.load(text)["traceEvents"]
    (file,) = folder.rglob("*.xplane.pb")
    events: list[dict[str, Any]] = []
    for pid, plane in enumerate(jax.profiler.ProfileData.from_file(str(file)).planes):
        for tid, line in enumerate(plane.lines):
            at = {"pid": pid, "tid": tid}
            args = {"name": line.name}
            events.append({**at, "ph": "M", "name": "thread_name", "args": args})
            for each in line.events:
                took = {"ts": each.start_ns / 1e3, "dur": each.duration_ns / 1e3}
                events.append({**at, "ph": "X", "name": each.name, **took})
    return events
