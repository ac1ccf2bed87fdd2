"""What an index says about a frame, and the data set that turns frames into batches.

`FrameDataset` loads pictures of the keyframe and of its adjacent frame, applies the preprocessing
and augmentation that it was asked for, and places the cameras in the keyframe's LIDAR frame in
the convention of BEVDepth's first generation (G1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from fd3d import boxes as box_math
from fd3d.augment import BEVAugmentation, draw_bev, move_boxes
from fd3d.data.batch import Batch
from fd3d.data.depth import depth_maps, load_points
from fd3d.data.images import (
    ImageSpec,
    View,
    draw_view,
    load_pixels,
    normalise,
    view_for_test,
    view_matrix,
)
from fd3d.errors import UsageError

if TYPE_CHECKING:
    from fd3d.data.index import FrameIndex

# G1 picks its adjacent frame by place in the list of sweeps 0.25 s apart: 1.5 s away at test
# time, 0.75 to 2.25 s away in training.
TEST_CHOICE = 5
DRAWN_CHOICES = (2, 8)

# Boxes are kept when their centre is strictly nearer than this in x and in y, metres (G1).
HALF_EXTENT = 51.2


@dataclass(frozen=True, kw_only=True)
class CameraShot:
    """One picture of a keyframe; file below the dataroot, size (width, height), microseconds."""

    file: str
    size: tuple[int, int]
    timestamp: int
    intrinsic: np.ndarray  # (3, 3) pixels of the stored picture
    camera2ego: np.ndarray  # (4, 4)
    ego2global: np.ndarray  # (4, 4) at the picture's own time


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One keyframe with its six pictures and its boxes of the ten classes.

    Poses are those at the lidar's time. Boxes are in the global frame as `fd3d.boxes`, with
    velocities NaN where the data set has none; no box is left out for having no points.
    """

    token: str
    scene: str
    timestamp: int  # microseconds
    lidar_file: str
    lidar2ego: np.ndarray  # (4, 4)
    ego2global: np.ndarray  # (4, 4)
    cameras: tuple[CameraShot, ...]  # in the order of CAMERAS
    boxes: np.ndarray  # (M, 9)
    labels: np.ndarray  # (M,) into CLASSES
    lidar_points: np.ndarray  # (M,) counts
    radar_points: np.ndarray  # (M,)
    visibility: np.ndarray  # (M,) nuScenes level 1..4, 0 = unknown
    attributes: tuple[str, ...]  # M names, "" = none

    def camera_to_lidar(self) -> np.ndarray:
        """(6, 4, 4) camera at the picture's time to LIDAR at the lidar's time, float64."""
        global2lidar = np.linalg.inv(self.ego2global @ self.lidar2ego)
        return np.stack([global2lidar @ shot.ego2global @ shot.camera2ego for shot in self.cameras])

    def boxes_in_lidar(self) -> np.ndarray:
        """(M, 9) the boxes in this frame's LIDAR frame."""
        return box_math.transform(self.boxes, np.linalg.inv(self.ego2global @ self.lidar2ego))

    def seen(self) -> np.ndarray:
        """(M,) bool: the box holds at least one lidar or radar point."""
        return self.lidar_points + self.radar_points > 0


@dataclass(frozen=True, kw_only=True)
class Adjacent:
    """Six pictures from shortly before or after a keyframe.

    files: in the order of CAMERAS; ego2global: at CAM_FRONT's time, used for all six as in G1;
    seconds: distance to the keyframe, >= 0.
    """

    files: tuple[str, ...]
    timestamp: int
    ego2global: np.ndarray
    seconds: float


def ego_motion(frame: Frame, adjacent: Adjacent) -> np.ndarray:
    """(4, 4) LIDAR at the adjacent moment to the keyframe's, with the keyframe's mounting."""
    now = frame.ego2global @ frame.lidar2ego
    return np.linalg.inv(now) @ adjacent.ego2global @ frame.lidar2ego


def drawn_choice(count: int, rng: np.random.Generator) -> int:
    """Place in a list of `count` sweeps for training: uniform in 2..8, the last of short lists."""
    first, last = DRAWN_CHOICES
    if count <= first:
        return max(count - 1, 0)
    return int(rng.integers(first, min(last, count - 1) + 1))


class FrameDataset(Dataset):
    """Single-frame batches (B = 1) of an index; `fd3d.data.batch.collate` joins them.

    Every draw is a function of (seed, epoch, token) alone, the same in any worker and any order.
    The adjacent frame, the picture views and the BEV augmentation are drawn independently, so two
    data sets with one seed (the expert's and the apprentice's view) agree on what they share.

    Args:
        index: the data set's frames.
        positions: which of them, in order; positions may repeat (CBGS).
        image: preprocessing of the network that will read the batches.
        truth: load the lidar depth maps, boxes and labels.
        adjacent: "test" takes G1's frame 1.5 s away, "draw" one of those 0.75 to 2.25 s away.
        image_augment: draw picture views instead of the test view.
        bev_augment: draw a BEV augmentation.
        seed: of all draws.
        keep_images_mb: keep up to this many MiB of prepared pictures in memory, per process;
            useful for small data sets without picture augmentation, refused with it.
    """

    def __init__(
        self,
        *,
        index: FrameIndex,
        positions: Sequence[int] | np.ndarray,
        image: ImageSpec,
        truth: bool,
        adjacent: str = "test",
        image_augment: bool = False,
        bev_augment: bool = False,
        seed: int = 0,
        keep_images_mb: float = 0,
    ) -> None:
        if adjacent not in ("test", "draw"):
            raise UsageError(f"adjacent rule {adjacent!r} is unknown: use test or draw")
        if keep_images_mb and image_augment:
            raise UsageError(
                "pictures are drawn anew with picture augmentation: leave keep_images_mb at 0"
            )
        self.index = index
        self.positions = np.asarray(positions, dtype=np.int64)
        self.image = image
        self.truth = truth
        self.adjacent = adjacent
        self.image_augment = image_augment
        self.bev_augment = bev_augment
        self.seed = seed
        self.epoch = 0
        self._kept: dict[str, np.ndarray] = {}
        self._room = int(keep_images_mb * 2**20)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def tokens(self) -> list[str]:
        """The frame key of every item, in order."""
        return [self.index.tokens[position] for position in self.positions]

    def set_epoch(self, epoch: int) -> None:
        """Draw anew from the next item on; call before the epoch's workers start."""
        self.epoch = epoch

    def __getitem__(self, item: int) -> Batch:
        position = int(self.positions[item])
        frame = self.index.frame(position)
        choice = TEST_CHOICE
        if self.adjacent == "draw":
            choice = drawn_choice(
                self.index.adjacent_count(position), self._rng(frame.token, "adjacent")
            )
        adjacent = self.index.adjacent(position, choice)
        views = self._views(frame)
        matrices = [view_matrix(self.image, view) for view in views]
        post_rots = np.stack([matrix for matrix, _ in matrices])
        post_trans = np.stack([vector for _, vector in matrices])
        augmentation = BEVAugmentation()
        if self.bev_augment:
            augmentation = draw_bev(self._rng(frame.token, "bev"))

        cameras = frame.camera_to_lidar()
        intrins = np.stack([shot.intrinsic for shot in frame.cameras])
        moments = np.stack([cameras, ego_motion(frame, adjacent) @ cameras])
        moments = augmentation.matrix() @ moments  # (T, N, 4, 4)
        depth = boxes = labels = None
        if self.truth:
            # The augmentation moves points and cameras alike, so the un-augmented ones give the
            # same pixels and the same depths.
            depth = depth_maps(
                load_points(self.index.dataroot / frame.lidar_file),
                spec=self.image,
                rots=cameras[:, :3, :3],
                trans=cameras[:, :3, 3],
                intrins=intrins,
                post_rots=post_rots,
                post_trans=post_trans,
            )
            depth = torch.from_numpy(depth)[None]
            boxes, labels = self._boxes(frame, augmentation)
        return Batch(
            tokens=(frame.token,),
            images=torch.from_numpy(self._images(frame, adjacent, views))[None],
            rots=_tensor(moments[:, :, :3, :3]),
            trans=_tensor(moments[:, :, :3, 3]),
            intrins=_tensor(np.stack([intrins] * 2)),
            post_rots=_tensor(np.stack([post_rots] * 2)),
            post_trans=_tensor(np.stack([post_trans] * 2)),
            dt=torch.tensor([adjacent.seconds], dtype=torch.float32),
            depth=depth,
            boxes=boxes,
            labels=labels,
        )

    def _rng(self, token: str, purpose: str) -> np.random.Generator:
        text = f"{self.seed}/{self.epoch}/{token}/{purpose}"
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def _views(self, frame: Frame) -> list[View]:
        if not self.image_augment:
            return [view_for_test(self.image, shot.size) for shot in frame.cameras]
        rng = self._rng(frame.token, "image")
        return [draw_view(self.image, shot.size, rng) for shot in frame.cameras]

    def _images(self, frame: Frame, adjacent: Adjacent, views: list[View]) -> np.ndarray:
        """(N, T, 3, H, W) float32 normalised; a camera's two moments share its view."""
        pixels = np.empty((len(views), 2, self.image.height, self.image.width, 3), dtype=np.uint8)
        for camera, (shot, view) in enumerate(zip(frame.cameras, views, strict=True)):
            for moment, file in enumerate((shot.file, adjacent.files[camera])):
                pixels[camera, moment] = self._pixels(file, view, shot.size)
        return normalise(pixels, self.image)

    def _pixels(self, file: str, view: View, stored: tuple[int, int]) -> np.ndarray:
        kept = self._kept.get(file)
        if kept is not None:
            return kept
        pixels = load_pixels(self.index.dataroot / file, self.image, view, stored)
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._kept[file] = pixels
        return pixels

    def _boxes(
        self, frame: Frame, augmentation: BEVAugmentation
    ) -> tuple[tuple[torch.Tensor], tuple[torch.Tensor]]:
        boxes = move_boxes(frame.boxes_in_lidar(), augmentation)
        inside = (np.abs(boxes[:, :2]) < HALF_EXTENT).all(axis=1)
        kept = inside & frame.seen()
        labels = torch.from_numpy(frame.labels[kept])
        return (torch.from_numpy(boxes[kept].astype(np.float32)),), (labels,)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))[None]
