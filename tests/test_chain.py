"""Residual blocks in one operation are what their layers are one after the other."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnscale.networks import chain, native
from bnscale.networks.norm import EPS, BatchNorm, composed, fuse
from bnscale.networks.resnet import Block
from bnscale.trial import Affine

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="this machine has no C compiler, or no AVX-512")

LAST = torch.channels_last
HALF = native.kernels() is not None and bool(native.kernels().bnscale_chain_half())
TYPES = [torch.float32, *([torch.bfloat16] if HALF else [])]


class Groups(BatchNorm):
    """A norm with a statistic, a gamma and a beta for each of G groups of images."""

    def __init__(self, groups: int, share: int, channels: int, draws: torch.Generator) -> None:
        super().__init__(channels, Affine.BOTH, groups * share)
        drawn = torch.randn(4, groups, channels, generator=draws)
        self.weight, self.bias = nn.Parameter(drawn[0]), nn.Parameter(drawn[1])
        self.running_mean, self.running_var = drawn[2].clone(), drawn[3].square() + 0.1

    def fuses(self, images_NCHW: Tensor) -> bool:
        return self.fused

    def forward(self, images_NCHW: Tensor) -> Tensor:
        rows = zip(self.running_mean, self.running_var, self.weight, self.bias, strict=True)
        parts = images_NCHW.chunk(len(self.weight))
        return torch.cat(
            [
                F.batch_norm(part, *statistics, gamma, beta, self.training, self.momentum, EPS)
                for part, (*statistics, gamma, beta) in zip(parts, rows, strict=True)
            ]
        )


class Case:
    """A few blocks, and images to put through."""

    def __init__(self, groups: int, share: int, channels: int, side: int, depth: int) -> None:
        self.draws = torch.Generator().manual_seed(channels * side)
        blocks = [
            Block("", channels, channels, 1, lambda name: Groups(groups, share, channels, self.draws))
            for _ in range(depth)
        ]
        for block in blocks:
            for conv in (block.conv1, block.conv2):
                nn.init.normal_(conv.weight, std=(9 * channels) ** -0.5, generator=self.draws)
                conv.weight.requires_grad = False
        self.blocks = nn.Sequential(*blocks).to(memory_format=LAST)
        fuse(self.blocks)
        self.x = self.images(groups * share, channels, side).abs()
        self.gradient = self.images(groups * share, channels, side)

    def images(self, images: int, channels: int, side: int) -> Tensor:
        return torch.randn(images, channels, side, side, generator=self.draws).contiguous(memory_format=LAST)

    def trained(self, *, chained: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Output, gradients of the images and of gamma and beta, and the running statistics that follow."""
        before = {name: value.clone() for name, value in self.blocks.named_buffers()}
        x = self.x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            if chained:
                y = chain.through(self.blocks, x)
                assert y.grad_fn is not None
                assert "Chain" in type(y.grad_fn).__name__
            else:
                with composed(self.blocks):
                    y = self.blocks(x)
        gradients = torch.autograd.grad(y, [x, *self.leaves()], self.gradient.to(dtype))
        after = [value.clone() for name, value in self.blocks.named_buffers() if "running" in name]
        for name, value in self.blocks.named_buffers():
            value.copy_(before[name])
        return [y.detach(), *gradients, *after]

    def leaves(self) -> list[nn.Parameter]:
        return [each for each in self.blocks.parameters() if each.requires_grad]

    def exact(self) -> list[Tensor]:
        """By torch's operations in double precision."""
        self.blocks.double()
        try:
            return self.trained(chained=False, dtype=torch.float64)
        finally:
            self.blocks.float()


def far(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Of each tensor, how far it is, to its own size."""
    return [float((a.double() - b).norm().detach() / b.norm().detach()) for a, b in zip(found, exact, strict=True)]


# Groups, images of each, channels, side, blocks.
CASES = [(1, 4, 16, 32, 1), (1, 3, 32, 16, 2), (1, 8, 64, 8, 3), (1, 2, 48, 8, 2), (3, 4, 16, 8, 2), (2, 2, 16, 24, 1)]


@pytest.mark.parametrize("case", CASES)
def test_outputs_statistics_and_gradients_are_those_of_the_layers_one_by_one(
    case: tuple[int, int, int, int, int],
) -> None:
    each = Case(*case)
    for found, right in zip(each.trained(chained=True), each.exact(), strict=True):
        assert far([found], [right])[0] < 1e-5


@pytest.mark.skipif(not HALF, reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("case", [(1, 8, 16, 32, 2), (1, 8, 32, 16, 2), (3, 8, 64, 8, 2)])
def test_in_bfloat16_nothing_is_farther_from_exact_than_by_the_layers_one_by_one(
    case: tuple[int, int, int, int, int],
) -> None:
    each = Case(*case)
    exact = each.exact()
    ours, theirs = (far(each.trained(chained=on, dtype=torch.bfloat16), exact) for on in (True, False))
    assert sum(ours) < 1.1 * sum(theirs)
    for own, other in zip(ours, theirs, strict=True):  # of few values, one by one: now this is nearer, now that
        assert own < 2 * other + 1e-4


@pytest.mark.parametrize("dtype", TYPES)
def test_no_bit_depends_on_the_number_of_threads(dtype: torch.dtype) -> None:
    each = Case(2, 5, 16, 16, 2)
    one = each.trained(chained=True, dtype=dtype)
    torch.set_num_threads(3)
    try:
        three = each.trained(chained=True, dtype=dtype)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(one, three, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", TYPES)
def test_evaluation_is_that_of_the_layers_one_by_one_and_moves_no_statistic(dtype: torch.dtype) -> None:
    for case in ((1, 4, 16, 32, 2), (2, 3, 64, 8, 3), (1, 5, 32, 16, 1)):
        each = Case(*case)
        each.blocks.eval()
        before = {name: value.clone() for name, value in each.blocks.named_buffers()}
        x = each.x.to(dtype)
        kept = x.clone()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            found = chain.through(each.blocks, x)
            assert torch.equal(x, kept)
            with composed(each.blocks):
                other = each.blocks(x)
        each.blocks.double()
        with torch.no_grad(), composed(each.blocks):
            right = each.blocks(each.x.double())
        assert far([found], [right])[0] < max(1e-5, 1.2 * far([other], [right])[0])
        assert all(torch.equal(value.float(), before[name]) for name, value in each.blocks.named_buffers())


def test_a_value_that_is_no_number_stays_none_in_its_group_and_reaches_no_other() -> None:
    each = Case(2, 3, 16, 8, 1)
    whole = each.trained(chained=True)
    each.x[1, 3, 4, 4] = torch.nan
    broken = each.trained(chained=True)
    assert broken[0][:3].isnan().any()
    assert torch.equal(broken[0][3:], whole[0][3:])
    assert all(slope[0].isnan().any() for slope in broken[2:6:2])  # of the gammas
    assert all(torch.equal(slope[1], was[1]) for slope, was in zip(broken[2:6], whole[2:6], strict=True))


def test_the_images_are_left_as_they_were_and_no_gradient_of_theirs_is_computed_unasked() -> None:
    each = Case(1, 3, 16, 8, 2)
    kept = each.x.clone()
    y = chain.through(each.blocks, each.x)
    slopes = torch.autograd.grad(y, each.leaves(), each.gradient)
    assert torch.equal(each.x, kept)
    asked = each.trained(chained=True)
    for slope, other in zip(slopes, asked[2 : 2 + len(slopes)], strict=True):
        # The running statistics moved in between, which training does not read.
        assert torch.equal(slope, other)


def test_a_weight_that_changes_is_laid_out_anew() -> None:
    each = Case(1, 3, 16, 8, 1)
    before = each.trained(chained=True)
    with torch.no_grad():
        each.blocks[0].conv2.weight.mul_(0.5).add_(0.01)
    after = each.trained(chained=True)
    assert not torch.equal(before[0], after[0])
    assert max(far(after, each.exact())) < 1e-5


@pytest.mark.parametrize("dtype", TYPES)
def test_no_bit_depends_on_how_blocks_are_parted_into_chains(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = Case(2, 3, 32, 16, 3)
    whole = each.trained(chained=True, dtype=dtype)
    monkeypatch.setattr(chain, "_changed", lambda module: module is each.blocks)
    parted = each.trained(chained=True, dtype=dtype)
    for a, b in zip(whole, parted, strict=True):
        assert torch.equal(a, b)


def test_who_looks_into_a_block_or_puts_something_in_its_place_gets_it_alone() -> None:
    each = Case(1, 3, 16, 8, 3)
    asked: list[int] = []
    alone = each.blocks[1].forward

    def counted(x: Tensor) -> Tensor:
        asked.append(1)
        return alone(x)

    right = each.trained(chained=True)
    each.blocks[1].forward = counted
    y = chain.through(each.blocks, each.x)
    assert asked == [1]
    assert far([y.detach()], [right[0].double()])[0] < 1e-5
    del each.blocks[1].forward
    seen: list[Tensor] = []
    for place in (each.blocks, each.blocks[0].relu1, each.blocks[2].conv1):
        hook = place.register_forward_hook(lambda module, given, out: seen.append(out))
        chain.through(each.blocks, each.x)
        hook.remove()
    assert len(seen) == 3


@pytest.mark.parametrize("own", ["weight that trains", "stride", "bias", "narrow images", "another type"])
def test_what_the_kernel_cannot_compute_is_left_to_the_layers(own: str) -> None:
    each = Case(1, 4, 16, 4 if own == "narrow images" else 8, 1)
    block = each.blocks[0]
    x = each.x
    if own == "weight that trains":
        block.conv1.weight.requires_grad = True
    elif own == "stride":
        block.conv1.stride = block.conv2.stride = (1, 2)
        block.conv2.padding = (1, 5)
    elif own == "bias":
        block.conv1.bias = nn.Parameter(torch.ones(16))
    elif own == "another type":
        each.blocks.double()
        x = x.double()
        for norm in (block.norm1, block.norm2):
            norm.fused = False
    assert not chain.links(block, x)
    if own != "stride":
        with composed(each.blocks):
            chain.through(each.blocks, x)
