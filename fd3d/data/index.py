"""The frame index: one memory-mapped table of a data set's frames, made once from its metadata.

Workers and ranks read the index and never open the devkit. `python -m fd3d.data.index` makes one
and says what it holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cached_property
from pathlib import Path

import numpy as np

from fd3d.classes import CAMERAS, CLASSES
from fd3d.data.frames import Adjacent, CameraShot, Frame
from fd3d.data.index_folder import made_index
from fd3d.errors import UsageError, exit_code

_ARRAYS = ("keyframes", "sweeps", "boxes", "names", "name_ends")


class FrameIndex:
    """The frames of one data set version in scene and time order; see `FrameIndex.open`.

    Pickling keeps the path alone, so that an index is handed to worker processes for nothing.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.meta = json.loads((self.path / "meta.json").read_text())
        self.dataroot = Path(self.meta["dataroot"])
        self.version: str = self.meta["version"]
        for name in _ARRAYS:
            setattr(self, f"_{name}", np.load(self.path / f"{name}.npy", mmap_mode="r"))

    @classmethod
    def open(
        cls, *, dataroot: Path | str, version: str, folder: Path | str | None = None
    ) -> FrameIndex:
        """The index of a data set, made first where it does not exist or the tables changed.

        Args:
            dataroot: folder that holds the version folder, samples and sweeps.
            version: name of the folder with the JSON tables ("v1.0-trainval").
            folder: where indexes are kept; default $FD3D_INDEX_DIR, else ~/.cache/fd3d/index.

        Raises:
            UsageError: the data set, the version or a table is not there.
        """
        path = made_index(Path(dataroot), version, folder)
        try:
            return cls(path)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"the frame index in {path} is damaged ({error}): delete that folder and "
                "run the same command again, which makes it anew"
            ) from None

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])

    def __len__(self) -> int:
        return len(self._keyframes)

    @cached_property
    def tokens(self) -> list[str]:
        """The sample_token of every frame, by position."""
        return [token.decode() for token in self._keyframes["token"].tolist()]

    @cached_property
    def _position_of(self) -> dict[str, int]:
        return {token: position for position, token in enumerate(self.tokens)}

    def position(self, token: str) -> int:
        """Where the frame `token` stands in this index."""
        try:
            return self._position_of[token]
        except KeyError:
            raise UsageError(
                f"frame {token!r} is not in {self.version} at {self.dataroot}: use the data set "
                "that the frame key came from"
            ) from None

    @property
    def splits(self) -> dict[str, list[str]]:
        """Scene names by split, for the splits that have frames here."""
        return self.meta["splits"]

    def split(self, name: str) -> np.ndarray:
        """(n,) int64 positions of the split's frames in scene and time order."""
        if name not in self.splits:
            known = ", ".join(sorted(self.splits)) or "none"
            raise UsageError(
                f"split {name!r} has no frames in {self.version} at {self.dataroot}: "
                f"choose from {known}"
            )
        wanted = set(self.splits[name])
        numbers = [n for n, scene in enumerate(self.meta["scenes"]) if scene in wanted]
        return np.flatnonzero(np.isin(self._keyframes["scene"], numbers))

    def frame(self, position: int) -> Frame:
        """Files, poses, calibration and boxes of one frame."""
        row = self._keyframes[position]
        start, end = row["boxes"]
        boxes = self._boxes[start:end]
        cameras = tuple(
            CameraShot(
                file=self._name(row["camera_file"][camera]),
                size=(int(row["camera_size"][camera, 0]), int(row["camera_size"][camera, 1])),
                timestamp=int(row["camera_timestamp"][camera]),
                intrinsic=np.array(row["intrinsic"][camera]),
                camera2ego=np.array(row["camera2ego"][camera]),
                ego2global=np.array(row["camera_ego2global"][camera]),
            )
            for camera in range(len(CAMERAS))
        )
        return Frame(
            token=row["token"].decode(),
            scene=self.meta["scenes"][row["scene"]],
            timestamp=int(row["timestamp"]),
            lidar_file=self._name(row["lidar_file"]),
            lidar2ego=np.array(row["lidar2ego"]),
            ego2global=np.array(row["ego2global"]),
            cameras=cameras,
            boxes=np.array(boxes["box"]),
            labels=boxes["label"].astype(np.int64),
            lidar_points=boxes["lidar_points"].astype(np.int64),
            radar_points=boxes["radar_points"].astype(np.int64),
            visibility=boxes["visibility"].astype(np.int64),
            attributes=tuple(
                self.meta["attributes"][number] if number >= 0 else ""
                for number in boxes["attribute"].tolist()
            ),
        )

    def _side(self, position: int) -> np.ndarray:
        """The sweeps that G1 looks at: the earlier ones, unless only later ones exist."""
        before, after = self._keyframes["sweeps"][position]
        side = before if before[0] >= 0 else after
        return side[side >= 0]

    def adjacent_count(self, position: int) -> int:
        """How many sweeps there are to choose the adjacent frame from, 0 to 9."""
        return len(self._side(position))

    def adjacent(self, position: int, choice: int) -> Adjacent:
        """Sweep number `choice` (0 = nearest in time, the last where there are fewer).

        A frame without any sweep is its own neighbour, at a time difference of 0.
        """
        row = self._keyframes[position]
        side = self._side(position)
        if not len(side):
            return Adjacent(
                files=tuple(self._name(number) for number in row["camera_file"]),
                timestamp=int(row["timestamp"]),
                ego2global=np.array(row["ego2global"]),
                seconds=0.0,
            )
        sweep = self._sweeps[side[min(choice, len(side) - 1)]]
        return Adjacent(
            files=tuple(self._name(number) for number in sweep["camera_file"]),
            timestamp=int(sweep["timestamp"]),
            ego2global=np.array(sweep["ego2global"]),
            seconds=abs(int(sweep["timestamp"]) - int(row["timestamp"])) * 1e-6,
        )

    def classes_present(self, positions: np.ndarray) -> np.ndarray:
        """(n, 10) bool: which classes each frame holds, boxes without a single point left out."""
        seen = (self._boxes["lidar_points"] + self._boxes["radar_points"]) > 0
        counts = np.zeros((len(self._boxes) + 1, len(CLASSES)), dtype=np.int64)
        counts[1:][np.flatnonzero(seen), self._boxes["label"][seen]] = 1
        counts = counts.cumsum(axis=0)
        ranges = self._keyframes["boxes"][positions]
        return counts[ranges[:, 1]] > counts[ranges[:, 0]]

    def _name(self, number: int) -> str:
        start = self._name_ends[number - 1] if number else 0
        return self._names[start : self._name_ends[number]].tobytes().decode()


def summary(index: FrameIndex) -> dict:
    """Counts of frames, scenes and boxes per split and class, for people and for --json."""
    splits = {}
    for name in sorted(index.splits):
        positions = index.split(name)
        ranges = index._keyframes["boxes"][positions]
        labels = [index._boxes["label"][start:end] for start, end in ranges]
        counts = np.bincount(np.concatenate(labels), minlength=len(CLASSES))
        splits[name] = {
            "scenes": len(index.splits[name]),
            "frames": len(positions),
            "boxes": dict(zip(CLASSES, counts.tolist(), strict=True)),
        }
    return {
        "dataroot": str(index.dataroot),
        "version": index.version,
        "index": str(index.path),
        "frames": len(index),
        "splits": splits,
    }


def _print_summary(facts: dict) -> None:
    print(f"{facts['frames']} frames of {facts['version']}; the index lies in {facts['index']}")
    names = list(facts["splits"])
    width = max(map(len, CLASSES))
    print("".join([" " * width, *(f" {name:>12}" for name in names)]))
    for row in ("scenes", "frames"):
        cells = (f" {facts['splits'][name][row]:>12}" for name in names)
        print("".join([f"{row:<{width}}", *cells]))
    for row in CLASSES:
        cells = (f" {facts['splits'][name]['boxes'][row]:>12}" for name in names)
        print("".join([f"{row:<{width}}", *cells]))
    here = f"--dataroot {facts['dataroot']} --version {facts['version']}"
    print(f"next: python recipes/train.py {here} --model bevdepth-tiny-h --out runs/expert")


def main(arguments: list[str] | None = None) -> None:
    """Make the index where needed and print what the data set holds."""
    parser = argparse.ArgumentParser(
        prog="python -m fd3d.data.index", description=main.__doc__.lower()
    )
    parser.add_argument("--dataroot", required=True, help="folder with samples/ and the tables")
    parser.add_argument("--version", required=True, help="table folder, e.g. v1.0-trainval")
    parser.add_argument(
        "--index-dir",
        help="where indexes are kept (default: $FD3D_INDEX_DIR or ~/.cache/fd3d/index)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args(arguments)
    index = FrameIndex.open(dataroot=args.dataroot, version=args.version, folder=args.index_dir)
    facts = summary(index)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_summary(facts)


if __name__ == "__main__":
    sys.exit(exit_code(main))
