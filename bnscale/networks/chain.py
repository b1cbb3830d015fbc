"""Residual blocks whose convolutions are frozen as one operation on the CPU, forward and backward.

Convolutions of few channels wait for memory. Where a norm follows each of them and only norms train, nothing but the
convolutions' outputs must exist for longer than an image stays in a cache: chain.c normalises an image as it goes into
a convolution and sums what the next norm needs as it comes out. For a block of two layers images are read or written 6
times forward and 10 times backward, where the operations one by one do it 10 and 18 times. Convolutions are direct,
and as no weight trains, weights are laid out for them once. Kept for the backward pass are the convolutions' outputs
and, of each block, one bit a value; gradients of weights are never computed.

Numbers agree with the operations one by one to rounding, and with themselves to the last bit, whatever the number of
threads. Legend: N images, C channels, H, W pixels, G groups of images with a statistic of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from bnscale.networks import fused, native
from bnscale.networks.native import CHUNK, LANES
from bnscale.networks.norm import EPS, BatchNorm

if TYPE_CHECKING:
    from bnscale.networks.resnet import Block

COLUMNS = 8  # of an image are computed at once: its width is a multiple


def links(block: "Block", x_NCHW: Tensor) -> bool:
    """Whether a block can be `chained`, given images of the shape and the type that come."""
    norms, convs, relus = (block.norm1, block.norm2), (block.conv1, block.conv2), (block.relu1, block.relu2)
    return (
        isinstance(block.shortcut, nn.Identity)
        and all(isinstance(norm, BatchNorm) and norm.fuses(x_NCHW) for norm in norms)  # first: a compiler sees no more
        and block.norm1.training == block.norm2.training
        and _fits(x_NCHW)
        and all(_frozen(conv, x_NCHW.shape[1]) for conv in convs)
        and all(type(relu) is nn.ReLU for relu in relus)
        and not any(changed(module) for module in block.children())
    )


def _fits(x_NCHW: Tensor) -> bool:
    if x_NCHW.dim() != 4 or x_NCHW.device.type != "cpu" or not x_NCHW.numel():
        return False
    _, channels, _, width = x_NCHW.shape
    if width % COLUMNS or channels % LANES or channels > CHUNK:
        return False
    convolved = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    library = native.kernels()
    return (
        library is not None
        and x_NCHW.dtype is convolved
        and (convolved is torch.float32 or (convolved is torch.bfloat16 and bool(library.bnscale_chain_half())))
    )


def _frozen(conv: nn.Module, channels: int) -> bool:
    """Whether it is a convolution that chain.c computes."""
    return (
        type(conv) is nn.Conv2d
        and not conv.weight.requires_grad
        and conv.weight.shape == (channels, channels, 3, 3)
        and conv.weight.dtype is torch.float32
        and conv.bias is None
        and (conv.stride, conv.padding, conv.dilation) == ((1, 1), (1, 1), (1, 1))
        and conv.padding_mode == "zeros"
    )


def changed(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into a module or comes out, or computes something else in its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or nn.modules.module._has_any_global_hook() or "forward" in module.__dict__


@dataclass(frozen=True)
class _Link:
    """A frozen convolution and the norm behind it."""

    weight: Tensor
    mean_GC: Tensor  # running statistics
    var_GC: Tensor
    momentum: float


def chained(blocks: "Sequence[Block]", x_NCHW: Tensor) -> Tensor:
    """Blocks that link, one after the other. How they are parted into calls changes no bit."""
    if not blocks:
        return x_NCHW
    links: list[_Link] = []
    values: list[Tensor] = []
    for block in blocks:
        for conv, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
            assert isinstance(norm, BatchNorm), "see `links`"
            given = norm.given(x_NCHW)
            fused.check(given)
            values += given[:2]
            links.append(_Link(conv.weight, *given[2:], norm.momentum))
    x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
    if not blocks[0].norm1.training:
        return _evaluated(x_NCHW, links, values)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x_NCHW, *values)):
        return _Chain.apply(x_NCHW, links, *values)
    return _forward(x_NCHW, links, values, None)


class _Shape:
    """Sizes as chain.c takes them, and room for it to work in."""

    def __init__(self, x_NCHW: Tensor, gamma_GC: Tensor) -> None:
        images, self.channels, height, self.width = x_NCHW.shape
        self.groups = gamma_GC.numel() // self.channels
        assert images % self.groups == 0, "each group has as many images"
        self.sizes = (self.groups, images // self.groups, height, self.width, self.channels)
        self.threads = torch.get_num_threads()
        self.half = native.half(x_NCHW)
        rows = max(1, CHUNK // self.channels)
        pixels = height * self.width
        self.chunks = images * (pixels // rows if pixels % rows == 0 else 1)
        aligned = LANES * self.channels + (height + 2) * (self.width + 2) * self.channels
        self.rooms = torch.empty(self.threads * aligned, dtype=x_NCHW.dtype)

    def sums(self) -> Tensor:
        """For two of each chunk and channel."""
        return torch.empty(2, self.chunks, self.channels, dtype=torch.float32)


class _Kept(NamedTuple):
    """For the backward pass."""

    of_links: list[Tensor]  # of each convolution: its output, and mean, 1 / deviation, scale of the norm behind it
    signs: list[Tensor]  # of each block


def _forward(x_NCHW: Tensor, links: Sequence[_Link], values: Sequence[Tensor], kept: _Kept | None) -> Tensor:
    """By the statistics of the images, towards which the running ones move."""
    shape = _Shape(x_NCHW, values[0])
    sums, y_NCHW, h_NCHW = shape.sums(), x_NCHW, torch.empty_like(x_NCHW)
    norm: list[Tensor | None] = [None] * 3  # mean, scale and beta of the norm that is still before what comes
    for place, link in enumerate(links):
        gamma_GC, beta_GC = values[2 * place : 2 * place + 2]
        adds = place > 0 and place % 2 == 0  # the block before ends
        before = x_NCHW if place <= 2 else h_NCHW  # what the block before began with
        signs = _signs(x_NCHW, kept) if adds else None
        out_NCHW = torch.empty_like(x_NCHW) if kept or place == 0 else y_NCHW  # an image goes before another comes
        wide = list(torch.empty(3, shape.groups, shape.channels))
        native.call(
            "bnscale_chain_forward", *shape.sizes, y_NCHW, before if adds else None, *norm, h_NCHW, signs,
            _laid_out(link.weight, x_NCHW), out_NCHW, gamma_GC, link.mean_GC, link.var_GC, link.momentum, EPS, *wide,
            sums, shape.rooms, shape.half, shape.threads,
        )  # fmt: skip
        if kept:
            kept.of_links.extend([out_NCHW, *wide])
        y_NCHW, norm = out_NCHW, [wide[0], wide[2], beta_GC]
    before, signs = x_NCHW if len(links) == 2 else h_NCHW, _signs(x_NCHW, kept)
    native.call("bnscale_chain_last", *shape.sizes, y_NCHW, before, *norm, h_NCHW, signs, shape.half, shape.threads)
    return h_NCHW


def _signs(x_NCHW: Tensor, kept: _Kept | None) -> Tensor | None:
    if kept is None:
        return None
    kept.signs.append(torch.empty(x_NCHW.numel() // LANES, dtype=torch.int16))
    return kept.signs[-1]


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, links: list[_Link], *values: Tensor) -> Tensor:
        kept = _Kept([], [])
        y_NCHW = _forward(x_NCHW, links, values, kept)
        ctx.save_for_backward(*kept.of_links, *kept.signs, *values[1::2], *(link.weight for link in links))
        ctx.many, ctx.like = len(links), values[0].shape
        return y_NCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        many, saved = ctx.many, list(ctx.saved_tensors)
        of_links, signs, betas, weights = (
            saved[: 4 * many], saved[4 * many : -2 * many], saved[-2 * many : -many], saved[-many:]
        )  # fmt: skip
        outs, means, inverses, scales = (of_links[part::4] for part in range(4))
        outs = [out_NCHW.contiguous(memory_format=torch.channels_last) for out_NCHW in outs]  # hooks may lay them anew
        shape = _Shape(outs[0], means[0])
        gradient_NCHW = gradient_NCHW.to(outs[0].dtype).contiguous(memory_format=torch.channels_last)
        slopes = [torch.empty(2, *ctx.like) for _ in outs]  # of gamma and beta
        here, there = shape.sums(), shape.sums()
        g_NCHW, t_NCHW = torch.empty_like(outs[0]), torch.empty_like(outs[0])
        native.call(
            "bnscale_chain_end", *shape.sizes, gradient_NCHW, signs[-1], g_NCHW, outs[-1], means[-1], inverses[-1],
            scales[-1], *slopes[-1], here, shape.half, shape.threads,
        )  # fmt: skip
        for place in reversed(range(many)):
            if place == 0 and not ctx.needs_input_grad[0]:
                break
            second, before = place % 2 == 1, place - 1
            norm_before: list[Tensor | None] = [None] * 7
            if place:
                norm_before = [
                    outs[before],
                    means[before],
                    inverses[before],
                    scales[before],
                    betas[before],
                    *slopes[before],
                ]
            native.call(
                "bnscale_chain_backward", *shape.sizes, g_NCHW if second else t_NCHW, outs[place], means[place],
                scales[place], betas[place], here[1], here[0], int(not second),
                _laid_out(weights[place], outs[0], backward=True), t_NCHW, None if second else g_NCHW,
                None if second or not place else signs[place // 2 - 1], *norm_before, there, shape.rooms, shape.half,
                shape.threads,
            )  # fmt: skip
            here, there = there, here
            if not second:
                g_NCHW, t_NCHW = t_NCHW, g_NCHW
        of_values = [part for pair in slopes for part in pair]
        return g_NCHW if ctx.needs_input_grad[0] else None, None, *of_values


def _evaluated(x_NCHW: Tensor, links: Sequence[_Link], values: Sequence[Tensor]) -> Tensor:
    """By the running statistics. Has no gradient."""
    shape = _Shape(x_NCHW, values[0])
    come, y_NCHW, h_NCHW = x_NCHW, torch.empty_like(x_NCHW), torch.empty_like(x_NCHW)
    norm: list[Tensor | None] = [None] * 3
    for place, link in enumerate(links):
        gamma_GC, beta_GC = values[2 * place : 2 * place + 2]
        before = (x_NCHW if place == 2 else h_NCHW) if place and place % 2 == 0 else None
        native.call(
            "bnscale_chain_forward", *shape.sizes, come, before, *norm, h_NCHW, None, _laid_out(link.weight, x_NCHW),
            y_NCHW, None, None, None, 0.0, EPS, None, None, None, None, shape.rooms, shape.half, shape.threads,
        )  # fmt: skip
        scale_GC = (gamma_GC.double() / (link.var_GC.double() + EPS).sqrt()).float()
        come, norm = y_NCHW, [link.mean_GC, scale_GC, beta_GC]
    before = x_NCHW if len(links) == 2 else h_NCHW
    native.call("bnscale_chain_last", *shape.sizes, y_NCHW, before, *norm, h_NCHW, None, shape.half, shape.threads)
    return h_NCHW


# --- weights ------------------------------------------------------------------------------------------

_laid: Any = WeakTensorKeyDictionary()  # of each weight: its version, and how it has been laid out


def _laid_out(weight_OIhw: Tensor, images_NCHW: Tensor, *, backward: bool = False) -> Tensor:
    """A weight as `tile` in chain.c reads it for such images, or turned round for the way back.

    Kept, for it is frozen, until it changes or moves; a change in its place through `.data` nobody sees.
    """
    together = 1 if images_NCHW.shape[3] % 16 == 0 or weight_OIhw.shape[0] % (2 * LANES) else 2
    key = (images_NCHW.dtype, together, backward)
    if isinstance(weight_OIhw, FakeTensor) or weight_OIhw.is_inference():
        return _lay_out(weight_OIhw, *key)
    state = weight_OIhw._version, weight_OIhw.data_ptr()
    before, known = _laid.get(weight_OIhw, (None, {}))
    if before != state:
        known = {}
        _laid[weight_OIhw] = state, known
    if key not in known:
        known[key] = _lay_out(weight_OIhw, *key)
    found: Tensor = known[key]
    return found


@torch.no_grad()
def _lay_out(weight_OIhw: Tensor, dtype: torch.dtype, together: int, backward: bool) -> Tensor:
    if backward:
        weight_OIhw = weight_OIhw.flip(2, 3).transpose(0, 1)
    outputs, inputs = weight_OIhw.shape[:2]
    blocks = outputs // LANES // together
    each = weight_OIhw.to(dtype).permute(2, 1, 3, 0)
    if dtype is torch.float32:
        return each.reshape(3, inputs, 3, blocks, together, LANES).permute(3, 0, 1, 2, 4, 5).contiguous()
    pairs = each.reshape(3, inputs // 2, 2, 3, blocks, together, LANES)
    return pairs.permute(4, 0, 1, 3, 5, 6, 2).contiguous()
