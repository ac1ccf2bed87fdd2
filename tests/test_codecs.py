"""How signals become stored numbers and back, and which values are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cache_tools.codecs import decode, dequantise, encode, quantise
from cache_tools.presets import PRESETS, codec_for
from fd3d.distill.signals import SignalSpec
from fd3d.errors import CheckFailed, UsageError

BEV = SignalSpec(name="bev", shape=(4, 8, 8), dtype="float16")
TABLE = SignalSpec(name="detections", shape=(5, 11), dtype="float32", ragged=True)

maps = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    elements=st.floats(-60000, 60000, width=32),
)


def noise(shape=BEV.shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_lossless_returns_the_float16_values_bit_for_bit():
    value = noise()
    codec = codec_for(BEV, "lossless")
    stored, error = encode(value, spec=BEV, codec=codec, frame="a")
    np.testing.assert_array_equal(decode(stored, spec=BEV, codec=codec), value.astype(np.float16))
    assert 0 < error.frame < 1e-3


@settings(max_examples=300, deadline=None)
@given(maps, st.sampled_from([2.0, 8.0, 32.0]))
def test_int8_clips_nothing_and_is_within_half_a_step(value, steps_per_sd):
    code, scale, zero = quantise(value, steps_per_sd=steps_per_sd)
    decoded = code * scale[:, None, None].astype(np.float64) + zero[:, None, None]
    # Arithmetic in float32 has an error of its own, relative to the largest value.
    slack = 4e-7 * np.abs(value).max() + 1e-30
    wrong = np.abs(decoded - value).reshape(len(value), -1).max(axis=1)
    constant = np.ptp(value.reshape(len(value), -1), axis=1) == 0
    assert (wrong <= np.where(constant, 0, 0.5001 * scale) + slack).all()


@settings(max_examples=200, deadline=None)
@given(maps)
def test_int8_keeps_exact_zeros(value):
    value = np.maximum(value, 0)
    value[:, 0, 0] = 0
    code, scale, zero = quantise(value, steps_per_sd=8.0)
    decoded = dequantise(code, scale, zero, dtype="float32")
    assert (decoded[value == 0] == 0).all()


@settings(max_examples=50, deadline=None)
@given(maps)
def test_int8_steps_are_no_coarser_than_the_preset_says(value):
    flat = value.reshape(len(value), -1).astype(np.float64)
    _, scale, _ = quantise(value, steps_per_sd=8.0)
    allowed = np.maximum(flat.std(axis=1) / 8, np.ptp(flat, axis=1) / 255)
    # Below this spread the mean of float32 values is not exact enough to tell.
    spread = allowed > 1e-5 * np.abs(flat).max(axis=1) + 1e-30
    assert (scale[spread] <= allowed[spread] * 1.001).all()


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_features_stay_within_the_budget_even_on_a_large_bias(preset):
    value = noise((4, 64, 64)) + np.array([0, 5, -30, 100], np.float32)[:, None, None]
    spec = SignalSpec(name="bev", shape=value.shape, dtype="float16")
    codec = codec_for(spec, preset)
    stored, error = encode(value, spec=spec, codec=codec, frame="a")
    decoded = decode(stored, spec=spec, codec=codec).astype(np.float64)
    centred = value - value.mean(axis=(1, 2), keepdims=True)
    measured = np.linalg.norm(decoded - value) / np.linalg.norm(centred)
    assert stored[""].dtype == np.int8
    assert error.frame == pytest.approx(measured, rel=1e-4)
    assert error.frame <= codec.budget and error.worst_channel >= error.frame


def test_the_error_of_a_map_with_bias_is_measured_without_it():
    """float16 of a small signal on a large bias is a bad copy of the signal: it must show."""
    value = noise() * 1e-3 + 100
    _, error = encode(value, spec=BEV, codec=codec_for(BEV, "lossless"), frame="a")
    assert error.frame > 1


def test_heatmap_steps_are_finer_than_those_of_features():
    spec = SignalSpec(name="heatmap", shape=BEV.shape, dtype="float16")
    assert codec_for(spec, "balanced").steps_per_sd > codec_for(BEV, "balanced").steps_per_sd


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rows", [0, 3, 5])
def test_tables_come_back_exactly_with_their_own_number_of_rows(preset, rows):
    value = noise((rows, 11)) * 1e6
    codec = codec_for(TABLE, preset)
    stored, error = encode(value, spec=TABLE, codec=codec, frame="a")
    np.testing.assert_array_equal(decode(stored, spec=TABLE, codec=codec), value)
    assert error is None


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65600.0, -70000.0])
def test_values_that_float16_cannot_hold_are_refused_by_frame(preset, bad):
    value = noise()
    value[2, 3, 4] = bad
    with pytest.raises(CheckFailed, match="frame-7.*bev"):
        encode(value, spec=BEV, codec=codec_for(BEV, preset), frame="frame-7")


@pytest.mark.parametrize("preset", PRESETS)
def test_extreme_values_never_decode_to_infinity(preset):
    value = noise() * 100
    value[0, 0, 0], value[1, 0, 0] = 65504, -65504
    codec = codec_for(BEV, preset)
    try:
        stored, _ = encode(value, spec=BEV, codec=codec, frame="a", focus=np.ones((8, 8), bool))
    except CheckFailed:
        return
    assert np.isfinite(decode(stored, spec=BEV, codec=codec)).all()


def test_nan_in_a_table_is_refused():
    value = noise((2, 11))
    value[1, 1] = np.nan
    with pytest.raises(CheckFailed, match="frame-7.*detections.*NaN"):
        encode(value, spec=TABLE, codec=codec_for(TABLE, "lossless"), frame="frame-7")


@pytest.mark.parametrize(
    ("spec", "shape"), [(BEV, (4, 8, 9)), (BEV, (8, 8)), (TABLE, (6, 11)), (TABLE, (2, 10))]
)
def test_another_shape_than_the_specs_is_refused(spec, shape):
    with pytest.raises(UsageError, match="spec says"):
        encode(noise(shape), spec=spec, codec=codec_for(spec, "lossless"), frame="a")
