"""`fd3d-cache import`: signals written elsewhere give the cache that building here would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import made_cache
import numpy as np
import pytest
from made_signals import FRAMES, about, write
from safetensors.numpy import save_file

from cache_tools.cli import main
from cache_tools.expectation import Expectation
from cache_tools.importing import import_signals
from cache_tools.reader import CacheReader
from cache_tools.verbs.bring import PRESETS as IMPORTED
from cache_tools.verify import verify
from fd3d.errors import CheckFailed, UsageError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("written") / "signals")


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "signals")


def compute(positions):
    frames = [made_cache.values(position) for position in positions]
    return {name: [frame[name] for frame in frames] for name in made_cache.SIGNALS}


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    paths = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("preset", IMPORTED)
@pytest.mark.parametrize("way", ["npy", "safetensors", "mixed"])
def test_an_import_is_what_building_here_would_have_given(tmp_path, way, preset):
    folder = write(tmp_path / "signals", way=way)
    before = contents(folder, "*")
    report = import_signals(folder, tmp_path / "i.zarr", preset=preset, shard_frames=4, quiet=True)
    built = made_cache.build(tmp_path / "b.zarr", frames=FRAMES, compute=compute, preset=preset)
    assert report.complete and report.cache_id == built.cache_id
    ours, theirs = (
        contents(tmp_path / name, "*/c.*", "commits/*", "*.json") for name in ("i.zarr", "b.zarr")
    )
    del ours["report.json"], theirs["report.json"]
    assert ours == theirs and any(name.startswith("bev/c.") for name in ours)
    assert verify(tmp_path / "i.zarr").ok and contents(folder, "*") == before


def test_values_come_back(written, tmp_path):
    import_signals(written, tmp_path / "c.zarr", quiet=True)
    reader = CacheReader(tmp_path / "c.zarr", expect=Expectation(grid=made_cache.GRID))
    for position, token in enumerate(reader.tokens):
        found, gave = reader.read(token), made_cache.values(position)
        np.testing.assert_array_equal(found["bev"], gave["bev"].astype(np.float16))
        np.testing.assert_array_equal(found["detections"], gave["detections"])


def test_other_spellings_of_the_same_numbers(copy, tmp_path):
    """Fortran order, the other byte order, float64, whole numbers for metres: one cache."""
    for number, path in enumerate(sorted(copy.glob("*.npy"))):
        value = np.load(path)
        spelt = [np.asfortranarray(value), value.astype(">f4"), value.astype(np.float64)]
        np.save(path, spelt[number % 3])
    described = about()
    grid = described["signals"]["bev"]["grid"]
    described["signals"]["bev"]["grid"] = {
        name: int(value) if isinstance(value, float) else value for name, value in grid.items()
    }
    (copy / "signals.json").write_text(json.dumps(described))
    report = import_signals(copy, tmp_path / "i.zarr", shard_frames=4, quiet=True)
    built = made_cache.build(tmp_path / "b.zarr", frames=FRAMES, compute=compute)
    assert report.cache_id == built.cache_id
    assert contents(tmp_path / "i.zarr", "*/c.*") == contents(tmp_path / "b.zarr", "*/c.*")


def test_some_signals_need_only_their_files(copy, tmp_path, capsys):
    for path in copy.glob("*.heatmap.npy"):
        path.unlink()
    words = ["import", str(copy), str(tmp_path / "c.zarr"), "--signals", "bev,detections"]
    assert main([*words, "--json", "--preset", "balanced", "--shard-frames", "3"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["complete"] and sorted(said["signals"]) == ["bev", "detections"]
    reader = CacheReader(tmp_path / "c.zarr")
    assert reader.manifest.preset == "balanced" and reader.manifest.shard_frames == 3


def test_run_again_it_goes_on_and_then_builds_nothing(copy, tmp_path, capsys):
    torn, out = copy / "frame-005.bev.npy", tmp_path / "c.zarr"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-8])
    with pytest.raises(CheckFailed, match="frame-005.bev.npy is cut short"):
        import_signals(copy, out, shard_frames=2, quiet=True)
    torn.write_bytes(whole)
    assert import_signals(copy, out, shard_frames=2, quiet=True).built == 3
    assert main(["import", str(copy), str(out), "--shard-frames", "2"]) == 0
    assert "7 frames (0 built now)" in capsys.readouterr().out and verify(out).ok


def test_a_killed_import_goes_on(written, tmp_path):
    out = tmp_path / "c.zarr"
    code = """if True:
        import os, signal, sys, time
        from pathlib import Path
        from cache_tools import importing
        first = Path(sys.argv[2]) / "commits" / "00000.json"
        read, left = importing._read, [5]
        def dying(*words):
            left[0] -= 1
            if not left[0]:
                while not first.exists():  # it is written in the background
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return read(*words)
        importing._read = dying
        importing.import_signals(sys.argv[1], sys.argv[2], shard_frames=2, quiet=True)
    """
    command = [sys.executable, "-c", code, str(written), str(out)]
    died = subprocess.run(command, timeout=120)
    assert died.returncode == -9
    # One frame was looked at before the build, three were read in it: one shard is whole.
    assert import_signals(written, out, shard_frames=2, quiet=True).built == 5
    assert verify(out).ok


def change(*path, to):
    """A change of signals.json: the field at `path`, or without it where `to` is `...`."""

    def apply(folder):
        described = about()
        inner = described
        for name in path[:-1]:
            inner = inner[name]
        if to is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to
        (folder / "signals.json").write_text(json.dumps(described))

    return apply


def text(content: bytes):
    return lambda folder: (folder / "signals.json").write_bytes(content)


def array(value, name="frame-003.bev.npy"):
    return lambda folder: np.save(folder / name, value)


def tensors(**changes):
    def apply(folder):
        for path in folder.glob("frame-003.*"):
            path.unlink()
        values = {**made_cache.values(3), **changes}
        save_file(
            {n: v for n, v in values.items() if v is not None}, folder / "frame-003.safetensors"
        )

    return apply


def raw(content: bytes, name="frame-003.bev.npy"):
    return lambda folder: (folder / name).write_bytes(content)


def pickled(folder):
    np.save(folder / "frame-003.bev.npy", np.array([{}], object), allow_pickle=True)


def no_regular_file(folder):
    (folder / "frame-003.bev.npy").unlink()
    os.mkfifo(folder / "frame-003.bev.npy")


MAP = made_cache.values(3)["bev"]
TABLE = "frame-003.detections.npy"
GRID = ("signals", "bev", "grid")
BAD = {
    # signals.json: 2, nothing is built
    "no_folder": (shutil.rmtree, 2, "there is no folder"),
    "no_json": (lambda folder: (folder / "signals.json").unlink(), 2, "has no signals.json"),
    "not_json": (text(b"{"), 2, "is not JSON"),
    "not_text": (text(b"\xff\xfe"), 2, "is not JSON"),
    "nan_in_json": (text(b'{"format": NaN}'), 2, "is not JSON"),
    "a_list": (text(b"[]"), 2, 'does not say "format"'),
    "nested": (text(b"[" * 100_000), 2, "nested too deeply"),
    "format": (change("format", to="other"), 2, 'does not say "format"'),
    "version": (change("format_version", to=2), 2, "format version 2, this code reads 1"),
    "version_true": (change("format_version", to=True), 2, "format version True"),
    "field_missing": (change("frames", to=...), 2, "frames is missing: correct it"),
    "field_unknown": (change("colour", to=1), 2, "colour is not a field"),
    "identity_missing": (change("identity", "split", to=...), 2, "identity.split is missing"),
    "identity_empty": (change("identity", "tensors", to=""), 2, "identity.tensors is empty"),
    "identity_type": (change("identity", "expert", to=3), 2, "identity.expert is 3, not str"),
    "identity_unknown": (change("identity", "x", to=3), 2, "identity.x is not a field"),
    "mode": (change("identity", "mode", to="turned"), 2, "signals.json: mode 'turned'"),
    "signals_none": (change("signals", to={}), 2, "names no signal"),
    "signal_type": (change("signals", "bev", to=[]), 2, "signals.bev is not an object"),
    "signal_name": (change("signals", "../up", to=about()["signals"]["bev"]), 2, "'../up'"),
    "shape_bool": (change("signals", "bev", "shape", to=[True, 40, 40]), 2, "bev.shape is"),
    "shape_zero": (change("signals", "bev", "shape", to=[0, 40, 40]), 2, "bev.shape is"),
    "shape_huge": (change("signals", "detections", "shape", to=[10**30, 11]), 2, "2 GB"),
    "dtype": (change("signals", "bev", "dtype", to="int8"), 2, "float16 or float32"),
    "grid_of_others": (change(*GRID, "nx", to=41), 2, "a grid of 40 rows"),
    "grid_words": (change(*GRID, "x_min", to="-16"), 2, "grid.x_min is '-16', not float"),
    "grid_halves": (change(*GRID, "nx", to=40.5), 2, "grid.nx is 40.5, not int"),
    "grid_frame": (change(*GRID, "frame", to="moon"), 2, "signals.json: signals.bev.grid: BEV"),
    "grid_endless": (change(*GRID, "x_max", to=10**400), 2, "grid is not finite"),
    "grid_of_table": (
        change("signals", "detections", "grid", to=about()["signals"]["bev"]["grid"]),
        2,
        "a map is (C, Y, X)",
    ),
    "frames_none": (change("frames", to=[]), 2, "names no frame"),
    "frames_number": (change("frames", to=["a", 3]), 2, "frame key 3 is not a word"),
    "frames_twice": (change("frames", to=["a", "b", "a"]), 2, "'a' is there twice"),
    "key_up": (change("frames", to=["../signals/frame-000"]), 2, "cannot name a file"),
    "key_root": (change("frames", to=["/etc/passwd"]), 2, "cannot name a file"),
    "key_dots": (change("frames", to=["a..b"]), 2, "cannot name a file"),
    "key_windows": (change("frames", to=["a\\b"]), 2, "cannot name a file"),
    "key_nul": (change("frames", to=["a\0"]), 2, "cannot name a file"),
    "key_hidden": (change("frames", to=[".a"]), 2, "cannot name a file"),
    # The folder: 2
    "file_missing": (
        lambda folder: (folder / "frame-003.bev.npy").unlink(),
        2,
        "1 files are missing",
    ),
    "frame_unknown": (change("frames", to=["frame-000", "nobody"]), 2, "as nobody.bev.npy"),
    "not_a_file": (no_regular_file, 2, "such as frame-003.bev.npy"),
    "both_ways": (
        lambda folder: save_file(made_cache.values(3), folder / "frame-003.safetensors"),
        2,
        "keep one of the two",
    ),
    # Values: 1
    "nan": (array(np.where(MAP > 1, np.nan, MAP)), 1, "frame-003.bev.npy holds NaN in bev"),
    "infinite": (array(np.where(MAP > 1, np.inf, MAP)), 1, "frame-003.bev.npy holds inf"),
    "too_large": (array(MAP * 1e6), 1, "beyond what float16 holds"),
    "too_large_for_all": (array(MAP.astype(np.float64) * 1e60), 1, "beyond what float16"),
    "nan_in_table": (array(np.full((2, 11), np.nan, np.float32), TABLE), 1, "NaN in detections"),
    "shape": (array(MAP[:, 1:]), 1, "of shape [6, 39, 40], signals.json says [6, 40, 40]"),
    "shape_none": (array(np.float32(1)), 1, "of shape []"),
    "table_long": (array(np.zeros((21, 11), np.float32), TABLE), 1, "says at most [20, 11]"),
    "table_wide": (array(np.zeros((2, 12), np.float32), TABLE), 1, "says at most [20, 11]"),
    "whole_numbers": (array(MAP.astype(np.int32)), 1, "bev as int32, signals.json says float16"),
    "too_coarse": (array(np.zeros((2, 11), np.float16), TABLE), 1, "as float16, signals.json"),
    "pickled": (pickled, 1, "frame-003.bev.npy"),
    "no_npy": (raw(b"junk"), 1, "damaged or no .npy"),
    "empty_npy": (raw(b""), 1, "damaged or no .npy"),
    "npy_version": (raw(b"\x93NUMPY\x09\x00"), 1, "damaged or no .npy"),
    "npy_header": (raw(b"\x93NUMPY\x01\x00\x04\x00((((" + bytes(9)), 1, "damaged or no .npy"),
    "no_safetensors": (
        lambda folder: (tensors()(folder), raw(b"junk", "frame-003.safetensors")(folder)),
        1,
        "damaged or no .safetensors",
    ),
    "tensor_missing": (tensors(bev=None), 1, "frame-003.safetensors has no tensor bev"),
    "tensor_unknown": (tensors(pv=MAP), 1, "has a tensor pv, which signals.json does not name"),
    "tensor_nan": (tensors(bev=MAP * np.nan), 1, "frame-003.safetensors holds NaN in bev"),
    "tensor_shape": (tensors(bev=MAP[1:].copy()), 1, "of shape [5, 40, 40]"),
    "tensor_type": (tensors(bev=MAP.astype(np.int8)), 1, "bev as I8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_that_names_it(copy, tmp_path, capsys, case):
    spoil, code, says = BAD[case]
    spoil(copy)
    out = tmp_path / "c.zarr"
    assert main(["import", str(copy), str(out), "--shard-frames", "1"]) == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: " if code == 2 else "failed: ") and says in said, said
    assert str(copy) in said and ": " in said.split(str(copy), 1)[1] and len(said) < 500, said
    # What is wrong with the whole is found before the cache exists; a frame, when it is met.
    assert out.exists() == (code == 1)


def test_files_that_agree_with_no_json_leave_no_cache(copy, tmp_path):
    change("signals", "bev", "shape", to=[7, 40, 40])(copy)
    with pytest.raises(CheckFailed, match="frame-000.bev.npy"):
        import_signals(copy, tmp_path / "c.zarr", quiet=True)
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.parametrize("broken", range(0, 128, 3))
def test_a_flipped_byte_of_a_header_is_told_or_harmless(copy, tmp_path, broken):
    path = copy / "frame-000.detections.npy"
    content = bytearray(path.read_bytes())
    content[broken] ^= 0x15
    path.write_bytes(bytes(content))
    try:
        import_signals(copy, tmp_path / "c.zarr", quiet=True)
    except CheckFailed as error:
        assert path.name in str(error)


def test_the_cache_does_not_go_into_the_folder(copy):
    for out in (copy, copy / "c.zarr", copy / "x" / ".." / "c.zarr"):
        with pytest.raises(UsageError, match="only read: give another OUT"):
            import_signals(copy, out, quiet=True)


def test_unknown_signals_and_another_cache_at_out_are_refused(copy, tmp_path):
    out = tmp_path / "c.zarr"
    with pytest.raises(UsageError, match="names the signals bev, detections, heatmap, not pv"):
        import_signals(copy, out, signals=["pv"], quiet=True)
    import_signals(copy, out, quiet=True)
    with pytest.raises(UsageError, match="differ in preset"):
        import_signals(copy, out, preset="fast", quiet=True)
