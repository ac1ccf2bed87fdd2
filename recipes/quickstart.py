"""The whole idea on two CPU cores in about ten minutes, on a synthetic data set.

    python recipes/quickstart.py --out runs/quickstart

An expert is trained, run once into a cache, an apprentice is distilled from that cache, and the
nuScenes devkit scores expert, apprentice and distilled apprentice side by side. Every stage is a
command that you can run yourself; it is printed before it runs. A stage whose result lies in the
output folder is not run again, so an interrupted quickstart goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from recipes.training import write_json

from fd3d.errors import CheckFailed, exit_code

EXPERT, APPRENTICE = "bevdepth-tiny-h", "bevdepth-tiny-l"
VERSION = "v1.0-synthetic"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for everything this makes (1 GB)")
    parser.add_argument("--scenes", type=int, default=100, help="training scenes")
    parser.add_argument("--val-scenes", type=int, default=20, help="validation scenes")
    parser.add_argument("--frames", type=int, default=6, help="keyframes a scene")
    parser.add_argument("--epochs", type=int, default=5, help="of every network")
    parser.add_argument("--distiller", choices=("l2", "heatmap"), default="heatmap")
    parser.add_argument("--seed", type=int, default=0, help="of the networks; the data keep theirs")
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=4.5, help="most minutes for the expert's training"
    )
    return parser.parse_args(argv)


class Stages:
    """Runs commands, says what they are, and remembers how long each took."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.logs = out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._file = out / "seconds.json"
        self.seconds = json.loads(self._file.read_text()) if self._file.exists() else {}

    def run(self, *commands: tuple[str, Path, Sequence[str]]) -> None:
        """Run commands side by side: (stage name, file that it makes, argv). Threads are shared
        out evenly; a failed stage ends the quickstart with the last lines of its log."""
        started = time.monotonic()
        waiting = [item for item in commands if not item[1].exists()]
        threads = max(1, (os.cpu_count() or 1) // max(1, len(waiting)))
        running = []
        for name, made, argv in waiting:
            print(f"\n[{name}] {shlex.join(argv)}", flush=True)
            log = (self.logs / f"{name}.log").open("w")
            process = subprocess.Popen(
                [sys.executable, *argv],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
            running.append((name, made, process, time.monotonic()))
        self._follow(running)
        for name, made, process, _ in running:
            if process.returncode != 0 or not made.exists():
                tail = (self.logs / f"{name}.log").read_text().strip().splitlines()[-3:]
                raise CheckFailed(f"stage {name} (exit code {process.returncode}): {' | '.join(tail)}")
        for name, _, _, _ in running:
            self.seconds[name] = round(time.monotonic() - started, 1)
        write_json(self._file, self.seconds)

    def _follow(self, running: list) -> None:
        """Show the newest line of each log until all have ended."""
        shown: dict[str, str] = {}
        while any(process.poll() is None for _, _, process, _ in running):
            time.sleep(0.5)
            for name, _, _, began in running:
                text = (self.logs / f"{name}.log").read_text(errors="replace")
                lines = text.replace("\r", "\n").strip().splitlines()
                if lines and lines[-1] != shown.get(name):
                    shown[name] = lines[-1]
                    print(f"  {time.monotonic() - began:5.0f} s  {lines[-1]}", flush=True)


def main(args: argparse.Namespace) -> None:
    started = time.monotonic()
    out = Path(args.out)
    stages = Stages(out)
    data, cache = out / "data", out / "expert.zarr"
    expert = out / "expert" / "model.safetensors"
    where = ["--dataroot", str(data), "--version", VERSION]
    common = [*where, "--epochs", str(args.epochs), "--batch", "4", "--lr", "2e-3", "--warmup", "60"]
    common += ["--clip", "10", "--seed", str(args.seed), "--workers", "0"]
    common += ["--keep-images-mb", "1500"]
    stages.run(
        (
            "data",
            data / "synthetic.json",
            ["-m", "fd3d.data.synthetic", "--out", str(data), "--version", VERSION]
            + ["--scenes", str(args.scenes), "--val-scenes", str(args.val_scenes)]
            + ["--frames", str(args.frames), "--seed", str(args.data_seed), "--width", "352"],
        )
    )
    stages.run(
        (
            "expert",
            expert,
            ["recipes/train.py", "--model", EXPERT, "--out", str(out / "expert"), *common]
            + ["--adjacent", "test", "--minutes", str(args.minutes)],
        )
    )
    stages.run(
        (
            "cache",
            cache / "report.json",
            ["-m", "cache_tools.cli", "build", "--expert", EXPERT, "--checkpoint", str(expert)]
            + [*where, "--split", "train", "--out", str(cache)]
            + ["--signals", "bev,detections,heatmap"],
        )
    )
    distil = ["recipes/distill_bevdepth.py", "--model", APPRENTICE, *common]
    stages.run(
        (
            "apprentice",
            out / "apprentice" / "model.safetensors",
            [*distil, "--distiller", "none", "--out", str(out / "apprentice")],
        ),
        (
            "distilled",
            out / "distilled" / "model.safetensors",
            [*distil, "--distiller", args.distiller, "--cache", str(cache)]
            + ["--out", str(out / "distilled")],
        ),
    )
    print(time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
