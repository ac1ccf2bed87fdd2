"""The part of an expert behind its splat, as a file beside a cache.

With it cached signals become boxes, and `lift` a map, without the image branch and its weights.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import nn

from fd3d import models
from fd3d.errors import UsageError
from fd3d.models import checkpoints
from fd3d.models.bevdepth.network import BEVDepth

# Modules of the network whose tensors the part has.
_MODULES = (
    "pre_process_net.",
    "img_bev_encoder_backbone.",
    "img_bev_encoder_neck.",
    "pts_bbox_head.",
)


def pack(model: nn.Module) -> bytes:
    """The part's tensors as the bytes of a safetensors file, the same for the same tensors."""
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in sorted(model.state_dict().items())
        if name.startswith(_MODULES)
    }
    return save(tensors, {checkpoints.ARCHITECTURE: model.name})


def unpack(path: str | Path) -> BEVDepth:
    """The network in eval mode, without an image branch: `encode`, `head`, `decode` and `assemble`
    work, `forward` does not.

    A file that is missing, damaged or of another network raises `UsageError`.
    """
    name = checkpoints.read_metadata(path).get(checkpoints.ARCHITECTURE, "")
    if name not in models.names():
        raise UsageError(
            f"{path} is of network {name!r}, which is not known: use the release that wrote it"
        )
    model = models.build(name)
    checkpoints.load_part(model, path, prefix=_MODULES)
    model.drop_image_branch()
    return model.eval().requires_grad_(False)
