"""A folder of signals as an expert elsewhere writes it: those of `made_cache`, frame by frame."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import made_cache
import numpy as np
from safetensors.numpy import save_file

from cache_tools.manifest_fields import spec_to_dict

FRAMES = 7


def about() -> dict:
    signals = {name: spec_to_dict(spec) for name, spec in made_cache.SIGNALS.items()}
    for spec in signals.values():
        del spec["name"]
    return {
        "format": "fd3d-signals",
        "format_version": 1,
        "identity": asdict(made_cache.IDENTITY),
        "signals": signals,
        "frames": made_cache.keys(FRAMES),
    }


def write(folder: Path, *, way: str = "npy") -> Path:
    """Frames of the made expert, in one of the two ways; `mixed` has both, as a pair may."""
    folder.mkdir()
    for position, key in enumerate(made_cache.keys(FRAMES)):
        values = made_cache.values(position)
        if way == "safetensors" or (way == "mixed" and position % 2):
            save_file(values, folder / f"{key}.safetensors")
            continue
        for name, value in values.items():
            np.save(folder / f"{key}.{name}.npy", value)
    (folder / "signals.json").write_text(json.dumps(about()))
    return folder
