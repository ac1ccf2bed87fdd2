"""What decides every byte of a synthetic data set, and the names that follow from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from fd3d.data.synthetic.rig import FULL_WIDTH, KEYFRAME_HZ
from fd3d.errors import UsageError

# Raised whenever the same parameters would give other bytes; it is part of every token.
GENERATOR_VERSION = 3

# The devkit keeps the names train, val, test, mini_train ... for the official scenes and refuses
# them for a version like this one, so its evaluation needs these.
DEVKIT_SPLITS = {"train": "synthetic_train", "val": "synthetic_val"}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """One data set. scenes are for training, val_scenes for validation; frames is per scene; reach
    is how far from the car things are put, metres."""

    scenes: int
    val_scenes: int
    frames: int
    seed: int
    width: int
    camera_hz: int
    version: str
    reach: float = 50.0

    def __post_init__(self) -> None:
        if self.scenes < 0 or self.val_scenes < 0 or self.scenes + self.val_scenes < 1:
            raise UsageError("nothing to make: ask for at least one scene with --scenes 1")
        if self.frames < 1:
            raise UsageError(f"a scene of {self.frames} keyframes is empty: use --frames 2 or more")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative: use 0 or more")
        if not 64 <= self.width <= FULL_WIDTH:
            raise UsageError(f"width {self.width} is out of range: use 64 to {FULL_WIDTH} pixels")
        if self.camera_hz % KEYFRAME_HZ or not KEYFRAME_HZ <= self.camera_hz <= 20:
            raise UsageError(
                f"{self.camera_hz} camera images a second do not meet the {KEYFRAME_HZ} keyframes "
                "a second: use an even --camera-hz from 2 to 20"
            )
        if not 12 <= self.reach <= 60:
            raise UsageError(f"reach {self.reach:g} m is out of range: use 12 to 60 metres")
        if not self.version or "/" in self.version or self.version.startswith("."):
            raise UsageError(f"version {self.version!r} is no folder name: try v1.0-synthetic")

    @property
    def height(self) -> int:
        """Image height in pixels, 9/16 of the width."""
        return round(self.width * 9 / 16)

    def to_dict(self) -> dict:
        return asdict(self)

    def scene_names(self) -> list[tuple[str, str]]:
        """(split, scene name) of every scene, training first."""
        return [("train", f"synthetic-train-{i:04d}") for i in range(self.scenes)] + [
            ("val", f"synthetic-val-{i:04d}") for i in range(self.val_scenes)
        ]

    def scene_seed(self, number: int) -> list[int]:
        """Seed of a scene's random numbers; a scene stays the same when others are added."""
        validation = number >= self.scenes
        return [self.seed, int(validation), number - self.scenes * validation]

    def token(self, *names: object) -> str:
        """32 hex digits that name one record of this data set.

        Two data sets share a token only where the record looks the same in both, so that a cache
        keyed by tokens cannot mix them up.
        """
        look = {
            "generator": GENERATOR_VERSION,
            "seed": self.seed,
            "frames": self.frames,
            "width": self.width,
            "camera_hz": self.camera_hz,
            "reach": self.reach,
        }
        text = json.dumps([look, *map(str, names)])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
