"""One optimizer step down a weighted sum of terms, and how hard each of them pulls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from fd3d.errors import CheckFailed


def descend(
    accelerator: Accelerator,
    optimizer: Optimizer,
    terms: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    clip: float,
) -> None:
    """One step down the sum of the terms times their weights (1 for those without one)."""
    accelerator.backward(sum(weights.get(name, 1.0) * term for name, term in terms.items()))
    if clip:
        accelerator.unscale_gradients()
        for group in optimizer.param_groups:
            # Apart: a head that is trained along must not shorten the apprentice's steps.
            nn.utils.clip_grad_norm_(group["params"], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def gradient_norms(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], parameters: Sequence[Tensor]
) -> dict[str, float]:
    """ "grad.NAME" of every term: the norm of its weighted gradient at the parameters, in this
    process and before clipping. Takes a backward pass for each and leaves the graph as it is."""
    found = {}
    for name, term in terms.items():
        weighted = weights.get(name, 1.0) * term
        parts = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
        total = sum(float(part.double().square().sum()) for part in parts if part is not None)
        found[f"grad.{name}"] = math.sqrt(total)
    return found


def finite_values(terms: Mapping[str, Tensor], step: int) -> dict[str, float]:
    """The terms as numbers; `CheckFailed` where one is not finite."""
    values = {name: float(term.detach()) for name, term in terms.items()}
    if not math.isfinite(sum(values.values())):
        raise CheckFailed(f"loss is not finite at step {step}: {values}")
    return values
