"""`fd3d-cache probe`: what each mode of the target costs under each augmentation."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from cache_tools.verbs.expert_flags import FRAMES, add_expert_flags, expert_run
from cache_tools.verbs.words import Verbs, sayer

if TYPE_CHECKING:
    from cache_tools.probe import ModeCost

_PROBE = """example:
  fd3d-cache probe --expert bevdepth-r50h --checkpoint expert.safetensors \\
    --dataroot data/nuscenes --version v1.0-trainval --split val --frames 16

The yardstick is the expert run anew on the augmented frame, as training with a live expert does.
clean leaves its un-augmented map where it is, moved moves it, relift splats its factors where the
augmentation puts the cameras (docs/distillation.md). An expert that was trained without BEV
augmentation answers badly to a scaled or mirrored world: the yardstick is then no better a target
than relift."""


def add(verbs: Verbs) -> None:
    """The verb's flags, help and what runs it."""
    text = "what each mode costs under each BEV augmentation, on maps and boxes"
    probe = verbs.new("probe", help=text, text=text, examples=_PROBE, run=_probe)
    add_expert_flags(probe)
    probe.add_argument("--frames", type=int, help="how many, over the split (default 8)")


def _plain(cost: ModeCost) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in asdict(cost).items()}


def _probe(args: argparse.Namespace) -> None:
    from cache_tools.probe import probe

    run = expert_run(args, ("bev",))
    say = sayer(args.json)
    count = min(FRAMES, len(run.keys)) if args.frames is None else args.frames
    say(f"Probing {args.expert} on {count} frames of split {args.split} ({args.version})")
    found = probe(run, count=count, quiet=args.json)
    if args.json:
        rows = {name: {m: _plain(c) for m, c in modes.items()} for name, modes in found.items()}
        print(json.dumps({"frames": count, "augmentations": rows}))
        return
    print(f"{'':34}{'map':>9}{'cosine':>9}{'boxes':>9}{'metres':>9}{'yaw deg':>9}{'m/s':>9}")
    for name, modes in found.items():
        for mode, c in modes.items():
            print(
                f"{name:18}{mode:16}{100 * c.error:8.2f}%{c.cosine:9.4f}{100 * c.found:8.0f}%"
                f"{c.distance:9.3f}{c.yaw:9.1f}{c.velocity:9.3f}"
            )
    print(
        "map: relative error, channel means removed; boxes: of the yardstick's best, those found "
        "within 2 m; then their mean distance, yaw and velocity error"
    )
