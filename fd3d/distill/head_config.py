"""What one distillation head differs from another in."""

from __future__ import annotations

from dataclasses import dataclass

from fd3d.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A distillation head; the defaults are those for full-size maps.

    Args:
        width: channels of a query.
        queries: how many boxes a frame can have.
        layers: of the decoder; each is trained and compared.
        heads, points: of the sampling attention: places that a query looks at are their product.
        hidden: channels inside the feed-forward parts.
    """

    width: int = 256
    queries: int = 300
    layers: int = 6
    heads: int = 8
    points: int = 4
    hidden: int = 512

    def __post_init__(self) -> None:
        if min(self.width, self.queries, self.layers, self.heads, self.points, self.hidden) < 1:
            raise UsageError(f"{self}: every number of a distillation head must be 1 or more")
        if self.width % self.heads:
            raise UsageError(f"a head of width {self.width} does not divide into {self.heads}")


FULL = HeadConfig()
# For maps of two CPU cores' networks: a third of the queries, half of the layers.
TINY = HeadConfig(width=64, queries=100, layers=3, heads=4, points=4, hidden=128)
