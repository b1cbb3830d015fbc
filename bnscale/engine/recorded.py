"""One update as a whole, recorded once and then replayed: a CUDA graph, between whose kernels no Python runs.

A deep network of narrow layers takes thousands of kernels a step, each shorter than its launch. Legend: N images.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

WARM_UP = 3  # updates before one is recorded: what compiles, chooses kernels or takes memory does so in the first ones

# Does a piece of work, perhaps several times, and returns what does it again on the same tensors.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """As PyTorch's notes on CUDA graphs have it: warmed up on another stream, then recorded, which computes nothing."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def again(work: Callable[[], None]) -> Callable[[], None]:
    """Where there are no graphs: the work itself, on the same tensors."""
    work()
    return work


@contextmanager
def unmoved(state: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards these tensors are what they were."""
    before = [each.detach().clone() for each in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for each, value in zip(state, before, strict=True):
                each.copy_(value)


class Recorded:
    """`update` of a batch of these shapes, which gives its losses; whatever it changes is in `state`.

    Recording takes updates; `state` is afterwards what it was before. What `update` reads beside its arguments it must
    read from tensors, for a replay sees nothing else.
    """

    def __init__(
        self,
        update: Callable[[Tensor, Tensor], Tensor],
        images_NCHW: Tensor,
        targets: Tensor,
        state: Sequence[Tensor],
        record: Recorder,
    ) -> None:
        self._images_NCHW, self._targets = images_NCHW.clone(), targets.clone()

        def work() -> None:
            self.losses = update(self._images_NCHW, self._targets)

        with unmoved(state):
            self._replay = record(work)

    def __call__(self, images_NCHW: Tensor, targets: Tensor) -> None:
        """One update; the losses before it are in `losses` until the next."""
        self._images_NCHW.copy_(images_NCHW)
        self._targets.copy_(targets)
        self._replay()
