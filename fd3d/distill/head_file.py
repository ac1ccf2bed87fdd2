"""A trained distillation head as a file, which says what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from fd3d.distill.head import DistillationHead
from fd3d.distill.head_config import HeadConfig
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.models import checkpoints

_ABOUT = "distillation_head"


def save_head(
    path: str | Path, head: DistillationHead, *, signals_id: str, record: Mapping[str, object]
) -> None:
    """Write the head, all or nothing; `record` goes into the metadata as it is."""
    about = {
        "config": asdict(head.config),
        "grid": head.grid.to_dict(),
        "channels": head.norm.num_features,
        "signals_id": signals_id,
    }
    checkpoints.save(path, head, {**record, _ABOUT: about})


def load_head(
    path: str | Path, *, channels: int, grid: BEVGrid, signals_id: str = "", expert: str = ""
) -> DistillationHead:
    """The head, in eval mode and without gradients.

    A file that is no head, or one for other maps, other signals (`signals_id`, "" = any) or another
    expert (name and digest, "" = any), raises `UsageError`.
    """
    metadata = checkpoints.read_metadata(path)
    try:
        about = json.loads(metadata.get(_ABOUT, ""))
        found = BEVGrid.from_dict(about["grid"])
        config = HeadConfig(**about["config"])
        trained_on, width = about["signals_id"], about["channels"]
        taught_by = json.loads(metadata.get("identity", "{}")).get("expert", "")
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path} is no distillation head: give what recipes/train_head.py made"
        ) from None
    if found != grid or width != channels:
        raise UsageError(
            f"the head {path} reads maps of {width} channels on {found}, not of {channels} on "
            f"{grid}: train one on this cache for this apprentice (recipes/train_head.py --model)"
        )
    if expert and taught_by and taught_by != expert:
        raise UsageError(
            f"the head {path} was trained on expert {taught_by[:40]}, this one is {expert[:40]}: "
            "train one on a cache of this expert (recipes/train_head.py)"
        )
    if signals_id and trained_on and trained_on != signals_id:
        raise UsageError(
            f"the head {path} was trained on signals {trained_on[:12]}, these are "
            f"{signals_id[:12]}: train one on this cache, which needs the signal bev beside its "
            "others (recipes/train_head.py)"
        )
    head = DistillationHead(channels=channels, grid=grid, config=config)
    checkpoints.load(head, path)
    return head.eval().requires_grad_(False)
