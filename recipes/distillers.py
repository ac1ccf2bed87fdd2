"""The distillers that a recipe can be asked for: their flags, signals, weights and construction."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from cache_tools.checksums import file_digest
from fd3d.distill import matching
from fd3d.distill.align import comparison_grid
from fd3d.distill.head import DistillationHead
from fd3d.distill.head_config import FULL, TINY, HeadConfig
from fd3d.distill.head_file import load_head
from fd3d.distill.losses import (
    bevdistill,
    cwd,
    distillbev,
    fd3d,
    fgd,
    heatmap,
    mgd,
    response,
    unidistill,
)
from fd3d.distill.losses.l2 import L2
from fd3d.distill.pv import ImagePlanes
from fd3d.distill.shared_map import AtSharedMap
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from recipes.flags import check_amounts

# Published methods that take the two maps and no flags of their own.
_PLAIN = {
    "cwd": cwd.CWD,
    "mgd": mgd.MGD,
    "fgd": fgd.FGD,
    "bevdistill": bevdistill.BEVDistill,
    "distillbev": distillbev.DistillBEV,
    "unidistill": unidistill.UniDistill,
}
NAMES = ("none", "l2", "heatmap", "fd3d", *_PLAIN, "response")

# What they read of the expert beside its map.
_BESIDE = {
    "bevdistill": ("detections",),
    "distillbev": ("heatmap",),
    "unidistill": ("heatmap",),
    "response": ("heatmap", "detections"),
}

# Weights of each distiller's terms. Those of `l2`, `fd3d` and `response` are ours, the first two in
# units of the expert's channel standard deviation; the others are published ones.
WEIGHTS = {
    "none": {},
    "l2": {"l2": 6.0},
    "heatmap": heatmap.WEIGHTS,
    "fd3d": fd3d.WEIGHTS,
    "cwd": cwd.WEIGHTS,
    "mgd": mgd.WEIGHTS,
    "fgd": fgd.WEIGHTS,
    "bevdistill": bevdistill.WEIGHTS,
    "distillbev": distillbev.WEIGHTS,
    "unidistill": unidistill.WEIGHTS,
    "response": response.WEIGHTS,
}

# Where maps are compared: in front of the heads, or behind their shared convolution.
PLACES = ("bev", "shared")

# Maps of fewer channels than this get a small distillation head.
_FULL_SIZE = 256


def add_distiller_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which distiller, and how."""
    parser.add_argument(
        "--distiller",
        choices=NAMES,
        default="fd3d",
        help="what the expert's signals teach by, see docs/distillation.md (default: %(default)s)",
    )
    parser.add_argument(
        "--weight",
        type=float,
        help="of the distiller's term, where it can only have one; else, and for fd3d whatever its "
        "--terms, a factor of the terms' own weights",
    )
    parser.add_argument(
        "--standardise",
        action="store_true",
        help="heatmap: measure errors in the expert's channel sd (for experts of other scale)",
    )
    parser.add_argument(
        "--pv",
        action="store_true",
        help="heatmap: compare the image planes too, as the released baseline does (signal pv)",
    )
    parser.add_argument(
        "--place",
        choices=PLACES,
        default="bev",
        help="which maps are compared: those that the heads read, or the shared map inside the "
        "heads, which the expert's head makes of its cached map (not fd3d, response)",
    )
    parser.add_argument(
        "--compare",
        choices=("expert", "apprentice"),
        default="expert",
        help="l2, fd3d: on whose grid the maps are compared",
    )
    own = parser.add_argument_group("fd3d")
    own.add_argument(
        "--terms",
        default=",".join(fd3d.Settings().terms),
        help="some of the default, %(default)s; gen_pv needs the signal pv",
    )
    own.add_argument(
        "--areas",
        choices=fd3d.AREAS,
        default="head",
        help="whose boxes are distilled: the distillation head's, the truth, the expert's",
    )
    own.add_argument(
        "--head",
        default="",
        help="distillation head from recipes/train_head.py (default: one is trained along)",
    )
    own.add_argument(
        "--val-cache",
        default="",
        help="a cache of the validation split by the same expert, to score a head on that is "
        "trained along",
    )
    own.add_argument("--masked", type=float, default=0.5, help="share of areas that is blanked")
    own.add_argument("--patch", type=int, default=1, help="cells of a blanked square's edge")
    own.add_argument("--margin", type=float, default=0.5, help="metres around boxes, on BEV")
    own.add_argument(
        "--outside", type=float, default=0.0, help="weight of cells outside the areas (default: 0)"
    )
    own.add_argument("--min-score", type=float, default=0.1, help="of boxes that make an area")
    own.add_argument(
        "--doubt",
        type=float,
        default=1.0,
        help="weight of areas and queries where the expert's detections and the truth disagree "
        "(default: 1)",
    )
    own.add_argument(
        "--head-lr", type=float, help="peak learning rate of a head trained along (default: --lr)"
    )


def check_distiller(args: argparse.Namespace) -> None:
    """Refuse flags that contradict the distiller."""
    check_amounts(args, "weight", "head_lr", "min_score", "outside", "margin")
    if args.standardise and args.distiller != "heatmap":
        raise UsageError("--standardise belongs to --distiller heatmap: leave one of them out")
    if args.pv and args.distiller != "heatmap":
        raise UsageError(
            "--pv belongs to --distiller heatmap (fd3d has --terms gen_pv): leave it out"
        )
    if args.compare != "expert" and args.distiller not in ("l2", "fd3d"):
        raise UsageError("--compare belongs to --distiller l2 and fd3d: leave it out")
    if args.place != "bev" and args.distiller in ("none", "fd3d", "response"):
        raise UsageError(f"--place does not go with --distiller {args.distiller}: leave it out")
    if args.place != "bev" and args.compare != "expert":
        raise UsageError("--place shared compares on the expert's grid: leave --compare out")
    if args.distiller != "fd3d":
        names = ("areas", "masked", "patch", "margin", "outside", "min_score", "doubt")
        own = {name: getattr(args, name) for name in names}
        own |= {"terms": tuple(args.terms.split(",")), "head": args.head or None}
        own |= {"head_lr": args.head_lr, "val_cache": args.val_cache or None}
        plain = {**asdict(fd3d.Settings()), "head": None, "head_lr": None, "val_cache": None}
        given = ["--" + name.replace("_", "-") for name in own if own[name] != plain[name]]
        if given:
            raise UsageError(f"{given[0]} belongs to --distiller fd3d: leave it out")
        return
    settings = settings_of(args)
    if settings.terms == ("focal",):
        # Without areas there is nothing that these would change.
        plain = fd3d.Settings()
        for name in ("areas", "masked", "patch", "margin", "outside"):
            if getattr(settings, name) != getattr(plain, name):
                raise UsageError(f"--{name} is of the generation terms: leave it out")
    if args.head_lr is not None and (args.head or not args.lr):
        raise UsageError(
            "--head-lr is of a head that is trained along, beside an --lr above 0: leave it out"
        )
    if args.val_cache and (args.head or not settings.needs_head):
        raise UsageError("--val-cache scores a head that is trained along: leave it out")
    if args.head and not settings.needs_head:
        raise UsageError("neither these --terms nor these --areas use a head: leave --head out")


def settings_of(args: argparse.Namespace) -> fd3d.Settings:
    """FD3D's settings that the flags name."""
    return fd3d.Settings(
        terms=tuple(sorted({term.strip() for term in args.terms.split(",")})),
        areas=args.areas,
        masked=args.masked,
        patch=args.patch,
        margin=args.margin,
        outside=args.outside,
        min_score=args.min_score,
        doubt=args.doubt,
        compare=args.compare,
    )


def identity_of(args: argparse.Namespace) -> dict[str, object]:
    """What a run depends on by its distiller, for `recipes.training.start`."""
    found = {name: f"{weight:g}" for name, weight in weights_of(args).items()}
    if args.distiller == "fd3d":
        found |= {name: str(value) for name, value in asdict(settings_of(args)).items()}
        found["head"] = "trained along"
        if args.head:
            found["head"] = file_digest(Path(args.head)) or "missing"
    if args.place != "bev":
        found["place"] = args.place
    if args.standardise:
        found["standardise"] = True
    if args.compare != "expert":
        found["compare"] = args.compare
    return {f"{args.distiller}.{name}": value for name, value in found.items()}


def signals_for(args: argparse.Namespace) -> tuple[str, ...]:
    """The signals that the distiller takes beside or in place of a map."""
    if args.distiller == "fd3d":
        return settings_of(args).signals
    return ("bev", *_BESIDE.get(args.distiller, ()), *(("pv",) if args.pv else ()))


def looks_at_objects(args: argparse.Namespace) -> bool:
    """Whether maps near objects are all that the distiller reads."""
    if args.distiller == "fd3d":
        settings = settings_of(args)
        return settings.terms == ("gen_bev",) and settings.areas == "gt" and not settings.outside
    # The convolution in between looks past the edges of what is exact.
    return args.distiller == "heatmap" and args.place == "bev" and not args.pv


def weights_of(args: argparse.Namespace) -> Mapping[str, float]:
    """Weights of the terms by name; --weight is that of a single term, or a factor of several."""
    own = WEIGHTS[args.distiller]
    if args.distiller == "heatmap" and not args.pv:
        own = {"heatmap": own["heatmap"]}
    if args.weight is not None and len(own) == 1:
        own = dict.fromkeys(own, args.weight)
    elif args.weight is not None:
        own = {name: args.weight * value for name, value in own.items()}
    # The head learns from the truth, however much the apprentice shall learn from the expert.
    return {**own, **matching.WEIGHTS} if args.distiller == "fd3d" else own


def head_config(channels: int) -> HeadConfig:
    """The sizes of a distillation head for maps of so many channels."""
    return FULL if channels >= _FULL_SIZE else TINY


def build_distiller(
    args: argparse.Namespace,
    model: nn.Module,
    *,
    expert_channels: int,
    expert_grid: BEVGrid,
    planes: ImagePlanes | None = None,
    expert_conv: nn.Module | None = None,
    signals_id: str = "",
    expert: str = "",
) -> nn.Module:
    """The distiller for an apprentice and maps on `expert_grid`; pairs that cannot be compared
    raise `UsageError`.

    Args:
        planes: the two networks' image maps, where the distiller compares them.
        expert_conv: the first convolution of the expert's head, for `--place shared`.
        signals_id, expert: of the source, which a head from a file must be of; "" = any.
    """
    maps = {
        "channels": model.bev_channels,
        "grid": model.grid,
        "expert_channels": expert_channels,
        "expert_grid": comparison_grid(model.grid, expert_grid),
    }
    if args.place == "shared":
        maps["channels"] = model.config.head
        maps["expert_channels"] = expert_conv.conv.out_channels
        inside = _feature_distiller(args, maps, planes)
        return AtSharedMap(distiller=inside, expert_conv=expert_conv)
    if args.distiller == "fd3d":
        return _fd3d(args, maps, planes, {"signals_id": signals_id, "expert": expert})
    if args.distiller == "response":
        return response.Response(config=model.config, expert_grid=maps["expert_grid"])
    return _feature_distiller(args, maps, planes)


def _feature_distiller(
    args: argparse.Namespace, maps: dict[str, Any], planes: ImagePlanes | None
) -> nn.Module:
    """One of those that need to know nothing of the maps but their channels and grids."""
    if args.distiller == "l2":
        return L2(compare=args.compare, **maps)
    if args.distiller == "heatmap":
        return heatmap.Heatmap(standardise=args.standardise, planes=planes, **maps)
    return _PLAIN[args.distiller](**maps)


def _fd3d(
    args: argparse.Namespace,
    maps: dict[str, Any],
    planes: ImagePlanes | None,
    of: dict[str, str],
) -> fd3d.FD3D:
    settings = settings_of(args)
    channels, grid = maps["expert_channels"], maps["expert_grid"]
    head = None
    if settings.needs_head and args.head:
        head = load_head(args.head, channels=channels, grid=grid, **of)
    elif settings.needs_head:
        head = DistillationHead(channels=channels, grid=grid, config=head_config(channels))
    return fd3d.FD3D(settings=settings, head=head, planes=planes, **maps)


def parameter_groups(args: argparse.Namespace, module: nn.Module) -> list[dict]:
    """Two groups for the optimizer where a head is trained along: its own, and the rest."""
    head = getattr(module.distiller, "head", None)
    own = [p for p in head.parameters() if p.requires_grad] if head is not None else []
    mine = {id(p) for p in own}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in mine]
    groups = [{"params": rest, "scale": 1.0}]
    if own:
        scale = 1.0 if args.head_lr is None else args.head_lr / args.lr
        groups.append({"params": own, "scale": scale})
    return groups
