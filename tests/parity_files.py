"""Stored values of the original BEVDepth networks: where they lie, and what each file holds.

They are looked for under $FD3D_PARITY, else under ../shared/parity beside the repository. A file is
known by its content, never by a list of names, so that more files of the same kinds are found, and
weights, images and head maps are drawn again from the seeds that each file names.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from fd3d.boxes import old_yaw
from fd3d.models.bevdepth.head import BRANCHES

BESIDE = Path(__file__).parents[1].parent / "shared" / "parity"
ROOT = Path(os.environ.get("FD3D_PARITY") or BESIDE)
FOLDER = ROOT / "bevdepth" if (ROOT / "bevdepth").is_dir() else ROOT

# Kind of an .npz file by the first of these fields that it has; the number is the generation.
MARKS = {
    "in/sensor2ego": "network 2",
    "in/weight_seed": "network 1",
    "loss/task0.loss_xy": "head 2",
    "in/head_seed": "head 1",
    "s0/rot_T": "augmentation 1",
    "bda/out_mat": "augmentation 2",
    "depthmap/vals": "depth target 2",
    "points_per_cell_yx": "voxels 2",
    "presence": "cbgs",
    "dx": "depth target 1",
}


@cache
def kinds() -> dict[Path, str]:
    """The kind of every stored file, "" where it is not known; {} where there is no folder."""
    found = {path: _kind_of_arrays(path) for path in sorted(FOLDER.rglob("*.npz"))}
    for path in sorted(FOLDER.rglob("*.json")):
        found[path] = _kind_of_json(path)
    return found


def _kind_of_arrays(path: Path) -> str:
    with np.load(path) as content:
        marks = [MARKS[name] for name in MARKS if name in content.files]
    return marks[0] if marks else ""


def _kind_of_json(path: Path) -> str:
    content = json.loads(path.read_text())
    if "_input" in content:
        return f"submission {1 if 'info' in content['_input'] else 2}"
    if all(isinstance(value, list) for value in content.values()):
        return "keys"
    return "checksums" if "image_rule" in content else ""


def files(*wanted: str):
    """One parameter for each file of these kinds, for `pytest.mark.parametrize`; skipped with the
    reason where there is none."""
    found = [path for path, kind in kinds().items() if kind in wanted]
    if not found:
        reason = f"no parity files ({', '.join(wanted)}) under {FOLDER}: set FD3D_PARITY"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")]
    return [pytest.param(path, id=path.stem.removeprefix("golden_")) for path in found]


def stored_keys(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a stored key list."""
    return {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()}


def drawn_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """The weights behind the stored tensors, by the rule that comes with them."""
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for key in sorted(shapes):
        shape, last = shapes[key], key.rsplit(".", 1)[-1]
        if last == "num_batches_tracked":
            weights[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        normal = rng.standard_normal(shape)
        if last == "running_var":
            value = 1 + 0.1 * np.abs(normal)
        elif last in ("running_mean", "bias"):
            value = 0.1 * normal
        elif len(shape) == 1:
            value = 1 + 0.1 * normal
        else:
            value = normal / np.sqrt(np.prod(shape[1:]))
        weights[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    # Camera numbers reach thousands: without this the gates would all be shut or open.
    for key in ("se.fc.0.running_var", "depth_net.bn.running_var"):
        if f"img_view_transformer.{key}" in weights:
            weights[f"img_view_transformer.{key}"] *= 1e5
    return weights


def drawn_images(golden) -> torch.Tensor:
    """(1, 6, T, 3, H, W): for each camera the keyframe, then its adjacent moments."""
    shape = tuple(golden["in/img_shape"])
    normal = np.random.Generator(np.random.PCG64(int(golden["in/img_seed"]))).standard_normal(shape)
    return torch.from_numpy(normal.astype(np.float32)).view(1, 6, shape[1] // 6, *shape[2:])


def drawn_heads(golden) -> tuple[dict[str, torch.Tensor], ...]:
    """The raw maps of every task that a head file was made from."""
    rng = np.random.Generator(np.random.PCG64(int(golden["in/head_seed"])))
    change = {"heatmap": (1.2, -4.0), "dim": (0.3, 0.8), "reg": (0.2, 0.5)}
    tasks = []
    while f"t{len(tasks)}/heatmap" in golden.files:
        _, classes, rows, columns = golden[f"t{len(tasks)}/heatmap"].shape
        maps = {}
        for branch, channels in {**BRANCHES, "heatmap": classes}.items():
            scale, shift = change.get(branch, (1.0, 0.0))
            value = scale * rng.standard_normal((1, channels, rows, columns)) + shift
            maps[branch] = torch.from_numpy(value.astype(np.float32))
        tasks.append(maps)
    return tuple(tasks)


def ours(boxes, convention: str, *, bottom: bool) -> torch.Tensor:
    """Rows of the original as ours: old yaw, or swapped sizes; z at the bottom where it says so."""
    boxes = torch.as_tensor(boxes).clone()
    if convention == "old":
        boxes[:, 6] = old_yaw(boxes[:, 6])
    else:
        boxes = boxes[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]]
    if bottom:
        boxes[:, 2] += boxes[:, 5] / 2
    return boxes


def stages(golden) -> list[str]:
    """Names of the tensors that a network file holds samples of."""
    return [name.removesuffix("/sub") for name in golden.files if name.endswith("/sub")]


def assert_stage(golden, name: str, found: torch.Tensor, *, most: float, strays: float = 0.0):
    """The sampled values and the statistics of one stage are the stored ones.

    `most` is the largest difference allowed, relative to the stage's largest magnitude; a share
    `strays` of the values may differ by more, up to ten times as much.
    """
    found = found.detach().contiguous()
    assert tuple(found.shape) == tuple(golden[f"{name}/shape"]), name
    mean, deviation, largest = golden[f"{name}/stats"]
    sampled = found.flatten()[:: int(golden[f"{name}/stride"])].numpy()
    error = np.abs(sampled - golden[f"{name}/sub"]) / largest
    assert (error > most).mean() <= strays, f"{name}: {error.max():.1e}"
    assert error.max() <= (10 * most if strays else most), f"{name}: {error.max():.1e}"
    assert abs(found.double().mean().item() - mean) < 1e-4 * deviation, name
    assert found.double().std(correction=0).item() == pytest.approx(deviation, rel=1e-4), name
