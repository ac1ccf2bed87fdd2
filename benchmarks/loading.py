"""What loading a training sample costs one worker, step by step, at both sizes of the paper's pair.

    python benchmarks/loading.py --dataroot DATA --version v1.0-trainval --split train

Pictures are augmented, two moments of six cameras; files are in the page cache. Each round times
every step once for one frame, in turn. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import circumstances, interleaved

from fd3d import models
from fd3d.data.depth import depth_maps, load_points
from fd3d.data.frames import FrameDataset
from fd3d.data.images import apply_view, draw_view, normalise, view_matrix
from fd3d.data.index import FrameIndex
from fd3d.errors import exit_code


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataroot", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--models", nargs="+", default=["bevdepth-r50l", "bevdepth-r50h"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--note", default="", help="what else ran on the machine, for the JSON")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loading-cpu.json"))
    return parser.parse_args()


def time_steps(args: argparse.Namespace, name: str) -> dict[str, dict]:
    """Milliseconds of whole samples and of their parts."""
    index = FrameIndex.open(dataroot=args.dataroot, version=args.version)
    image = models.build(name).image
    positions = index.split(args.split)
    samples = {
        reduced: FrameDataset(
            index=index,
            positions=positions,
            image=image,
            truth=True,
            image_augment=True,
            reduced_jpeg=reduced,
        )
        for reduced in (False, True)
    }
    frame = index.frame(int(positions[0]))
    rng = np.random.default_rng(0)
    views = [draw_view(image, shot.size, rng) for shot in frame.cameras]
    files = [index.dataroot / shot.file for shot in frame.cameras]
    matrices = [view_matrix(image, view) for view in views]
    cameras = frame.camera_to_lidar()

    def decode(*, reduced: bool) -> list[Image.Image]:
        pictures = []
        for file, view in zip(files, views, strict=True):
            with Image.open(file) as picture:
                if reduced:
                    picture.draft("RGB", view.resized)
                pictures.append(picture.convert("RGB"))
        return pictures

    whole, half = decode(reduced=False), decode(reduced=True)

    def see(pictures: list[Image.Image]) -> np.ndarray:
        return np.stack([apply_view(p, image, v) for p, v in zip(pictures, views, strict=True)])

    pixels = see(whole)

    def twice(step):
        """Six pictures for each of two moments."""
        return lambda _: [step() for _ in range(image.moments)]

    def depth(_):
        return depth_maps(
            load_points(index.dataroot / frame.lidar_file),
            spec=image,
            rots=cameras[:, :3, :3],
            trans=cameras[:, :3, 3],
            intrins=np.stack([shot.intrinsic for shot in frame.cameras]),
            post_rots=np.stack([matrix for matrix, _ in matrices]),
            post_trans=np.stack([vector for _, vector in matrices]),
        )

    return interleaved(
        {
            "sample": lambda count: samples[False][count % len(positions)],
            "sample, reduced JPEG": lambda count: samples[True][count % len(positions)],
            "decode": twice(lambda: decode(reduced=False)),
            "decode, reduced": twice(lambda: decode(reduced=True)),
            "resize, crop, turn": twice(lambda: see(whole)),
            "the same, from reduced": twice(lambda: see(half)),
            "normalise": twice(lambda: normalise(pixels, image)),
            "lidar to depth map": depth,
        },
        rounds=args.rounds,
    )


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = {}
    for name in args.models:
        rows[name] = times = time_steps(args, name)
        print(name)
        for step, row in times.items():
            print(f"  {step:24s} {row['median_ms']:8.1f} ms")
    record = {
        "what": "one sample of six cameras and two moments, one process, one thread",
        "data": args.version,
        **circumstances(
            device="cpu", threads=1, note=args.note, packages=("torch", "numpy", "pillow")
        ),
        "milliseconds": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"made {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
