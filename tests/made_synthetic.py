"""The small synthetic data set that its own tests look at."""

from pathlib import Path

from fd3d.data.synthetic import generate

VERSION = "v1.0-synthetic"
TINY = {"scenes": 2, "val_scenes": 1, "frames": 4, "seed": 3, "width": 256, "version": VERSION}


def make(out: Path) -> Path:
    generate(out=out, workers=1, quiet=True, **TINY)
    return out
