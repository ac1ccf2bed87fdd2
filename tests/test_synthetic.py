"""How the synthetic data set is made: the same bytes always, nothing of others lost."""

import hashlib
import importlib
import json

import pytest
from made_synthetic import TINY, make

from fd3d.data.synthetic import generate
from fd3d.data.synthetic.__main__ import main
from fd3d.data.synthetic.parameters import Parameters
from fd3d.data.synthetic.tables import visibility_token
from fd3d.errors import UsageError, exit_code


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make(tmp_path_factory.mktemp("synthetic") / "data")


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_bytes_do_not_depend_on_the_number_of_workers(root, tmp_path):
    generate(out=tmp_path / "two", workers=2, quiet=True, **TINY)
    assert digests(tmp_path / "two") == digests(root)


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(root, tmp_path, monkeypatch):
    module = importlib.import_module("fd3d.data.synthetic.generate")
    make, made = module.make_scene, []

    def stop_at_the_last(parameters, number, out):
        if number == 2 and len(made) == 2:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(number)
        return make(parameters, number, out)

    monkeypatch.setattr(module, "make_scene", stop_at_the_last)
    out = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        generate(out=out, workers=1, quiet=True, **TINY)
    assert not (out / "synthetic.json").exists()
    result = generate(out=out, workers=1, quiet=True, **TINY)
    assert made == [0, 1, "stopped", 2] and result.made == TINY["frames"]
    assert digests(out) == digests(root)
    assert generate(out=out, workers=1, quiet=True, **TINY).made == 0


def test_other_seeds_and_sizes_share_no_tokens():
    first = Parameters(camera_hz=4, **TINY)
    for change in ({"seed": 4}, {"width": 320}, {"frames": 5}):
        other = Parameters(camera_hz=4, **{**TINY, **change})
        assert first.token("a", "sample", 0) != other.token("a", "sample", 0)
    longer = Parameters(camera_hz=4, **{**TINY, "scenes": 9})
    assert first.token("a", "sample", 0) == longer.token("a", "sample", 0)
    assert first.scene_seed(2) == longer.scene_seed(9)  # the first validation scene of both


@pytest.mark.parametrize(
    ("visible", "coverable", "level"),
    [(0, 0, "1"), (39, 100, "1"), (40, 100, "2"), (60, 100, "3"), (80, 100, "4"), (5, 5, "4")],
)
def test_visibility_levels_are_those_of_nuscenes(visible, coverable, level):
    assert visibility_token(visible, coverable) == level


def test_foreign_folders_and_other_parameters_are_refused(root, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose")
    with pytest.raises(UsageError, match="not empty"):
        generate(out=tmp_path, workers=1, quiet=True, **TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]
    with pytest.raises(UsageError, match="other parameters"):
        generate(out=root, workers=1, quiet=True, **{**TINY, "seed": 99})


@pytest.mark.parametrize(
    "wrong",
    [
        ["--width", "20"],
        ["--camera-hz", "5"],
        ["--scenes", "0", "--val-scenes", "0"],
        ["--frames", "0"],
        ["--workers", "0"],
        ["--version", "a/b"],
    ],
)
def test_wrong_arguments_are_told_in_one_sentence(wrong, tmp_path, capsys):
    code = exit_code(lambda: main(["--out", str(tmp_path / "new"), *wrong]))
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_command_says_what_it_made(tmp_path, capsys):
    out = tmp_path / "new"
    small = ["--out", str(out), "--scenes", "1", "--val-scenes", "0", "--frames", "1"]
    main([*small, "--width", "64", "--workers", "1", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["keyframes"] == 1 and said["annotations_per_keyframe"]["vehicle.car"] > 0
    main([*small, "--width", "64", "--workers", "1"])
    assert "recipes/train.py" in capsys.readouterr().out
