"""Residual blocks in one operation are what their layers are one after the other."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from bnscale.networks import chain, native
from bnscale.networks.norm import EPS, BatchNorm, composed, fuse
from bnscale.networks.resnet import Block, through
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
                y = through(self.blocks, x)
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
            found = through(each.blocks, x)
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
    y = through(each.blocks, each.x)
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
    monkeypatch.setattr(chain, "changed", lambda module: module is each.blocks)
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
    y = through(each.blocks, each.x)
    assert asked == [1]
    assert far([y.detach()], [right[0].double()])[0] < 1e-5
    del each.blocks[1].forward
    seen: list[Tensor] = []
    for place in (each.blocks, each.blocks[0].relu1, each.blocks[2].conv1):
        hook = place.register_forward_hook(lambda module, given, out: seen.append(out))
        through(each.blocks, each.x)
        hook.remove()
    assert len(seen) == 3


def test_blocks_in_training_and_in_evaluation_are_each_what_they_are() -> None:
    each = Case(1, 4, 16, 8, 3)
    each.blocks[1].eval()
    each.blocks[2].norm1.eval()
    right = Case(1, 4, 16, 8, 3)
    right.blocks[1].eval()
    right.blocks[2].norm1.eval()
    right.blocks.double()
    with torch.no_grad():
        found = through(each.blocks, each.x)
        with composed(right.blocks):
            assert far([found], [right.blocks(right.x.double())])[0] < 1e-5
    for (name, moved), other in zip(each.blocks.named_buffers(), right.blocks.buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(moved.double(), other.double(), rtol=1e-5, atol=1e-6)


def test_without_gradients_a_chain_in_training_keeps_nothing_and_computes_the_same() -> None:
    each, other = Case(1, 4, 32, 16, 3), Case(1, 4, 32, 16, 3)
    with torch.no_grad():
        found = through(each.blocks, each.x)
    y = through(other.blocks, other.x)
    assert torch.equal(found, y.detach())
    assert all(map(torch.equal, each.blocks.buffers(), other.blocks.buffers()))
    made: list[int] = []
    real = torch.empty_like

    def counted(like: Tensor, **given: object) -> Tensor:
        made.append(1)
        return real(like, **given)  # type: ignore[call-overload]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "empty_like", counted)
        through(each.blocks, each.x)
    assert len(made) == 2  # whatever the number of blocks


def test_a_weight_that_changes_before_the_way_back_is_an_error_as_it_is_layer_by_layer() -> None:
    each = Case(1, 3, 16, 8, 2)
    y = through(each.blocks, each.x.requires_grad_())
    with torch.no_grad():
        each.blocks[0].conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_weight_that_is_put_in_the_place_of_another_is_laid_out_anew() -> None:
    each = Case(1, 3, 16, 8, 1)
    each.trained(chained=True)
    each.blocks[0].conv1.weight.data = -each.blocks[0].conv1.weight.data
    assert max(far(each.trained(chained=True), each.exact())) < 1e-5


def test_what_is_kept_may_be_laid_anew_by_hooks_on_saved_tensors() -> None:
    each = Case(1, 3, 16, 8, 2)
    right = each.trained(chained=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        again = each.trained(chained=True)
    assert all(map(torch.equal, right, again))


def test_images_and_gradients_may_lie_as_they_like_and_need_not_be_square() -> None:
    each = Case(1, 3, 16, 8, 2)
    each.x = each.x.repeat(1, 1, 3, 1).contiguous()
    each.gradient = torch.randn(each.x.shape, generator=each.draws)
    assert max(far(each.trained(chained=True), each.exact())) < 1e-5


def test_a_chain_cannot_be_traced_without_content_or_differentiated_twice() -> None:
    each = Case(1, 2, 16, 8, 1)
    right = each.trained(chained=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, pytest.raises(RuntimeError, match="cannot be traced"):
        through(each.blocks, fake.from_tensor(each.x))
    assert torch.equal(each.trained(chained=True)[0], right[0])  # nothing of that is left
    y = through(each.blocks, each.x.requires_grad_())
    (slope,) = torch.autograd.grad(y.square().sum(), [each.x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own
def test_a_tangent_is_not_lost() -> None:
    each = Case(1, 2, 16, 8, 1)
    each.blocks.eval()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(each.x, torch.ones_like(each.x))
        for norm in (each.blocks[0].norm1, each.blocks[0].norm2):
            norm.fuses = partial(BatchNorm.fuses, norm)
        assert forward_ad.unpack_dual(through(each.blocks, dual)).tangent is not None


def _trains(each: Case) -> None:
    each.blocks[0].conv2.weight.requires_grad = True


def _strides(each: Case) -> None:
    each.blocks[0].conv2.stride = (2, 2)


def _adds(each: Case) -> None:
    each.blocks[0].conv1.bias = nn.Parameter(torch.ones(32))


def _mirrors(each: Case) -> None:
    each.blocks[0].conv2.padding_mode = "reflect"


def _parts(each: Case) -> None:
    each.blocks[0].conv2 = nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False).requires_grad_(False)


def _is_double(each: Case) -> None:
    each.blocks[0].conv2.double()


def _rectifies_otherwise(each: Case) -> None:
    each.blocks[0].relu1 = nn.GELU()  # type: ignore[assignment]


def _has_a_shortcut(each: Case) -> None:
    each.blocks[0].shortcut = nn.Sequential(nn.Conv2d(32, 32, 1))


def _is_wide(each: Case) -> None:
    each.x = each.x.double()


def _is_narrow(each: Case) -> None:
    each.x = each.x[..., :4]


def _is_thin(each: Case) -> None:
    each.x = each.x[:, :24]


def _is_empty(each: Case) -> None:
    each.x = each.x[:, :, :0]


def _is_watched(each: Case) -> None:
    each.blocks[0].conv2.register_forward_hook(lambda *given: None)


CHANGES = [
    _trains, _strides, _adds, _mirrors, _parts, _is_double, _rectifies_otherwise, _has_a_shortcut, _is_wide, _is_narrow,
    _is_thin, _is_empty, _is_watched,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_kernel_cannot_compute_is_left_to_the_layers(change: Callable[[Case], None]) -> None:
    each = Case(1, 4, 32, 8, 1)
    assert chain.links(each.blocks[0], each.x)
    change(each)
    assert not chain.links(each.blocks[0], each.x)


def test_images_of_another_type_than_convolutions_have_are_left_to_the_layers() -> None:
    each = Case(1, 4, 32, 8, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not chain.links(each.blocks[0], each.x)
        assert chain.links(each.blocks[0], each.x.bfloat16()) is HALF
    assert not chain.links(each.blocks[0], each.x.bfloat16())


def test_a_block_of_another_class_is_computed_by_it() -> None:
    class Other(Block):
        def forward(self, x_NCHW: Tensor) -> Tensor:
            return 2 * x_NCHW

    each = Case(1, 2, 16, 8, 2)
    each.blocks[0].__class__ = Other
    alone = through(nn.Sequential(each.blocks[1]), 2 * each.x)
    assert torch.equal(through(each.blocks, each.x), alone)
