"""Imports go one way: recipes -> cache_tools -> fd3d; CuPy and the devkit have one place each."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANK = {"fd3d": 0, "cache_tools": 1, "recipes": 2}
DEVKIT = {"fd3d/evaluation.py", "fd3d/data/index_folder.py"}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"{path} uses a relative import; write the whole name")
    return found


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, package
    return files


@pytest.mark.parametrize("package", RANK)
def test_no_import_against_the_direction(package):
    for path in sources(package):
        above = {name for name in imported(path) & set(RANK) if RANK[name] > RANK[package]}
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_the_devkit_and_cupy_are_imported_in_their_places_only():
    for package in RANK:
        for path in sources(package):
            name = path.relative_to(ROOT).as_posix()
            if "nuscenes" in imported(path):
                assert name in DEVKIT, f"{name} imports the devkit"
            if "cupy" in imported(path):
                assert name == "fd3d/cuda.py", f"{name} imports CuPy"


def test_nothing_unpickles():
    for package in RANK:
        for path in sources(package):
            assert not imported(path) & {"joblib", "dill", "cloudpickle"}, path
            text = path.read_text()
            for way in ("pickle.load", "Unpickler(", "weights_only=False", "allow_pickle=True"):
                assert way not in text, f"{path} has {way}"
