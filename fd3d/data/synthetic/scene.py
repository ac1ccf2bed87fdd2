"""Makes one scene: its image and lidar files, and its rows of the nuScenes tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from fd3d.classes import CAMERAS
from fd3d.data.synthetic.lidar import sweep
from fd3d.data.synthetic.parameters import Parameters
from fd3d.data.synthetic.placement import draw_world
from fd3d.data.synthetic.render import Stage, View, render, set_stage
from fd3d.data.synthetic.rig import (
    KEYFRAME_HZ,
    LEAD_IN_SECONDS,
    LIDAR,
    Mount,
    intrinsic_at,
    mounts,
    quaternion,
)
from fd3d.data.synthetic.tables import SCENE_TABLES, visibility_token

ANNOTATED_METRES = 65.0
_JPEG_QUALITY = 92
_FIRST_SECOND = 1_600_000_000
# A thing counts as seen by the cameras from this share of an image's pixels on (7 at 352 x 198).
_SEEN_SHARE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Shoot:
    """One scene being made; `rows` collects its part of the tables."""

    parameters: Parameters
    out: Path
    name: str
    number: int
    stage: Stage
    rig: dict[str, Mount]
    rng: np.random.Generator
    rows: dict[str, list] = field(default_factory=lambda: {name: [] for name in SCENE_TABLES})

    def token(self, *names: object) -> str:
        return self.parameters.token(self.name, *names)

    def stamp(self, seconds: float) -> int:
        """Microseconds since 1970 of a moment of this scene."""
        return (_FIRST_SECOND + 1000 * self.number) * 1_000_000 + round((1 + seconds) * 1e6)


def make_scene(parameters: Parameters, number: int, out: Path) -> dict[str, list]:
    """Write the files of scene `number` below `out` and return its table rows."""
    split_and_name = parameters.scene_names()[number]
    rng = np.random.default_rng(parameters.scene_seed(number))
    duration = (parameters.frames - 1) / KEYFRAME_HZ
    world = draw_world(rng, duration=duration, reach=parameters.reach)
    rig = mounts(rng)
    shoot = Shoot(
        parameters=parameters,
        out=out,
        name=split_and_name[1],
        number=number,
        stage=set_stage(world, rng),
        rig=rig,
        rng=rng,
    )
    for channel in (LIDAR, *CAMERAS):
        for kind in ("samples", "sweeps"):
            if kind == "samples" or channel != LIDAR:
                (out / kind / channel).mkdir(parents=True, exist_ok=True)
    _add_scene(shoot)
    _add_sensors(shoot)
    actors = len(world.actors)
    points = np.zeros((parameters.frames, actors), dtype=np.int64)
    pixels = np.zeros((parameters.frames, actors, 2), dtype=np.int64)
    per_keyframe = parameters.camera_hz // KEYFRAME_HZ
    last = dict.fromkeys((LIDAR, *CAMERAS))
    for frame in range(parameters.frames):
        # Images between two keyframes belong to the second one, as in nuScenes.
        earlier = per_keyframe - 1 if frame else round(LEAD_IN_SECONDS * parameters.camera_hz)
        for step in range(earlier, -1, -1):
            moment = frame / KEYFRAME_HZ - step / parameters.camera_hz
            for channel in CAMERAS:
                pixels[frame] += _shoot_camera(shoot, channel, frame, moment, step == 0, last)
        points[frame] = _shoot_lidar(shoot, frame, last)
    _add_annotations(shoot, points, pixels)
    return shoot.rows


def _add_scene(shoot: Shoot) -> None:
    world, frames = shoot.stage.world, shoot.parameters.frames
    samples = [shoot.token("sample", frame) for frame in range(frames)]
    shoot.rows["log"].append(
        {
            "token": shoot.token("log"),
            "logfile": shoot.name,
            "vehicle": "synthetic",
            "date_captured": "2020-09-13",
            "location": "synthetic",
        }
    )
    shoot.rows["scene"].append(
        {
            "token": shoot.token("scene"),
            "log_token": shoot.token("log"),
            "nbr_samples": frames,
            "first_sample_token": samples[0],
            "last_sample_token": samples[-1],
            "name": shoot.name,
            "description": f"synthetic, {world.light.name}, {world.ego.speed:.1f} m/s",
        }
    )
    for frame, token in enumerate(samples):
        shoot.rows["sample"].append(
            {
                "token": token,
                "timestamp": shoot.stamp(frame / KEYFRAME_HZ),
                "prev": samples[frame - 1] if frame else "",
                "next": samples[frame + 1] if frame + 1 < frames else "",
                "scene_token": shoot.token("scene"),
            }
        )


def _add_sensors(shoot: Shoot) -> None:
    for channel, mount in shoot.rig.items():
        intrinsic = []
        if mount.intrinsic is not None:
            intrinsic = intrinsic_at(mount, shoot.parameters.width).tolist()
        shoot.rows["calibrated_sensor"].append(
            {
                "token": shoot.token("calibrated_sensor", channel),
                "sensor_token": shoot.parameters.token("sensor", channel),
                "translation": list(mount.translation),
                "rotation": quaternion(mount.to_ego()[:3, :3]),
                "camera_intrinsic": intrinsic,
            }
        )


def _add_data(
    shoot: Shoot,
    channel: str,
    frame: int,
    moment: float,
    pose: np.ndarray,
    *,
    key: bool,
    last: dict,
) -> Path:
    """Add the sample_data and ego_pose rows of one file, and return where the file goes."""
    stamp = shoot.stamp(moment)
    token = shoot.token("sample_data", channel, stamp)
    ending, kind = ("pcd.bin", "pcd") if channel == LIDAR else ("jpg", "jpg")
    folder = "samples" if key else "sweeps"
    filename = f"{folder}/{channel}/{shoot.name}__{channel}__{stamp}.{ending}"
    size = (0, 0) if channel == LIDAR else (shoot.parameters.width, shoot.parameters.height)
    before = last[channel]
    row = {
        "token": token,
        "sample_token": shoot.token("sample", frame),
        "ego_pose_token": token,
        "calibrated_sensor_token": shoot.token("calibrated_sensor", channel),
        "timestamp": stamp,
        "fileformat": kind,
        "is_key_frame": key,
        "height": size[1],
        "width": size[0],
        "filename": filename,
        "prev": before["token"] if before else "",
        "next": "",
    }
    if before:
        before["next"] = token
    last[channel] = row
    shoot.rows["sample_data"].append(row)
    shoot.rows["ego_pose"].append(
        {
            "token": token,
            "timestamp": stamp,
            "rotation": quaternion(pose[:3, :3]),
            "translation": pose[:3, 3].tolist(),
        }
    )
    return shoot.out / filename


def _shoot_camera(
    shoot: Shoot, channel: str, frame: int, moment: float, key: bool, last: dict
) -> np.ndarray | int:
    """Write one image; at a keyframe, the (actors, 2) visible and coverable pixels in it."""
    mount, parameters = shoot.rig[channel], shoot.parameters
    moment += mount.delay
    ego = shoot.stage.world.ego_pose(moment)
    path = _add_data(shoot, channel, frame, moment, ego, key=key, last=last)
    view = View(
        pose=ego @ mount.to_ego(),
        intrinsic=intrinsic_at(mount, parameters.width),
        width=parameters.width,
        height=parameters.height,
        time=moment,
    )
    image, counts = render(shoot.stage, view, shoot.rng, count=key)
    Image.fromarray(image).save(path, quality=_JPEG_QUALITY)
    return counts if key else 0


def _shoot_lidar(shoot: Shoot, frame: int, last: dict) -> np.ndarray:
    """Write the sweep of a keyframe; (actors,) points inside each box."""
    moment = frame / KEYFRAME_HZ
    ego = shoot.stage.world.ego_pose(moment)
    path = _add_data(shoot, LIDAR, frame, moment, ego, key=True, last=last)
    result = sweep(shoot.stage, ego @ shoot.rig[LIDAR].to_ego(), moment, shoot.rng)
    result.points.tofile(path)
    return result.inside


def _add_annotations(shoot: Shoot, points: np.ndarray, pixels: np.ndarray) -> None:
    """Boxes of every thing from the first to the last frame in which a sensor sees it in range.

    Frames in between are annotated even where the thing is hidden, as nuScenes' annotators do, so
    that speeds can be taken from neighbouring frames.
    """
    world, parameters = shoot.stage.world, shoot.parameters
    number = world.actors.annotated
    times = np.arange(parameters.frames) / KEYFRAME_HZ
    placed = [world.placed(t) for t in times]
    bottom = np.stack([position[:number] for position, _ in placed])
    yaw = np.stack([angle[:number] for _, angle in placed])
    ego = np.stack([world.ego_pose(t)[:2, 3] for t in times])
    in_range = np.linalg.norm(bottom[..., :2] - ego[:, None], axis=-1) < ANNOTATED_METRES
    fewest = _SEEN_SHARE * parameters.width * parameters.height
    seen = in_range & ((points[:, :number] > 0) | (pixels[:, :number, 0] >= fewest))
    for actor in range(number):
        frames = np.flatnonzero(seen[:, actor])
        if len(frames) == 0:
            continue
        frames = [f for f in range(frames[0], frames[-1] + 1) if in_range[f, actor]]
        tokens = [shoot.token("annotation", actor, f) for f in frames]
        shoot.rows["instance"].append(
            {
                "token": shoot.token("instance", actor),
                "category_token": parameters.token("category", world.actors.category[actor]),
                "nbr_annotations": len(tokens),
                "first_annotation_token": tokens[0],
                "last_annotation_token": tokens[-1],
            }
        )
        attribute = world.actors.attribute[actor]
        size = world.actors.size[actor]
        for i, f in enumerate(frames):
            centre = bottom[f, actor] + [0.0, 0.0, size[2] / 2]
            half = yaw[f, actor] / 2
            shoot.rows["sample_annotation"].append(
                {
                    "token": tokens[i],
                    "sample_token": shoot.token("sample", f),
                    "instance_token": shoot.token("instance", actor),
                    "visibility_token": visibility_token(*pixels[f, actor].tolist()),
                    "attribute_tokens": [parameters.token("attribute", attribute)]
                    if attribute
                    else [],
                    "translation": np.round(centre, 4).tolist(),
                    "size": size.tolist(),
                    "rotation": [float(np.cos(half)), 0.0, 0.0, float(np.sin(half))],
                    "prev": tokens[i - 1] if i else "",
                    "next": tokens[i + 1] if i + 1 < len(frames) else "",
                    "num_lidar_pts": int(points[f, actor]),
                    "num_radar_pts": 0,
                }
            )
