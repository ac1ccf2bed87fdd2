"""Make a synthetic data set in the nuScenes schema.

    python -m fd3d.data.synthetic --out data/synthetic --scenes 30 --val-scenes 5 --frames 20

The same arguments give the same bytes, whatever --workers is. An interrupted run goes on where it
stopped when the same command is run again.
"""

from __future__ import annotations

import argparse
import json
import sys

from fd3d.data.synthetic.generate import Made, generate
from fd3d.data.synthetic.parameters import DEVKIT_SPLITS
from fd3d.errors import exit_code


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fd3d.data.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="new or empty folder")
    parser.add_argument("--scenes", type=int, default=30, help="training scenes (default: 30)")
    parser.add_argument("--val-scenes", type=int, default=5, help="validation scenes (default: 5)")
    parser.add_argument(
        "--frames", type=int, default=20, help="keyframes a scene, 2 a second (default: 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides everything (default: 0)")
    parser.add_argument(
        "--width",
        type=int,
        default=1600,
        help="image width in pixels, 64 to 1600; height is 9/16 of it (default: 1600)",
    )
    parser.add_argument(
        "--camera-hz",
        type=int,
        default=4,
        help="images a second of each camera, keyframes among them; even (default: 4)",
    )
    parser.add_argument(
        "--reach",
        type=float,
        default=50.0,
        help="metres from the car within which things are put, 12 to 60 (default: 50)",
    )
    parser.add_argument("--version", default="v1.0-synthetic", help="name of the folder of tables")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no progress")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.json:
        frames = (args.scenes + args.val_scenes) * args.frames
        print(
            f"making {frames} keyframes of six cameras and a lidar, {args.width} pixels wide, "
            f"in {args.out}",
            flush=True,
        )
    as_json = args.json
    options = {name: value for name, value in vars(args).items() if name != "json"}
    made = generate(**options, quiet=as_json)
    print(json.dumps(_for_machines(made)) if as_json else _for_people(made))


def _for_machines(made: Made) -> dict:
    return {
        "out": str(made.out),
        "version": made.parameters.version,
        "keyframes": made.frames,
        "keyframes_made": made.made,
        "seconds": round(made.seconds, 2),
        "keyframes_per_second": round(made.rate, 2),
        "annotations_per_keyframe": made.per_frame,
        "splits_for_the_devkit": DEVKIT_SPLITS,
    }


def _for_people(made: Made) -> str:
    parameters = made.parameters
    if made.made:
        what = f"{made.made} keyframes in {made.seconds:.0f} s, {made.rate:.1f} keyframes/s"
    else:
        what = f"{made.frames} keyframes were there already"
    boxes = ", ".join(f"{name} {number:.1f}" for name, number in made.per_frame.items())
    here = f"--dataroot {made.out} --version {parameters.version}"
    return "\n".join(
        (
            f"{made.out}: {parameters.scenes} training and {parameters.val_scenes} validation "
            f"scenes; {what}",
            f"boxes in an average keyframe: {boxes}",
            "splits: train and val; the devkit's own evaluation knows them as "
            f"{DEVKIT_SPLITS['train']} and {DEVKIT_SPLITS['val']}",
            f"next: python recipes/train.py {here} --model bevdepth-tiny-h --out runs/expert",
        )
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
