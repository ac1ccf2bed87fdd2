"""What an index says about a frame, and the data set that turns frames into batches.

`FrameDataset` loads pictures of the keyframe and of its adjacent frames, applies the preprocessing
and augmentation that it was asked for, and places the cameras as `placement` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from fd3d import boxes as box_math
from fd3d.augment import BEVAugmentation, draw_bev, generator, move_boxes, replayed
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
from fd3d.data.placement import FRONT, Moment, keyframe_moments, sweep_moments
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

    def pose(self, frame: str) -> np.ndarray:
        """(4, 4) pose in the global frame of "lidar", or of "ego": the car at CAM_FRONT's time, as
        in G2."""
        if frame == "ego":
            return self.cameras[FRONT].ego2global
        return self.ego2global @ self.lidar2ego

    def boxes_in(self, frame: str) -> np.ndarray:
        """(M, 9) the boxes in one of `fd3d.grid.FRAMES`."""
        return box_math.seen_from(self.boxes, self.pose(frame))

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
        image: what the network that will read the batches takes in.
        truth: load the lidar depth maps, boxes and labels.
        adjacent: "test" takes G1's frame 1.5 s away, "draw" one of those 0.75 to 2.25 s away; G2's
            previous keyframes are what they are.
        image_augment: draw picture views instead of the test view.
        bev_augment: draw a BEV augmentation; bev_flips: with mirror images. Where the attribute
            `replays` is set to N, it is one of the N that a cache has of each frame.
        seed: of all draws.
        reduced_jpeg: decode pictures no finer than they are used, see `load_pixels`.
        pictures: False leaves pictures and depth maps out, for what looks at boxes alone.
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
        bev_flips: bool = True,
        seed: int = 0,
        reduced_jpeg: bool = False,
        keep_images_mb: float = 0,
        pictures: bool = True,
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
        self.bev_flips = bev_flips
        self.reduced_jpeg = reduced_jpeg
        self.seed = seed
        self.pictures = pictures
        self.replays = 0
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

    def seconds(self, item: int) -> float:
        """Seconds between a keyframe and its first adjacent frame; opens no picture."""
        position = int(self.positions[item])
        return self._moments(position, self.index.frame(position))[1]

    def __getitem__(self, item: int) -> Batch:
        position = int(self.positions[item])
        frame = self.index.frame(position)
        moments, seconds = self._moments(position, frame)
        views = self._views(frame)
        matrices = [view_matrix(self.image, view) for view in views]
        post_rots = np.stack([matrix for matrix, _ in matrices])
        post_trans = np.stack([vector for _, vector in matrices])
        augmentation = self._augmentation(frame.token)
        matrix = augmentation.matrix()
        placed = matrix @ np.stack([moment.cameras for moment in moments])  # (T, N, 4, 4)
        depth = boxes = labels = None
        if self.truth:
            boxes, labels = self._boxes(frame, augmentation)
        if self.truth and self.pictures:
            # The augmentation moves points and cameras alike, so the un-augmented ones give the
            # same pixels and the same depths.
            cameras = frame.camera_to_lidar()
            depth = depth_maps(
                load_points(self.index.dataroot / frame.lidar_file),
                spec=self.image,
                rots=cameras[:, :3, :3],
                trans=cameras[:, :3, 3],
                intrins=moments[0].intrins,
                post_rots=post_rots,
                post_trans=post_trans,
            )
            depth = torch.from_numpy(depth)[None]
        return Batch(
            tokens=(frame.token,),
            images=torch.from_numpy(self._images(frame, moments, views))[None]
            if self.pictures
            else torch.zeros(1, 0),
            rots=_tensor(placed[:, :, :3, :3]),
            trans=_tensor(placed[:, :, :3, 3]),
            intrins=_tensor(np.stack([moment.intrins for moment in moments])),
            post_rots=_tensor(np.stack([post_rots] * len(moments))),
            post_trans=_tensor(np.stack([post_trans] * len(moments))),
            dt=torch.tensor([seconds], dtype=torch.float32),
            bev_augment=_tensor(matrix[:3, :3]),
            ego2lidar=_tensor(np.linalg.inv(frame.pose("lidar")) @ frame.pose("ego")),
            depth=depth,
            boxes=boxes,
            labels=labels,
        )

    def _moments(self, position: int, frame: Frame) -> tuple[list[Moment], float]:
        """What the cameras saw, and the seconds to the first adjacent moment."""
        others = self.image.moments - 1
        if self.image.frame == "ego":
            frames = [frame, *(self._before(position, frame, n + 1) for n in range(others))]
            seconds = abs(frame.timestamp - frames[min(1, others)].timestamp) * 1e-6
            return keyframe_moments(frames), seconds
        if not others:
            return sweep_moments(frame, None), 0.0
        choice = TEST_CHOICE
        if self.adjacent == "draw":
            choice = drawn_choice(
                self.index.adjacent_count(position), self._rng(frame.token, "adjacent")
            )
        adjacent = self.index.adjacent(position, choice)
        return sweep_moments(frame, adjacent), adjacent.seconds

    def _before(self, position: int, frame: Frame, steps: int) -> Frame:
        """The keyframe some steps earlier, or `frame` itself where the scene begins later."""
        if steps > position:
            return frame
        earlier = self.index.frame(position - steps)
        return earlier if earlier.scene == frame.scene else frame

    def _rng(self, token: str, purpose: str) -> np.random.Generator:
        return generator(self.seed, self.epoch, token, purpose)

    def _augmentation(self, token: str) -> BEVAugmentation:
        if not self.bev_augment:
            return BEVAugmentation()
        rng = self._rng(token, "bev")
        if self.replays:
            return replayed(token, int(rng.integers(self.replays)))
        return draw_bev(rng, flip=0.5 if self.bev_flips else 0.0)

    def _views(self, frame: Frame) -> list[View]:
        if not self.image_augment:
            return [view_for_test(self.image, shot.size) for shot in frame.cameras]
        rng = self._rng(frame.token, "image")
        return [draw_view(self.image, shot.size, rng) for shot in frame.cameras]

    def _images(self, frame: Frame, moments: list[Moment], views: list[View]) -> np.ndarray:
        """(N, T, 3, H, W) float32 normalised; a camera's moments share its view."""
        size = (len(views), len(moments), self.image.height, self.image.width, 3)
        pixels = np.empty(size, dtype=np.uint8)
        for camera, (shot, view) in enumerate(zip(frame.cameras, views, strict=True)):
            for number, moment in enumerate(moments):
                pixels[camera, number] = self._pixels(moment.files[camera], view, shot.size)
        return normalise(pixels, self.image)

    def _pixels(self, file: str, view: View, stored: tuple[int, int]) -> np.ndarray:
        kept = self._kept.get(file)
        if kept is not None:
            return kept
        path = self.index.dataroot / file
        pixels = load_pixels(path, self.image, view, stored, reduced=self.reduced_jpeg)
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._kept[file] = pixels
        return pixels

    def _boxes(
        self, frame: Frame, augmentation: BEVAugmentation
    ) -> tuple[tuple[torch.Tensor], tuple[torch.Tensor]]:
        boxes = move_boxes(frame.boxes_in(self.image.frame), augmentation)
        inside = (np.abs(boxes[:, :2]) < HALF_EXTENT).all(axis=1)
        kept = inside & frame.seen()
        labels = torch.from_numpy(frame.labels[kept])
        return (torch.from_numpy(boxes[kept].astype(np.float32)),), (labels,)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))[None]
