"""What distillation gains: paired runs of apprentices with and without it, on synthetic data.

    python benchmarks/gain.py --work runs/gain --data-seeds 12,13 --rows none,heatmap,fd3d

The protocol, fixed before the runs of record:

- One data set for each data seed: 300 training and 60 validation scenes of 4 keyframes, things
  within 22 m; one expert `bevdepth-tiny-h` on each (seed 0, 2000 steps of 4 frames), run once into
  a cache (`balanced`); one distillation head from the cache (1500 steps of 4 maps).
- Apprentices `bevdepth-tiny-l`, 1500 steps of 2 frames, peak rate 1e-3. A training seed names
  initial weights, order of frames and augmentation: rows of one seed are paired in all of them.
- Data seed 11 is for choosing weights and settings. Seeds 12 and 13 are for reporting, once;
  nothing is chosen by them. A row that carries a claim has five training seeds or more on each.
- Setting `plain` has no augmentation; `augmented` has that of the images and class-balanced
  sampling (the paper's second setting without BEV augmentation, which mode `clean` cannot have).
- The score is that of the nuScenes devkit on all 240 validation frames, after the last step.
  Differences are paired by (data seed, training seed); intervals are Student's, 95 %.

A row is a name of `ROWS`, with `@W` behind it for a factor of the weights (`fd3d@0.5`), or with
`/PRESET` for another cache (`l2/tiny`): what a lossy preset costs is the paired difference to
`/lossless` (`--report --against l2/lossless`). Rows of FD3D have all of its terms but where they
name others. A run that is in the JSON file is not run again; stages whose result is in the work
folder neither.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from gain_report import BALANCED, parts_of, report

from cache_tools.presets import PRESETS
from fd3d.durable import write_json
from fd3d.errors import CheckFailed, UsageError, exit_code
from recipes import distill_bevdepth
from recipes.distillers import weights_of

VERSION = "v1.0-synthetic"
EXPERT, APPRENTICE = "bevdepth-tiny-h", "bevdepth-tiny-l"
RESULTS = Path(__file__).parent / "results" / "gain-cpu.json"

_ALL = "--signals bev,detections,heatmap,pv --preset balanced"
_FD3D = "--distiller fd3d --head {head}"
ROWS = {
    "none": "--distiller none",
    "l2": "--distiller l2",
    "l2 shared": "--distiller l2 --place shared",
    "heatmap": "--distiller heatmap",
    "heatmap with pv": "--distiller heatmap --pv",
    "heatmap standardised": "--distiller heatmap --standardise --weight 10",
    "cwd": "--distiller cwd",
    "mgd": "--distiller mgd",
    "fgd": "--distiller fgd",
    "bevdistill": "--distiller bevdistill",
    "distillbev": "--distiller distillbev",
    "unidistill": "--distiller unidistill",
    "response": "--distiller response",
    "fd3d": _FD3D,
    "fd3d on bev": _FD3D + " --terms gen_bev,focal",
    "fd3d gen_bev": _FD3D + " --terms gen_bev",
    "fd3d focal": _FD3D + " --terms focal",
    "fd3d gen_pv": _FD3D + " --terms gen_pv",
    "fd3d joint": "--distiller fd3d",
    "fd3d gt areas": "--distiller fd3d --areas gt --terms gen_bev",
    "fd3d expert areas": "--distiller fd3d --areas expert --terms gen_bev",
    "fd3d doubt": _FD3D + " --doubt 0.2",
    "fd3d small grid": _FD3D + " --compare apprentice",
}
SETTINGS = {"plain": "--keep-images-mb 1500", "augmented": "--image-augment --cbgs"}
# What tells one run from another.
KEY = ("setting", "data_seed", "row", "seed")
SCORES = ("nds", "map", "mate", "mase", "maoe", "mave", "maae")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", help="folder for data, experts and runs (3 GB a data seed)")
    parser.add_argument("--data-seeds", default="12,13", help="(default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="of training (default: %(default)s)")
    parser.add_argument("--rows", default="none,l2,heatmap,fd3d", help="(default: %(default)s)")
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="plain")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where runs are kept")
    parser.add_argument("--report", action="store_true", help="print the tables and run nothing")
    parser.add_argument(
        "--against", default="none", help="the row of the differences (default: %(default)s)"
    )
    return parser.parse_args(argv)


def call(words: str, log: Path) -> None:
    """Run one command of this project, its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        file.write(words + "\n")
        file.flush()
        done = subprocess.run(
            [sys.executable, *shlex.split(words)],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).resolve().parents[1],
            # As in recipes/quickstart.py.
            env={**os.environ, "OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1"},
        )
    if done.returncode:
        raise CheckFailed(f"{words.split(' --')[0]} failed, see {log}")


def prepare(work: Path, seed: int, presets: Sequence[str] = ()) -> dict[str, Path]:
    """Data, expert, caches and head of a data seed; what is there is not made again.

    `presets` beside balanced get a cache of the training split too, lossless ones by the expert,
    the others by export from those.
    """
    folder = (work / f"data-{seed}").resolve()
    data, expert, head = folder / "data", folder / "expert", folder / "head"
    weights = expert / "model.safetensors"
    where = f"--dataroot {data} --version {VERSION}"
    learn = f"{where} --workers 0 --warmup 100 --clip 10 --seed 0"
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 --local_addr 127.0.0.1"
    build = f"-m cache_tools.cli build --expert {EXPERT} --checkpoint {weights} {where}"
    stages = {
        "data": (
            data / "synthetic.json",
            f"-m fd3d.data.synthetic --out {data} --version {VERSION} --scenes 300 "
            f"--val-scenes 60 --frames 4 --seed {seed} --width 352 --reach 22",
        ),
        "expert": (
            weights,
            f"{launch} recipes/train.py --model {EXPERT} --out {expert} {learn} --batch 2 "
            f"--keep-images-mb 1500 --lr 1.5e-3 --adjacent test --steps 2000{_resume(expert)}",
        ),
        "train": (
            folder / "train.zarr" / "report.json",
            f"{build} {_ALL} --split train --out {folder / 'train.zarr'}",
        ),
        "val": (
            folder / "val.zarr" / "report.json",
            f"{build} {_ALL} --split val --out {folder / 'val.zarr'}",
        ),
        "head": (
            head / "scores.json",
            f"recipes/train_head.py --cache {folder / 'train.zarr'} --val-cache "
            f"{folder / 'val.zarr'} {learn} --batch 4 --lr 1e-3 --steps 1500 --out "
            f"{head}{_resume(head)}",
        ),
        "score": (expert / "val" / "scores.json", _score(EXPERT, expert, where)),
    }
    if presets:
        lossless = cache_of(folder, "lossless")
        words = f"{build} --signals bev --split train --preset lossless --out {lossless}"
        stages["lossless"] = (lossless / "report.json", words)
    for preset in sorted(set(presets) - {"lossless"}):
        out = cache_of(folder, preset)
        words = f"-m cache_tools.cli export {lossless} {out} --preset {preset}"
        stages[preset] = (out / "report.json", words)
    for name, (made, words) in stages.items():
        if not made.exists():
            print(f"data seed {seed}: {name}", flush=True)
            call(words, folder / "logs" / f"{name}.log")
    return {"folder": folder, "data": data, "head": head / "model.safetensors"}


def cache_of(folder: Path, preset: str) -> Path:
    """The cache of a data seed's training split; the main one, with every signal, is balanced."""
    return folder / ("train.zarr" if preset == BALANCED else f"train-{preset}.zarr")


def one_run(paths: dict[str, Path], setting: str, row: str, seed: int) -> dict:
    """Train and score one apprentice; its record."""
    name, preset, factor = parts_of(row)
    folder = row.replace(" ", "-").replace("/", "-on-")
    out = paths["folder"] / "runs" / setting / folder / str(seed)
    where = f"--dataroot {paths['data']} --version {VERSION}"
    words = f"recipes/distill_bevdepth.py --model {APPRENTICE} {where} --workers 0 --warmup 100 "
    words += f"--clip 10 --batch 2 --lr 1e-3 --steps 1500 --seed {seed} --out {out} "
    words += f"{SETTINGS[setting]} {ROWS[name].format(head=paths['head'])}"
    if name != "none":
        words += f" --cache {cache_of(paths['folder'], preset)}"
    if factor:
        words += f" --weight {weight_of(name, float(factor))}"
    began, commit = time.monotonic(), _commit()
    # A run that an earlier call began or ended says nothing of its time and code.
    whole = not (out / "run.json").exists()
    if not (out / "model.safetensors").exists():
        call(words + _resume(out), out.with_suffix(".train.log"))
    call(_score(APPRENTICE, out, where), out.with_suffix(".val.log"))
    scores = json.loads((out / "val" / "scores.json").read_text())
    expert = json.loads((paths["folder"] / "expert" / "val" / "scores.json").read_text())
    told = json.loads((out / "run.json").read_text())
    summary = json.loads((out / "summary.json").read_text())
    return {
        "setting": setting,
        "row": row,
        "seed": seed,
        "data_seed": int(paths["folder"].name.rpartition("-")[2]),
        **{score: scores[score] for score in SCORES},
        "expert_nds": expert["nds"],
        "seconds_per_step": summary["seconds_per_step"],
        "wait_per_step": summary["wait_per_step"],
        "seconds": round(time.monotonic() - began, 1) if whole else None,
        "identity": told["identity"],
        "commit": commit if whole else None,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        # Without the folders of the machine.
        "words": words.replace(str(paths["folder"]), "WORK"),
    }


def weight_of(name: str, factor: float) -> float:
    """What --weight must say for a factor of the weight that a row has."""
    where = f"--model {APPRENTICE} --dataroot DATA --version {VERSION} --out OUT"
    own = weights_of(distill_bevdepth.parse(f"{where} {ROWS[name]}".split()))
    return factor * next(iter(own.values())) if len(own) == 1 else factor


def _is_factor(text: str) -> bool:
    return not text or re.fullmatch(r"[0-9.]*[0-9][0-9.]*", text) is not None


def _resume(out: Path) -> str:
    return " --resume" if (out / "run.json").exists() else ""


def _score(model: str, run: Path, where: str) -> str:
    return (
        f"recipes/evaluate.py --model {model} --checkpoint {run / 'model.safetensors'} {where} "
        f"--split val --workers 0 --out {run / 'val'}"
    )


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip()


def main(args: argparse.Namespace) -> None:
    records = json.loads(args.json.read_text())["runs"] if args.json.exists() else []
    if args.report:
        if args.against not in {run["row"] for run in records}:
            raise UsageError(f"{args.json} has no runs of row {args.against!r}")
        print(report(records, args.against))
        return
    if not args.work:
        raise UsageError("--work DIR is needed to run: data, experts and runs go there")
    try:
        seeds = [[int(n) for n in text.split(",")] for text in (args.data_seeds, args.seeds)]
    except ValueError:
        raise UsageError("--data-seeds and --seeds are whole numbers with commas between") from None
    rows = args.rows.split(",")
    unknown = [row for row in rows if parts_of(row)[0] not in ROWS]
    if unknown:
        raise UsageError(f"row {unknown[0]!r} is not known: choose from {', '.join(ROWS)}")
    wrong = [row for row in rows if not _is_factor(parts_of(row)[2])]
    if wrong:
        raise UsageError(f"row {wrong[0]!r}: what follows @ is a number, and the row's end")
    presets = {parts_of(row)[1] for row in rows} - {BALANCED}
    if presets - set(PRESETS):
        raise UsageError(f"rows may name a preset behind /, one of {', '.join(PRESETS)}")
    done = {tuple(run[name] for name in KEY) for run in records}
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = []
    for data_seed in seeds[0]:
        paths = prepare(Path(args.work), data_seed, sorted(presets))
        for seed in seeds[1]:
            jobs += [
                (paths, args.setting, row, seed)
                for row in rows
                if (args.setting, data_seed, row, seed) not in done
            ]

    lock = threading.Lock()

    def keep(job: tuple) -> None:
        record = one_run(*job)
        with lock:
            records.append(record)
            records.sort(key=lambda run: tuple(run[name] for name in KEY))
            write_json(
                args.json,
                {
                    "data": "synthetic (fd3d.data.synthetic)",
                    "runs": records,
                },
            )
        print(
            f"{len(records)} runs: {record['setting']} {record['data_seed']} {record['row']} seed "
            f"{record['seed']}: NDS {record['nds']:.4f} mAP {record['map']:.4f}, "
            f"{record['seconds'] or 0:.0f} s",
            flush=True,
        )

    # One-thread processes side by side make better use of cores than threads do.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in pool.map(keep, jobs):
            pass
    print(report(records, args.against))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
