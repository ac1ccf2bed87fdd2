"""Distillers in data-parallel training: one module, and processes of which one sees no box."""

from dataclasses import replace

import pytest
import torch
from made_fd3d import APPRENTICE, EXPERT
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from fd3d import models
from fd3d.data.batch import collate
from fd3d.data.frames import FrameDataset
from fd3d.data.index import FrameIndex
from fd3d.distill.head import DistillationHead
from fd3d.distill.head_config import TINY
from fd3d.distill.losses.bevdistill import BEVDistill
from fd3d.distill.losses.fd3d import FD3D, Settings
from fd3d.distill.pv import ImagePlanes, pv_signals
from fd3d.distill.trainee import Trainee
from recipes import distill_bevdepth
from recipes.distillers import parameter_groups


def test_the_head_has_a_parameter_group_of_its_own():
    args = distill_bevdepth.parse(
        ["--model", APPRENTICE, "--distiller", "fd3d", "--head-lr", "4e-4", "--lr", "1e-3"]
        + ["--dataroot", "d", "--version", "v", "--out", "o"]
    )
    trainee = small_trainee()
    groups = parameter_groups(args, trainee)
    assert [group["scale"] for group in groups] == [1.0, pytest.approx(0.4)]
    own = {id(p) for p in trainee.distiller.head.parameters()}
    assert {id(p) for p in groups[1]["params"]} == own
    assert not own & {id(p) for p in groups[0]["params"]}
    assert sum(len(g["params"]) for g in groups) == len(list(trainee.parameters()))


def small_trainee() -> Trainee:
    torch.manual_seed(2)
    model = models.build(APPRENTICE)
    grid = models.build(EXPERT).grid
    head = DistillationHead(
        channels=64, grid=grid, config=replace(TINY, queries=10, layers=2, width=16)
    )
    maps = {"grid": model.grid, "expert_grid": grid, "channels": 64, "expert_channels": 64}
    settings = Settings(areas="gt", terms=("gen_bev", "focal"))
    return Trainee(model, FD3D(settings=settings, head=head, **maps))


def trainees() -> dict[str, Trainee]:
    """An apprentice with each kind of distiller that looks at boxes of its own."""
    found = {"fd3d, true areas": small_trainee()}
    torch.manual_seed(3)
    model = models.build(APPRENTICE)
    maps = {"grid": model.grid, "channels": 64, "expert_channels": 64}
    maps["expert_grid"] = models.build(EXPERT).grid
    neck = model.config.neck
    planes = ImagePlanes(
        apprentice=model.image, expert=model.image, channels=neck, expert_channels=neck
    )
    settings = Settings(areas="expert", terms=("gen_bev", "gen_pv"))
    found["fd3d, the expert's areas"] = Trainee(
        model, FD3D(settings=settings, planes=planes, **maps)
    )
    found["bevdistill"] = Trainee(models.build(APPRENTICE), BEVDistill(**maps))
    return found


def _rank(rank: int, dataroot: str, version: str, meeting: str) -> None:
    """One of two processes; the second sees no box, the third step nobody does."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    index = FrameIndex.open(dataroot=dataroot, version=version)
    image = models.build(APPRENTICE).image
    frames = FrameDataset(index=index, positions=index.split("val"), image=image, truth=True)
    whole = collate([frames[2 * rank], frames[2 * rank + 1]])
    none = replace(
        whole,
        boxes=tuple(torch.zeros(0, 9) for _ in range(2)),
        labels=tuple(torch.zeros(0, dtype=torch.int64) for _ in range(2)),
    )
    for name, trainee in trainees().items():
        module = DistributedDataParallel(trainee, find_unused_parameters=False)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        for step in range(4):
            batch = none if rank == 1 or step == 2 else whole
            random = torch.Generator().manual_seed(step)
            pv = torch.randn(12, trainee.model.config.neck, *image.depth_shape, generator=random)
            said = {"bev": torch.randn(2, 64, 64, 64, generator=random), **pv_signals(batch, pv)}
            said["detections"] = [
                torch.cat([boxes.nan_to_num(), torch.full((len(boxes), 2), 0.5)], dim=1)
                for boxes in batch.boxes
            ]
            terms = module(batch, said)
            loss = sum(terms.values())
            assert torch.isfinite(loss), (name, terms)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        total = torch.stack([p.detach().abs().sum() for p in module.parameters()]).sum()
        sums = [torch.zeros_like(total) for _ in range(2)]
        distributed.all_gather(sums, total)
        assert torch.isfinite(total) and torch.equal(sums[0], sums[1]), "the processes agree"
    distributed.destroy_process_group()


def test_a_process_without_boxes_neither_hangs_nor_spoils(synthetic, tmp_path):
    words = (str(synthetic.dataroot), synthetic.version, str(tmp_path / "meeting"))
    multiprocessing.spawn(_rank, args=words, nprocs=2, join=True)
