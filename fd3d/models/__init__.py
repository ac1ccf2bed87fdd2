"""Networks by name: `build("bevdepth-tiny-h")` gives one with random tensors."""

from __future__ import annotations

from fd3d.errors import UsageError
from fd3d.models import presets
from fd3d.models.bevdepth.network import BEVDepth

PRESETS = {
    "bevdepth-r50h": presets.bevdepth_r50h,
    "bevdepth-r50l": presets.bevdepth_r50l,
    "bevdepth-tiny-h": presets.bevdepth_tiny_h,
    "bevdepth-tiny-l": presets.bevdepth_tiny_l,
}


def names() -> tuple[str, ...]:
    """The names that `build` knows."""
    return tuple(PRESETS)


def build(name: str) -> BEVDepth:
    """The named network with random tensors; an unknown name raises `UsageError`."""
    if name not in PRESETS:
        raise UsageError(f"network {name!r} is not known: choose from {', '.join(PRESETS)}")
    return BEVDepth(PRESETS[name]())
