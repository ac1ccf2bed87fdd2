"""The flags that every training recipe has, and the refusal of values that cannot be meant."""

from __future__ import annotations

import argparse
import math

import torch
from accelerate.tracking import get_available_trackers

from fd3d import cuda
from fd3d.errors import UsageError

# Length of a run that names none, as in the paper.
_EPOCHS = 24


def add_run_arguments(parser: argparse.ArgumentParser, *, network: bool = True) -> None:
    """The flags that all training recipes have; without a `network` that sees pictures, those
    about it are left out and keep their defaults."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataroot", required=True, help="folder of the data set")
    data.add_argument("--version", required=True, help="its version folder, e.g. v1.0-trainval")
    data.add_argument("--split", default="train", help="split to train on (default: train)")
    data.add_argument("--workers", type=int, default=2, help="loader processes (0: in the trainer)")
    if network:
        _add_network_arguments(parser, data)
    else:
        parser.set_defaults(
            keep_images_mb=0,
            reduced_jpeg=False,
            image_augment=False,
            cbgs=False,
            backbone="",
            save_memory=False,
        )
    run = parser.add_argument_group("run")
    run.add_argument("--out", required=True, help="folder for checkpoints and logs")
    length = run.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help=f"length of the training (default: {_EPOCHS})")
    length.add_argument("--steps", type=int, help="its length in optimizer steps instead")
    run.add_argument("--batch", type=int, default=8, help="frames a step and process")
    run.add_argument("--lr", type=float, default=2e-4, help="peak learning rate of AdamW")
    run.add_argument("--weight-decay", type=float, default=0.01)
    run.add_argument("--warmup", type=int, default=500, help="steps of linear warm-up (0: none)")
    run.add_argument(
        "--clip",
        type=float,
        default=0.0,
        help="gradient norm limit, of each parameter group (0: none)",
    )
    run.add_argument(
        "--ema",
        type=float,
        default=0.0,
        metavar="DECAY",
        help="keep a moving average of the weights, 0.999 for instance, and export it (0: none)",
    )
    run.add_argument("--seed", type=int, default=0, help="of weights and data order")
    run.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    run.add_argument(
        "--minutes", type=float, default=0.0, help="shorten the run to fit this long (0: do not)"
    )
    run.add_argument("--max-steps", type=int, default=0, help="stop after so many steps (0: all)")
    run.add_argument("--save-steps", type=int, default=0, help="also save every so many steps")
    run.add_argument("--log-steps", type=int, default=10, help="log every so many steps")
    run.add_argument(
        "--log-gradients",
        action="store_true",
        help="log how hard each weighted term pulls at the apprentice (a backward pass each)",
    )
    run.add_argument("--resume", action="store_true", help="go on from the last save in --out")
    run.add_argument("--tracker", default="", help="tensorboard, wandb, ... through Accelerate")
    run.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train (auto: the GPU if there is one)",
    )
    run.add_argument(
        "--cpu", dest="device", action="store_const", const="cpu", help="the same as --device cpu"
    )


def _add_network_arguments(parser: argparse.ArgumentParser, data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "--keep-images-mb", type=int, default=0, help="RAM for decoded images, MB (0: none)"
    )
    data.add_argument(
        "--reduced-jpeg",
        action="store_true",
        help="decode pictures at half size where less is used: faster, a few grey levels off",
    )
    data.add_argument(
        "--image-augment", action="store_true", help="random resize, crop, flip, tilt"
    )
    data.add_argument(
        "--cbgs",
        action="store_true",
        help="draw frames so that classes are met equally often",
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--backbone", default="", help="file of a ResNet trained on ImageNet to start from"
    )
    network.add_argument(
        "--save-memory",
        action="store_true",
        help="compute activations again in the backward pass instead of keeping them",
    )


def settle(args: argparse.Namespace) -> None:
    """Fill in the length of a run that names none; refuse what `add_run_arguments` cannot mean."""
    if args.steps is None and args.epochs is None:
        args.epochs = _EPOCHS
    check_least(args, 1, "batch", "epochs", "steps", "log_steps")
    check_least(args, 0, "workers", "keep_images_mb", "warmup", "max_steps", "save_steps")
    check_amounts(args, "lr", "weight_decay", "clip", "minutes")
    if not 0 <= args.ema < 1:
        raise UsageError(f"--ema {args.ema} is not possible: use a number from 0 to below 1")
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed {args.seed} is not possible: use 0 to 2**32 - 1")
    if args.tracker and args.tracker not in {str(name) for name in get_available_trackers()}:
        raise UsageError(f"tracker {args.tracker} is not installed: install it, or leave it out")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda needs a CUDA device and a build of torch that sees it: use --device cpu"
        )
    if not args.out:
        raise UsageError("--out is empty: name a folder")


def kernels_note(device: str) -> str | None:
    """What to say where `--device cuda` was asked for and the CUDA kernels cannot run."""
    why = cuda.missing() if device == "cuda" else None
    return f"{why}; torch resamples instead" if why else None


def check_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Refuse whole numbers below `least`; flags that were not given are left alone."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"{_flag(name)} {value} is not possible: use {least} or more")


def check_amounts(args: argparse.Namespace, *names: str) -> None:
    """Refuse negative, infinite and NaN amounts; flags that were not given are left alone."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{_flag(name)} {value} is not possible: use a number from 0")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
