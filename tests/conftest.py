"""Shared fixtures: a small synthetic data set, the real keyframe, an index folder for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[1].parent / "shared"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set that tests may read: where it lies and one split of it."""

    dataroot: Path
    version: str
    split: str

    def open(self):
        from fd3d.data.index import FrameIndex

        return FrameIndex.open(dataroot=self.dataroot, version=self.version)


@pytest.fixture(scope="session", autouse=True)
def index_folder(tmp_path_factory):
    """Frame indexes made by tests go to a temporary folder, never to the user's own."""
    folder = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD3D_INDEX_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory) -> DataSet:
    """Two scenes of synthetic driving, one of them for validation, in pictures of 352x198."""
    from fd3d.data.synthetic import generate

    dataroot = tmp_path_factory.mktemp("synthetic")
    generate(out=dataroot, scenes=1, val_scenes=1, frames=5, seed=3, width=352)
    (tables,) = (path.parent for path in dataroot.glob("*/sample.json"))
    return DataSet(dataroot=dataroot, version=tables.name, split="val")


@pytest.fixture(scope="session")
def real_keyframe() -> DataSet:
    """The real nuScenes keyframe that lies beside this repository, where it does."""
    dataroot = SHARED / "real_keyframe"
    if not dataroot.is_dir():
        pytest.skip("the real keyframe is not beside this repository")
    return DataSet(dataroot=dataroot, version="v1.0-keyframe", split="keyframe")
