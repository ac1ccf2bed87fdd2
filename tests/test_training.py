"""The schedule and the data order of the recipes."""

import argparse
import math

import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset

from fd3d import cuda
from fd3d.errors import UsageError
from recipes import run_folder, training
from recipes.ema import EMA
from recipes.flags import add_run_arguments, kernels_note, settle
from recipes.run_folder import Position
from recipes.schedule import Schedule, measures_pace
from recipes.training import EpochOrder, is_logged, rest_of_epoch


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


class Rows(Dataset):
    """Gives its row numbers, with the epoch that it was told."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 9

    def __getitem__(self, row):
        return row, self.epoch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_each_epoch_has_its_own_order_and_draws_however_it_is_entered(processes, workers):
    PartialState(cpu=True)
    position = Position(steps=100)
    for epoch, done in ((0, 0), (1, 0), (2, 1), (2, 0), (7, 0)):
        position.epoch, position.batch = epoch, done
        found = []
        for process in range(processes):
            order = EpochOrder(length=9, seed=3)
            loader = DataLoader(
                Rows(), batch_size=2, sampler=order, num_workers=workers, drop_last=True
            )
            loader = prepare_data_loader(
                loader, num_processes=processes, process_index=process, put_on_device=False
            )
            # What an epoch before leaves in Accelerate's loader must not matter.
            list(rest_of_epoch(loader, order, Position(epoch=epoch + 3, steps=100)))
            batches = list(rest_of_epoch(loader, order, position))
            assert {int(n) for _, epochs in batches for n in epochs} == {epoch}
            found.append([rows.tolist() for rows, _ in batches])
        whole = EpochOrder(length=9, seed=3)
        whole.set_epoch(epoch)
        rows = list(whole)[: 8 - 8 % (2 * processes)]
        expected = [rows[start : start + 2] for start in range(0, len(rows), 2)]
        together = [batch for batches in zip(*found, strict=True) for batch in batches]
        assert together == expected[done * processes :], (epoch, done)


def test_the_log_has_the_first_step_and_every_so_manyth():
    assert [step for step in range(1, 25) if is_logged(step, 10)] == [1, 10, 20]
    assert [step for step in range(1, 4) if is_logged(step, 1)] == [1, 2, 3]


def test_pace_is_measured_again_after_twice_the_steps_until_the_rate_drops():
    schedule = Schedule(base=1.0, warmup=0, steps=300)
    assert schedule.drops == (200, 275)
    assert [step for step in range(300) if measures_pace(step, schedule)] == [20, 40, 80, 160]


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    return parser.parse_args(["--dataroot", "d", "--version", "v", "--out", "o", *flags])


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, rows):
        return {"loss": (self.weight * rows).square().mean()}


def test_no_step_is_saved_twice(tmp_path, monkeypatch):
    """Four batches an epoch: saves by step fall on the ends of epochs and of the run."""
    saved = []

    def save(accelerator, out, position):
        saved.append(position.step)
        run_folder.save(accelerator, out, position)

    monkeypatch.setattr(training, "save", save)
    # One process stands for two here, and would refuse itself.
    monkeypatch.setattr(training, "hold", lambda out: None)
    common = ["--out", str(tmp_path / "run"), "--cpu", "--epochs", "3", "--save-steps", "2"]
    common += ["--batch", "2", "--workers", "0", "--lr", "1e-3"]
    for flags, steps in ((["--max-steps", "4"], [2, 4]), (["--resume"], [6, 8, 10, 12])):
        args = parsed(*common, *flags)
        summary = training.fit(
            args=args,
            accelerator=training.start(args, {"model": "toy"}),
            module=Toy(),
            dataset=Rows(),
            collate=torch.utils.data.default_collate,
            inputs=lambda item: (item[0].float(),),
            weights={},
            export=lambda model, record: None,
        )
        assert saved == steps and summary["steps"] == steps[-1]
        saved.clear()


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


def test_the_average_of_the_weights_is_what_is_exported(tmp_path, monkeypatch):
    """Against the recurrence written out, through a stop and a resume."""
    monkeypatch.setattr(training, "hold", lambda out: None)
    common = ["--out", str(tmp_path / "run"), "--cpu", "--steps", "6", "--warmup", "0"]
    common += ["--batch", "2", "--workers", "0", "--lr", "1e-1", "--ema", "0.9"]
    seen, exported = [], []

    class Watched(EMA):
        def update(self, module):
            seen.append(module.weight.item())
            super().update(module)

    monkeypatch.setattr(training, "EMA", Watched)
    for flags in (["--max-steps", "3"], ["--resume"]):
        args = parsed(*common, *flags)
        summary = training.fit(
            args=args,
            accelerator=training.start(args, {"model": "toy"}),
            module=Toy(),
            dataset=Rows(),
            collate=torch.utils.data.default_collate,
            inputs=lambda item: (item[0].float(),),
            weights={},
            export=lambda model, record: exported.append(model.weight.item()),
        )
    average = 1.0
    for step, weight in enumerate(seen, start=1):
        kept = 0.9 * (1 - math.exp(-step / 2000))
        average = kept * average + (1 - kept) * weight
    assert len(seen) == 6 and len(set(seen)) == 6
    assert exported[1] == pytest.approx(average, rel=1e-6)
    assert exported[1] != seen[-1] and summary["ema"] == 0.9
    with pytest.raises(UsageError, match="now it is ema 0.0"):
        without = parsed(*common[: common.index("--ema")], "--resume")
        training.start(without, {"model": "toy"})


def test_the_average_keeps_statistics_and_counts():
    norm = torch.nn.BatchNorm1d(2).train()
    ema = EMA(norm, decay=0.5)
    ema._average["running_mean"].fill_(4.0)
    norm(torch.randn(8, 2))
    ema.update(norm)
    copied = torch.nn.BatchNorm1d(2)
    ema.copy_to(copied)
    assert copied.num_batches_tracked == 1
    kept = 0.5 * (1 - math.exp(-1 / 2000))
    torch.testing.assert_close(copied.running_mean, kept * 4 + (1 - kept) * norm.running_mean)
