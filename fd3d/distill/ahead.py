"""On a GPU: the next batch travels while the step computes.

`ahead` prepares each item one step early on a stream of its own, and `Pinned` gives it page-locked
memory to copy from, without which a copy to the device would make the host wait. On the CPU, items
are prepared when they are asked for. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def ahead(
    items: Iterable[Any], prepare: Callable[[Any], Any], device: torch.device | str
) -> Iterator[Any]:
    """`prepare(item)` for each item; on CUDA one item ahead of the one in use.

    What `prepare` starts on the device runs on a side stream. The stream that is current where
    the result is taken waits for it there, not the host.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from map(prepare, items)
        return
    side, waiting = torch.cuda.Stream(device), []
    for item in items:
        # The side stream uses memory again that steps before this one have let go of: they must
        # be through with it. The step that starts next is what `prepare` overlaps.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            waiting.append((prepare(item), side.record_event()))
        if len(waiting) > 1:
            yield _arrived(*waiting.pop(0), device)
    if waiting:
        yield _arrived(*waiting.pop(), device)


def _arrived(prepared: Any, done: torch.cuda.Event, device: torch.device) -> Any:
    torch.cuda.current_stream(device).wait_event(done)
    return prepared


class Pinned:
    """Two page-locked buffers for each map, used in turn, on the way to a CUDA device.

    Allocated at the first batch of a size; a smaller one uses a part. Copies go through the
    current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[dict[str, Tensor]] = [{}, {}]
        self._left: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def send(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The maps on the device, in their dtype, on their way; `maps` may be overwritten."""
        self._turn = 1 - self._turn
        buffers, left = self._buffers[self._turn], self._left[self._turn]
        if left is not None:
            # The copy of two batches ago; it has been done for a step.
            left.synchronize()
        sent = {}
        for name, value in maps.items():
            if name not in buffers or len(buffers[name]) < len(value):
                buffers[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            buffer = buffers[name][: len(value)]
            buffer.copy_(value)
            sent[name] = buffer.to(self._device, non_blocking=True)
        self._left[self._turn] = torch.cuda.current_stream(self._device).record_event()
        return sent
