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
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cache_tools.info import cache_info
from fd3d import models
from fd3d.data.index import FrameIndex
from fd3d.draw import frame_picture, submitted_boxes
from fd3d.durable import write_json
from fd3d.efficiency import giga_multiply_adds
from fd3d.errors import CheckFailed, exit_code

EXPERT, APPRENTICE = "bevdepth-tiny-h", "bevdepth-tiny-l"
VERSION = "v1.0-synthetic"
SCORES = ("NDS", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for everything this makes (1.2 GB)")
    parser.add_argument("--scenes", type=int, default=160, help="training scenes")
    parser.add_argument("--val-scenes", type=int, default=30, help="validation scenes")
    parser.add_argument("--frames", type=int, default=4, help="keyframes a scene")
    parser.add_argument(
        "--reach", type=float, default=22, help="metres within which things are put (easy: 22)"
    )
    parser.add_argument(
        "--steps", type=int, default=1000, help="most steps of 4 frames for the expert"
    )
    parser.add_argument(
        "--apprentice-steps", type=int, default=1500, help="steps of 2 frames for the apprentices"
    )
    parser.add_argument("--distiller", choices=("l2", "heatmap"), default="l2")
    parser.add_argument("--seed", type=int, default=0, help="of the networks; the data keep theirs")
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--expert-lr", default="1.5e-3", help="peak learning rate of the expert")
    parser.add_argument("--lr", default="1e-3", help="peak learning rate of the apprentices")
    parser.add_argument(
        "--mixed-precision",
        choices=("no", "bf16"),
        default="bf16" if fast_bfloat16() else "no",
        help="of every training (default: bf16 where the CPU has instructions for it)",
    )
    parser.add_argument(
        "--minutes", type=float, default=4.8, help="most minutes for the expert's training"
    )
    return parser.parse_args(argv)


def fast_bfloat16() -> bool:
    """True where the CPU multiplies bfloat16 itself; elsewhere it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def script(name: str) -> str:
    """A recipe beside this one, as it would be typed here."""
    return os.path.relpath(Path(__file__).with_name(name))


def resume(out: Path) -> list[str]:
    """What a training needs to go on where an interrupted one stopped."""
    return ["--resume"] if (out / "run.json").exists() else []


@dataclass(frozen=True)
class Stage:
    """A command: its name, the file that it makes last, its arguments, how many processes it is."""

    name: str
    made: Path
    argv: Sequence[str]
    processes: int = 1


def _reason(log: str) -> str:
    """The sentence with which a command ended, also where a launcher said more after it."""
    lines = log.strip().splitlines() or ["it said nothing"]
    said = [line for line in lines if re.match(r"(\S+: )?(error|failed): ", line)]
    return (said or lines)[-1]


class Stages:
    """Runs commands, says what they are, and remembers how long each took."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.logs = out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._file = out / "seconds.json"
        self.seconds = json.loads(self._file.read_text()) if self._file.exists() else {}

    def run(self, *stages: Stage) -> None:
        """Run stages side by side, with threads shared out evenly. One that fails ends the
        quickstart with the last lines of its log."""
        started = time.monotonic()
        waiting = [stage for stage in stages if not stage.made.exists()]
        processes = sum(stage.processes for stage in waiting)
        threads = max(1, (os.cpu_count() or 1) // max(1, processes))
        running = []
        for stage in waiting:
            print(f"\n[{stage.name}] {shlex.join(stage.argv)}", flush=True)
            process = subprocess.Popen(
                [sys.executable, *stage.argv],
                stdout=self._log(stage).open("w"),
                stderr=subprocess.STDOUT,
                # Waiting threads sleep: spinning ones bring a step from 0.2 to 20 s as soon as
                # something else runs on the same cores. Huge pages spare page faults.
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(threads),
                    "OMP_WAIT_POLICY": "passive",
                    "THP_MEM_ALLOC_ENABLE": "1",
                },
            )
            running.append((stage, process))
        self._follow(running)
        for stage, process in running:
            if process.returncode != 0 or not stage.made.exists():
                raise CheckFailed(
                    f"stage {stage.name} (exit code {process.returncode}, log in "
                    f"{self._log(stage)}): {_reason(self._log(stage).read_text())}"
                )
        for stage in waiting:
            self.seconds[stage.name] = round(time.monotonic() - started, 1)
        write_json(self._file, self.seconds)

    def _log(self, stage: Stage) -> Path:
        return self.logs / f"{stage.name}.log"

    def _follow(self, running: list[tuple[Stage, subprocess.Popen]]) -> None:
        """Show the newest line of each log until all have ended."""
        began, shown = time.monotonic(), {}
        while any(process.poll() is None for _, process in running):
            time.sleep(0.5)
            for stage, _ in running:
                text = self._log(stage).read_text(errors="replace")
                lines = text.replace("\r", "\n").strip().splitlines()
                if lines and lines[-1] != shown.get(stage.name):
                    shown[stage.name] = lines[-1]
                    print(f"  {time.monotonic() - began:5.0f} s  {lines[-1]}", flush=True)


def main(args: argparse.Namespace) -> None:
    started = time.monotonic()
    out = Path(args.out)
    stages = Stages(out)
    data, cache = out / "data", out / "expert.zarr"
    expert = out / "expert" / "model.safetensors"
    where = ["--dataroot", str(data), "--version", VERSION]
    common = [*where, "--warmup", "100", "--clip", "10", "--seed", str(args.seed)]
    common += ["--workers", "0", "--keep-images-mb", "1500"]
    if args.mixed_precision != "no":
        common += ["--mixed-precision", args.mixed_precision]
    stages.run(
        Stage(
            "data",
            data / "synthetic.json",
            ["-m", "fd3d.data.synthetic", "--out", str(data), "--version", VERSION]
            + ["--scenes", str(args.scenes), "--val-scenes", str(args.val_scenes)]
            + ["--frames", str(args.frames), "--seed", str(args.data_seed), "--width", "352"]
            + ["--reach", f"{args.reach:g}"],
        )
    )
    # A second process makes better use of a second core than a second thread does.
    processes = min(2, os.cpu_count() or 1)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    # The name of this machine need not lead back to it.
    launch += ["--local_addr", "127.0.0.1"]
    stages.run(
        Stage(
            "expert",
            expert,
            [*launch, script("train.py"), "--model", EXPERT, "--out", str(out / "expert")]
            + [*common, "--batch", str(4 // processes), "--lr", args.expert_lr]
            + ["--adjacent", "test"]
            + ["--steps", str(args.steps), "--minutes", str(args.minutes)]
            + resume(out / "expert"),
            processes,
        )
    )
    stages.run(
        Stage(
            "cache",
            cache / "report.json",
            ["-m", "cache_tools.cli", "build", "--expert", EXPERT, "--checkpoint", str(expert)]
            + [*where, "--split", "train", "--out", str(cache)]
            + ["--signals", "bev,detections,heatmap"],
        )
    )
    distil = [script("distill_bevdepth.py"), "--model", APPRENTICE, *common]
    distil += ["--batch", "2", "--lr", args.lr, "--steps", str(args.apprentice_steps)]
    stages.run(
        Stage(
            "apprentice",
            out / "apprentice" / "model.safetensors",
            [*distil, "--distiller", "none", "--out", str(out / "apprentice")]
            + resume(out / "apprentice"),
        ),
        Stage(
            "distilled",
            out / "distilled" / "model.safetensors",
            [*distil, "--distiller", args.distiller, "--cache", str(cache)]
            + ["--out", str(out / "distilled"), *resume(out / "distilled")],
        ),
    )
    shared = [script("evaluate.py"), *where, "--split", "val", "--workers", "0"]
    runs = {"expert": EXPERT, "apprentice": APPRENTICE, "distilled": APPRENTICE}
    stages.run(
        *(
            Stage(
                f"evaluate-{run}",
                out / run / "val" / "scores.json",
                [*shared, "--model", model, "--out", str(out / run / "val"), "--checkpoint"]
                + [str(out / run / "model.safetensors")]
                + (["--control"] if run == "expert" else []),
            )
            for run, model in runs.items()
        )
    )
    summary = summarise(out, args, stages.seconds, runs)
    picture(out, data)
    print_table(summary)
    print(
        f"\n{time.monotonic() - started:.0f} s in all on {os.cpu_count()} cores. Made "
        f"{out / 'summary.json'} and {out / 'picture.png'}.\nnext: distil another apprentice from "
        f"the same cache, without the expert: change --distiller, --weight or --seed in the "
        f"[distilled] command above and give it a new --out."
    )


def summarise(out: Path, args: argparse.Namespace, seconds: dict, runs: dict[str, str]) -> dict:
    """The figures of the three runs, read from what their stages wrote, as DIR/summary.json."""
    # What trained it, whatever this call would choose.
    told = json.loads((out / "distilled" / "run.json").read_text())["identity"]["distiller"]
    titles = {
        "expert": f"expert {EXPERT}",
        "apprentice": f"apprentice {APPRENTICE}",
        "distilled": f"apprentice + {told} from the cache",
    }
    rows = []
    for run, name in runs.items():
        scores = json.loads((out / run / "val" / "scores.json").read_text())
        training = json.loads((out / run / "summary.json").read_text())
        rows.append(
            {
                "name": titles[run],
                **{key: scores[key.lower()] for key in SCORES},
                "gflops": round(giga_multiply_adds(models.build(name)), 3),
                "seconds_per_step": round(training["seconds_per_step"], 4),
                "wait_per_step": round(training["wait_per_step"], 4),
                "steps": training["steps"],
                "planned_steps": training["planned_steps"],
                "frames_per_step": training["batch"] * training["processes"],
                "seed": training["seed"],
            }
        )
    control = json.loads((out / "expert" / "val" / "control.json").read_text())
    stored = cache_info(out / "expert.zarr")
    summary = {
        "data": "synthetic (fd3d.data.synthetic)",
        "rows": rows,
        "control": {key: control[key.lower()] for key in SCORES},
        "cache": {
            "frames": stored["frames"],
            "bytes": stored["bytes"],
            "raw_fp16_bytes": stored["raw_fp16_bytes"],
            "preset": stored["preset"],
            "cache_id": stored["cache_id"],
        },
        "seconds": seconds,
        "arguments": vars(args),
    }
    write_json(out / "summary.json", summary)
    return summary


def print_table(summary: dict) -> None:
    print(f"\nvalidation split, {summary['data']}, scored by the nuScenes devkit")
    heads = [*SCORES, "GFLOPs", "s/step", "frames"]
    width = max(len(row["name"]) for row in summary["rows"]) + 2
    print(" " * width + "".join(f"{head:>8}" for head in heads))
    for row in summary["rows"]:
        figures = "".join(f"{row[key]:8.3f}" for key in SCORES)
        cost = f"{row['gflops']:8.2f}{row['seconds_per_step']:8.3f}{row['frames_per_step']:8}"
        print(f"{row['name']:<{width}}{figures}{cost}")
    print("s/step: seconds a training step; frames: in each.")
    control = summary["control"]
    print(
        f"The expert's own boxes with random yaw and zero velocity: mAOE {control['mAOE']:.2f}, "
        f"mAVE {control['mAVE']:.2f}."
    )
    cache = summary["cache"]
    print(
        f"Cache ({cache['preset']}): {cache['frames']} frames, {cache['bytes'] / 1e6:.0f} MB, "
        f"{cache['bytes'] / cache['raw_fp16_bytes']:.2f} of raw fp16."
    )


def picture(out: Path, data: Path) -> None:
    """DIR/picture.png: the validation frame with the most boxes, truth beside both apprentices."""
    index = FrameIndex.open(dataroot=data, version=VERSION)
    frames = [index.frame(position) for position in index.split("val")]
    frame = max(frames, key=lambda item: len(item.boxes))
    layers = {"ground truth": frame.boxes[frame.seen()]}
    for run, name in (("apprentice", "apprentice"), ("distilled", "distilled apprentice")):
        results = json.loads((out / run / "val" / "results.json").read_text())["results"]
        layers[name] = submitted_boxes(results[frame.token], min_score=0.3)
    frame_picture(
        out / "picture.png",
        frame=frame,
        dataroot=index.dataroot,
        layers=layers,
        title=f"validation frame {frame.token} (synthetic); detections with a score of 0.3 or more",
    )


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
