"""Timing contenders against each other: each round runs every one once, in turn, so that a busy
moment of the machine hits all alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

Run = Callable[[int], object]


def interleaved(
    runs: dict[str, Run],
    *,
    rounds: int,
    device: str = "cpu",
    items: int = 1,
    before: Callable[[str], None] | None = None,
    warm: bool = True,
) -> dict[str, dict]:
    """Name -> times in ms of each contender.

    Args:
        runs: each is called with the number of its round.
        rounds: how many count.
        device: "cuda" for times between events on the GPU.
        items: what a run does, of which times are those of one.
        before: called with the contender's name before each of its runs, untimed.
        warm: begin with a round that is not counted.
    """
    times: dict[str, list] = {name: [] for name in runs}
    for count in range(0 if warm else 1, rounds + 1):
        for name, run in runs.items():
            if before is not None:
                before(name)
            wall, busy = once(lambda run=run, count=count: run(count), device)
            if count:
                times[name].append((wall / items, busy / items))
    return {name: summary(pairs, device) for name, pairs in times.items()}


def once(run: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """Milliseconds of wall clock (GPU: between events) and of processor time."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), float("nan")
    wall, busy = time.perf_counter(), time.process_time()
    run()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - busy)


def summary(pairs: Sequence[tuple[float, float]], device: str = "cpu") -> dict:
    """Median, quartiles and minimum of (wall, processor) milliseconds."""
    wall, busy = (sorted(one) for one in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles(wall, n=4, method="inclusive")
    return {
        "median_ms": round(middle, 3),
        "quartiles_ms": [round(low, 3), round(high, 3)],
        "min_ms": round(wall[0], 3),
        "median_processor_ms": None if device == "cuda" else round(statistics.median(busy), 3),
    }


def circumstances(*, device: str, threads: int, note: str, packages: Sequence[str]) -> dict:
    """What a result's JSON says of where and when it was taken."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread used",
        "note": note,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: installed(name) for name in packages},
        "load_before": os.getloadavg()[0],
    }


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
