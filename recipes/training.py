"""The part that every training recipe shares: frames, schedule, order, loop.

A recipe builds a module whose forward returns a dict of named loss terms, and hands it to `fit`.
Everything else that a reader may want to change is in the recipe itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from fd3d import models
from fd3d.data.frames import FrameDataset
from fd3d.data.images import ImageSpec
from fd3d.data.index import FrameIndex
from fd3d.data.sampling import class_balanced
from fd3d.distill.ahead import ahead
from fd3d.distill.handover import dead_workers_told
from fd3d.durable import write_json
from fd3d.errors import UsageError
from fd3d.models import imagenet
from fd3d.models.recompute import save_memory
from fd3d.progress import Progress
from recipes.descent import descend, finite_values, gradient_norms
from recipes.ema import EMA
from recipes.flags import kernels_note, settle
from recipes.run_folder import Position, check_out, hold, load, open_log, save
from recipes.schedule import Pace, Schedule, fit_in, measures_pace


class EpochOrder(Sampler[int]):
    """A shuffled order that depends on (seed, epoch) alone, so that any epoch can be re-entered."""

    def __init__(self, *, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


def training_frames(
    args: argparse.Namespace,
    image: ImageSpec,
    *,
    adjacent: str = "test",
    bev_augment: bool = False,
    bev_flips: bool = True,
) -> FrameDataset:
    """The frames of the split that the flags name, with their truth."""
    index = FrameIndex.open(dataroot=args.dataroot, version=args.version)
    positions = index.split(args.split)
    if args.cbgs:
        rng = np.random.default_rng(args.seed)
        positions = positions[class_balanced(index.classes_present(positions), rng=rng)]
    return FrameDataset(
        index=index,
        positions=positions,
        image=image,
        truth=True,
        adjacent=adjacent,
        image_augment=args.image_augment,
        bev_augment=bev_augment,
        bev_flips=bev_flips,
        seed=args.seed,
        reduced_jpeg=args.reduced_jpeg,
        keep_images_mb=args.keep_images_mb,
    )


def new_model(args: argparse.Namespace) -> nn.Module:
    """The network that the flags name, random but for the backbone that they may name."""
    model = models.build(args.model)
    if args.backbone:
        imagenet.load_backbone(model.img_backbone, args.backbone)
    if args.save_memory:
        save_memory(model)
    return model


def start(args: argparse.Namespace, identity: Mapping[str, object]) -> Accelerator:
    """Check the flags, prepare the output folder and the accelerator; seed everything.

    `identity` names what the run depends on (signals id, cache id, expert); it and the flags that
    shape a training are written beside the checkpoints, and resuming with others is refused.
    """
    settle(args)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    identity = {**identity, **_shape_of(args), "processes": processes}
    out = Path(args.out)
    check_out(out, identity, resume=args.resume)
    # Processes of torchrun find each other on a CPU only when Accelerate is told to use it.
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        cpu=args.device == "cpu" or (processes > 1 and not torch.cuda.is_available()),
        log_with=args.tracker or None,
        project_config=ProjectConfiguration(project_dir=str(out)),
    )
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        hold(out)
        if not args.resume:
            write_json(out / "run.json", {"identity": dict(identity), "arguments": vars(args)})
    accelerator.wait_for_everyone()
    if args.tracker:
        scalars = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool))}
        accelerator.init_trackers("fd3d", config={**scalars, **identity})
    note = kernels_note(args.device)
    if note:
        accelerator.print(note)
    set_seed(args.seed)
    return accelerator


def _shape_of(args: argparse.Namespace) -> dict[str, object]:
    """The flags that make a training another one; those that were not given are left out."""
    names = ("steps", "epochs", "batch", "seed", "lr", "weight_decay", "warmup", "clip", "ema")
    names += ("mixed_precision", "image_augment", "reduced_jpeg", "cbgs", "head_lr")
    given = {name: getattr(args, name, None) for name in names}
    return {
        name: value for name, value in given.items() if value is not None and value is not False
    }


@dead_workers_told()
def fit(
    *,
    args: argparse.Namespace,
    accelerator: Accelerator,
    module: nn.Module,
    dataset: Dataset,
    collate: Callable,
    inputs: Callable[[object], tuple],
    weights: Mapping[str, float],
    export: Callable[[nn.Module, dict], None],
    groups: Callable[[nn.Module], list[dict]] | None = None,
) -> dict:
    """Train `module` and return the run's summary (also written to OUT/summary.json).

    Args:
        module: `module(*given)` gives named, unweighted loss terms; the one thing that is
            wrapped for data parallelism, so every trained parameter must be in it.
        inputs: from what the loader yields to the module's arguments, on the device; runs outside
            the module's autocast (a live expert runs here), on a GPU one step ahead.
        weights: of loss terms by name; terms that are not named weigh 1.
        export: called with the trained module and the run's record at the end.
        groups: the module's parameter groups for the optimizer; "scale" in one is its factor of
            the learning rate. None = one group.
    """
    out = Path(args.out)
    order = EpochOrder(length=len(dataset), seed=args.seed)
    loader = _loader(args, dataset, order, collate)
    parameters = groups(module) if groups else module.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    module, optimizer, loader = accelerator.prepare(
        module, optimizer, loader, device_placement=[True, True, False]
    )
    if len(loader) == 0:
        raise UsageError(
            f"{len(dataset)} frames do not fill one batch of {args.batch} on each of "
            f"{accelerator.num_processes} processes: lower --batch"
        )
    ema = EMA(accelerator.unwrap_model(module), decay=args.ema) if args.ema else None
    if ema:
        accelerator.register_for_checkpointing(ema)
    planned = args.steps or args.epochs * len(loader)
    position = Position(steps=planned)
    # A run that was killed before its first save starts over.
    if args.resume and (out / "last.json").exists():
        position = load(accelerator, out)
    warmup = min(args.warmup, position.steps // 4) if args.minutes else args.warmup
    schedule = Schedule(base=args.lr, warmup=warmup, steps=position.steps)
    main = accelerator.is_main_process
    log = open_log(out / "log.jsonl", position.step) if main else None
    # A second save of one step would go over the first in place: a kill then leaves neither whole.
    saved = position.step
    pace = Pace()
    told = _told_gradients(args, accelerator.unwrap_model(module))
    module.train()
    with Progress(
        total=schedule.steps, unit="steps", title=out.name, done=position.step, quiet=not main
    ) as progress:
        while position.step < _end(args, schedule):
            batches = rest_of_epoch(loader, order, position)
            for given in ahead(pace.watch(batches), inputs, accelerator.device):
                rate = schedule.at(position.step)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("scale", 1.0)
                terms = module(*given)
                logged = is_logged(position.step + 1, args.log_steps)
                norms = gradient_norms(terms, weights, told) if told and logged else {}
                descend(accelerator, optimizer, terms, weights, clip=args.clip)
                if ema:
                    ema.update(accelerator.unwrap_model(module))
                values = finite_values(terms, position.step)
                pace.done()
                position.step += 1
                position.batch += 1
                if log and logged:
                    _write_log(log, accelerator, position, pace, rate, {**values, **norms})
                progress.advance(1, f"loss {sum(values.values()):.3f}")
                if args.minutes and measures_pace(position.step, schedule):
                    schedule = fit_in(args, planned, position.step, pace, accelerator)
                    progress.total = position.steps = schedule.steps
                if args.save_steps and position.step % args.save_steps == 0:
                    save(accelerator, out, position)
                    saved = position.step
                if position.step >= _end(args, schedule):
                    break
            else:
                position.epoch, position.batch = position.epoch + 1, 0
            if saved < position.step:
                save(accelerator, out, position)
                saved = position.step
    summary = _summary(args, accelerator, module, position, planned, pace)
    accelerator.wait_for_everyone()
    if ema:
        ema.copy_to(accelerator.unwrap_model(module))
    if main:
        export(accelerator.unwrap_model(module), json.loads((out / "run.json").read_text()))
        write_json(out / "summary.json", summary)
    accelerator.end_training()
    return summary


def _told_gradients(args: argparse.Namespace, module: nn.Module) -> list[Tensor]:
    """The parameters at which --log-gradients tells each term's gradient: the apprentice's."""
    if not args.log_gradients:
        return []
    return [p for p in getattr(module, "model", module).parameters() if p.requires_grad]


def _loader(
    args: argparse.Namespace, dataset: Dataset, order: EpochOrder, collate: Callable
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=args.batch,
        sampler=order,
        num_workers=args.workers,
        collate_fn=collate,
        drop_last=True,
    )


def rest_of_epoch(loader: DataLoader, order: EpochOrder, position: Position) -> DataLoader:
    """The batches of the position's epoch that are not done yet, in the order of that epoch.

    `loader` is one that Accelerate prepared, over a data set and an `order` with epochs.
    """
    order.set_epoch(position.epoch)
    loader.dataset.set_epoch(position.epoch)
    rest = skip_first_batches(loader, position.batch)
    # Such a loader tells order or data set, when it begins, the number of its own passes: always 0,
    # since it is a new one for every epoch.
    rest.set_epoch(position.epoch)
    return rest


def _end(args: argparse.Namespace, schedule: Schedule) -> int:
    """The step that this call of the recipe stops at."""
    return min(args.max_steps or schedule.steps, schedule.steps)


def is_logged(step: int, every: int) -> bool:
    """Whether the log has a line of step 1, 2, ...: of the first and of every `every`-th."""
    return step == 1 or step % every == 0


def _write_log(
    log: TextIO,
    accelerator: Accelerator,
    position: Position,
    pace: Pace,
    rate: float,
    values: Mapping[str, float],
) -> None:
    line = {
        "step": position.step,
        "epoch": position.epoch,
        "lr": rate,
        "seconds": pace.steps[-1],
        "wait": pace.waits[-1],
        **values,
    }
    log.write(json.dumps(line) + "\n")
    log.flush()
    # Does nothing without --tracker.
    accelerator.log({**values, "lr": rate}, step=position.step)


def _summary(
    args: argparse.Namespace,
    accelerator: Accelerator,
    module: nn.Module,
    position: Position,
    planned: int,
    pace: Pace,
) -> dict:
    return {
        "steps": position.step,
        "planned_steps": planned,
        "epochs": args.epochs,
        "batch": args.batch,
        "processes": accelerator.num_processes,
        "seed": args.seed,
        "ema": args.ema,
        "seconds": time.monotonic() - pace.began,
        "seconds_per_step": statistics.median(pace.steps) if pace.steps else 0.0,
        "wait_per_step": statistics.median(pace.waits) if pace.waits else 0.0,
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def tell(args: argparse.Namespace, accelerator: Accelerator, summary: Mapping) -> None:
    """Say what the run made and what to run next."""
    weights = Path(args.out) / "model.safetensors"
    accelerator.print(
        f"made {weights} in {summary['steps']} steps, {summary['seconds']:.0f} s\n"
        f"next: python recipes/evaluate.py --model {args.model} --checkpoint {weights} "
        f"--dataroot {args.dataroot} --version {args.version} --split val --out {args.out}/val"
    )
