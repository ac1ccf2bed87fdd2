"""CenterPoint's head: a shared convolution, then six small branches for each task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from fd3d.models.recompute import Recomputing

# Channels of the regression branches, in the order of CenterPoint's modules.
BRANCHES = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
# Heatmaps start at a probability of about 0.1.
HEATMAP_BIAS = -2.19


class ConvNorm(Recomputing):
    """3x3 convolution, batch norm, ReLU, named as in mmcv's checkpoints."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self._run, x)

    def _run(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class CenterHead(nn.Module):
    """Raw prediction maps of every task.

    Args:
        inputs: channels of the BEV map.
        width: channels inside the head.
        tasks: class names of each task.
    """

    def __init__(self, *, inputs: int, width: int, tasks: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.shared_conv = ConvNorm(inputs, width)
        self.task_heads = nn.ModuleList(_task_head(width, len(classes)) for classes in tasks)

    def forward(self, bev: Tensor) -> tuple[dict[str, Tensor], ...]:
        """(B, inputs, Y, X) to one dict a task: reg 2, height 1, dim 3, rot 2, vel 2, heatmap.

        Each value is (B, channels, Y, X); `reg` in cells, `height` and log `dim` in metres, `rot`
        sine and cosine, `vel` metres of displacement, `heatmap` logits.
        """
        return self.branches(self.shared_conv(bev))

    def branches(self, shared: Tensor) -> tuple[dict[str, Tensor], ...]:
        """What `forward` gives, from the shared map (B, width, Y, X)."""
        return tuple(
            {name: branch(shared) for name, branch in head.items()} for head in self.task_heads
        )


def _task_head(width: int, classes: int) -> nn.ModuleDict:
    head = nn.ModuleDict()
    for name, channels in {**BRANCHES, "heatmap": classes}.items():
        last = nn.Conv2d(width, channels, 3, padding=1)
        # torch's own small initial weights stay: Kaiming's over so few outputs would make the
        # first heatmaps noise, whose focal loss is twenty times that of the bias alone.
        nn.init.constant_(last.bias, HEATMAP_BIAS if name == "heatmap" else 0.0)
        head[name] = nn.Sequential(ConvNorm(width, width), last)
    return head
