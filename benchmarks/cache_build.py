"""What storing the expert's signals costs beside running the expert: builds against bare inference.

    python recipes/quickstart.py --out runs/quickstart
    python benchmarks/cache_build.py --tiny runs/quickstart/data \\
        --dataroot DATAROOT --version v1.0-mini --split mini_val

All contenders run the same expert with weights from a seed over the same frames, which the same
loader reads. `bare` moves the signals to numpy and drops them. Builds do what `fd3d-cache build`
does; `in turn` does it without a thread, as builds did before they had one. Two sizes: `tiny` is
`bevdepth-tiny-h` over a synthetic data set, with all cores, with one, and as if it ran on another
device: it then sleeps for as long as it took with all cores, and what it once said is copied.
`full` is `bevdepth-r50h` over the first frames of a split, which are repeated where there are too
few. Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from timing import circumstances, interleaved

from cache_tools import manifest
from cache_tools.bottleneck import BESIDE, FRONT
from cache_tools.build import Compute, batches_of, build_cache
from cache_tools.expert import ExpertRun, prepare
from cache_tools.manifest import Manifest
from cache_tools.presets import PRESETS
from cache_tools.writer import ShardWriter, create_or_open
from fd3d.data.batch import Batch

SIGNALS = ("bev", "detections", "heatmap")
BARE = "bare"
# A build is to take at most so much longer than bare inference, plus what that itself varies by.
GOAL = 1.05


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", type=Path, help="a synthetic data set, for the size tiny")
    parser.add_argument("--frames", type=int, default=24, help="of the size tiny")
    parser.add_argument(
        "--away-frames",
        type=int,
        default=24,
        help="of the size tiny on another device, where a short build's fixed cost shows most",
    )
    parser.add_argument(
        "--away-only", action="store_true", help="of the size tiny, all cores and another device"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each, size tiny")
    parser.add_argument("--dataroot", type=Path, help="a nuScenes data set, for the size full")
    parser.add_argument("--version", default="v1.0-mini", help="of the data set [v1.0-mini]")
    parser.add_argument("--split", default="mini_val", help="of the data set [mini_val]")
    parser.add_argument("--full-frames", type=int, default=2, help="of the size full")
    parser.add_argument("--full-rounds", type=int, default=2, help="timed runs of each, size full")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--work", type=Path, help="where caches are written [a temporary folder]")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the JSON")
    parser.add_argument("--out", type=Path, help="JSON file [benchmarks/results/cache-build-cpu]")
    args = parser.parse_args()
    if args.tiny is None and args.dataroot is None:
        parser.error("give --tiny, --dataroot or both")
    return args


class Contenders:
    """The ways to take an expert over some frames, and the seconds of their stages.

    Args:
        run: the expert and its data.
        frames: how many; they begin anew where the split has fewer.
        batch: frames at a time.
        folder: where caches are made.
        compute: stands for the expert's own.
    """

    def __init__(
        self,
        *,
        run: ExpertRun,
        frames: int,
        batch: int,
        folder: Path,
        compute: Compute | None = None,
    ) -> None:
        self._run, self._batch, self._folder = run, batch, folder
        self._compute = compute or run.compute
        self._keys = [f"{i}-{run.keys[i % len(run.keys)]}" for i in range(frames)]
        self.stages: dict[str, list[dict[str, float]]] = {}

    def all(self, in_turn: bool) -> dict[str, Callable[[int], None]]:
        """Contender -> a run over all frames; `in_turn`: with the one without a thread."""
        runs: dict[str, Callable[[int], None]] = {BARE: lambda _: self._one_thread(BARE, None)}
        for preset in PRESETS:
            runs[preset] = lambda _, preset=preset: self._build(preset)
        if in_turn:
            runs["balanced, in turn"] = lambda _: self._one_thread("balanced, in turn", "balanced")
        return runs

    def clear(self, _: str) -> None:
        """Remove what the last run wrote, and let the disk finish with it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        os.sync()

    def _load(self, batches: Sequence[Sequence[int]]):
        count = len(self._run.keys)
        return self._run.load([[i % count for i in positions] for positions in batches])

    def _manifest(self, preset: str) -> Manifest:
        return manifest.make(
            identity=self._run.identity,
            signals=self._run.signals,
            keys=self._keys,
            preset=preset,
            shard_frames=16,
        )

    def _build(self, preset: str) -> None:
        report = build_cache(
            out=self._folder,
            identity=self._run.identity,
            signals=self._run.signals,
            keys=self._keys,
            compute=self._compute,
            load=self._load,
            preset=preset,
            batch=self._batch,
            quiet=True,
        )
        self.stages.setdefault(preset, []).append(dict(report.seconds))

    def _one_thread(self, name: str, preset: str | None) -> None:
        """Everything one after the other; nothing is stored where there is no preset."""
        cache = self._manifest(preset or "lossless")
        writer = None
        if preset is not None:
            create_or_open(self._folder, cache, self._keys)
            writer = ShardWriter(folder=self._folder, cache=cache, keys=self._keys)
        spent = dict.fromkeys((*FRONT, *BESIDE), 0.0)
        before = time.perf_counter()

        def lap(stage: str) -> None:
            nonlocal before
            now = time.perf_counter()
            spent[stage] += now - before
            before = now

        batches = batches_of(cache, range(cache.shards), self._batch)
        inputs = iter(self._load(batches))
        for positions in batches:
            given = next(inputs)
            lap("load")
            values = self._compute(given)
            lap("expert")
            if writer is None:
                continue
            for row, position in enumerate(positions):
                writer.add(position, {signal: values[signal][row] for signal in values})
            lap("encode")
            if (positions[-1] + 1) % cache.shard_frames == 0 or positions is batches[-1]:
                writer.publish(positions[-1] // cache.shard_frames)
            lap("write")
        self.stages.setdefault(name, []).append(spent)


def elsewhere(run: ExpertRun, seconds: float) -> Compute:
    """Like an expert on a device that takes so many seconds a frame and leaves the cores free."""
    said = run.compute(next(run.load([[0]])))

    def compute(batch: Batch) -> dict[str, list[np.ndarray]]:
        rows = len(batch.dt)
        time.sleep(seconds * rows)
        return {name: [values[0].copy() for _ in range(rows)] for name, values in said.items()}

    return compute


def measure(
    contenders: Contenders, *, frames: int, batch: int, rounds: int, threads: int, full: bool
) -> dict:
    """One size: wall and processor time of every contender, and its stages, for each frame."""
    torch.set_num_threads(threads)
    # A round more, and a contender more, would take minutes in the full size.
    runs = contenders.all(in_turn=not full)
    times = interleaved(runs, rounds=rounds, items=frames, before=contenders.clear, warm=not full)
    contenders.clear(BARE)
    bare = times[BARE]
    low, high = bare["quartiles_ms"]
    spread = (high - low) / bare["median_ms"]
    for name, row in times.items():
        counted = contenders.stages[name][-rounds:]
        row["stages_ms"] = {
            stage: round(1e3 * statistics.median(one[stage] for one in counted) / frames, 3)
            for stage in counted[0]
        }
        row["over_bare"] = round(row["median_ms"] / bare["median_ms"], 4)
        row["within_goal"] = row["over_bare"] <= GOAL + spread
    return {
        "frames": frames,
        "batch": batch,
        "rounds": rounds,
        "expert_threads": threads,
        "bare_spread": round(spread, 4),
        "times": times,
    }


def report(found: dict, title: str) -> None:
    """The table of one size, milliseconds a frame."""
    print(
        f"\n{title}, torch threads {found['expert_threads']}, ms a frame; bare inference varies by "
        f"{100 * found['bare_spread']:.1f} % between its quartiles"
    )
    columns = ("wall", "quartiles", "", "over bare", "processor", *FRONT, *BESIDE)
    print(f"{'':20}" + "".join(f"{name:>10}" for name in columns))
    for name, row in found["times"].items():
        figures = [row["median_ms"], *row["quartiles_ms"]]
        last = [row["median_processor_ms"], *row["stages_ms"].values()]
        print(
            f"{name:20}"
            + "".join(f"{value:10.1f}" for value in figures)
            + f"{row['over_bare']:10.3f}"
            + "".join(f"{value:10.1f}" for value in last)
        )


def main() -> None:
    args = parse()
    cores = torch.get_num_threads()
    packages = ("torch", "numpy", "zarr", "numcodecs")
    result = {
        "what": "building a cache against running the same expert over the same frames and "
        "dropping what it says; processor time is that of the process without its loader's workers",
        "goal": f"median at most {GOAL} of bare, plus the distance of bare's quartiles",
        **circumstances(device="cpu", threads=cores, note=args.note, packages=packages),
        "workers": args.workers,
        "sizes": {},
    }

    def prepared(expert: str, dataroot: Path, version: str, split: str) -> ExpertRun:
        return prepare(
            expert=expert,
            checkpoint=None,
            init_seed=0,
            dataroot=dataroot,
            version=version,
            split=split,
            signals=SIGNALS,
            preset="focal",
            workers=args.workers,
        )

    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        place = Path(folder) / "c.zarr"
        if args.tiny is not None:
            run = prepared("bevdepth-tiny-h", args.tiny, "v1.0-synthetic", "val")

            def tiny(name: str, threads: int, frames: int, compute: Compute | None = None) -> dict:
                shape = {"frames": frames, "batch": 4}
                found = measure(
                    Contenders(run=run, folder=place, compute=compute, **shape),
                    **shape,
                    rounds=args.rounds,
                    threads=threads,
                    full=False,
                )
                result["sizes"][name] = found
                report(found, name)
                return found

            found = tiny("tiny, all cores", cores, args.frames)
            if not args.away_only:
                tiny("tiny, one core", 1, args.frames)
            seconds = found["times"][BARE]["stages_ms"]["expert"] / 1e3
            tiny("tiny, another device", cores, args.away_frames, elsewhere(run, seconds))
        if args.dataroot is not None:
            run = prepared("bevdepth-r50h", args.dataroot, args.version, args.split)
            torch.set_num_threads(cores)
            run.compute(next(run.load([[0]])))
            shape = {"frames": args.full_frames, "batch": 1}
            found = measure(
                Contenders(run=run, folder=place, **shape),
                **shape,
                rounds=args.full_rounds,
                threads=cores,
                full=True,
            )
            result["sizes"]["full"] = found
            report(found, "full")
    result["load_after"] = os.getloadavg()[0]
    out = args.out or Path(__file__).parent / "results" / "cache-build-cpu.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
