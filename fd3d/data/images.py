"""Pictures as the networks take them: resize, crop, flip, rotate, normalise, and their matrices.

Every network names its preprocessing in an `ImageSpec`; a `View` is one choice of resize, crop,
flip and rotation, taken by the test rule or drawn for training. Numbers and order of the draws are
those of BEVDet, whose two generations are called G1 and G2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fd3d.errors import UsageError
from fd3d.grid import FRAMES


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What one network takes in: which pictures, and how they are prepared.

    Args:
        height, width: network input in pixels, multiples of `stride`.
        resize_test: added to width / stored width at test time (G1 at full size: 0.04).
        resize_train: lowest and highest number added to width / stored width in training.
        flip: mirror every second picture in training.
        rotate_degrees: training rotation is uniform in +- this.
        stride: network pixels per cell of the neck and the depth map.
        depth_range: metres; first bin, end, step.
        depth_cells: where a lidar point belongs: "round", the cell nearest to it (G1); or "floor",
            the cell that holds its nearest pixel (G2).
        channels: "rgb" (G1) or "bgr" (G2) order of the pictures' planes.
        mean, std: of the planes in that order, scaled to [0, 1]; G2 subtracts red's from blue.
        frame: where cameras and boxes are placed, see `fd3d.grid.FRAMES`.
        moments: pictures of each camera. In the lidar frame the second is G1's adjacent sweep; in
            the ego frame the others are the previous keyframes, as in G2.
    """

    height: int
    width: int
    resize_test: float = 0.0
    resize_train: tuple[float, float] = (-0.06, 0.11)
    flip: bool = True
    rotate_degrees: float = 5.4
    stride: int = 16
    depth_range: tuple[float, float, float] = (1.0, 60.0, 1.0)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    depth_cells: str = "round"
    channels: str = "rgb"
    frame: str = "lidar"
    moments: int = 2

    def __post_init__(self) -> None:
        if self.stride < 1 or self.height < self.stride or self.width < self.stride:
            raise UsageError(
                f"network input {self.width}x{self.height} is smaller than one cell of "
                f"{self.stride} pixels: choose a larger input or a smaller stride"
            )
        if self.height % self.stride or self.width % self.stride:
            raise UsageError(
                f"network input {self.width}x{self.height} does not divide into cells of "
                f"{self.stride} pixels: choose multiples of {self.stride}"
            )

        for name, known in (
            ("depth_cells", ("round", "floor")),
            ("channels", ("rgb", "bgr")),
            ("frame", FRAMES),
        ):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name} {getattr(self, name)!r} is not known: use one of {', '.join(known)}"
                )
        if self.moments < 1 or (self.frame == "lidar" and self.moments > 2):
            raise UsageError(
                f"{self.moments} moments are not possible in the {self.frame} frame: use 1 or 2, "
                "or more of them in the ego frame"
            )

    @property
    def depth_shape(self) -> tuple[int, int]:
        """(h, w) of the network's depth map."""
        return self.height // self.stride, self.width // self.stride

    @property
    def depth_bins(self) -> int:
        """How many depth bins `depth_range` holds."""
        first, end, step = self.depth_range
        return math.ceil((end - first) / step - 1e-9)


@dataclass(frozen=True, kw_only=True)
class View:
    """One way to turn a stored picture into network input: resize, crop, mirror, rotate.

    `resize` is the factor; `resized` (width, height) pixels after it; `left`, `top` the crop's
    corner in the resized picture, possibly outside of it; degrees counter-clockwise.
    """

    resize: float
    resized: tuple[int, int]
    left: int
    top: int
    flip: bool = False
    rotate_degrees: float = 0.0


def view_for_test(spec: ImageSpec, stored: tuple[int, int]) -> View:
    """The view at test time of pictures stored at (width, height): bottom centre, no flip."""
    return _view(spec, stored, spec.resize_test, lambda spare: spare / 2)


def draw_view(spec: ImageSpec, stored: tuple[int, int], rng: np.random.Generator) -> View:
    """A training view; the draws are resize, crop, flip, rotation, in this order."""
    added = rng.uniform(*spec.resize_train)
    view = _view(spec, stored, added, lambda spare: rng.uniform(0, max(0, spare)))
    return View(
        resize=view.resize,
        resized=view.resized,
        left=view.left,
        top=view.top,
        flip=bool(spec.flip and rng.integers(2)),
        rotate_degrees=float(rng.uniform(-spec.rotate_degrees, spec.rotate_degrees)),
    )


def _view(spec: ImageSpec, stored: tuple[int, int], added: float, left_of_spare) -> View:
    resize = spec.width / stored[0] + added
    resized = int(stored[0] * resize), int(stored[1] * resize)
    return View(
        resize=resize,
        resized=resized,
        left=int(left_of_spare(resized[0] - spec.width)),
        top=resized[1] - spec.height,
    )


def view_matrix(spec: ImageSpec, view: View) -> tuple[np.ndarray, np.ndarray]:
    """(3, 3) and (3,) float64: network pixel = matrix @ (u, v, 1) + vector of a stored pixel."""
    rotation = np.eye(2) * view.resize
    shift = -np.array([view.left, view.top], dtype=np.float64)
    if view.flip:
        mirror = np.diag([-1.0, 1.0])
        rotation = mirror @ rotation
        shift = mirror @ shift + [spec.width, 0.0]
    angle = math.radians(view.rotate_degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    middle = np.array([spec.width, spec.height]) / 2
    matrix, vector = np.eye(3), np.zeros(3)
    matrix[:2, :2] = turn @ rotation
    vector[:2] = turn @ (shift - middle) + middle
    return matrix, vector


def load_pixels(
    path: Path | str,
    spec: ImageSpec,
    view: View,
    stored: tuple[int, int],
    *,
    reduced: bool = False,
) -> np.ndarray:
    """(height, width, 3) uint8 RGB: the stored picture seen through `view`, black outside of it.

    `reduced` lets JPEG leave out frequencies that are finer than the resized picture: a view of
    less than half the stored size is decoded at half of it, in half the time, a few grey levels
    off where the picture has fine grain.

    A file that is missing, unreadable, truncated or not of size `stored` (width, height), which
    `view` was made for, raises `UsageError` naming it.
    """
    try:
        with Image.open(path) as picture:
            if picture.size != stored:
                raise UsageError(
                    f"image {path} is {picture.width}x{picture.height} but its table says "
                    f"{stored[0]}x{stored[1]}: correct width and height in sample_data.json"
                )
            if reduced:
                picture.draft("RGB", view.resized)
            return apply_view(picture.convert("RGB"), spec, view)
    except FileNotFoundError:
        raise UsageError(
            f"image {path} is missing: download it or point --dataroot at the folder that has it"
        ) from None
    except (OSError, SyntaxError) as error:
        raise UsageError(f"image {path} cannot be read ({error}): fetch the file again") from None


def apply_view(picture: Image.Image, spec: ImageSpec, view: View) -> np.ndarray:
    """(height, width, 3) uint8 RGB of an RGB picture seen through `view`."""
    picture = _resize_and_crop(picture, spec, view)
    if view.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view.rotate_degrees:
        picture = picture.rotate(view.rotate_degrees)
    return np.asarray(picture)


def _resize_and_crop(picture: Image.Image, spec: ImageSpec, view: View) -> Image.Image:
    if view.resized[0] > picture.width or view.resized[1] > picture.height:
        grown = picture.resize(view.resized, Image.Resampling.BICUBIC)
        box = (view.left, view.top, view.left + spec.width, view.top + spec.height)
        return grown.crop(box)
    # Shrinking only the part that the crop keeps gives the pixels of shrinking everything first,
    # since Pillow filters across the border of the box: a few in ten thousand differ, by one grey
    # level. Growing does not have this property (8-bit clipping between Pillow's two passes).
    left, top = max(view.left, 0), max(view.top, 0)
    right = min(view.left + spec.width, view.resized[0])
    bottom = min(view.top + spec.height, view.resized[1])
    across = picture.width / view.resized[0]
    down = picture.height / view.resized[1]
    size = right - left, bottom - top
    box = (
        left * across,
        top * down,
        min(right * across, picture.width),
        min(bottom * down, picture.height),
    )
    kept = picture.resize(size, Image.Resampling.BICUBIC, box=box)
    if size == (spec.width, spec.height):
        return kept
    canvas = Image.new("RGB", (spec.width, spec.height))
    canvas.paste(kept, (left - view.left, top - view.top))
    return canvas


def normalise(pixels: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """(..., 3, H, W) float32 images from (..., H, W, 3) uint8 RGB; planes in the spec's order."""
    if spec.channels == "bgr":
        pixels = pixels[..., ::-1]
    std = np.asarray(spec.std, dtype=np.float32)
    scale = (1.0 / (255.0 * std)).astype(np.float32)
    offset = (-np.asarray(spec.mean, dtype=np.float32) / std).astype(np.float32)
    images = np.moveaxis(pixels, -1, -3).astype(np.float32, order="C")
    images *= scale[:, None, None]
    images += offset[:, None, None]
    return images
