"""The distillation head: object queries that read an expert's BEV map and say what is there.

FD3D trains a third head, on the ground truth, whose queries tell where the expert's map is worth
distilling. It is of the DETR kind: learned queries, decoder layers of self-attention, sampling
attention on the map (Zhu et al., "Deformable DETR") and a feed-forward part, a class and a box
branch behind each, boxes refined from layer to layer. What each layer samples, and with which
weights, is part of its result: `fd3d.distill.losses.fd3d` samples both maps with them.

The head reads the expert alone, never an apprentice, and is thrown away after training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fd3d.classes import CLASSES
from fd3d.distill.head_config import HeadConfig
from fd3d.grid import BEVGrid
from fd3d.models.precision import full_precision

# Heights in metres that a centre's z is regressed in, as fractions of this range.
HEIGHTS = (-5.0, 3.0)
# x y z (fractions of the grid and of HEIGHTS) log w l h, sine and cosine of yaw, vx vy (m/s)
CODES = 10
# Scores start near .01, so that hundreds of empty queries do not swamp the first steps.
_FIRST_LOGIT = -4.6


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Where and how one decoder layer looked.

    places: (B, Q, heads, points, 2) fractions (x, y) of the grid. weights: (B, Q, heads, points),
    summing to one over the points. values: (B, Q, width), the weighted sums that it saw.
    """

    places: Tensor
    weights: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class HeadOutputs:
    """What each decoder layer said, logits (B, Q, 10), codes (B, Q, CODES), and where it looked."""

    logits: tuple[Tensor, ...]
    codes: tuple[Tensor, ...]
    sampled: tuple[Sampled, ...]


class SampleAttention(nn.Module):
    """Weighted sums of a projected map at places around each query's own.

    Args:
        channels: of the map.
        config: sizes.
    """

    def __init__(self, *, channels: int, config: HeadConfig) -> None:
        super().__init__()
        self.heads, self.points = config.heads, config.points
        count = config.heads * config.points
        self.value = nn.Linear(channels, config.width)
        self.offsets = nn.Linear(config.width, 2 * count)
        self.weights = nn.Linear(config.width, count)
        self.output = nn.Linear(config.width, config.width)
        # Each head starts by looking in its own direction, a cell further with each point.
        angles = torch.arange(self.heads) * (2 * torch.pi / self.heads)
        ways = torch.stack([angles.cos(), angles.sin()], dim=1)
        steps = torch.arange(1, self.points + 1)
        first = ways[:, None] * steps[None, :, None]
        nn.init.zeros_(self.offsets.weight)
        with torch.no_grad():
            self.offsets.bias.copy_(first.flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)

    def forward(self, query: Tensor, centres: Tensor, bev: Tensor) -> tuple[Tensor, Sampled]:
        """(B, Q, width) queries at `centres` (B, Q, 2), fractions of the map (B, C, Y, X)."""
        split = (*query.shape[:2], self.heads, self.points)
        cells = query.new_tensor([bev.shape[-1], bev.shape[-2]])
        offsets = self.offsets(query).unflatten(2, (self.heads, self.points, 2))
        places = centres[:, :, None, None] + offsets / cells
        weights = self.weights(query).view(split).softmax(dim=-1)
        values = sample(bev, places, weights, self.value.weight, self.value.bias)
        return self.output(values), Sampled(places=places, weights=weights, values=values)


def sample(bev: Tensor, places: Tensor, weights: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """(B, Q, width): a map (B, C, Y, X), projected by `matrix` (width, C) and `bias`, summed at
    `places` with `weights` as in `Sampled`; zero beyond the map."""
    heads = places.shape[2]
    value = functional.conv2d(bev, matrix[:, :, None, None], bias)
    value = value.unflatten(1, (heads, -1)).flatten(0, 1)
    where = (2 * places - 1).transpose(1, 2).flatten(0, 1)
    found = functional.grid_sample(value, where.to(value.dtype), align_corners=False)
    share = weights.transpose(1, 2).flatten(0, 1)[:, None]
    summed = (found * share).sum(dim=-1)  # (B * heads, width / heads, Q)
    return summed.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2)


class DecoderLayer(nn.Module):
    """Self-attention, sampling attention and feed-forward, each added and normalised."""

    def __init__(self, *, channels: int, config: HeadConfig) -> None:
        super().__init__()
        self.among = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.look = SampleAttention(channels=channels, config=config)
        self.think = nn.Sequential(
            nn.Linear(config.width, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.width),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))

    def forward(
        self, query: Tensor, position: Tensor, centres: Tensor, bev: Tensor
    ) -> tuple[Tensor, Sampled]:
        """The queries after the layer, and where it looked."""
        placed = query + position
        query = self.norms[0](query + self.among(placed, placed, query, need_weights=False)[0])
        seen, sampled = self.look(query + position, centres, bev)
        query = self.norms[1](query + seen)
        return self.norms[2](query + self.think(query)), sampled


class DistillationHead(nn.Module):
    """Boxes from an expert's map, by object queries.

    Args:
        channels: of the expert's map.
        grid: of the map that `forward` gets.
        config: sizes.
    """

    def __init__(self, *, channels: int, grid: BEVGrid, config: HeadConfig) -> None:
        super().__init__()
        self.name = "distillation-head"
        self.config, self.grid = config, grid
        # An expert's channels are of any scale.
        self.norm = nn.BatchNorm2d(channels)
        self.content = nn.Parameter(torch.randn(config.queries, config.width) * 0.02)
        # Fractions of the grid and of the heights, through a sigmoid; spread evenly at first.
        self.anchors = nn.Parameter(_inverse(torch.rand(config.queries, 3) * 0.9 + 0.05))
        self.position = nn.Sequential(
            nn.Linear(3, config.width), nn.ReLU(), nn.Linear(config.width, config.width)
        )
        self.layers = nn.ModuleList(
            DecoderLayer(channels=channels, config=config) for _ in range(config.layers)
        )
        self.classes = nn.ModuleList(nn.Linear(config.width, len(CLASSES)) for _ in self.layers)
        self.boxes = nn.ModuleList(
            nn.Sequential(
                nn.Linear(config.width, config.width), nn.ReLU(), nn.Linear(config.width, CODES)
            )
            for _ in self.layers
        )
        for branch in self.classes:
            nn.init.constant_(branch.bias, _FIRST_LOGIT)
        for branch in self.boxes:
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)

    def forward(self, bev: Tensor) -> HeadOutputs:
        """(B, C, Y, X), an expert's map on `grid`, to what every layer says."""
        with full_precision(bev):
            bev = self.norm(bev.float())
            query = self.content.expand(len(bev), -1, -1)
            anchor = self.anchors.expand(len(bev), -1, -1)
            logits, codes, sampled = [], [], []
            for layer, score, regress in zip(self.layers, self.classes, self.boxes, strict=True):
                fractions = anchor.sigmoid()
                query, seen = layer(query, self.position(fractions), fractions[..., :2], bev)
                said = regress(query)
                moved = anchor + said[..., :3]
                logits.append(score(query))
                codes.append(torch.cat([moved.sigmoid(), said[..., 3:]], dim=-1))
                sampled.append(seen)
                # Each layer starts from the last one's box and answers for its own step alone.
                anchor = moved.detach()
        return HeadOutputs(logits=tuple(logits), codes=tuple(codes), sampled=tuple(sampled))


def encode(boxes: Tensor, grid: BEVGrid) -> Tensor:
    """(M, CODES) of boxes (M, 9) in the grid's frame; unknown velocities stay NaN."""
    x = (boxes[:, 0] - grid.x_min) / (grid.x_max - grid.x_min)
    y = (boxes[:, 1] - grid.y_min) / (grid.y_max - grid.y_min)
    z = (boxes[:, 2] - HEIGHTS[0]) / (HEIGHTS[1] - HEIGHTS[0])
    sizes = boxes[:, 3:6].clamp(min=1e-3).log()
    turn = torch.stack([boxes[:, 6].sin(), boxes[:, 6].cos()], dim=1)
    return torch.cat([torch.stack([x, y, z], dim=1), sizes, turn, boxes[:, 7:9]], dim=1)


def decode(codes: Tensor, grid: BEVGrid) -> Tensor:
    """(..., 9) boxes of codes (..., CODES), the inverse of `encode`."""
    x = grid.x_min + codes[..., 0] * (grid.x_max - grid.x_min)
    y = grid.y_min + codes[..., 1] * (grid.y_max - grid.y_min)
    z = HEIGHTS[0] + codes[..., 2] * (HEIGHTS[1] - HEIGHTS[0])
    yaw = torch.atan2(codes[..., 6], codes[..., 7])
    sizes = codes[..., 3:6].clamp(max=5.0).exp()
    first = torch.stack([x, y, z], dim=-1)
    return torch.cat([first, sizes, yaw[..., None], codes[..., 8:10]], dim=-1)


def _inverse(fraction: Tensor) -> Tensor:
    """The number whose sigmoid is `fraction`."""
    return torch.log(fraction / (1 - fraction))
