"""What a network costs: multiply-adds by part, parameters, and, where asked, time and memory.

Multiply-adds are counted in two ways. `plain` is one for each multiply-add of a convolution or a
matrix product. `paper` follows mmcv's counter, which FD3D's tables were made with: nothing for a
deformable convolution, softmax, splat, warp or nearest upsampling, but also two for each element
that a batch norm reads, one for each that a ReLU or a bilinear upsampling yields or a pooling
reads, and one for each bias added. It gives the paper's 322.17 for `bevdepth-r50l` and 1288.70 for
`bevdepth-r50h`.

    python -m fd3d.efficiency [NAMES] [--json] [--measure --device cuda]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fd3d import models
from fd3d.data.batch import Batch
from fd3d.errors import UsageError, exit_code
from fd3d.models.bevdepth.network import BEVDepth, moment_cameras

# Sub-modules by the part that they are counted as; the longest fitting name wins.
PARTS = {
    "img_backbone": "image backbone",
    "img_neck": "image neck",
    "img_view_transformer": "depth and context",
    "img_view_transformer.se": "camera gate",
    "img_view_transformer.extra_depthnet": "depth blocks",
    "img_view_transformer.dcn": "deformable convolution",
    "pre_process_net": "pre-process",
    "img_bev_encoder_backbone": "BEV backbone",
    "img_bev_encoder_neck": "BEV pyramid",
    "pts_bbox_head": "head",
    "part_head": "part labels",  # a training aid: nothing at test time
}

aten = torch.ops.aten


def blank_batch(model: nn.Module) -> Batch:
    """One frame of the size that `model` takes, zeros seen by six identical level cameras."""
    image, cameras = model.image, 6
    moments = image.moments
    focal = float(image.width)
    intrinsic = torch.tensor([[focal, 0, image.width / 2], [0, focal, image.height / 2], [0, 0, 1]])
    # Camera x right, y down, z forward becomes x right, y forward, z up.
    level = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])

    def each(value: torch.Tensor) -> torch.Tensor:
        return value.expand(1, moments, cameras, *value.shape).clone()

    return Batch(
        tokens=("blank",),
        images=torch.zeros(1, cameras, moments, 3, image.height, image.width),
        rots=each(level),
        trans=each(torch.zeros(3)),
        intrins=each(intrinsic),
        post_rots=each(torch.eye(3)),
        post_trans=each(torch.zeros(3)),
        dt=torch.ones(1),
    )


def _convolution(args: tuple, out: Tensor) -> tuple[int, int]:
    products = out.numel() * math.prod(args[1].shape[1:])
    return products, products + (out.numel() if args[2] is not None else 0)


def _linear(args: tuple, out: Tensor) -> tuple[int, int]:
    products = args[1].numel() * out.shape[-1]
    return products, products + out.shape[-1]


def _product(args: tuple, out: Tensor) -> tuple[int, int]:
    return out.numel() * args[0].shape[-1], 0


# Operator -> (plain, paper) counts of one call.
RULES: dict[object, Callable[[tuple, Tensor], tuple[int, int]]] = {
    aten.convolution: _convolution,
    aten.addmm: _linear,
    aten.mm: _product,
    aten.bmm: _product,
    aten.native_batch_norm: lambda args, out: (0, 2 * args[0].numel()),
    aten.relu: lambda args, out: (0, out.numel()),
    aten.relu_: lambda args, out: (0, out.numel()),
    aten.max_pool2d_with_indices: lambda args, out: (0, args[0].numel()),
    aten.mean: lambda args, out: (0, args[0].numel()),
    aten.upsample_bilinear2d: lambda args, out: (0, out.numel()),
}


class CostCounter(TorchDispatchMode):
    """Adds up what runs inside it, by the part of `model` that it runs in; see `plain`, `paper`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.plain: Counter[str] = Counter()
        self.paper: Counter[str] = Counter()
        self._inside: list[str] = []
        self._hooks = ExitStack()
        for name, module in model.named_modules():
            if name in PARTS:
                enter = module.register_forward_pre_hook(self._enter(PARTS[name]))
                leave = module.register_forward_hook(lambda *_: self._inside.pop() and None)
                self._hooks.callback(enter.remove)
                self._hooks.callback(leave.remove)

    def _enter(self, part: str) -> Callable[..., None]:
        return lambda *_: self._inside.append(part)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        rule = RULES.get(func.overloadpacket)
        if rule is not None:
            plain, paper = rule(args, out[0] if isinstance(out, tuple) else out)
            part = self._inside[-1] if self._inside else "other"
            self.plain[part] += plain
            self.paper[part] += paper
        return out

    def __exit__(self, *raised) -> None:
        super().__exit__(*raised)
        self._hooks.close()


@torch.no_grad()
def count(model: BEVDepth) -> CostCounter:
    """The counts of one six-camera frame, all of its moments included; nothing is computed.

    The network's parts are run on tensors without contents, so the splat between them, which both
    ways leave out, need not be.
    """
    with torch.device("meta"):
        ghost = BEVDepth(model.config).eval()
        batch = blank_batch(ghost)
        with CostCounter(ghost) as counter:
            maps = []
            for moment in range(ghost.image.moments):
                images = batch.images[:, :, moment].flatten(0, 1)
                neck = ghost.img_neck(ghost.img_backbone(images))
                ghost.img_view_transformer(neck, moment_cameras(batch, moment))
                bev = torch.zeros(1, ghost.config.context, *ghost.grid.shape)
                if ghost.pre_process_net is not None:
                    (bev,) = ghost.pre_process_net(bev)
                maps.append(bev)
            ghost.head(ghost.encode(torch.cat(maps, dim=1)))
    return counter


def giga_multiply_adds(model: BEVDepth) -> float:
    """1e9 plain multiply-adds of one six-camera frame, all moments of a network included."""
    return count(model).plain.total() / 1e9


def cost(name: str) -> dict:
    """Parameters and counts of the named network, in all and by part, for people and --json."""
    with torch.device("meta"):
        model = models.build(name)
    counter = count(model)
    parameters: Counter[str] = Counter()
    for key, value in model.named_parameters():
        fitting = [module for module in PARTS if key.startswith(f"{module}.")]
        parameters[PARTS[max(fitting, key=len)] if fitting else "other"] += value.numel()
    return {
        "name": name,
        "parameters": parameters.total(),
        "gflops_paper": counter.paper.total() / 1e9,
        "gmac_plain": counter.plain.total() / 1e9,
        "parts": {
            part: {
                "parameters": parameters[part],
                "gflops_paper": counter.paper[part] / 1e9,
                "gmac_plain": counter.plain[part] / 1e9,
            }
            for part in dict.fromkeys(PARTS.values())
            if parameters[part]
        },
    }


@torch.inference_mode()
def measure(name: str, device: str, seconds: float) -> dict:
    """Frames a second and peak memory of a forward pass with random weights, batch of one frame.

    Memory is what torch held at most on a CUDA device, and the whole process on a CPU.
    """
    model = models.build(name).eval().to(device)
    batch = blank_batch(model).to(device)
    cuda = torch.device(device).type == "cuda"
    model(batch)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        model(batch)
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cuda:
        peak = torch.cuda.max_memory_allocated(device)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "fps": 1 / statistics.median(times),
        "passes": len(times),
        "peak_mib": peak / 2**20,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fd3d.efficiency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="networks (default: all that `build` knows)")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead")
    parser.add_argument("--measure", action="store_true", help="also run it: FPS and peak memory")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to measure"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, each network")
    return parser.parse_args(argv)


def _print(found: dict) -> None:
    print(f"{found['name']}: {found['parameters']:,} trainable parameters")
    width = max(map(len, found["parts"]))
    print(f"  {'':<{width}} {'paper GFLOPs':>13} {'plain GMAC':>11} {'parameters':>12}")
    for part, row in [*found["parts"].items(), ("all", found)]:
        counts = f"{row['gflops_paper']:>13.2f} {row['gmac_plain']:>11.2f}"
        print(f"  {part:<{width}} {counts} {row['parameters']:>12,}")
    if "measured" in found:
        run = found["measured"]
        print(
            f"  {run['fps']:.2f} frames/s (median of {run['passes']}), {run['peak_mib']:.0f} MiB "
            f"at most, {run['device']}, {run['threads']} threads, random weights"
        )


def main(args: argparse.Namespace) -> None:
    unknown = [name for name in args.names if name not in models.names()]
    if unknown:
        raise UsageError(
            f"network {unknown[0]!r} is not known: choose from {', '.join(models.names())}"
        )
    try:
        torch.zeros(1, device=args.device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"--device {args.device} cannot be used: try cpu or cuda") from None
    results = []
    for name in args.names or models.names():
        found = cost(name)
        if args.measure:
            # A process of its own, whose memory no other network has used.
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                run = process.submit(measure, name, args.device, args.seconds)
                found["measured"] = run.result()
        results.append(found)
        if not args.json:
            _print(found)
    if args.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
