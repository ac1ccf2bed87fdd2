"""From the command line's words to what `build_cache` takes: an expert of this project run over a
split of a nuScenes-schema data set, with its own preprocessing and no augmentation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from cache_tools.focal import FOCUS
from cache_tools.focus import Focus
from cache_tools.manifest import Identity
from cache_tools.presets import codec_for
from fd3d import models
from fd3d.data.batch import Batch, collate
from fd3d.data.frames import FrameDataset
from fd3d.data.index import FrameIndex
from fd3d.distill import bev_part
from fd3d.distill.signals import LiveExpert, SignalSpec, specs
from fd3d.errors import UsageError
from fd3d.models import checkpoints

ADJACENT = "test"


@dataclass(frozen=True, kw_only=True)
class ExpertRun:
    """An expert and the frames it is to see: the arguments of `build_cache`, and the two callables
    that it needs. `load` reads ahead with worker processes."""

    live: LiveExpert
    signals: Mapping[str, SignalSpec]
    focus: Focus | None
    identity: Identity
    dataset: FrameDataset
    keys: tuple[str, ...]
    device: torch.device
    workers: int

    def bev_part(self) -> bytes:
        """What is to lie beside the arrays, see `fd3d.distill.bev_part`."""
        return bev_part.pack(self.live.model)

    def load(self, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """The expert's view of each batch of positions in turn."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=[list(positions) for positions in batches],
            collate_fn=collate,
            num_workers=min(self.workers, len(batches)),
        )
        return iter(loader)

    def in_order(self, keys: Sequence[str]) -> ExpertRun:
        """The same run with its frames in the order of `keys`."""
        row = {token: position for position, token in enumerate(self.keys)}
        dataset = copy.copy(self.dataset)
        dataset.positions = dataset.positions[[row[key] for key in keys]]
        return replace(self, dataset=dataset, keys=tuple(keys))

    def compute(self, batch: Batch) -> dict[str, list[np.ndarray]]:
        """The signals of a batch, one array per frame; for preset focal also the focus."""
        found = {
            name: [item.float().cpu().numpy() for item in values]
            for name, values in self.live.signals(batch.to(self.device)).items()
        }
        values = {name: found[name] for name in self.signals}
        if self.focus is not None:
            pairs = zip(batch.tokens, found["detections"], strict=True)
            values[FOCUS] = [self.focus(token, table) for token, table in pairs]
        return values


def spread(total: int, count: int) -> list[int]:
    """`count` positions spread over `total` frames, the first and the last among them."""
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def prepare(
    *,
    expert: str,
    checkpoint: str | Path | None,
    init_seed: int | None,
    dataroot: str | Path,
    version: str,
    split: str,
    signals: Sequence[str],
    preset: str = "lossless",
    device: str = "cpu",
    workers: int = 2,
    replays: int = 0,
) -> ExpertRun:
    """Open the data, build the expert and load its weights, from a checkpoint or from a seed.

    What is missing or does not fit raises `UsageError`.
    """
    if (checkpoint is None) == (init_seed is None):
        raise UsageError("give the expert's weights: either --checkpoint FILE or --init-seed N")
    if workers < 0:
        raise UsageError(f"--workers {workers} is not possible: use 0 or more")
    place = _device(device)
    model = _model(expert, checkpoint, init_seed)
    wanted = specs(model, signals, replays)
    kept = [codec for codec in (codec_for(s, preset) for s in wanted.values()) if codec.coarse]
    if kept and replays:
        raise UsageError(
            "preset focal keeps what lies at objects, and replayed maps are moved: use another one"
        )
    names = (*signals, "detections") if kept else signals
    live = LiveExpert(model=model, names=names, replays=replays)
    index = FrameIndex.open(dataroot=dataroot, version=version)
    positions = index.split(split)
    identity = Identity(
        expert=expert,
        tensors=checkpoints.tensors_digest(model),
        preprocessing=asdict(model.image),
        mode=live.mode,
        dataset_version=version,
        split=split,
        adjacency=ADJACENT,
        origin=Path(checkpoint).name if checkpoint else f"weights from seed {init_seed}",
    )
    model.to(place)
    dataset = FrameDataset(
        index=index, positions=positions, image=model.image, truth=False, adjacent=ADJACENT
    )
    return ExpertRun(
        live=live,
        signals=wanted,
        focus=Focus(index=index, grid=model.grid, codec=kept[0]) if kept else None,
        identity=identity,
        dataset=dataset,
        keys=tuple(dataset.tokens),
        device=place,
        workers=workers,
    )


def _model(expert: str, checkpoint: str | Path | None, init_seed: int | None) -> nn.Module:
    if init_seed is not None:
        if not 0 <= init_seed < 2**63:
            raise UsageError(f"--init-seed {init_seed} is not possible: use 0 to 2**63 - 1")
        torch.manual_seed(init_seed)
    model = models.build(expert)
    if checkpoint is not None:
        checkpoints.load(model, Path(checkpoint))
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(name)
        torch.zeros(1, device=place).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["no such device"])[0][:80]
        raise UsageError(f"--device {name} cannot be used ({reason}): try cpu or cuda:0") from None
    return place
