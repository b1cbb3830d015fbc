"""The parts of a network compiled: one graph a shape, however deep the network.

torch.compile of a whole network takes minutes and grows with depth; its parts (blocks of a residual network, layers of
a plain one) have few shapes, and the code of a class is compiled once for each. Weights and running statistics are
inputs of what is compiled, so that all parts of a shape, of all trials of a process, share it; other processes of the
node find it in torch's own cache on the disk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from bnscale.networks.recompute import parts, replaced

SHAPES = (
    4096  # of one class, in one process that trains many trials and cohorts; at torch's own limit of 8 it would end
)


@contextmanager
def compiled(network: nn.Module) -> Iterator[None]:
    """Inside, the network computes each of its parts by compiled code; elsewhere, as for probes, it is what it was.

    A backward pass may come later. The first pass of each shape compiles.
    """
    with replaced({part: partial(_code(type(part).forward), part) for part in parts(network)}):
        yield


@cache
def _code(forward: Callable[..., Any]) -> Callable[..., Tensor]:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, SHAPES)
    code: Callable[..., Tensor] = torch.compile(forward, dynamic=False, fullgraph=True)
    return code
