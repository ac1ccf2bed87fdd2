"""The schedule and the data order of the recipes."""

import argparse

import pytest
import torch

from fd3d import cuda
from fd3d.errors import UsageError
from recipes.flags import add_run_arguments, kernels_note, settle
from recipes.schedule import Schedule, measures_pace
from recipes.training import EpochOrder


def test_learning_rate_at_every_epoch_of_the_papers_schedule():
    steps = 1000
    schedule = Schedule(base=2e-4, warmup=500, steps=24 * steps)
    rates = [schedule.at(epoch * steps + steps - 1) for epoch in range(24)]
    assert rates[:16] == pytest.approx([2e-4] * 16)
    assert rates[16:22] == pytest.approx([2e-5] * 6)
    assert rates[22:] == pytest.approx([2e-6] * 2)
    # The decay falls on the first step of its epoch, not one later.
    assert schedule.at(16 * steps - 1) == pytest.approx(2e-4)
    assert schedule.at(16 * steps) == pytest.approx(2e-5)


def test_warm_up_is_linear_from_a_thousandth():
    schedule = Schedule(base=1.0, warmup=100, steps=1000)
    assert schedule.at(0) == pytest.approx(1e-3)
    assert schedule.at(50) == pytest.approx(0.5005)
    assert schedule.at(100) == pytest.approx(1.0)


def test_no_warm_up_starts_at_the_base_rate():
    assert Schedule(base=0.3, warmup=0, steps=10).at(0) == pytest.approx(0.3)


def test_order_depends_on_seed_and_epoch_alone():
    first, second = (EpochOrder(length=50, seed=3) for _ in range(2))
    first.set_epoch(4)
    list(second)
    second.set_epoch(4)
    assert list(first) == list(second)
    assert sorted(first) == list(range(50))
    second.set_epoch(5)
    assert list(first) != list(second)
    assert list(EpochOrder(length=50, seed=4)) != list(EpochOrder(length=50, seed=3))


def test_pace_is_measured_again_after_twice_the_steps_until_the_rate_drops():
    schedule = Schedule(base=1.0, warmup=0, steps=300)
    assert schedule.drops == (200, 275)
    assert [step for step in range(300) if measures_pace(step, schedule)] == [20, 40, 80, 160]


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    return parser.parse_args(["--dataroot", "d", "--version", "v", "--out", "o", *flags])


def test_a_device_that_is_not_there_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda needs a CUDA device"):
        settle(parsed("--device", "cuda"))
    assert parsed().device == "auto" and parsed("--cpu").device == "cpu"


def test_cuda_without_its_kernels_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(cuda, "missing", lambda: "CUDA kernels need CuPy: pip install it")
    note = kernels_note("cuda")
    assert note.endswith("; torch resamples instead") and "CuPy" in note and "\n" not in note
    assert kernels_note("auto") is None and kernels_note("cpu") is None
    monkeypatch.setattr(cuda, "missing", lambda: None)
    assert kernels_note("cuda") is None
