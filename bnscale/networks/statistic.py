"""Statistics over the images of one or several workers, and normalizing by them, forward and backward.

Every pass over the images is a native kernel. Where workers share a statistic they hold equally many images.

Shapes: N images of this worker, C channels, H, W pixels, P workers behind one statistic.
"""

import math
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


def statistic(images_NCHW: Tensor, size: Size, channels: int, peers: dist.ProcessGroup | None) -> Statistic:
    """The mean and the size over all images of the peers; in float32 where the images are half as wide."""
    images_NCHW = images_NCHW.detach().contiguous(memory_format=_layout(images_NCHW))
    count = images_NCHW.numel() // channels  # values of one channel on this worker
    wide = torch.promote_types(images_NCHW.dtype, torch.float32)
    over = [0, *range(2, images_NCHW.dim())]
    # The running statistics given here only set the type of what comes back.
    like_C = torch.zeros(channels, dtype=wide, device=images_NCHW.device)
    own = list(torch.batch_norm_update_stats(images_NCHW, like_C, like_C.clone(), 1.0))
    if size is Size.L1:
        # Not torch.linalg.vector_norm: with channels last it takes four times as long.
        own.append(images_NCHW.abs().sum(over, dtype=wide) / count)
    elif size is Size.LINF:
        own.append(_largest(images_NCHW, over).to(wide))

    if peers is not None:
        own = _combined(own, size, peers)
        count *= dist.get_world_size(peers)
    mean_C, variance_C, *of_size = own
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


def _combined(own: list[Tensor], size: Size, peers: dist.ProcessGroup) -> list[Tensor]:
    """Of all peers' images, from the mean, the variance and, where it is another, the size of each one's own.

    Means and variances as by Chan, Golub & LeVeque 1979: a sum of squares would cancel where the mean is large.
    """
    own_SC = torch.stack(own)
    all_PSC = own_SC.new_empty(dist.get_world_size(peers), *own_SC.shape)
    dist.all_gather(list(all_PSC.unbind()), own_SC, group=peers)
    mean_PC, variance_PC, *of_size = all_PSC.unbind(1)
    mean_C = mean_PC.mean(0)
    variance_C = variance_PC.mean(0) + (mean_PC - mean_C).square().mean(0)
    return [mean_C, variance_C, *(each.amax(0) if size is Size.LINF else each.mean(0) for each in of_size)]


def normalised(
    images_NCHW: Tensor, gamma_C: Tensor, beta_C: Tensor, by: Statistic, eps: float, peers: dist.ProcessGroup | None
) -> Tensor:
    """gamma * (images - mean) / sqrt(size^2 + eps) + beta, in the images' own type.

    The gradient knows that mean and size are functions of the images of all peers; it can be taken once.
    """
    return _Normalise.apply(images_NCHW, gamma_C, beta_C, by, eps, peers)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images_NCHW: Tensor,
        gamma_C: Tensor,
        beta_C: Tensor,
        by: Statistic,
        eps: float,
        peers: dist.ProcessGroup | None,
    ) -> Tensor:
        layout = _layout(images_NCHW)
        images_NCHW = images_NCHW.contiguous(memory_format=layout)
        ctx.save_for_backward(images_NCHW, gamma_C, by.mean_C, by.size_C, by.square_C)
        ctx.size, ctx.count, ctx.eps, ctx.peers, ctx.layout = by.size, by.values, eps, peers, layout
        return F.batch_norm(images_NCHW, by.mean_C, by.square_C, gamma_C, beta_C, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        """With x' = (x - mean) / s, s = sqrt(size^2 + eps), and sums over the values of all peers,

        dL/dgamma = sum g x',  dL/dbeta = sum g,
        dL/dx = gamma / s * (g - sum g / count - dL/dgamma / s * size * dsize/dx),

        where size * dsize/dx is (x - mean) / count for the deviation, x / count for l_2, size * sign(x) / count for
        l_1, and size * sign(x) at the largest |x| for l_inf, in equal parts where several are the largest.
        """
        images_NCHW, gamma_C, mean_C, size_C, square_C = ctx.saved_tensors
        gradient_NCHW = gradient_NCHW.contiguous(memory_format=ctx.layout)
        scale_C = (square_C + ctx.eps).rsqrt()
        _, gamma_gradient_C, beta_gradient_C = torch.ops.aten.native_batch_norm_backward(
            gradient_NCHW, images_NCHW, gamma_C, mean_C, square_C, mean_C, scale_C, True, ctx.eps, [False, True, True]
        )
        images_gradient_NCHW = None
        if ctx.needs_input_grad[0]:
            # Every value moves the mean and the size of every worker: hence the sums over the peers.
            gamma_sum_C, beta_sum_C = gamma_gradient_C, beta_gradient_C
            if ctx.peers is not None:
                sums_2C = torch.stack([gamma_sum_C, beta_sum_C])
                dist.all_reduce(sums_2C, group=ctx.peers)
                gamma_sum_C, beta_sum_C = sums_2C
            slope_C = gamma_C * scale_C
            back_C = -slope_C
            through_mean_C = back_C * beta_sum_C / ctx.count
            if ctx.size in (Size.DEVIATION, Size.L2):
                through_size_C = back_C * gamma_sum_C / ctx.count
                centre_C = mean_C if ctx.size is Size.DEVIATION else torch.zeros_like(mean_C)
                images_gradient_NCHW = F.batch_norm(
                    images_NCHW, centre_C, square_C, through_size_C, through_mean_C, False, 0.0, ctx.eps
                )
            else:
                sign_NCHW, sharing = images_NCHW.sign(), ctx.count
                if ctx.size is Size.LINF:
                    sharing = _keep_largest(sign_NCHW, images_NCHW, size_C, ctx.peers)
                through_size_C = back_C * gamma_sum_C / sharing * size_C * scale_C
                images_gradient_NCHW = torch.addcmul(
                    _as(through_mean_C, images_NCHW), sign_NCHW, _as(through_size_C, images_NCHW), out=sign_NCHW
                )
            images_gradient_NCHW.addcmul_(gradient_NCHW, _as(slope_C, gradient_NCHW))
        return (
            images_gradient_NCHW,
            gamma_gradient_C if ctx.needs_input_grad[1] else None,
            beta_gradient_C if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
        )


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
