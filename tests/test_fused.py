"""Batch norm, addition and relu in one operation are what they are one after the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from examples import digits
from torch import Tensor, nn

from bnscale.data import Resident
from bnscale.engine import Gang
from bnscale.engine.local import LocalEngine
from bnscale.networks import build, fused, native
from bnscale.networks.norm import BatchNorm, composed, fuse
from bnscale.probes import Snapshot
from bnscale.trial import Affine, Network, Norm, Precision, Trainable

NOWHERE = Path("/nonexistent")
EPS, MOMENTUM = 1e-5, 0.1

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="this machine has no C compiler, or no AVX-512")


class Case:
    """Images, what is added, gradients; of G groups with a statistic of their own."""

    def __init__(self, groups: int, share: int, channels: int, side: int, *, adds: bool) -> None:
        draws = torch.Generator().manual_seed(channels * side)
        shape = (groups * share, channels, side, side)

        def drawn(*of: int) -> Tensor:
            return torch.randn(of, generator=draws)

        def images() -> Tensor:
            return drawn(*shape).contiguous(memory_format=torch.channels_last)

        self.groups = groups
        self.x, self.gradient = 3 * images() + 5, images()
        self.plus = images() if adds else None
        self.gamma, self.beta = drawn(groups, channels), drawn(groups, channels)
        self.mean, self.var = drawn(groups, channels), drawn(groups, channels).square()

    def to(self, dtype: torch.dtype) -> "Case":
        """Images rounded to a type; everything of a channel stays as it is."""
        self.x, self.gradient = self.x.to(dtype), self.gradient.to(dtype)
        self.plus = None if self.plus is None else self.plus.to(dtype)
        return self

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        wanted = [self.x, self.gamma, self.beta, *([] if self.plus is None else [self.plus])]
        return [each.detach().to(dtype or each.dtype).requires_grad_() for each in wanted]

    def fused(self) -> list[Tensor]:
        """Output, running statistics, gradients."""
        x, gamma, beta, *plus = leaves = self.leaves()
        running = [self.mean.clone(), self.var.clone()]
        y = fused.rectified(x, plus[0] if plus else None, gamma, beta, *running, MOMENTUM, EPS)
        return [y.detach(), *running, *torch.autograd.grad(y, leaves, self.gradient)]

    def evaluated(self) -> Tensor:
        """Output by the statistics that there are."""
        return fused.evaluated(self.x.clone(), self.plus, self.gamma, self.beta, self.mean, self.var, EPS)

    def exactly_evaluated(self) -> Tensor:
        """The same by torch's operations in double precision, group by group."""
        given = [each.double() for each in (self.mean, self.var, self.gamma, self.beta)]
        parts = self.x.double().chunk(self.groups)
        y = torch.cat([F.batch_norm(part, *row, eps=EPS) for part, *row in zip(parts, *given, strict=True)])
        return F.relu(y if self.plus is None else y + self.plus)

    def exact(self) -> list[Tensor]:
        """The same by torch's operations in double precision, group by group."""
        x, gamma, beta, *plus = leaves = self.leaves(torch.float64)
        running = [self.mean.double(), self.var.double()]
        parts = [
            F.batch_norm(part, *(each[group] for each in running), gamma[group], beta[group], True, MOMENTUM, EPS)
            for group, part in enumerate(x.chunk(self.groups))
        ]
        y = torch.cat(parts)
        y = F.relu(y + plus[0] if plus else y)
        return [y.detach(), *running, *torch.autograd.grad(y, leaves, self.gradient.double())]


CASES = [(1, 8, 16, 32, True), (1, 6, 32, 16, False), (1, 5, 48, 7, True), (3, 4, 64, 8, False), (2, 3, 16, 5, True)]


@pytest.mark.parametrize(("groups", "share", "channels", "side", "adds"), CASES)
def test_outputs_statistics_and_gradients_are_those_of_the_operations_one_by_one(
    groups: int, share: int, channels: int, side: int, adds: bool
) -> None:
    case = Case(groups, share, channels, side, adds=adds)
    for mine, right in zip(case.fused(), case.exact(), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=2e-6, atol=4e-6 * float(right.abs().max()))


@pytest.mark.parametrize("adds", [True, False])
def test_bfloat16_images_are_rounded_once_and_their_sums_are_float32(adds: bool) -> None:
    case = Case(1, 8, 32, 16, adds=adds).to(torch.bfloat16)
    mine, right = case.fused(), case.exact()
    half = 2.0**-8  # of a value's last place in bfloat16
    for name, a, b in zip(("y", "mean", "var", "x", "gamma", "beta", "plus"), mine, right, strict=False):
        images = name in ("y", "x", "plus")
        assert a.dtype is (torch.bfloat16 if images else torch.float32)
        close = half if images else 1e-5
        torch.testing.assert_close(a.double(), b, rtol=close, atol=(1e-3 if images else 1e-5) * float(b.abs().max()))


@pytest.mark.parametrize(("groups", "share", "channels", "side", "adds"), CASES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 2.0**-8)])
def test_evaluation_is_that_of_the_operations_one_by_one_and_moves_no_statistic(
    groups: int, share: int, channels: int, side: int, adds: bool, dtype: torch.dtype, close: float
) -> None:
    case = Case(groups, share, channels, side, adds=adds).to(dtype)
    before = [case.mean.clone(), case.var.clone()]
    mine, right = case.evaluated(), case.exactly_evaluated()
    assert mine.dtype is dtype
    torch.testing.assert_close(mine.double(), right, rtol=close, atol=2e-6 * float(right.max()))
    assert torch.equal(case.mean, before[0])
    assert torch.equal(case.var, before[1])


def test_evaluation_hands_on_a_value_that_is_no_number_and_none_beside_it() -> None:
    clean, spoilt = (Case(2, 4, 32, 8, adds=True) for _ in range(2))
    spoilt.x[1, 3, 2, 2] = float("nan")
    spoilt.var[1, 5] = float("nan")
    mine, right = spoilt.evaluated(), clean.evaluated()
    assert mine[1, 3, 2, 2].isnan()
    assert mine[4:, 5].isnan().all()
    mine[1, 3, 2, 2], mine[4:, 5] = right[1, 3, 2, 2], right[4:, 5]
    assert torch.equal(mine, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_the_number_of_threads(dtype: torch.dtype) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            case = Case(2, 5, 32, 15, adds=True).to(dtype)
            results.append([*case.fused(), case.evaluated()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_value_that_is_no_number_stays_none_in_its_channel_and_group_and_reaches_no_other() -> None:
    clean, spoilt = (Case(2, 4, 32, 8, adds=True) for _ in range(2))
    spoilt.x[1, 3, 2, 2] = float("nan")
    for mine, right in zip(spoilt.fused(), clean.fused(), strict=True):
        of_images = mine.dim() == 4
        rest = torch.ones_like(mine, dtype=torch.bool)
        if of_images:
            rest[:4, 3] = False
        else:
            rest[0, 3] = False
        assert torch.equal(mine[rest], right[rest])
    y, mean, var, x, gamma, *_ = spoilt.fused()
    assert all(each.isnan().any() for each in (y[:4, 3], mean[0, 3], var[0, 3], x[:4, 3], gamma[0, 3]))


def test_nothing_is_computed_of_images_that_need_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 4, 16, 8, adds=False)
    asked, call = [], native.call

    def spied(name: str, *given: Any) -> None:
        if name == "bnscale_backward":
            asked.append(given[-5])  # where the gradient of the images would be put
        call(name, *given)

    monkeypatch.setattr(native, "call", spied)
    gamma = case.gamma.requires_grad_()
    y = fused.rectified(case.x, None, gamma, case.beta, case.mean, case.var, MOMENTUM, EPS)
    (slope,) = torch.autograd.grad(y, [gamma], case.gradient)
    assert asked == [None]
    right = Case(1, 4, 16, 8, adds=False).exact()[4]
    torch.testing.assert_close(slope.double(), right, rtol=1e-5, atol=1e-4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many norms were fused: one entry each."""
    calls: list[int] = []
    real = BatchNorm.given

    def given(self: BatchNorm, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        calls.append(1)
        return real(self, images_NCHW)

    monkeypatch.setattr(BatchNorm, "given", given)
    return calls


NETWORKS = {
    "gamma and beta alone": {"depth": 14},
    "the whole network": {"depth": 14, "trainable": Trainable.ALL},
    "a VGG": {"network": Network.VGG, "depth": 11, "trainable": Trainable.ALL},
}


@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
def test_a_network_trains_to_the_same_numbers(changes: dict[str, object], counted: list[int]) -> None:
    trial = digits(lr=0.1, **changes)
    ends = []
    for apart in (False, True):
        engine = LocalEngine(build(trial), trial, Gang(), None)
        data, calls, losses = Resident(trial, NOWHERE, torch.device("cpu")), len(counted), []
        if apart:
            for norm in engine.module.modules():
                if isinstance(norm, BatchNorm):
                    norm.fused = False
        for step in range(2):  # later, one value of many will have passed 0 in one of the two, as by any other rounding
            loss = engine(*data.batch(step))
            engine.backward(loss)
            engine.step(trial.rate(step))
            losses.append(loss.detach())
        assert (len(counted) > calls) is not apart
        ends.append([torch.stack(losses), *engine.module.state_dict().values()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hooks_bfloat16_evaluation_and_other_norm_batches_get_what_they_ask_for(counted: list[int]) -> None:
    trial = digits(depth=8)
    images_NCHW = torch.randn(trial.batch, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    network = build(trial).to(memory_format=torch.channels_last)
    fuse(network)
    sites = sum(isinstance(each, nn.ReLU) for each in network.modules())

    def norms_fused() -> int:
        counted.clear()
        network(images_NCHW)
        return len(counted)

    assert norms_fused() == sites
    with composed(network):
        assert norms_fused() == 0
    assert norms_fused() == sites
    with torch.autocast("cpu", torch.bfloat16):
        assert norms_fused() == sites
    seen: list[Tensor] = []
    hook = network.get_submodule("blocks.1.norm2").register_forward_hook(lambda *passed: seen.append(passed[2]))
    assert norms_fused() == sites - 1
    assert len(seen) == 1
    hook.remove()
    for norm in network.modules():
        if isinstance(norm, BatchNorm):
            norm.norm_batch = trial.batch // 2
    assert norms_fused() == 0
    network.eval()
    assert norms_fused() == 0  # somebody may ask for a gradient
    with torch.no_grad():
        assert norms_fused() == sites  # by running statistics, whatever the images behind one
        hook = network.get_submodule("blocks.1.norm2").register_forward_hook(lambda *passed: seen.append(passed[2]))
        assert norms_fused() == sites - 1
        assert len(seen) == 2
        hook.remove()


KINDS: dict[str, dict[str, object]] = {
    "batch": {},
    "ghost batches": {"norm_batch": 4},
    "gamma alone": {"affine": Affine.GAMMA},
    "bfloat16": {"precision": Precision.BF16},
    "l1": {"norm": Norm.L1, "trainable": Trainable.ALL},
    "renorm": {
        "norm": Norm.RENORM, "renorm_r": 3.0, "renorm_d": 5.0, "renorm_start": 0.0, "renorm_r_end": 0.5,
        "renorm_d_end": 0.5,
    },
    "noise behind the norm": {"norm": Norm.NOISY, "trainable": Trainable.ALL},
    "a VGG": {"network": Network.VGG, "depth": 11},
}  # fmt: skip


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_network_is_evaluated_to_the_same_numbers(changes: dict[str, object], counted: list[int]) -> None:
    trial = digits(**changes)
    engine = LocalEngine(build(trial), trial, Gang(), None)
    data, logits = Resident(trial, NOWHERE, torch.device("cpu")), []
    engine.backward(engine(*data.batch(0)))  # statistics leave 0 and 1
    at = Snapshot(trial, 1, engine, data)
    counted.clear()
    logits.append(at.logits(data.batch(1)[0]))
    assert bool(counted) is (trial.norm is not Norm.NOISY)
    with composed(engine.module):
        logits.append(at.logits(data.batch(1)[0]))
    close = 2.0**-5 if trial.precision is Precision.BF16 else 1e-5
    torch.testing.assert_close(*logits, rtol=close, atol=close)


def test_without_a_compiler_networks_train_all_the_same(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc")
    native.kernels.cache_clear()
    try:
        trial = digits(depth=8)
        engine = LocalEngine(build(trial), trial, Gang(), None)
        loss = engine(*Resident(trial, NOWHERE, torch.device("cpu")).batch(0))
        engine.backward(loss)
        assert native.kernels() is None
        assert not counted
    finally:
        native.kernels.cache_clear()


def test_one_value_a_channel_is_refused_as_torch_refuses_it() -> None:
    one = torch.ones(1, 16)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused.rectified(one, None, one[0].clone(), one[0].clone(), one[0].clone(), one[0].clone(), MOMENTUM, EPS)
