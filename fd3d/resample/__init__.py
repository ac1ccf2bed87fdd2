"""Maps from one grid to another: `resample`, and `PixelGrid` for image maps."""

from __future__ import annotations

from fd3d.resample.function import resample
from fd3d.resample.geometry import PixelGrid

__all__ = ["PixelGrid", "resample"]
