"""Batch normalization, an addition and relu as one operation on the CPU: relu(norm(x) + plus), forward and backward.

torch's own operations read or write the images six to eight times forward and as often backward; fused.c does three or
four, and five or six; in evaluation two or three. What it keeps for the backward pass is x and, behind an addition, one
bit a value. To keep y instead and invert it would keep as much, and divide by gammas of which BN-only training brings
many near 0. Numbers agree with torch's to rounding, and with themselves to the last bit, whatever the number of
threads.

Legend: N images, C channels, H, W pixels, G groups of images with a statistic of their own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from bnscale.networks import native
from bnscale.networks.native import CHUNK, LANES

_TYPES = (torch.float32, torch.bfloat16)


def fits(images_NCHW: Tensor) -> bool:
    """Whether these images can be normalised here: on a CPU, in float32 or bfloat16, and so many channels."""
    return (
        images_NCHW.device.type == "cpu"
        and images_NCHW.dtype in _TYPES
        and images_NCHW.shape[1] % LANES == 0
        and forward_ad._current_level < 0  # a tangent would be lost
        and native.kernels() is not None
    )


def rectified(
    images_NCHW: Tensor,
    plus_NCHW: Tensor | None,
    gamma_GC: Tensor,
    beta_GC: Tensor,
    running_mean_GC: Tensor,
    running_var_GC: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """relu(gamma * (x - mean) / sqrt(variance + eps) + beta + plus), each of G consecutive groups of images by its own
    statistics, towards which the running ones move; the running variance moves by the unbiased one.

    Of images that `fits`. Can be differentiated once.
    """
    layout = _layout(images_NCHW)
    images_NCHW = images_NCHW.contiguous(memory_format=layout)
    if plus_NCHW is not None:
        plus_NCHW = plus_NCHW.to(images_NCHW.dtype).contiguous(memory_format=layout)
    given = (gamma_GC, beta_GC, running_mean_GC, running_var_GC)
    check(given)
    if images_NCHW.numel() < 2 * gamma_GC.numel():
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {images_NCHW.shape}")
    return _Rectified.apply(images_NCHW, plus_NCHW, *given, momentum, eps)


def evaluated(
    images_NCHW: Tensor,
    plus_NCHW: Tensor | None,
    gamma_GC: Tensor,
    beta_GC: Tensor,
    mean_GC: Tensor,
    var_GC: Tensor,
    eps: float,
) -> Tensor:
    """The same by statistics that are given and stay as they are, in the place of the images.

    Of images that `fits`. Has no gradient.
    """
    layout, channels = _layout(images_NCHW), images_NCHW.shape[1]
    images_NCHW = images_NCHW.contiguous(memory_format=layout)
    if plus_NCHW is not None:
        plus_NCHW = plus_NCHW.to(images_NCHW.dtype).contiguous(memory_format=layout)
    groups = gamma_GC.numel() // channels
    count = images_NCHW.numel() // channels // groups
    check((gamma_GC, beta_GC, mean_GC, var_GC))
    scale_GC = torch.empty(groups, channels, dtype=torch.float32)
    native.call(
        "bnscale_evaluate", groups, count, channels, images_NCHW, plus_NCHW, gamma_GC, beta_GC,
        mean_GC, var_GC, eps, scale_GC, images_NCHW,
        native.half(images_NCHW), torch.get_num_threads(),
    )  # fmt: skip
    return images_NCHW


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images_NCHW: Tensor,
        plus_NCHW: Tensor | None,
        gamma_GC: Tensor,
        beta_GC: Tensor,
        running_mean_GC: Tensor,
        running_var_GC: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        channels = images_NCHW.shape[1]
        groups = gamma_GC.numel() // channels
        count = images_NCHW.numel() // channels // groups
        wide = torch.empty(3, groups, channels, dtype=torch.float32)  # mean, 1 / deviation, scale
        y_NCHW = torch.empty_like(images_NCHW)
        signs = None if plus_NCHW is None else torch.empty(images_NCHW.numel() // LANES, dtype=torch.int16)
        room = _room(groups, count, channels)
        native.call(
            "bnscale_forward", groups, count, channels, images_NCHW, plus_NCHW, gamma_GC,
            beta_GC, running_mean_GC, running_var_GC, momentum, eps,
            *wide, y_NCHW, signs, room,
            native.half(images_NCHW), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(images_NCHW, wide, beta_GC, *([] if signs is None else [signs]))
        ctx.sizes, ctx.shape = (groups, count, channels), gamma_GC.shape
        return y_NCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        images_NCHW, wide, beta_GC, *rest = ctx.saved_tensors
        images_NCHW = images_NCHW.contiguous(memory_format=_layout(images_NCHW))  # hooks may lay it anew
        signs = rest[0] if rest else None
        groups, count, channels = ctx.sizes
        gradient_NCHW = gradient_NCHW.to(images_NCHW.dtype).contiguous(memory_format=_layout(images_NCHW))
        of_gamma_GC, of_beta_GC = torch.empty(2, *ctx.shape, dtype=torch.float32)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx_NCHW = torch.empty_like(images_NCHW) if wanted else None
        dplus_NCHW = torch.empty_like(images_NCHW) if wanted and signs is not None else None
        room = _room(groups, count, channels)
        native.call(
            "bnscale_backward", groups, count, channels, gradient_NCHW, images_NCHW, signs,
            *wide, beta_GC, of_gamma_GC, of_beta_GC,
            dx_NCHW, dplus_NCHW, room, native.half(images_NCHW),
            torch.get_num_threads(),
        )  # fmt: skip
        return dx_NCHW, dplus_NCHW, of_gamma_GC, of_beta_GC, None, None, None, None


def check(of_channels: tuple[Tensor, ...]) -> None:
    """What is read by its address alone: a float32 for each group and channel, in order."""
    for each_GC in of_channels:
        assert each_GC.dtype is torch.float32, each_GC.dtype
        assert each_GC.is_contiguous(), each_GC.stride()
        assert each_GC.shape == of_channels[0].shape, each_GC.shape


def _layout(images_NCHW: Tensor) -> torch.memory_format:
    return torch.channels_last if images_NCHW.dim() == 4 else torch.contiguous_format


def _room(groups: int, count: int, channels: int) -> Tensor:
    """For two sums of each chunk and channel."""
    rows = max(1, CHUNK // channels)
    return torch.empty(2 * groups * -(-count // rows) * channels, dtype=torch.float32)
