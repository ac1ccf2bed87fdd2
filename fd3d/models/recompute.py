"""Activation checkpointing (Chen et al. 2016): memory of a training step for a second forward pass.

Blocks keep their inputs alone and compute the rest again when gradients come by. The numbers are
the same to the bit on a CPU; batch norms learn their statistics in the first pass only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputing(nn.Module):
    """A module whose forward may go through `again`."""

    recompute = False

    def again(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, a part of this module; what it holds for the backward pass is
        forgotten and computed again where `save_memory` asked for that."""
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return function(*inputs)
        return checkpoint(
            function,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _statistics_kept(self)),
        )


def save_memory(model: nn.Module) -> None:
    """Let every block of the model that can forget its activations do so."""
    for module in model.modules():
        if isinstance(module, Recomputing):
            module.recompute = True


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norms inside normalise by the batch, as in training, and learn nothing from it."""
    norms = [
        norm
        for norm in module.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats
    ]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        # The statistics must go through the operator, or autograd sees another one than before.
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
