"""Run a detector on a split, write the nuScenes results JSON and score it with the devkit.

    python recipes/evaluate.py --model bevdepth-tiny-l --checkpoint runs/distilled/model.safetensors \
        --dataroot DATA --version v1.0-synthetic --split val --out runs/distilled/val
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from recipes.training import write_json
from torch import nn
from torch.utils.data import DataLoader

from fd3d import models
from fd3d.data.batch import Detections, collate
from fd3d.data.frames import FrameDataset
from fd3d.data.index import FrameIndex
from fd3d.errors import exit_code
from fd3d.evaluation import evaluate, submission, write_submission
from fd3d.models import checkpoints
from fd3d.progress import Progress


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
    with Progress(total=len(frames), unit="frames", title="detect", quiet=quiet) as progress:
        for item in loader:
            moved = item.to(device)
            decoded = model.decode(model(moved).tasks, moved.dt)
            found.update(zip(item.tokens, decoded, strict=True))
            progress.advance(len(item))
    return found


def main(args: argparse.Namespace) -> None:
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
    write_submission(results, submission(found, index))
    scores = evaluate(
        dataroot=args.dataroot,
        version=args.version,
        split=args.split,
        submission=results,
        out_dir=out,
    )
    values = scores.to_dict()
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
