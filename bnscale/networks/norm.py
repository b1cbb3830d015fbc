"""Batch normalization whose statistics stand on `norm_batch` images, however many workers share the batch.

Ioffe & Szegedy 2015 (arXiv:1502.03167); ghost batches: Hoffer et al. 2017 (arXiv:1705.08741). A worker holds
a share of the batch. Where `norm_batch` is the share, this is torch's own layer. Where it is less, each
contiguous group of `norm_batch` images has its own statistics. Where it is more, consecutive workers
combine theirs. So the number of workers changes the order of summation and nothing else.

Shapes: N images of this worker, C channels, H, W pixels, G ghost groups, P peers (workers behind one statistic).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bnscale.trial import Refusal


class BatchNorm(nn.BatchNorm2d):
    """Affine batch normalization with running statistics, as torch's, over `norm_batch` images a statistic.

    The running variance is the unbiased one over `norm_batch` images. With several ghost groups the running
    statistics move once a step, by the mean over the groups. A new layer is alone; `spread` places it on a gang.

    Raises ValueError in training mode for a share of images that cannot hold `norm_batch`.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, norm_batch: int) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.1)
        self.norm_batch = norm_batch
        self.peers: dist.ProcessGroup | None = None  # the workers behind one statistic; None: this one alone

    def forward(self, images_NCHW: Tensor) -> Tensor:
        share = images_NCHW.shape[0]
        if not self.training or (share == self.norm_batch and self.peers is None):
            return super().forward(images_NCHW)
        workers = 1 if self.peers is None else dist.get_world_size(self.peers)
        if workers * share % self.norm_batch or (workers > 1 and workers * share != self.norm_batch):
            raise ValueError(
                f"norm_batch {self.norm_batch}: {share} images on each of {workers} workers cannot be parted into it"
            )
        if self.peers is None:
            normalised_NCHW, mean_C, variance_C = self._ghosts(images_NCHW)
        else:
            normalised_NCHW, mean_C, variance_C = _Shared.apply(
                images_NCHW, self.weight, self.bias, self.eps, self.peers
            )
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(variance_C, self.momentum)
        return normalised_NCHW

    def _ghosts(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each contiguous group by its own statistics; the mean of the groups' means and unbiased variances."""
        groups = images_NCHW.split(self.norm_batch)
        # With momentum 1 torch's kernel hands out the group's statistics as "running" ones.
        mean_GC = self.running_mean.new_zeros(len(groups), self.num_features)
        variance_GC = torch.zeros_like(mean_GC)
        normalised = [
            F.batch_norm(group, mean_C, variance_C, self.weight, self.bias, True, 1.0, self.eps)
            for group, mean_C, variance_C in zip(groups, mean_GC.unbind(), variance_GC.unbind(), strict=True)
        ]
        return torch.cat(normalised), mean_GC.mean(0), variance_GC.mean(0)

    def extra_repr(self) -> str:
        return f"{self.num_features}, norm_batch={self.norm_batch}"


class _Shared(torch.autograd.Function):
    """Batch normalization over the images of all peers, who hold equally many.

    Returns the normalised images in their own type, and the mean and the unbiased variance in gamma's. Every pass
    over the images is a native kernel. Each worker's means and sums of squared deviations are combined
    as by Chan, Golub & LeVeque 1979: a sum of squares would cancel where the mean is large.
    """

    @staticmethod
    def forward(
        ctx: Any, images_NCHW: Tensor, gamma_C: Tensor, beta_C: Tensor, eps: float, peers: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = _layout(images_NCHW)
        images_NCHW = images_NCHW.contiguous(memory_format=layout)
        count = images_NCHW.numel() // gamma_C.numel()  # values of one channel on this worker
        workers = dist.get_world_size(peers)

        # The running statistics given here only set the type of what comes back: gamma's.
        own_2C = torch.stack(
            torch.batch_norm_update_stats(images_NCHW, torch.zeros_like(gamma_C), torch.ones_like(gamma_C), 1.0)
        )
        all_P2C = own_2C.new_empty(workers, *own_2C.shape)
        dist.all_gather(list(all_P2C.unbind()), own_2C, group=peers)
        mean_PC, variance_PC = all_P2C.unbind(1)
        mean_C = mean_PC.mean(0)
        variance_C = variance_PC.mean(0) + (mean_PC - mean_C).square().mean(0)

        normalised_NCHW = F.batch_norm(images_NCHW, mean_C, variance_C, gamma_C, beta_C, False, 0.0, eps)
        unbiased_C = variance_C * (workers * count / (workers * count - 1))
        ctx.save_for_backward(images_NCHW, gamma_C, mean_C, variance_C)
        ctx.eps, ctx.peers, ctx.layout, ctx.count = eps, peers, layout, workers * count
        ctx.mark_non_differentiable(mean_C, unbiased_C)
        return normalised_NCHW, mean_C, unbiased_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NCHW: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        images_NCHW, gamma_C, mean_C, variance_C = ctx.saved_tensors
        gradient_NCHW = gradient_NCHW.contiguous(memory_format=ctx.layout)
        scale_C = (variance_C + ctx.eps).rsqrt()
        # Sums over this worker's values: of gradient times normalised value, and of gradient.
        _, gamma_gradient_C, beta_gradient_C = torch.ops.aten.native_batch_norm_backward(
            gradient_NCHW, images_NCHW, gamma_C, mean_C, variance_C, mean_C, scale_C, True, ctx.eps, [False, True, True]
        )
        images_gradient_NCHW = None
        if ctx.needs_input_grad[0]:
            # Every value moves the mean and the variance of every worker: hence the sums over the peers.
            sums_2C = torch.stack([gamma_gradient_C, beta_gradient_C])
            dist.all_reduce(sums_2C, group=ctx.peers)
            slope_C = gamma_C * scale_C
            through_variance_C, through_mean_C = -slope_C * sums_2C / ctx.count
            images_gradient_NCHW = F.batch_norm(
                images_NCHW, mean_C, variance_C, through_variance_C, through_mean_C, False, 0.0, ctx.eps
            ).addcmul_(gradient_NCHW, slope_C.to(gradient_NCHW.dtype)[:, None, None])
        return (
            images_gradient_NCHW,
            gamma_gradient_C if ctx.needs_input_grad[1] else None,
            beta_gradient_C if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _layout(images_NCHW: Tensor) -> torch.memory_format:
    """Channels last where the images are so and nothing else."""
    last = images_NCHW.is_contiguous(memory_format=torch.channels_last) and not images_NCHW.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def check(batch: int, norm_batch: int, workers: int) -> None:
    """Raises Refusal where equal shares of the batch on `workers` workers cannot hold `norm_batch`."""
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
    """Place every BatchNorm of `module` on the workers of the process group, who share `batch` images.

    Collective. Raises Refusal for a batch that the workers cannot share.
    """
    workers = dist.get_world_size()
    for norm in _norms(module):
        check(batch, norm.norm_batch, workers)
        size = norm.norm_batch * workers // batch
        norm.peers = _peers(size) if size > 1 else None


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
    placed = [(norm, norm.peers) for norm in _norms(module)]
    for norm, _ in placed:
        norm.peers = None
    try:
        yield
    finally:
        for norm, peers in placed:
            norm.peers = peers


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
