"""Ids that say what a cache is, and a manifest that is believed only when it is whole."""

from __future__ import annotations

import json
from dataclasses import replace

import made_cache
import pytest

from cache_tools import manifest
from cache_tools.checksums import canonical_json, digest
from fd3d.distill.signals import SignalSpec
from fd3d.errors import CheckFailed, UsageError
from fd3d.grid import BEVGrid


def make(**changes) -> manifest.Manifest:
    arguments = {
        "identity": made_cache.IDENTITY,
        "signals": made_cache.SIGNALS,
        "keys": made_cache.keys(3),
        "preset": "lossless",
        "shard_frames": 4,
        **changes,
    }
    return manifest.make(**arguments)


@pytest.fixture
def cache(tmp_path):
    out = tmp_path / "c.zarr"
    made_cache.build(out, frames=3)
    return out


def edit(cache, change, *, seal=True):
    """Change manifest.json; sealed, as if a program of ours had written the change."""
    path = cache / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    if seal:
        content.pop("checksum", None)
        content["checksum"] = digest(canonical_json(content))
    path.write_text(json.dumps(content))


def test_equal_inputs_give_equal_ids():
    assert make().signals_id == make().signals_id
    assert make().cache_id == make().cache_id
    assert make(signals=dict(reversed(made_cache.SIGNALS.items()))).cache_id == make().cache_id


@pytest.mark.parametrize(
    "change",
    [
        {"identity": replace(made_cache.IDENTITY, expert="other")},
        {"identity": replace(made_cache.IDENTITY, tensors="f" * 16)},
        {"identity": replace(made_cache.IDENTITY, preprocessing={"height": 65})},
        {"identity": replace(made_cache.IDENTITY, split="train")},
        {"identity": replace(made_cache.IDENTITY, dataset_version="v1")},
        {"identity": replace(made_cache.IDENTITY, adjacency="draw")},
        {"keys": made_cache.keys(4)},
        {"keys": made_cache.keys(3)[::-1]},
        {"signals": {"bev": made_cache.SIGNALS["bev"]}},
    ],
)
def test_what_determines_the_values_changes_both_ids(change):
    assert make(**change).signals_id != make().signals_id
    assert make(**change).cache_id != make().cache_id
    assert make().differences(make(**change))


@pytest.mark.parametrize("change", [{"preset": "balanced"}, {"shard_frames": 8}])
def test_how_values_are_stored_changes_the_cache_id_alone(change):
    assert make(**change).signals_id == make().signals_id
    assert make(**change).cache_id != make().cache_id


def test_where_the_weights_were_found_is_in_no_id():
    moved = make(identity=replace(made_cache.IDENTITY, origin="elsewhere.safetensors"))
    assert moved.cache_id == make().cache_id


def test_a_manifest_comes_back_as_it_was_written(cache):
    assert manifest.load(cache) == make()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format_version=1), "format 1.*reads 2"),
        (lambda c: c.update(format="another"), "not a cache"),
        (lambda c: c.pop("frames"), "frames is missing"),
        (lambda c: c.update(frames="3"), "frames is '3', not int"),
        (lambda c: c.update(frames=True), "frames is True, not int"),
        (lambda c: c.update(colour="red"), "colour is not a field"),
        (lambda c: c["identity"].pop("split"), "identity.split is missing"),
        (lambda c: c["identity"].update(age=3), "identity.age is not a field"),
        (lambda c: c["codecs"]["bev"].update(kind="jpeg"), "jpeg"),
        (lambda c: c["signals"]["bev"].update(shape=[]), "bev"),
    ],
)
def test_a_manifest_of_another_form_is_refused_naming_the_field(cache, change, says):
    edit(cache, change)
    with pytest.raises(UsageError, match=says):
        manifest.load(cache)


def test_a_number_that_json_does_not_have_is_damage(cache):
    path = cache / "manifest.json"
    path.write_text(path.read_text().replace('"budget": 0.0', '"budget": NaN', 1))
    with pytest.raises(CheckFailed, match="not JSON"):
        manifest.load(cache)


@pytest.mark.parametrize("seal", [True, False])
def test_an_edited_manifest_is_noticed(cache, seal):
    edit(cache, lambda c: c["identity"].update(split="train"), seal=seal)
    with pytest.raises(CheckFailed, match="damaged or edited"):
        manifest.load(cache)


def test_every_flipped_byte_of_manifest_and_tokens_is_noticed(cache):
    for name in ("manifest.json", "tokens.json", "bev/zarr.json", "zarr.json"):
        path = cache / name
        whole = path.read_bytes()
        for at in range(0, len(whole), 7):
            torn = bytearray(whole)
            torn[at] ^= 1
            path.write_bytes(torn)
            try:
                found = manifest.load(cache)
                tokens = manifest.load_tokens(cache, found)
            except (UsageError, CheckFailed) as error:
                assert str(path) in str(error) or path.name in str(error)
                continue
            # White space between JSON tokens may differ; nothing else.
            assert name == "manifest.json" and found == make(), (name, at)
            assert tokens == tuple(made_cache.keys(3))
        path.write_bytes(whole)


def test_what_is_not_a_cache_is_refused(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("notes", "file", "nothing"):
        with pytest.raises(UsageError, match=r"not a cache|no cache"):
            manifest.load(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        {"keys": []},
        {"keys": ["a", "a"]},
        {"keys": ["a", ""]},
        {"signals": {}},
        {"preset": "zip"},
        {"shard_frames": 0},
        {"identity": replace(made_cache.IDENTITY, preprocessing={"a": object()})},
        {"signals": {"a/b": SignalSpec(name="a/b", shape=(2,), dtype="float32")}},
        {"signals": {"a": SignalSpec(name="a", shape=(2,), dtype="int64")}},
        {"signals": {"a": SignalSpec(name="b", shape=(2,), dtype="float32")}},
    ],
)
def test_a_build_that_makes_no_sense_is_refused(change):
    with pytest.raises(UsageError):
        make(**change)


def test_two_signals_cannot_share_an_array():
    grid = BEVGrid.square(half_extent=1.0, cells=2)
    bev = SignalSpec(name="bev", shape=(1, 2, 2), dtype="float16", grid=grid)
    scale = SignalSpec(name="bev_scale", shape=(1,), dtype="float32")
    with pytest.raises(UsageError, match="rename"):
        make(signals={"bev": bev, "bev_scale": scale}, preset="balanced")
