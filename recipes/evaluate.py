"""Run a detector on a split, write the nuScenes results JSON and score it with the devkit.

    python recipes/evaluate.py --model bevdepth-tiny-l --dataroot DATA --version v1.0-synthetic \\
        --checkpoint runs/distilled/model.safetensors --split val --out runs/distilled/val
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from fd3d import models
from fd3d.data.batch import Detections, collate
from fd3d.data.frames import FrameDataset
from fd3d.data.index import FrameIndex
from fd3d.distill.handover import dead_workers_told
from fd3d.durable import write_json
from fd3d.errors import UsageError, exit_code
from fd3d.evaluation import evaluate, submission, write_submission
from fd3d.models import checkpoints
from fd3d.progress import Progress
from recipes.flags import check_least


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help=f"one of {', '.join(models.names())}")
    parser.add_argument("--checkpoint", required=True, help="its weights (.safetensors or .pth)")
    parser.add_argument("--dataroot", required=True, help="folder of the data set")
    parser.add_argument("--version", required=True, help="its version folder, e.g. v1.0-trainval")
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", required=True, help="folder for results.json and the scores")
    parser.add_argument("--batch", type=int, default=4, help="frames a forward pass")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--control",
        action="store_true",
        help="also score the same boxes with random yaw and zero velocity (control.json)",
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON only")
    return parser.parse_args(argv)


@torch.no_grad()
def detect(
    model: nn.Module, frames: FrameDataset, *, batch: int, workers: int, device: str, quiet: bool
) -> dict[str, Detections]:
    """Detections of every frame by token, in the keyframe's LIDAR frame."""
    model = model.to(device).eval()
    loader = DataLoader(frames, batch_size=batch, num_workers=workers, collate_fn=collate)
    found: dict[str, Detections] = {}
    with (
        dead_workers_told(),
        Progress(total=len(frames), unit="frames", title="detect", quiet=quiet) as progress,
    ):
        for item in loader:
            moved = item.to(device)
            decoded = model.decode(model(moved).tasks, moved.dt)
            found.update(zip(item.tokens, decoded, strict=True))
            progress.advance(len(item))
    return found


def forget_motion(records: dict, seed: int = 0) -> dict:
    """The same results with random yaw and zero velocity: what not to know them would score."""
    rng = np.random.default_rng(seed)
    blind = {}
    for token, boxes in records["results"].items():
        half = rng.uniform(0, np.pi, len(boxes))
        blind[token] = [
            {**box, "rotation": [math.cos(a), 0.0, 0.0, math.sin(a)], "velocity": [0.0, 0.0]}
            for box, a in zip(boxes, half, strict=True)
        ]
    return {**records, "results": blind}


def _check(args: argparse.Namespace) -> None:
    check_least(args, 1, "batch")
    check_least(args, 0, "workers")
    try:
        torch.zeros(1, device=args.device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"--device {args.device} cannot be used: try cpu or cuda") from None


def main(args: argparse.Namespace) -> None:
    _check(args)
    model = models.build(args.model)
    checkpoints.load(model, args.checkpoint)
    index = FrameIndex.open(dataroot=args.dataroot, version=args.version)
    frames = FrameDataset(
        index=index, positions=index.split(args.split), image=model.image, truth=False
    )
    found = detect(
        model,
        frames,
        batch=args.batch,
        workers=args.workers,
        device=args.device,
        quiet=args.json,
    )
    out = Path(args.out)
    results = out / "results.json"
    records = submission(found, index)
    write_submission(results, records)
    data = {"dataroot": args.dataroot, "version": args.version, "split": args.split}
    if args.control:
        write_submission(out / "control" / "results.json", forget_motion(records))
        blind = evaluate(
            **data, submission=out / "control" / "results.json", out_dir=out / "control"
        )
        write_json(out / "control.json", blind.to_dict())
    values = evaluate(**data, submission=results, out_dir=out).to_dict()
    record = {"model": args.model, "checkpoint": checkpoints.read_metadata(args.checkpoint)}
    write_json(out / "scores.json", {**record, "split": args.split, **values})
    if args.json:
        print(json.dumps(values))
        return
    heads = ("nds", "map", "mate", "mase", "maoe", "mave", "maae")
    print("  ".join(f"{name}" for name in ("NDS", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE")))
    print("  ".join(f"{values[name]:.3f}" for name in heads))
    print(f"made {results} and {out / 'scores.json'}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
