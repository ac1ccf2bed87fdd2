"""The ten nuScenes detection classes and what the field fixes for each of them.

Order of `CLASSES`: CenterPoint's six-task concatenation, which every BEVDet and BEVDepth
checkpoint uses, so that label 0 is car and label 9 is traffic_cone.
"""

from __future__ import annotations

CLASSES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)

LABEL_OF = {name: label for label, name in enumerate(CLASSES)}

# Classes that share one head ("task") in CenterPoint's nuScenes heads.
SIX_TASKS = (
    ("car",),
    ("truck", "construction_vehicle"),
    ("bus", "trailer"),
    ("barrier",),
    ("motorcycle", "bicycle"),
    ("pedestrian", "traffic_cone"),
)
ONE_TASK = (CLASSES,)

# Evaluation range in metres from the ego origin (nuScenes detection_cvpr_2019).
CLASS_RANGE = {
    "car": 50.0,
    "truck": 50.0,
    "construction_vehicle": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "barrier": 30.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "pedestrian": 40.0,
    "traffic_cone": 30.0,
}

# The six cameras in BEVDet's order; every (.., N, ..) camera axis in this project uses it.
CAMERAS = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)
