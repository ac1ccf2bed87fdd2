from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fd3d.data.images import (
    ImageSpec,
    View,
    apply_view,
    draw_view,
    load_pixels,
    normalise,
    view_for_test,
    view_matrix,
)
from fd3d.errors import UsageError

SPEC = ImageSpec(height=64, width=176)
STORED = (352, 198)


def _smooth_picture(width: int, height: int) -> Image.Image:
    """Red grows along u, green along v, so that a pixel's colour says where it came from."""
    u, v = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([u * 255 / width, v * 255 / height, np.full_like(u, 128)], axis=2)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


@pytest.mark.parametrize("seed", range(12))
def test_every_pixel_comes_from_where_the_matrix_says(seed):
    view = draw_view(SPEC, STORED, np.random.default_rng(seed))
    pixels = apply_view(_smooth_picture(*STORED), SPEC, view).astype(float)
    matrix, vector = view_matrix(SPEC, view)
    u, v = np.meshgrid(np.arange(176) + 0.5, np.arange(64) + 0.5)
    target = np.stack([u, v, np.ones_like(u)]).reshape(3, -1)
    source = np.linalg.inv(matrix) @ (target - vector[:, None] * [[1], [1], [0]])
    source = source[:2].reshape(2, 64, 176) - 0.5
    known = (source[0] > 4) & (source[0] < 347) & (source[1] > 4) & (source[1] < 193)
    # Turning a finished crop leaves black corners, which the blue channel tells apart.
    known &= pixels[..., 2] > 0
    assert known.mean() > 0.6
    # A network pixel is about two stored ones, a grey level about one; turning takes the nearest
    # neighbour and the resized picture has a whole number of pixels.
    error = np.stack([pixels[..., 0] * 352, pixels[..., 1] * 198]) / 255 - source
    assert np.abs(error[:, known]).max() < 4.5
    assert np.abs(error[:, known].mean(axis=1)).max() < 2.0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_cropping_while_resizing_gives_the_pixels_of_cropping_afterwards(seed):
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, size=(198, 352, 3), dtype=np.uint8))
    view = replace(draw_view(SPEC, STORED, rng), flip=False, rotate_degrees=0.0)
    slow = picture.resize(view.resized, Image.Resampling.BICUBIC)
    slow = slow.crop((view.left, view.top, view.left + SPEC.width, view.top + SPEC.height))
    difference = np.abs(np.asarray(slow).astype(int) - apply_view(picture, SPEC, view))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_a_crop_beyond_the_picture_is_black():
    view = View(resize=0.25, resized=(88, 49), left=-10, top=-15)
    white = Image.new("RGB", STORED, (255, 255, 255))
    pixels = apply_view(white, SPEC, view)
    assert (pixels[15:64, 10:98] == 255).all()
    assert pixels.sum() == 255 * 3 * 88 * 49


def test_the_test_view_keeps_the_bottom_centre_and_draws_nothing():
    spec = ImageSpec(height=256, width=704, resize_test=0.04)
    view = view_for_test(spec, (1600, 900))
    assert view == View(resize=0.48, resized=(768, 432), left=32, top=176)


def test_draws_repeat_by_seed_and_can_be_turned_off():
    one, two = (draw_view(SPEC, STORED, np.random.default_rng(4)) for _ in range(2))
    assert one == two
    still = replace(SPEC, flip=False, rotate_degrees=0.0, resize_train=(0.0, 0.0))
    for seed in range(8):
        view = draw_view(still, STORED, np.random.default_rng(seed))
        assert not view.flip and view.rotate_degrees == 0 and view.resized == (176, 99)


def test_normalised_images_have_the_networks_mean_and_spread():
    pixels = np.random.default_rng(0).integers(0, 256, size=(2, 3, 5, 7, 3), dtype=np.uint8)
    images = normalise(pixels, SPEC)
    assert images.shape == (2, 3, 3, 5, 7) and images.dtype == np.float32
    expected = (pixels / 255 - SPEC.mean) / SPEC.std
    np.testing.assert_allclose(images, np.moveaxis(expected, -1, -3), atol=1e-5)


def test_files_that_cannot_be_used_are_named(tmp_path):
    view = view_for_test(SPEC, STORED)
    good, cut, text = (tmp_path / name for name in ("good.jpg", "cut.jpg", "text.jpg"))
    _smooth_picture(*STORED).save(good)
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    text.write_text("no picture")
    for path, stored in [
        (tmp_path / "missing.jpg", STORED),
        (cut, STORED),
        (text, STORED),
        (good, (1600, 900)),
    ]:
        with pytest.raises(UsageError, match=path.name):
            load_pixels(path, SPEC, view, stored)


@pytest.mark.parametrize("size", [(60, 176), (64, 170), (0, 176)])
def test_inputs_that_do_not_divide_into_cells_are_refused(size):
    with pytest.raises(UsageError, match="pixels"):
        ImageSpec(height=size[0], width=size[1])


def test_reduced_decoding_shows_the_same_picture(tmp_path):
    """A smooth picture: within a few grey levels where half the size is enough, else the same."""
    y, x = np.mgrid[:450, :800]
    waves = [np.sin(x / 37 + y / 53 + phase) * 100 + 120 for phase in (0, 1, 2)]
    Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    stored = (800, 450)
    for width, halved in ((352, True), (704, False)):
        spec = ImageSpec(height=width * 4 // 11, width=width)
        view = draw_view(spec, stored, np.random.default_rng(1))
        assert (view.resize < 0.5) == halved
        whole = load_pixels(tmp_path / "a.jpg", spec, view, stored).astype(int)
        reduced = load_pixels(tmp_path / "a.jpg", spec, view, stored, reduced=True).astype(int)
        # Half a stored pixel of shift would be more than 1.
        difference = np.abs(whole - reduced)[8:-8, 8:-8]
        assert difference.mean() < 0.5 and (difference.max() > 0) == halved
