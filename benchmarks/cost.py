"""What a distilled training step costs, by parts: without an expert, with a live one, from a cache.

    python benchmarks/cost.py --dataroot DATA --checkpoint expert.safetensors

DATA is a synthetic set (`python -m fd3d.data.synthetic`), the checkpoint that of a trained
`bevdepth-tiny-h`; both are what recipes/quickstart.py leaves in its folder. Contenders take turns,
a step each, on the same frames, in one process without loader workers. Parts of a step:

    data        the apprentice's pictures and truth
    expert      what it takes to have the expert's signals: its pictures and its network, or reading
                and, in mode relift, splatting and the BEV encoder
    apprentice  the rest of a step without distillation: forward, backward, optimizer
    distiller   what a step with it takes beyond that

Also bytes, and the epochs after which building the cache has paid for itself. At full size
multiply-adds are counted: a network that is trained costs its forward pass three times. Writes
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from timing import circumstances
from training_memory import noise_batch

from cache_tools.build import BuildReport, build_cache
from cache_tools.expert import prepare
from fd3d import models
from fd3d.classes import CLASSES
from fd3d.data.batch import collate
from fd3d.distill.pv import ImagePlanes, pv_signals
from fd3d.distill.trainee import Trainee
from fd3d.efficiency import CostCounter, count
from fd3d.errors import UsageError, exit_code
from fd3d.models.bevdepth.head import BRANCHES
from fd3d.models.bevdepth.network import BEVDepth, Outputs
from recipes import distill_bevdepth
from recipes.distillers import NAMES, build_distiller, parameter_groups, signals_for, weights_of

VERSION = "v1.0-synthetic"
TINY = ("bevdepth-tiny-h", "bevdepth-tiny-l")
FULL = ("bevdepth-r50h", "bevdepth-r50l")
CACHES = {
    "bev": ("bev",),
    "lift": ("lift",),
    "pv": ("bev", "pv"),
    "all": ("bev", "detections", "heatmap"),
}
PARTS = ("data", "expert", "apprentice", "distiller")
BATCH = 2

# Training split and epochs of the paper.
NUSCENES, EPOCHS = 28_130, 24

# FD3D without its term in the image planes, and with a head from a file, whose every query makes
# an area.
_ON_BEV = "--distiller fd3d --terms gen_bev,focal"
FROZEN = {"bev, fd3d on bev, trained head", "pv, fd3d, trained head"}
# Contender -> flags; what is not live names the cache of `CACHES` that it reads first.
CONTENDERS = {
    "none": "--distiller none",
    "live, l2": "--distiller l2",
    "bev, l2": "--distiller l2",
    "lift, l2": "--distiller l2 --mode relift --bev-augment",
    "live, heatmap": "--distiller heatmap",
    "bev, heatmap": "--distiller heatmap",
    "live, fd3d on bev": _ON_BEV,
    "bev, fd3d on bev": _ON_BEV,
    "bev, fd3d on bev, trained head": f"{_ON_BEV} --min-score 0",
    "live, fd3d": "--distiller fd3d",
    "pv, fd3d": "--distiller fd3d",
    "pv, fd3d, trained head": "--distiller fd3d --min-score 0",
    **{
        f"all, {name}": f"--distiller {name}"
        for name in ("cwd", "mgd", "fgd", "bevdistill", "distillbev", "unidistill", "response")
    },
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataroot", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of bevdepth-tiny-h")
    parser.add_argument("--split", default="val", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--tiny-only", action="store_true", help="count nothing at full size")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the JSON")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cost-cpu.json"))
    return parser.parse_args(argv)


class Contender:
    """A training as recipes/distill_bevdepth.py sets it up, one step at a time."""

    def __init__(self, name: str, args: argparse.Namespace, caches: dict[str, Path]) -> None:
        where = name.partition(",")[0]
        words = ["--model", TINY[1], "--version", VERSION, "--split", args.split, "--workers", "0"]
        words += ["--dataroot", str(args.dataroot), "--out", "unused", "--batch", str(BATCH)]
        words += ["--cpu", *CONTENDERS[name].split()]
        if where == "live":
            words += ["--source", "live", "--expert", TINY[0]]
            words += ["--expert-checkpoint", str(args.checkpoint)]
        elif where in caches:
            words += ["--cache", str(caches[where])]
        given = distill_bevdepth.parse(words)
        torch.manual_seed(0)
        model = models.build(given.model)
        self._frames = distill_bevdepth.training_frames(
            given, model.image, bev_augment=given.bev_augment
        )
        source = distill_bevdepth.make_source(given, self._frames.index)
        relift = distill_bevdepth.make_relift(given, source)
        self._handover = distill_bevdepth.make_handover(
            given, model, source, relift, torch.device("cpu")
        )
        planes = distill_bevdepth.image_planes(given, model, source)
        distiller = distill_bevdepth.make_distiller(given, model, source, self._handover, planes)
        if name in FROZEN:
            distiller.head.requires_grad_(False)
            distiller.learns = False
        self._trainee = Trainee(model, distiller).train()
        self._optimizer = torch.optim.AdamW(parameter_groups(given, self._trainee), lr=1e-4)
        self._weights = weights_of(given)

    def step(self, number: int) -> dict[str, float]:
        """Seconds of data, expert and the rest of a step."""
        rows = [(number * BATCH + row) % len(self._frames) for row in range(BATCH)]
        times = [time.perf_counter()]
        frames = [self._frames[row] for row in rows]
        batch = collate(frames)
        times.append(time.perf_counter())
        signals = None
        if self._handover:
            loaded = self._handover.load([self._frames.tokens[row] for row in rows], frames)
            signals = self._handover.signals(loaded, batch)
        times.append(time.perf_counter())
        terms = self._trainee(batch, signals)
        sum(self._weights.get(name, 1.0) * term for name, term in terms.items()).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        data, expert, rest = (after - before for before, after in pairwise(times))
        return {"data": data, "expert": expert, "rest": rest}


def build(args: argparse.Namespace, name: str, out: Path) -> tuple[BuildReport, float]:
    """A balanced cache of the split, and the seconds a frame that it took."""
    run = prepare(
        expert=TINY[0],
        checkpoint=args.checkpoint,
        init_seed=None,
        dataroot=args.dataroot,
        version=VERSION,
        split=args.split,
        signals=CACHES[name],
        workers=0,
    )
    began = time.perf_counter()
    report = build_cache(
        out=out,
        identity=run.identity,
        signals=run.signals,
        keys=run.keys,
        bev_part=run.bev_part,
        compute=run.compute,
        load=run.load,
        preset="balanced",
        batch=BATCH,
    )
    return report, (time.perf_counter() - began) / report.frames


def measured(args: argparse.Namespace) -> dict:
    """The tiny pair's table: ms of every part of a step, of each contender."""
    with tempfile.TemporaryDirectory(prefix="fd3d-cost-") as folder:
        caches = {name: Path(folder) / f"{name}.zarr" for name in CACHES}
        built = {name: build(args, name, path) for name, path in caches.items()}
        trainings = {name: Contender(name, args, caches) for name in CONTENDERS}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in trainings}
        for number in range(-1, args.rounds):
            found = {name: one.step(max(number, 0)) for name, one in trainings.items()}
            if number < 0:
                continue
            alone = found["none"]["rest"]
            for name, parts in found.items():
                rest = {"apprentice": alone, "distiller": parts.pop("rest") - alone}
                rounds[name].append({**parts, **rest})
            print(f"\rround {number + 1}/{args.rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    table = {name: _summary(steps) for name, steps in rounds.items()}
    told = {}
    for name, (report, seconds) in built.items():
        reads = next(one for one in table if one.startswith(f"{name}, "))
        live, cached = (table[one]["expert"]["median_ms"] / BATCH for one in ("live, l2", reads))
        told[name] = {
            "bytes_a_frame": round(report.bytes / report.frames),
            "build_ms_a_frame": round(1e3 * seconds, 1),
            "epochs_to_win": round(1e3 * seconds / (live - cached), 2) if live > cached else None,
        }
    return {
        "pair": TINY,
        "batch": BATCH,
        "rounds": args.rounds,
        "steps": table,
        "caches": told,
    }


def _summary(steps: list[dict[str, float]]) -> dict:
    found = {}
    totals = [{"step": sum(parts.values())} for parts in steps]
    for name, rows in [*((part, steps) for part in PARTS), ("step", totals)]:
        spread = statistics.quantiles([1e3 * row[name] for row in rows], n=4)
        low, middle, high = (round(value, 2) for value in spread)
        found[name] = {"median_ms": middle, "quartiles_ms": [low, high]}
    return found


def counted() -> dict:
    """Plain giga-multiply-adds a frame of a training step at full size."""
    with torch.device("meta"):
        expert, apprentice = (models.build(name) for name in FULL)
    teacher, pupil = count(expert), count(apprentice)
    behind = ("pre-process", "BEV backbone", "BEV pyramid")
    relift = sum(teacher.plain[part] for part in behind)
    parts = {
        "apprentice": 3 * pupil.plain.total(),
        "expert, live": teacher.plain.total(),
        "expert, bev": 0,
        "expert, lift": relift,
    }
    for name in NAMES[1:]:
        parts[f"distiller, {name}"] = _distiller_products(name, apprentice, expert)
    return {
        "pair": FULL,
        "giga_multiply_adds": {n: round(v / 1e9, 1) for n, v in parts.items()},
        # Of nuScenes' training split: a live expert for each student, a cached one for all.
        "expert_passes": {"live, a student": NUSCENES * EPOCHS, "cached, in all": NUSCENES},
    }


def _distiller_products(name: str, apprentice: BEVDepth, expert: BEVDepth) -> int:
    """Three times the multiply-adds of a distiller's forward pass on one frame of eight boxes; of
    FD3D with a head that is used as it is."""
    words = ["--model", apprentice.name, "--distiller", name, "--dataroot", "", "--version", ""]
    given = distill_bevdepth.parse([*words, "--out", ""])
    sizes = {"expert_channels": expert.bev_channels, "expert_grid": expert.grid}
    planes = ImagePlanes(
        apprentice=apprentice.image,
        expert=expert.image,
        channels=apprentice.config.neck,
        expert_channels=expert.config.neck,
    )
    used = planes if "pv" in signals_for(given) else None
    distiller = build_distiller(given, apprentice, planes=used, **sizes)
    head = getattr(distiller, "head", None)
    bev = torch.randn(1, apprentice.bev_channels, *apprentice.grid.shape)
    tasks = tuple(
        {
            branch: torch.zeros(1, channels, *apprentice.grid.shape)
            for branch, channels in {**BRANCHES, "heatmap": len(classes)}.items()
        }
        for classes in apprentice.config.tasks
    )
    pv, other = (
        torch.randn(6, model.config.neck, *model.image.depth_shape)
        for model in (apprentice, expert)
    )
    outputs = Outputs(depth_logits=bev, bev=bev, shared=bev, tasks=tasks, pv=pv)
    batch, score = noise_batch(apprentice), torch.full((8, 1), 0.5)
    target = {
        **pv_signals(batch, other),
        "bev": torch.randn(1, expert.bev_channels, *expert.grid.shape),
        "heatmap": torch.rand(1, len(CLASSES), *expert.grid.shape),
        "detections": [torch.cat([batch.boxes[0], score, batch.labels[0][:, None]], dim=1)],
    }
    with torch.no_grad(), CostCounter(distiller) as counter:
        distiller.eval()(outputs, target, batch)
    total = counter.plain.total()
    if head is None:
        return 3 * total
    with torch.no_grad(), CostCounter(head) as counter:
        head.eval()(target["bev"])
    frozen = counter.plain.total()
    return 3 * (total - frozen) + frozen


def main(args: argparse.Namespace) -> None:
    if args.rounds < 2:
        raise UsageError(f"--rounds {args.rounds} is not possible: use 2 or more")
    where = circumstances(
        device="cpu", threads=torch.get_num_threads(), note=args.note, packages=("torch",)
    )
    result = {**where, "data": "synthetic (fd3d.data.synthetic)", "tiny": measured(args)}
    print(f"{'ms a step of ' + str(BATCH):<26}" + "".join(f"{n:>12}" for n in (*PARTS, "step")))
    for name, row in result["tiny"]["steps"].items():
        print(f"{name:<26}" + "".join(f"{row[n]['median_ms']:12.1f}" for n in (*PARTS, "step")))
    for name, row in result["tiny"]["caches"].items():
        print(f"{name}: {row}")
    if not args.tiny_only:
        result["full"] = counted()
        print("giga-multiply-adds a frame:", result["full"]["giga_multiply_adds"])
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"made {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
