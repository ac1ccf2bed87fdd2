"""Networks by name: `build("bevdepth-tiny-h")` gives one with random tensors."""

from __future__ import annotations

from fd3d.errors import UsageError
from fd3d.models import presets, public
from fd3d.models.bevdepth.network import BEVDepth

PRESETS = {
    "bevdepth-r50h": presets.bevdepth_r50h,
    "bevdepth-r50l": presets.bevdepth_r50l,
    "bevdepth-r50h-single": public.bevdepth_r50h_single,
    "bevdepth-r50l-single": public.bevdepth_r50l_single,
    "bevdet-r50-g1": public.bevdet_r50_g1,
    "bevdet-r50": public.bevdet_r50,
    "bevdepth-r50-g2": public.bevdepth_r50_g2,
    "bevdepth-r50-g2-dcn": public.bevdepth_r50_g2_dcn,
    "bevdet4d-r50-depth": public.bevdet4d_r50_depth,
    "bevdet-r50-4d-depth": public.bevdet_r50_4d_depth,
    "bevdet-r50-4dlongterm-depth": public.bevdet_r50_4dlongterm_depth,
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
