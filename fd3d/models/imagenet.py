"""Starting the image backbone from ImageNet weights in a local file."""

from __future__ import annotations

from pathlib import Path

from fd3d.errors import UsageError
from fd3d.models.checkpoints import Report
from fd3d.models.resnet import ResNet
from fd3d.models.weight_files import read_weights

# The classifier: torchvision's and timm's name, and mmpretrain's.
_CLASSIFIER = ("fc.", "head.")
_PREFIXES = ("backbone.", "img_backbone.")


def load_backbone(backbone: ResNet, path: Path | str) -> Report:
    """Copy ImageNet weights into a network's `img_backbone`.

    Read are ResNets as torchvision, timm and mmpretrain name them, in a torch file or safetensors;
    the classifier is left out. BEVDepth's authors start from torchvision's `resnet50-0676ba61.pth`.

    Raises:
        UsageError: a file that is missing, damaged, or of another network; nothing is copied then.
    """
    _, tensors = read_weights(path)
    for prefix in _PREFIXES:
        if f"{prefix}conv1.weight" in tensors:
            tensors = {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
    own = backbone.state_dict()
    ignored = tuple(sorted(name for name in tensors if name.startswith(_CLASSIFIER)))
    given = {name: value for name, value in tensors.items() if name not in ignored}
    # Files from before torch 0.4.1 do not count batches.
    missing = tuple(sorted(own.keys() - given.keys()))
    lacking = [name for name in missing if not name.endswith("num_batches_tracked")]
    reshaped = [n for n in sorted(own.keys() & given.keys()) if own[n].shape != given[n].shape]
    unexpected = sorted(given.keys() - own.keys())
    if lacking or reshaped or unexpected:
        example = (lacking or reshaped or unexpected)[0]
        raise UsageError(
            f"{path} is not of this backbone (see {example}): give torchvision's or timm's "
            "plain ResNet of the same depth"
        )
    backbone.load_state_dict(given, strict=False)
    return Report(loaded=tuple(sorted(given)), missing=missing, ignored=ignored)
