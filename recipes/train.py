"""Train an expert or an apprentice without distillation.

    python recipes/train.py --model bevdepth-tiny-h --dataroot DATA --version v1.0-synthetic \\
        --out runs/expert
    accelerate launch recipes/train.py --model bevdepth-r50h --dataroot /data/nuscenes \\
        --version v1.0-trainval --out runs/r50h --image-augment --bev-augment

The defaults are the paper's: AdamW, 2e-4, divided by ten after 2/3 and 11/12 of 24 epochs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fd3d import models
from fd3d.data.batch import collate
from fd3d.distill.trainee import Trainee
from fd3d.errors import exit_code
from fd3d.models import checkpoints
from recipes.flags import add_run_arguments
from recipes.training import fit, new_model, start, tell, training_frames


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help=f"one of {', '.join(models.names())}")
    parser.add_argument("--init", default="", help="checkpoint to start the weights from")
    parser.add_argument(
        "--bev-augment", action="store_true", help="random rotation, scale and flips of the BEV"
    )
    parser.add_argument(
        "--adjacent",
        choices=("draw", "test"),
        default="draw",
        help="the second frame: drawn from those 0.75 to 2.25 s away, or the one 1.5 s away that "
        "tests and experts take (default: draw)",
    )
    add_run_arguments(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    model = new_model(args)
    if args.init:
        checkpoints.load(model, args.init)
    dataset = training_frames(
        args, model.image, adjacent=args.adjacent, bev_augment=args.bev_augment
    )
    accelerator = start(args, {"model": args.model, "dataset": f"{args.version}:{args.split}"})
    # Built again behind the seed, so that the weights of a run depend on --seed alone.
    model = new_model(args)
    if args.init:
        checkpoints.load(model, args.init)
    out = Path(args.out)
    accelerator.print(
        f"training {args.model} on {len(dataset)} frames of {args.version}:{args.split} "
        f"({accelerator.num_processes} x {accelerator.device.type}), into {out}"
    )
    summary = fit(
        args=args,
        accelerator=accelerator,
        module=Trainee(model),
        dataset=dataset,
        collate=collate,
        inputs=lambda batch: (batch.to(accelerator.device),),
        weights={},
        export=lambda trained, record: checkpoints.save(
            out / "model.safetensors", trained.model, record
        ),
    )
    tell(args, accelerator, summary)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
