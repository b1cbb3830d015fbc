"""Losses on their way from the device to the host, which need not wait for each: it may run ahead.

Legend: S steps, K trials.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from bnscale.engine import Pass

Of = TypeVar("Of")


class Message(NamedTuple, Generic[Of]):
    step: int  # updates taken
    of: Sequence[Of]  # whose losses these are
    values_SK: Tensor  # of the steps since the message before; on the host
    there: torch.cuda.Event | None  # of a GPU: from when on they are


class Losses(Generic[Of]):
    """Of the steps of a pass, from all its workers: added as they are asked for, told when there is time."""

    def __init__(self, engine: Pass) -> None:
        self._engine = engine
        self._new: list[Tensor] = []  # of the steps since the last message, (K,) each
        self._sent: deque[Message[Of]] = deque()

    def add(self, losses_K: Tensor) -> None:
        self._new.append(losses_K.detach())

    def told(self, step: int, of: Sequence[Of], late: int) -> Iterator[tuple[int, list[tuple[Of, list[float]]]]]:
        """Send what is new after `step` updates, and wait for all messages but the latest few: after how many updates
        each was sent, and everyone's losses since the one before. Collective."""
        self._sent.append(self._message(step, of))
        self._new = []
        while len(self._sent) > late:
            message = self._sent.popleft()
            if message.there is not None:
                message.there.synchronize()
            yield message.step, list(zip(message.of, message.values_SK.T.tolist(), strict=True))

    def _message(self, step: int, of: Sequence[Of]) -> Message[Of]:
        if not self._new:
            return Message(step, of, torch.empty(0, len(of)), None)
        values_SK = self._engine.total(torch.stack(self._new)) / self._engine.gang.workers
        if not values_SK.is_cuda:
            return Message(step, of, values_SK, None)
        host_SK = torch.empty(values_SK.shape, dtype=values_SK.dtype, pin_memory=True)
        host_SK.copy_(values_SK, non_blocking=True)
        there = torch.cuda.Event()
        there.record()
        return Message(step, of, host_SK, there)
