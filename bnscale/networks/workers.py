"""Norm layers on a gang: which workers stand behind one statistic.

Consecutive workers hold consecutive shares of the batch; `norm_batch` images are a part of a share, a share, or
several.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from bnscale.networks.norm import BatchNorm, Noise
from bnscale.trial import Refusal, Trial


def check(trial: Trial, workers: int) -> None:
    """Raises Refusal where equal shares of the batch on `workers` workers cannot hold `norm_batch`."""
    _check(trial.batch, trial.norm_batch if trial.norm.over_images else 1, workers)


def _check(batch: int, norm_batch: int, workers: int) -> None:
    if _holds(batch, norm_batch, workers):
        return
    legal = [count for count in range(1, batch + 1) if _holds(batch, norm_batch, count)]
    near = [*(c for c in legal if c < workers)][-1:] + [*(c for c in legal if c > workers)][:1]
    ways = " or ".join(map(str, near))
    if workers < 1 or batch % workers:
        raise Refusal(f"workers {workers}: must divide batch {batch} into equal shares; try {ways}")
    raise Refusal(
        f"workers {workers}: {batch // workers} images on each neither divide nor are divided by "
        f"norm_batch {norm_batch}, so a batch statistic would be cut; try {ways}"
    )


def _holds(batch: int, norm_batch: int, workers: int) -> bool:
    if workers < 1 or batch % workers:
        return False
    share = batch // workers
    return share % norm_batch == 0 or norm_batch % share == 0


def spread(module: nn.Module, batch: int) -> None:
    """Place every norm layer of `module` on the workers of the process group, who share `batch` images.

    Collective. Raises Refusal for a batch that the workers cannot share.
    """
    workers = dist.get_world_size()
    for norm in _norms(module):
        _check(batch, norm.norm_batch, workers)
        size = norm.norm_batch * workers // batch
        norm.peers = _peers(size) if size > 1 else None
    for noise in _noises(module):
        noise.place = (dist.get_rank(), workers)


_subgroups: dict[int, dist.ProcessGroup] = {}
_world: dist.ProcessGroup | None = None


def _peers(size: int) -> dist.ProcessGroup:
    """This worker's group of `size` consecutive workers; kept, for a rebuilt one leaks threads and sockets."""
    global _world
    if _world is not dist.group.WORLD:
        _subgroups.clear()
        _world = dist.group.WORLD
    if size not in _subgroups:
        whole = size == dist.get_world_size()
        group = dist.group.WORLD if whole else dist.new_subgroups(size)[0]
        assert group is not None
        _subgroups[size] = group
    return _subgroups[size]


@contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Inside, training-mode forwards use no collectives: their statistics come from images of this worker only."""
    placed = [(norm, norm.peers) for norm in _norms(module) if norm.peers is not None]
    sharing = [(noise, noise.place) for noise in _noises(module)]
    for norm, _ in placed:
        norm.peers = None
    for noise, _ in sharing:
        noise.place = (0, 1)
    try:
        yield
    finally:
        for norm, peers in placed:
            norm.peers = peers
        for noise, place in sharing:
            noise.place = place


@contextmanager
def gathered(module: nn.Module, images: int) -> Iterator[None]:
    """Inside, a batch of so many images serves: where they are no multiple of `norm_batch`, they are one statistic."""
    before = [(norm, norm.norm_batch) for norm in _norms(module) if images % norm.norm_batch]
    for norm, _ in before:
        norm.norm_batch = images
    try:
        yield
    finally:
        for norm, size in before:
            norm.norm_batch = size


@torch.no_grad()
def settle(module: nn.Module) -> None:
    """Average the running statistics over the workers, where their images differed. Collective; one all-reduce.

    A running statistic is linear in the batches' statistics, so the mean over workers is what one worker
    with the whole batch would hold.
    """
    workers = dist.get_world_size()
    apart = [norm for norm in _norms(module) if norm.peers is None or dist.get_world_size(norm.peers) < workers]
    if workers == 1 or not apart:
        return
    statistics = [statistic for norm in apart for statistic in (norm.running_mean, norm.running_var)]
    flat = torch.cat(statistics)
    dist.all_reduce(flat)
    flat /= workers
    for statistic, mean in zip(statistics, flat.split([s.numel() for s in statistics]), strict=True):
        statistic.copy_(mean)


def _norms(module: nn.Module) -> list[BatchNorm]:
    return [each for each in module.modules() if isinstance(each, BatchNorm)]


def _noises(module: nn.Module) -> list[Noise]:
    return [each for each in module.modules() if isinstance(each, Noise)]
