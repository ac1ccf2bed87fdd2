"""The thirteen nuScenes tables: what is the same in every data set, and how scenes are joined."""

from __future__ import annotations

import json
import os
from pathlib import Path

from PIL import Image

from fd3d.classes import CAMERAS
from fd3d.data.synthetic.parameters import DEVKIT_SPLITS, Parameters
from fd3d.data.synthetic.rig import LIDAR
from fd3d.data.synthetic.things import KINDS

# Made scene by scene; the others are the same for every data set.
SCENE_TABLES = (
    "calibrated_sensor",
    "ego_pose",
    "instance",
    "log",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
)
ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)
_VISIBILITY = ("v0-40", "v40-60", "v60-80", "v80-100")
_MAP = "maps/open_ground.png"


def write_json(path: Path, content: object) -> None:
    """Write `content` to `path`, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, separators=(",", ":")))
    os.replace(partial, path)


def visibility_token(visible: int, coverable: int) -> str:
    """The nuScenes level of a thing of which `visible` of `coverable` pixels are seen."""
    share = visible / coverable if coverable else 0.0
    return str(1 + (share >= 0.4) + (share >= 0.6) + (share >= 0.8))


def write_tables(out: Path, parameters: Parameters, scenes: list[dict[str, list]]) -> None:
    """Write all tables, splits.json and the map of a data set from its scenes' rows, in order."""
    folder = out / parameters.version
    folder.mkdir(parents=True, exist_ok=True)
    tables = _common(parameters)
    for name in SCENE_TABLES:
        tables[name] = [row for scene in scenes for row in scene[name]]
    tables["map"][0]["log_tokens"] = [row["token"] for row in tables["log"]]
    for name, rows in tables.items():
        write_json(folder / f"{name}.json", rows)
    splits: dict[str, list[str]] = {}
    for split, scene in parameters.scene_names():
        for name in (split, DEVKIT_SPLITS[split]):
            splits.setdefault(name, []).append(scene)
    write_json(folder / "splits.json", splits)
    (out / "maps").mkdir(exist_ok=True)
    # The devkit wants a mask of drivable ground; the car may drive anywhere here.
    Image.new("L", (64, 64), 255).save(out / _MAP)


def _common(parameters: Parameters) -> dict[str, list[dict]]:
    token = parameters.token
    categories = [kind.category for kind in KINDS.values()]
    return {
        "category": [
            {"token": token("category", name), "name": name, "description": "", "index": i + 1}
            for i, name in enumerate(categories)
        ],
        "attribute": [
            {"token": token("attribute", name), "name": name, "description": ""}
            for name in ATTRIBUTES
        ],
        "visibility": [
            {
                "token": str(i + 1),
                "level": level,
                "description": "share of a thing's pixels that nothing else hides, all cameras",
            }
            for i, level in enumerate(_VISIBILITY)
        ],
        "sensor": [
            {
                "token": token("sensor", name),
                "channel": name,
                "modality": "lidar" if name == LIDAR else "camera",
            }
            for name in (LIDAR, *CAMERAS)
        ],
        "map": [
            {
                "token": token("map"),
                "log_tokens": [],
                "category": "semantic_prior",
                "filename": _MAP,
            }
        ],
    }
