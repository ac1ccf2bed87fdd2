"""Without CuPy or without a GPU the scaffold says so in one sentence and touches nothing."""

import sys

import pytest
import torch

from fd3d import cuda
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.resample import resample


@pytest.fixture(autouse=True)
def fresh():
    cuda.missing.cache_clear()
    yield
    cuda.missing.cache_clear()


def test_importing_the_library_does_not_import_cupy():
    assert "cupy" not in sys.modules or cuda.missing() is None


def test_what_is_missing_is_one_sentence_with_the_fix(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA device" in cuda.missing()
    cuda.missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'fd3d[cuda12]'" in cuda.missing()
    with pytest.raises(UsageError, match="CuPy") as refused:
        cuda.require()
    assert "\n" not in str(refused.value)


def test_a_cupy_that_cannot_reach_its_driver_counts_as_missing(monkeypatch):
    def broken():
        raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cuda, "_cupy", broken)
    assert "cudaErrorInsufficientDriver" in cuda.missing()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_asking_for_the_gpu_path_without_a_gpu_is_refused():
    grid = BEVGrid.square(half_extent=8, cells=8)
    with pytest.raises(UsageError, match="CUDA"):
        resample(torch.zeros(1, 1, 8, 8), from_grid=grid, to_grid=grid, path="cupy")
