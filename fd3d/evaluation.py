"""nuScenes submissions from detections, and their official scores through the devkit.

What a submission holds follows BEVDet: attributes come from class and speed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from pyquaternion import Quaternion

from fd3d.boxes import VX, VY, YAW, H, L, W
from fd3d.classes import CLASS_RANGE, CLASSES
from fd3d.data.batch import Detections
from fd3d.data.frames import Frame
from fd3d.data.index import FrameIndex
from fd3d.data.index_folder import official_version
from fd3d.durable import replacing
from fd3d.errors import CheckFailed, UsageError

MAX_BOXES = 500

_META = {
    "use_camera": True,
    "use_lidar": False,
    "use_radar": False,
    "use_map": False,
    "use_external": False,
}

# Above this speed in m/s an object counts as moving (G1).
_MOVING = 0.2
_VEHICLES = ("car", "truck", "bus", "trailer", "construction_vehicle")
_MOVING_ATTRIBUTE = {
    **dict.fromkeys(_VEHICLES, "vehicle.moving"),
    "motorcycle": "cycle.with_rider",
    "bicycle": "cycle.with_rider",
    "pedestrian": "pedestrian.moving",
}
_STILL_ATTRIBUTE = {
    **dict.fromkeys(_VEHICLES, "vehicle.parked"),
    "bus": "vehicle.stopped",
    "motorcycle": "cycle.without_rider",
    "bicycle": "cycle.without_rider",
    "pedestrian": "pedestrian.standing",
}

_ERRORS = {
    "ate": "trans_err",
    "ase": "scale_err",
    "aoe": "orient_err",
    "ave": "vel_err",
    "aae": "attr_err",
}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Official nuScenes detection scores.

    nds and map in [0, 1]; mean errors over the classes: translation in metres, scale as 1 - IoU,
    orientation in radians, velocity in m/s, attribute as 1 - accuracy. `classes` gives ap, ate,
    ase, aoe, ave and aae by class, NaN where nuScenes does not define the error.
    """

    nds: float
    map: float
    mate: float
    mase: float
    maoe: float
    mave: float
    maae: float
    classes: dict[str, dict[str, float]]

    def to_dict(self) -> dict:
        """Plain numbers for JSON; None stands for NaN."""
        values = asdict(self)
        values["classes"] = {
            name: {key: None if math.isnan(value) else value for key, value in row.items()}
            for name, row in self.classes.items()
        }
        return values


def truth_as_detections(index: FrameIndex, position: int, place: str = "lidar") -> Detections:
    """The frame's annotated boxes, in its "lidar" or "ego" frame, as detections of score 1.

    Boxes without a single point are left out, as the evaluation does; missing velocities are 0.
    """
    frame = index.frame(position)
    kept = frame.seen()
    boxes = np.nan_to_num(frame.boxes_in(place)[kept], nan=0.0)
    return Detections(
        boxes=torch.from_numpy(boxes.astype(np.float32)),
        scores=torch.ones(len(boxes)),
        labels=torch.from_numpy(frame.labels[kept]),
        frame=place,
    )


def submission(
    results: Mapping[str, Detections], index: FrameIndex, split: str | None = None
) -> dict:
    """The nuScenes submission of detections, each in the frame that it names.

    Args:
        results: detections by frame key; every frame of the split that will be scored.
        index: where the frames' poses are.
        split: when given, `results` must hold exactly the frames of this split.

    Raises:
        UsageError: a frame is unknown, missing, or not of the split.
        CheckFailed: a detection holds NaN or an infinity.
    """
    if split is not None:
        _check_tokens(set(results), index, split, "the detections")
    return {
        "meta": dict(_META),
        "results": {
            token: frame_results(index.frame(index.position(token)), found)
            for token, found in results.items()
        },
    }


def frame_results(frame: Frame, found: Detections) -> list[dict]:
    """One frame's rows of a submission, at most 500, in the order of `found`.

    Boxes of G1, in the lidar frame, are left out beyond the evaluation range of their class, which
    the evaluation does anyway; those of G2, in the ego frame, are kept. Both give centres, where
    G2's own code writes the bottom's height; matching does not look at it.
    """
    boxes = found.boxes.detach().cpu().numpy().astype(np.float64)
    scores = found.scores.detach().cpu().numpy().astype(np.float64)
    labels = found.labels.detach().cpu().numpy()
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise CheckFailed(
            f"detections of frame {frame.token} hold NaN or infinite numbers: the network has "
            "diverged"
        )
    kept = np.arange(len(boxes))
    if found.frame == "lidar":
        in_ego = boxes[:, :3] @ frame.lidar2ego[:3, :3].T + frame.lidar2ego[:3, 3]
        reach = np.array([CLASS_RANGE[name] for name in CLASSES])[labels]
        kept = np.flatnonzero(np.hypot(in_ego[:, 0], in_ego[:, 1]) <= reach)
    if len(kept) > MAX_BOXES:
        best = np.argsort(-scores[kept], kind="stable")[:MAX_BOXES]
        kept = kept[np.sort(best)]
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    pose = frame.pose(found.frame)
    turn = pose[:3, :3]
    centres = boxes[:, :3] @ turn.T + pose[:3, 3]
    velocities = np.pad(boxes[:, VX : VY + 1], ((0, 0), (0, 1))) @ turn.T
    rotations = _headings(turn, boxes[:, YAW])
    speeds = np.hypot(velocities[:, 0], velocities[:, 1])
    rows = []
    for n, label in enumerate(labels):
        name = CLASSES[label]
        attribute = (_MOVING_ATTRIBUTE if speeds[n] > _MOVING else _STILL_ATTRIBUTE).get(name, "")
        rows.append(
            {
                "sample_token": frame.token,
                "translation": centres[n].tolist(),
                "size": boxes[n, [W, L, H]].tolist(),
                "rotation": rotations[n].tolist(),
                "velocity": velocities[n, :2].tolist(),
                "detection_name": name,
                "detection_score": float(scores[n]),
                "attribute_name": attribute,
            }
        )
    return rows


def _headings(turn: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """(n, 4) quaternions (w, x, y, z) of `turn` after a rotation by `yaw` about z."""
    w, x, y, z = Quaternion(matrix=turn).elements
    cos, sin = np.cos(yaw / 2), np.sin(yaw / 2)
    parts = [w * cos - z * sin, x * cos + y * sin, y * cos - x * sin, w * sin + z * cos]
    return np.stack(parts, axis=1)


def write_submission(path: Path | str, content: dict) -> None:
    """Write a submission as JSON; the file is either whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w") as file:
        json.dump(content, file)


def evaluate(
    *,
    dataroot: Path | str,
    version: str,
    split: str,
    submission: Path | str,
    out_dir: Path | str,
    verbose: bool = False,
) -> Scores:
    """The official scores of a submission file on a split, by the devkit's `DetectionEval`.

    Args:
        dataroot, version: the data set, as the devkit takes them.
        split: an official split of this version, or one of the data set's splits.json; where the
            latter has an official name, splits.json must list its scenes under another name too.
        submission: JSON file with exactly the frames of the split.
        out_dir: gets the devkit's metrics_summary.json and metrics_details.json.
        verbose: let the devkit print.

    Raises:
        UsageError: the split or file does not fit, or the split has no annotations.
    """
    index = FrameIndex.open(dataroot=dataroot, version=version)
    content = _read_submission(Path(submission))
    _check_tokens(set(content["results"]), index, split, f"submission {submission}")
    devkit_split = _devkit_split(index, split)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    hush = contextlib.ExitStack()
    if not verbose:
        hush.enter_context(contextlib.redirect_stdout(io.StringIO()))
        hush.enter_context(contextlib.redirect_stderr(io.StringIO()))
    with hush, _some_box(content, Path(submission), out_dir) as path:
        from nuscenes import NuScenes
        from nuscenes.eval.common.config import config_factory
        from nuscenes.eval.detection.evaluate import DetectionEval

        summary = DetectionEval(
            NuScenes(version=version, dataroot=str(dataroot), verbose=verbose),
            config=config_factory("detection_cvpr_2019"),
            result_path=str(path),
            eval_set=devkit_split,
            output_dir=str(out_dir),
            verbose=verbose,
        ).main(plot_examples=0, render_curves=False)
    return _scores(summary)


def _scores(summary: dict) -> Scores:
    errors = summary["label_tp_errors"]
    means = {f"m{short}": summary["tp_errors"][name] for short, name in _ERRORS.items()}
    classes = {
        label: {
            "ap": float(summary["mean_dist_aps"][label]),
            **{short: float(errors[label][name]) for short, name in _ERRORS.items()},
        }
        for label in CLASSES
    }
    return Scores(nds=summary["nd_score"], map=summary["mean_ap"], **means, classes=classes)


def _read_submission(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"submission {path} is missing: write it first") from None
    except ValueError as error:
        raise UsageError(f"submission {path} is not JSON ({error}): write it again") from None
    good = isinstance(content, dict) and {"meta", "results"} <= set(content)
    if not good or not isinstance(content["results"], dict):
        raise UsageError(f"submission {path} has no meta and results by frame: write it again")
    return content


def _check_tokens(tokens: set[str], index: FrameIndex, split: str, what: str) -> None:
    wanted = {index.tokens[position] for position in index.split(split)}
    missing, extra = wanted - tokens, tokens - wanted
    if missing or extra:
        example = sorted(missing or extra)[0]
        raise UsageError(
            f"{what} lacks {len(missing)} of {len(wanted)} frames of split {split} and has "
            f"{len(extra)} others (such as {example}): predict exactly the frames of the split"
        )


def _devkit_split(index: FrameIndex, split: str) -> str:
    """What the devkit calls this split, after a check that there is something to score."""
    from nuscenes.utils.splits import is_predefined_split

    if not index.classes_present(index.split(split)).any():
        raise UsageError(
            f"split {split!r} of {index.version} has no annotated boxes to score against: choose "
            f"another of {', '.join(sorted(index.splits))}"
        )
    if not is_predefined_split(split) or index.version.endswith(official_version(split)):
        return split
    # The devkit takes a name like "val" for its own scenes, whatever splits.json says.
    for name, scenes in index.splits.items():
        if scenes == index.splits[split] and not is_predefined_split(name):
            return name
    raise UsageError(
        f"the devkit has its own scenes for split {split!r}: give the scenes of {index.version} a "
        "second name in splits.json"
    )


@contextlib.contextmanager
def _some_box(content: dict, path: Path, folder: Path):
    """A submission file that holds at least one box, since the devkit fails on empty ones.

    The box added to an empty submission lies so far out that the devkit's range filter drops it.
    """
    if any(content["results"].values()):
        yield path
        return
    token = next(iter(content["results"]))
    far = {
        "sample_token": token,
        "translation": [1e9, 1e9, 0.0],
        "size": [1.0, 1.0, 1.0],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "velocity": [0.0, 0.0],
        "detection_name": CLASSES[0],
        "detection_score": 0.0,
        "attribute_name": "",
    }
    with tempfile.TemporaryDirectory(dir=folder) as room:
        file = Path(room) / "submission.json"
        file.write_text(json.dumps({**content, "results": {**content["results"], token: [far]}}))
        yield file
