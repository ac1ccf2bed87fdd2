"""Makes the arrays of a frame index from the JSON tables of a nuScenes-schema data set.

The tables are read directly rather than through the devkit's `NuScenes` object: the devkit looks
records up one call at a time and holds all of them, radar included. What is computed here from
annotations (velocities) follows the devkit's `box_velocity`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fd3d.boxes import VX, VY, YAW, H, L, W
from fd3d.classes import CAMERAS
from fd3d.errors import UsageError

LIDAR = "LIDAR_TOP"
FRONT = CAMERAS.index("CAM_FRONT")

# G1 lists the sweeps around a keyframe in steps of 0.25 s and looks at most 9 steps away.
SWEEP_STEP_SECONDS = 0.25
SWEEPS_EACH_SIDE = 9

# The devkit gives no velocity when the annotations it would difference lie further apart.
_MAX_VELOCITY_SECONDS = 1.5

SWEEP_DTYPE = np.dtype(
    [("timestamp", "<i8"), ("ego2global", "<f8", (4, 4)), ("camera_file", "<i8", (6,))]
)
BOX_DTYPE = np.dtype(
    [
        ("box", "<f8", (9,)),  # global frame, as fd3d.boxes
        ("label", "i1"),
        ("attribute", "i1"),  # index into meta["attributes"], -1 = none
        ("visibility", "i1"),  # nuScenes level 1..4, 0 = unknown
        ("lidar_points", "<i4"),
        ("radar_points", "<i4"),
    ]
)


def keyframe_dtype(token_length: int) -> np.dtype:
    """One row of the keyframe table; file columns index the name blob."""
    return np.dtype(
        [
            ("token", f"S{token_length}"),
            ("scene", "<i4"),
            ("timestamp", "<i8"),
            ("lidar_file", "<i8"),
            ("lidar2ego", "<f8", (4, 4)),
            ("ego2global", "<f8", (4, 4)),
            ("camera_file", "<i8", (6,)),
            ("camera_timestamp", "<i8", (6,)),
            ("camera_size", "<i4", (6, 2)),
            ("intrinsic", "<f8", (6, 3, 3)),
            ("camera2ego", "<f8", (6, 4, 4)),
            ("camera_ego2global", "<f8", (6, 4, 4)),
            ("boxes", "<i8", (2,)),
            ("sweeps", "<i4", (2, SWEEPS_EACH_SIDE)),  # prev, next; -1 = no such sweep
        ]
    )


class _Names:
    """Collects strings once each and hands out their numbers."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}

    def number(self, name: str) -> int:
        return self._number.setdefault(name, len(self._number))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(bytes,) uint8 blob and (n,) int64 end offsets."""
        encoded = [name.encode() for name in self._number]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return np.frombuffer(b"".join(encoded), dtype=np.uint8), ends


def build_arrays(
    *,
    tables: Path,
    label_of_category: Callable[[str], int | None],
    splits: Mapping[str, list[str]],
) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of an index by file stem, and its JSON description.

    Args:
        tables: folder of one version with scene.json and the other tables.
        label_of_category: label of a nuScenes category, None for those that are not detected.
        splits: scene names by split; only splits with frames here are kept.
    """
    scenes = _read(tables, "scene")
    samples = _samples_in_order(_read(tables, "sample"), scenes)
    shots = _SampleData(tables, {row["token"]: row["scene_token"] for row in samples})
    names = _Names()
    keyframes = np.zeros(
        len(samples), dtype=keyframe_dtype(max((len(s["token"]) for s in samples), default=1))
    )
    scene_number = {row["token"]: number for number, row in enumerate(scenes)}
    keyframes["token"] = [row["token"].encode() for row in samples]
    keyframes["scene"] = [scene_number[row["scene_token"]] for row in samples]
    keyframes["timestamp"] = [row["timestamp"] for row in samples]
    _fill_sensors(keyframes, samples, shots, names)
    sweeps = _fill_sweeps(keyframes, samples, shots, names)
    boxes, attributes = _fill_boxes(keyframes, samples, tables, label_of_category)
    blob, ends = names.arrays()
    with_frames = {scenes[number]["name"] for number in np.unique(keyframes["scene"])}
    description = {
        "scenes": [row["name"] for row in scenes],
        "attributes": attributes,
        "splits": {
            split: kept
            for split, all_of in splits.items()
            if (kept := sorted(with_frames & set(all_of)))
        },
    }
    arrays = {
        "keyframes": keyframes,
        "sweeps": sweeps,
        "boxes": boxes,
        "names": blob,
        "name_ends": ends,
    }
    return arrays, description


def _read(tables: Path, name: str, optional: bool = False) -> list[dict]:
    path = tables / f"{name}.json"
    try:
        rows = json.loads(path.read_bytes())
    except FileNotFoundError:
        if optional:
            return []
        raise UsageError(
            f"table {path} is missing: the data set is incomplete, fetch its metadata again"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"table {path} is not JSON ({error}): fetch the metadata of the data set again"
        ) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(
            f"table {path} is not a list of records: fetch the metadata of the data set again"
        )
    return rows


def _samples_in_order(samples: list[dict], scenes: list[dict]) -> list[dict]:
    order = {row["token"]: number for number, row in enumerate(scenes)}
    return sorted(samples, key=lambda row: (order[row["scene_token"]], row["timestamp"]))


class _SampleData:
    """Camera and lidar records: keyframes by (sample, channel), all pictures by scene."""

    def __init__(self, tables: Path, scene_of_sample: Mapping[str, str]) -> None:
        sensors = {row["token"]: row["channel"] for row in _read(tables, "sensor")}
        self.calibration = {row["token"]: row for row in _read(tables, "calibrated_sensor")}
        channel_of = {
            token: sensors[row["sensor_token"]] for token, row in self.calibration.items()
        }
        self.keyframe: dict[tuple[str, str], dict] = {}
        self.by_scene: dict[str, tuple[list[dict], ...]] = {}
        number_of = {channel: number for number, channel in enumerate(CAMERAS)}
        for row in _read(tables, "sample_data"):
            channel = channel_of[row["calibrated_sensor_token"]]
            if channel != LIDAR and channel not in number_of:
                continue
            if row["is_key_frame"]:
                self.keyframe[row["sample_token"], channel] = row
            if channel != LIDAR:
                scene = scene_of_sample[row["sample_token"]]
                cameras = self.by_scene.setdefault(scene, tuple([] for _ in CAMERAS))
                cameras[number_of[channel]].append(row)
        for cameras in self.by_scene.values():
            for rows in cameras:
                rows.sort(key=lambda row: row["timestamp"])
        self._poses = {row["token"]: row for row in _read(tables, "ego_pose")}

    def of_keyframe(self, sample_token: str, channel: str) -> dict:
        try:
            return self.keyframe[sample_token, channel]
        except KeyError:
            raise UsageError(
                f"sample {sample_token} has no {channel} keyframe: every sample needs "
                f"{LIDAR} and the six cameras, fetch the metadata of the data set again"
            ) from None

    def poses(self, rows: list[dict]) -> np.ndarray:
        """(n, 4, 4) ego to global at the rows' own times."""
        return _matrices([self._poses[row["ego_pose_token"]] for row in rows])

    def mountings(self, rows: list[dict]) -> np.ndarray:
        """(n, 4, 4) sensor to ego."""
        return _matrices([self.calibration[row["calibrated_sensor_token"]] for row in rows])


def _fill_sensors(
    keyframes: np.ndarray, samples: list[dict], shots: _SampleData, names: _Names
) -> None:
    rows = [shots.of_keyframe(sample["token"], LIDAR) for sample in samples]
    keyframes["lidar_file"] = [names.number(row["filename"]) for row in rows]
    keyframes["lidar2ego"] = shots.mountings(rows)
    keyframes["ego2global"] = shots.poses(rows)
    for camera, channel in enumerate(CAMERAS):
        rows = [shots.of_keyframe(sample["token"], channel) for sample in samples]
        keyframes["camera_file"][:, camera] = [names.number(row["filename"]) for row in rows]
        keyframes["camera_timestamp"][:, camera] = [row["timestamp"] for row in rows]
        sizes = [(row["width"], row["height"]) for row in rows]
        keyframes["camera_size"][:, camera] = np.reshape(sizes, (-1, 2))
        intrinsics = [
            shots.calibration[row["calibrated_sensor_token"]]["camera_intrinsic"] for row in rows
        ]
        keyframes["intrinsic"][:, camera] = np.reshape(intrinsics, (-1, 3, 3))
        keyframes["camera2ego"][:, camera] = shots.mountings(rows)
        keyframes["camera_ego2global"][:, camera] = shots.poses(rows)


def _fill_sweeps(
    keyframes: np.ndarray, samples: list[dict], shots: _SampleData, names: _Names
) -> np.ndarray:
    """Fill the `sweeps` column and return the sweep table it points into."""
    times = {
        scene: [np.array([row["timestamp"] for row in rows], dtype=np.int64) for rows in cameras]
        for scene, cameras in shots.by_scene.items()
    }
    periods = [np.diff(cameras[FRONT]) for cameras in times.values()]
    periods = np.concatenate(periods) if periods else np.zeros(0)
    step = 1
    if len(periods):
        step = max(1, round(SWEEP_STEP_SECONDS / max(float(np.median(periods)) * 1e-6, 1e-6)))
    place = {
        scene: {row["token"]: number for number, row in enumerate(cameras[FRONT])}
        for scene, cameras in shots.by_scene.items()
    }
    numbers: dict[tuple[str, int], int] = {}
    keyframes["sweeps"] = -1
    for position, sample in enumerate(samples):
        scene = sample["scene_token"]
        here = place[scene][shots.of_keyframe(sample["token"], CAMERAS[FRONT])["token"]]
        for side, sign in enumerate((-1, 1)):
            for entry in range(SWEEPS_EACH_SIDE):
                there = here + sign * step * (entry + 1)
                if not 0 <= there < len(place[scene]):
                    break
                number = numbers.setdefault((scene, there), len(numbers))
                keyframes["sweeps"][position, side, entry] = number
    sweeps = np.zeros(len(numbers), dtype=SWEEP_DTYPE)
    front = [shots.by_scene[scene][FRONT][there] for scene, there in numbers]
    sweeps["timestamp"] = [row["timestamp"] for row in front]
    sweeps["ego2global"] = shots.poses(front)
    scene_of = [scene for scene, _ in numbers]
    for camera in range(len(CAMERAS)):
        nearest = {
            scene: _nearest(all_times[camera], all_times[FRONT])
            for scene, all_times in times.items()
        }
        sweeps["camera_file"][:, camera] = [
            names.number(shots.by_scene[scene][camera][nearest[scene][there]]["filename"])
            for scene, (_, there) in zip(scene_of, numbers, strict=True)
        ]
    return sweeps


def _nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each of `wanted` the number of the nearest of the sorted `times`."""
    after = np.clip(np.searchsorted(times, wanted), 1, max(len(times) - 1, 1))
    before = after - 1
    after = np.minimum(after, len(times) - 1)
    return np.where(wanted - times[before] <= times[after] - wanted, before, after)


def _fill_boxes(
    keyframes: np.ndarray,
    samples: list[dict],
    tables: Path,
    label_of_category: Callable[[str], int | None],
) -> tuple[np.ndarray, list[str]]:
    """Fill the `boxes` column (start, end) and return the box table and the attribute names."""
    categories = {row["token"]: row["name"] for row in _read(tables, "category", optional=True)}
    label_of = {
        row["token"]: label_of_category(categories[row["category_token"]])
        for row in _read(tables, "instance", optional=True)
    }
    rows = _read(tables, "sample_annotation", optional=True)
    rows = [row for row in rows if label_of[row["instance_token"]] is not None]
    place = {sample["token"]: position for position, sample in enumerate(samples)}
    rows.sort(key=lambda row: place[row["sample_token"]])
    attributes = _read(tables, "attribute", optional=True)
    attribute_number = {row["token"]: number for number, row in enumerate(attributes)}
    boxes = np.zeros(len(rows), dtype=BOX_DTYPE)
    position = np.array([place[row["sample_token"]] for row in rows], dtype=np.int64)
    times = keyframes["timestamp"][position]
    boxes["box"][:, :3] = np.reshape([row["translation"] for row in rows], (-1, 3))
    boxes["box"][:, [W, L, H]] = np.reshape([row["size"] for row in rows], (-1, 3))
    heading = _rotations([row["rotation"] for row in rows])[:, :, 0]
    boxes["box"][:, YAW] = np.arctan2(heading[:, 1], heading[:, 0])
    boxes["box"][:, VX : VY + 1] = _velocities(rows, boxes["box"][:, :2], times)
    boxes["label"] = [label_of[row["instance_token"]] for row in rows]
    boxes["attribute"] = [
        attribute_number[row["attribute_tokens"][0]] if row["attribute_tokens"] else -1
        for row in rows
    ]
    boxes["visibility"] = [int(row.get("visibility_token") or 0) for row in rows]
    boxes["lidar_points"] = [row["num_lidar_pts"] for row in rows]
    boxes["radar_points"] = [row["num_radar_pts"] for row in rows]
    keyframes["boxes"][:, 0] = np.searchsorted(position, np.arange(len(samples)), side="left")
    keyframes["boxes"][:, 1] = np.searchsorted(position, np.arange(len(samples)), side="right")
    return boxes, [row["name"] for row in attributes]


def _velocities(rows: list[dict], xy: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(n, 2) m/s by central difference where both neighbours exist, NaN where neither does."""
    number = {row["token"]: n for n, row in enumerate(rows)}
    own = np.arange(len(rows))
    first = np.array([number.get(row["prev"], -1) for row in rows], dtype=np.int64)
    last = np.array([number.get(row["next"], -1) for row in rows], dtype=np.int64)
    both = (first >= 0) & (last >= 0)
    first = np.where(first >= 0, first, own)
    last = np.where(last >= 0, last, own)
    seconds = (times[last] - times[first]) * 1e-6
    known = (seconds > 0) & (seconds <= np.where(both, 2, 1) * _MAX_VELOCITY_SECONDS)
    velocity = np.full((len(rows), 2), np.nan)
    velocity[known] = (xy[last] - xy[first])[known] / seconds[known, None]
    return velocity


def _matrices(rows: list[dict]) -> np.ndarray:
    """(n, 4, 4) from records with a rotation quaternion and a translation."""
    matrices = np.tile(np.eye(4), (len(rows), 1, 1))
    matrices[:, :3, :3] = _rotations([row["rotation"] for row in rows])
    matrices[:, :3, 3] = np.reshape([row["translation"] for row in rows], (-1, 3))
    return matrices


def _rotations(quaternions: list[list[float]]) -> np.ndarray:
    """(n, 3, 3) from (w, x, y, z) quaternions of any length."""
    q = np.reshape(np.asarray(quaternions, dtype=np.float64), (-1, 4))
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)
