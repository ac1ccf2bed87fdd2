"""Bytes and errors of `bev` and `lift` at full size, and whether `relift` is exact.

    python benchmarks/lift.py --dataroot DATAROOT --version v1.0-mini --split mini_val

Runs `bevdepth-r50h` with weights from a seed (there is no trained one) on the first frame of the
split and stores it in every preset. `lift` is compared where it counts, on the map that the head
reads: splatted and encoded from the decoded factors against the expert's own. Under augmentations
the same way from a lossless cache stands against the live expert's factors. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from timing import circumstances

from cache_tools.build import build_cache
from cache_tools.codecs import error_of
from cache_tools.expert import prepare
from cache_tools.probe import AUGMENTATIONS
from cache_tools.score import head_of
from cache_tools.source import CachedExpert
from fd3d.distill.relift import Relift
from fd3d.distill.replay import augmented
from fd3d.distill.signals import LIFT

PRESETS = ("lossless", "balanced", "tiny", "fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--expert", default="bevdepth-r50h")
    parser.add_argument("--dataroot", type=Path, required=True)
    parser.add_argument("--version", default="v1.0-mini", help="of the data set [v1.0-mini]")
    parser.add_argument("--split", default="mini_val", help="of the data set [mini_val]")
    parser.add_argument("--out", type=Path, default="benchmarks/results/lift-cpu.json")
    args = parser.parse_args()
    run = prepare(
        expert=args.expert,
        checkpoint=None,
        init_seed=0,
        dataroot=args.dataroot,
        version=args.version,
        split=args.split,
        signals=("bev", "lift"),
        workers=0,
    )
    key, model = run.keys[0], run.live.model
    batch = next(iter(run.load([[0]])))
    said = run.compute(batch)
    with torch.no_grad():
        factors = [(one.depth_logits.float().softmax(1), one.context) for one in model.see(batch)]
    raw = 2 * said["bev"][0].size
    presets, exact = {}, {}
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            report = build_cache(
                out=Path(folder) / "c.zarr",
                identity=run.identity,
                signals=run.signals,
                keys=[key],
                compute=lambda _: said,
                bev_part=run.bev_part,
                preset=preset,
                shard_frames=1,
                quiet=True,
            )
            source = CachedExpert(Path(folder) / "c.zarr", names=("lift",), mode="relift")
            found, relift = source.signals([source.load(key)]), Relift(head_of(source.reader))
            lift = sum(report.signals[name].bytes for name in LIFT)
            presets[preset] = {
                "bev_of_raw": report.signals["bev"].bytes / raw,
                "bev_error": report.signals["bev"].worst_error,
                "lift_of_raw_bev": lift / raw,
                "lift_error_at_the_heads_map": error_of(
                    said["bev"][0], relift(found)[0].numpy()
                ).frame,
            }
            if preset == "lossless":
                for name, augmentation in AUGMENTATIONS.items():
                    moved = augmented(batch, torch.from_numpy(augmentation.matrix()[:3, :3]))
                    with torch.no_grad():
                        live = model.assemble(factors, moved).double()
                    apart = relift(found, moved).double() - live
                    exact[name] = float(apart.norm() / live.norm())
        print(preset, {name: round(value, 5) for name, value in presets[preset].items()})
    print("relift, relative to the live expert:", {n: f"{v:.1e}" for n, v in exact.items()})
    result = {
        **circumstances(
            device="cpu", threads=torch.get_num_threads(), note="", packages=("torch",)
        ),
        "what": f"{args.expert}, weights from seed 0, one frame of {args.version}",
        "presets": presets,
        "relift_relative_difference": exact,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"made {args.out}")


if __name__ == "__main__":
    main()
