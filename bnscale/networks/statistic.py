"""Statistics over the images of one or several workers, and normalizing by them, forward and backward.

Every pass over the images is a native kernel. Where workers share a statistic they hold equally many images.

Shapes: N images of this worker, C channels, H, W pixels, P workers behind one statistic.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Size(Enum):
    """What the centred images of a channel are divided by."""

    DEVIATION = "standard deviation"
    L1 = "mean |x|"
    L2 = "root mean x^2"
    LINF = "largest |x|"


class Statistic(NamedTuple):
    """Of one channel each, over so many `values`."""

    size: Size
    values: int
    mean_C: Tensor
    size_C: Tensor  # what is divided by, without epsilon
    square_C: Tensor  # its square
    running_C: Tensor  # what the running variance moves by: unbiased where it is a variance


class Own(NamedTuple):
    """Of this worker's images alone: what it tells the others behind a statistic."""

    size: Size
    values: int
    parts: list[Tensor]  # mean_C and variance_C; where the size is another, size_C


def own(images_NCHW: Tensor, size: Size, channels: int) -> Own:
    """The mean and the size over the images of this worker; in float32 where the images are half as wide."""
    images_NCHW = images_NCHW.detach().contiguous(memory_format=_layout(images_NCHW))
    count = images_NCHW.numel() // channels  # values of one channel
    wide = torch.promote_types(images_NCHW.dtype, torch.float32)
    over = [0, *range(2, images_NCHW.dim())]
    # The running statistics given here only set the type of what comes back.
    like_C = torch.zeros(channels, dtype=wide, device=images_NCHW.device)
    parts = list(torch.batch_norm_update_stats(images_NCHW, like_C, like_C.clone(), 1.0))
    if size is Size.L1:
        # Not torch.linalg.vector_norm: with channels last it takes four times as long.
        parts.append(images_NCHW.abs().sum(over, dtype=wide) / count)
    elif size is Size.LINF:
        parts.append(_largest(images_NCHW, over).to(wide))
    return Own(size, count, parts)


def exchanged(several: Sequence[Own], peers: dist.ProcessGroup | None) -> Callable[[], list[Statistic]]:
    """The statistics of several layers over all images of the peers: one message, begun here and waited for by the call
    of what comes back. What does not need them is computed between the two."""
    gathered = None if peers is None else _gather([part for each in several for part in each.parts], peers)

    def wait() -> list[Statistic]:
        if gathered is None or peers is None:
            return [_statistic(each.size, each.values, each.parts) for each in several]
        parts = iter(gathered())
        workers = dist.get_world_size(peers)
        return [
            _statistic(each.size, each.values * workers, _combined([next(parts) for _ in each.parts], each.size))
            for each in several
        ]

    return wait


def statistic(images_NCHW: Tensor, size: Size, channels: int, peers: dist.ProcessGroup | None) -> Statistic:
    """The mean and the size over all images of the peers, once they are here."""
    return exchanged([own(images_NCHW, size, channels)], peers)()[0]


def _statistic(size: Size, count: int, parts: list[Tensor]) -> Statistic:
    mean_C, variance_C, *of_size = parts
    match size:
        case Size.DEVIATION:
            return Statistic(size, count, mean_C, variance_C.sqrt(), variance_C, variance_C * (count / (count - 1)))
        case Size.L2:
            square_C = variance_C + mean_C.square()
            size_C = square_C.sqrt()
        case Size.L1 | Size.LINF:
            (size_C,) = of_size
            square_C = size_C.square()
    return Statistic(size, count, mean_C, size_C, square_C, square_C)


def _gather(parts: Sequence[Tensor], peers: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """Begin to hand these to every peer in one message; the call of what comes back waits for theirs: (P, ...) each.

    Also where only the sums are asked for: on gloo a gathering takes two thirds of the time of a sum, and each worker
    sums in the same order.
    """
    flat_K = torch.cat([part.flatten() for part in parts])
    all_PK = flat_K.new_empty(dist.get_world_size(peers), flat_K.numel())
    message = dist.all_gather_into_tensor(all_PK.view(-1), flat_K, group=peers, async_op=True)
    assert message is not None, "this worker is one of the peers"

    def wait() -> list[Tensor]:
        message.wait()
        split = all_PK.split([part.numel() for part in parts], dim=1)
        return [whole.view(-1, *part.shape) for whole, part in zip(split, parts, strict=True)]

    return wait


def _combined(parts: list[Tensor], size: Size) -> list[Tensor]:
    """Of all peers' images, from the mean, the variance and, where it is another, the size of each one's own.

    Means and variances as by Chan, Golub & LeVeque 1979: a sum of squares would cancel where the mean is large.
    """
    mean_PC, variance_PC, *of_size = parts
    mean_C = mean_PC.mean(0)
    variance_C = variance_PC.mean(0) + (mean_PC - mean_C).square().mean(0)
    return [mean_C, variance_C, *(each.amax(0) if size is Size.LINF else each.mean(0) for each in of_size)]


class Term(NamedTuple):
    """Images and what normalizes them."""

    images_NCHW: Tensor
    gamma_C: Tensor
    beta_C: Tensor
    by: Statistic


def normalised(terms: Sequence[Term], eps: float, peers: dist.ProcessGroup | None) -> Tensor:
    """The sum over the terms of gamma * (images - mean) / sqrt(size^2 + eps) + beta, in the images' own type.

    The gradient knows that mean and size are functions of the images of all peers; it can be taken once, and exchanges
    the sums of all terms in one message.
    """
    tensors = [tensor for term in terms for tensor in term[:3]]
    return _Normalise.apply([term.by for term in terms], eps, peers, *tensors)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, by: list[Statistic], eps: float, peers: dist.ProcessGroup | None, *tensors: Tensor) -> Tensor:
        ctx.by, ctx.eps, ctx.peers = [(each.size, each.values) for each in by], eps, peers
        ctx.layout = _layout(tensors[0])
        saved, total_NCHW = [], None
        for (images_NCHW, gamma_C, beta_C), each in zip(_by(3, tensors), by, strict=True):
            images_NCHW = images_NCHW.contiguous(memory_format=ctx.layout)
            saved += [images_NCHW, gamma_C, each.mean_C, each.size_C, each.square_C]
            term_NCHW = F.batch_norm(images_NCHW, each.mean_C, each.square_C, gamma_C, beta_C, False, 0.0, eps)
            total_NCHW = term_NCHW if total_NCHW is None else total_NCHW.add_(term_NCHW)
        ctx.save_for_backward(*saved)
        assert total_NCHW is not None, "a sum of something"
        return total_NCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        """With x' = (x - mean) / s, s = sqrt(size^2 + eps), and sums over the values of all peers,

        dL/dgamma = sum g x',  dL/dbeta = sum g,
        dL/dx = gamma / s * (g - sum g / count - dL/dgamma / s * size * dsize/dx),

        where size * dsize/dx is (x - mean) / count for the deviation, x / count for l_2, size * sign(x) / count for
        l_1, and size * sign(x) at the largest |x| for l_inf, in equal parts where several are the largest. While the
        sums travel, gamma / s * g is computed.
        """
        gradient_NCHW = gradient_NCHW.contiguous(memory_format=ctx.layout)
        terms = [
            _Backward(size, values, *tensors)
            for (size, values), tensors in zip(ctx.by, _by(5, ctx.saved_tensors), strict=True)
        ]
        sums = [term.sums(gradient_NCHW, ctx.eps) for term in terms]
        wanted = [ctx.needs_input_grad[at] for at in range(3, 3 + 3 * len(terms), 3)]
        # Every value moves the mean and the size of every worker: hence the sums over the peers. All of them are
        # exchanged where one is wanted: that is a function of the network, and the workers' networks are the same.
        exchange = None
        if ctx.peers is not None and any(wanted):
            exchange = _gather([part for pair in sums for part in pair], ctx.peers)
        gradients: list[Tensor | None] = []
        travelling = [
            term.own_part(gradient_NCHW, ctx.eps) if want else None for term, want in zip(terms, wanted, strict=True)
        ]
        totals: list[Any] = sums
        if exchange is not None:
            totals = list(_by(2, [part_PC.sum(0) for part_PC in exchange()]))
        for place, (term, part_NCHW) in enumerate(zip(terms, travelling, strict=True)):
            if part_NCHW is not None:
                term.add_shared_part(part_NCHW, totals[place], ctx.eps, ctx.peers)
            of_gamma, of_beta = ctx.needs_input_grad[4 + 3 * place : 6 + 3 * place]
            gamma_gradient_C, beta_gradient_C = sums[place]
            gradients += [part_NCHW, gamma_gradient_C if of_gamma else None, beta_gradient_C if of_beta else None]
        return None, None, None, *gradients


class _Backward(NamedTuple):
    """What the backward pass keeps of one term."""

    size: Size
    values: int  # of all peers, behind one statistic
    images_NCHW: Tensor
    gamma_C: Tensor
    mean_C: Tensor
    size_C: Tensor
    square_C: Tensor

    def sums(self, gradient_NCHW: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """dL/dgamma and dL/dbeta over the values of this worker."""
        scale_C = (self.square_C + eps).rsqrt()
        _, gamma_gradient_C, beta_gradient_C = torch.ops.aten.native_batch_norm_backward(
            gradient_NCHW, self.images_NCHW, self.gamma_C, self.mean_C, self.square_C, self.mean_C, scale_C,
            True, eps, [False, True, True],
        )  # fmt: skip
        return gamma_gradient_C, beta_gradient_C

    def own_part(self, gradient_NCHW: Tensor, eps: float) -> Tensor:
        """The part of the images' gradient that needs nothing of the peers: gamma / s * g."""
        return gradient_NCHW * _as(self.gamma_C * (self.square_C + eps).rsqrt(), gradient_NCHW)

    def add_shared_part(
        self, part_NCHW: Tensor, sums: tuple[Tensor, Tensor], eps: float, peers: dist.ProcessGroup | None
    ) -> None:
        """Complete the images' gradient, given dL/dgamma and dL/dbeta over the values of all peers."""
        gamma_sum_C, beta_sum_C = sums
        scale_C = (self.square_C + eps).rsqrt()
        back_C = -self.gamma_C * scale_C
        through_mean_C = back_C * beta_sum_C / self.values
        if self.size in (Size.DEVIATION, Size.L2):
            through_size_C = back_C * gamma_sum_C / self.values
            centre_C = self.mean_C if self.size is Size.DEVIATION else torch.zeros_like(self.mean_C)
            if self.images_NCHW.dtype != centre_C.dtype:  # half as wide: only batch norm's kernel sums in float32
                shared_NCHW = F.batch_norm(
                    self.images_NCHW, centre_C, self.square_C, through_size_C, through_mean_C, False, 0.0, eps
                )
                part_NCHW.add_(shared_NCHW)
                return
            direction_NCHW, slope_C = self.images_NCHW, through_size_C * scale_C
            shift_C = through_mean_C - slope_C * centre_C
        else:
            direction_NCHW, shift_C = self.images_NCHW.sign(), through_mean_C
            sharing: int | Tensor = self.values
            if self.size is Size.LINF:
                sharing = _keep_largest(direction_NCHW, self.images_NCHW, self.size_C, peers)
            slope_C = back_C * gamma_sum_C / sharing * self.size_C * scale_C
        part_NCHW.addcmul_(direction_NCHW, _as(slope_C, part_NCHW)).add_(_as(shift_C, part_NCHW))


def _by(size: int, row: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The row in pieces of so many; itertools has it from Python 3.12 on."""
    return (row[at : at + size] for at in range(0, len(row), size))


def _largest(images_NCHW: Tensor, over: list[int]) -> Tensor:
    """The largest |value| of each channel."""
    if images_NCHW.dim() == 4 and _layout(images_NCHW) is torch.contiguous_format:
        return images_NCHW.abs().amax(over)
    # Channels lie side by side. Blocks of up to 32 times all of them against each other first, and then the values of
    # the largest block: with fewer than 32 values to a row amax takes up to ten times as long.
    channels = images_NCHW.shape[1]
    block = math.gcd(images_NCHW.numel() // channels, 32)
    blocks = images_NCHW.movedim(1, -1).reshape(-1, block * channels)
    return blocks.abs().amax(0).view(block, channels).amax(0)


def _keep_largest(sign_NCHW: Tensor, images_NCHW: Tensor, size_C: Tensor, peers: dist.ProcessGroup | None) -> Tensor:
    """Set the sign to 0 where an image is not the largest of its channel; returns how many of all peers' are."""
    # 1 and 0 in the images' own type: a comparison into booleans, and their sum, take five times as long.
    largest_NCHW = images_NCHW.abs().eq_(_as(size_C, images_NCHW))
    sign_NCHW.mul_(largest_NCHW)
    ties_C = largest_NCHW.sum([0, *range(2, images_NCHW.dim())], dtype=size_C.dtype)
    if peers is not None:
        dist.all_reduce(ties_C, group=peers)
    return ties_C


def _as(values_C: Tensor, images_NCHW: Tensor) -> Tensor:
    """Values of the channels, of the images' type and ready to be broadcast over them."""
    return values_C.to(images_NCHW.dtype).view(-1, *(1 for _ in images_NCHW.shape[2:]))


def _layout(images_NCHW: Tensor) -> torch.memory_format:
    """Channels last where the images are so and nothing else."""
    last = images_NCHW.dim() == 4 and images_NCHW.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not images_NCHW.is_contiguous() else torch.contiguous_format
