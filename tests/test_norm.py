"""Batch statistics stand on `norm_batch` images: on one worker, in ghost groups, and across workers."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from crew import Crew
from examples import digits
from torch import Tensor, nn

from bnscale.networks.norm import BatchNorm
from bnscale.networks.workers import alone, check, settle, spread
from bnscale.trial import Affine, Refusal

CHANNELS = 5
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def images(count: int, side: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, CHANNELS, side, side, generator=generator, dtype=torch.float64) * 2 + 3).to(dtype)


def layer(norm_batch: int, dtype: torch.dtype = torch.float64) -> BatchNorm:
    norm = BatchNorm(CHANNELS, Affine.BOTH, norm_batch).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(3, -1, CHANNELS))
    return norm


def reading(norm: nn.BatchNorm2d, inputs: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Everything that one training-mode pass forward and backward gives."""
    leaf = inputs.clone().requires_grad_()
    output = norm(leaf)
    output.backward(cotangent)
    return {
        "output": output.detach(),
        "images_gradient": leaf.grad,
        "gamma_gradient": norm.weight.grad.clone(),
        "beta_gradient": norm.bias.grad.clone(),
        "running_mean": norm.running_mean.clone(),
        "running_var": norm.running_var.clone(),
        "tracked": norm.num_batches_tracked.clone(),
    }


# --- one worker ---------------------------------------------------------------------------------


def test_a_whole_batch_behind_one_statistic_is_torchs_own_layer_to_the_last_bit():
    inputs, cotangent = images(8, dtype=torch.float32), images(8, seed=1, dtype=torch.float32)
    ours = layer(8, torch.float32)
    torchs = nn.BatchNorm2d(CHANNELS)
    torchs.load_state_dict(ours.state_dict())
    expected = reading(torchs, inputs, cotangent)
    for name, value in reading(ours, inputs, cotangent).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_each_ghost_group_has_its_own_statistics_and_the_running_ones_move_once_by_their_mean(layout):
    inputs, cotangent = images(8).contiguous(memory_format=layout), images(8, seed=1)
    got = reading(layer(2), inputs, cotangent)

    groups = [reading(layer(2), inputs[i : i + 2], cotangent[i : i + 2]) for i in range(0, 8, 2)]
    torch.testing.assert_close(got["output"], torch.cat([g["output"] for g in groups]))
    torch.testing.assert_close(got["images_gradient"], torch.cat([g["images_gradient"] for g in groups]))
    for name in ("gamma_gradient", "beta_gradient"):
        torch.testing.assert_close(got[name], sum(g[name] for g in groups))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(got[name], torch.stack([g[name] for g in groups]).mean(0))
    assert got["tracked"] == 1
    assert got["output"].is_contiguous(memory_format=layout)


def test_evaluation_uses_running_statistics_for_any_number_of_images():
    norm = layer(4)
    norm.train()(images(4))
    norm.eval()
    for count in (1, 3, 8):
        expected = F.batch_norm(images(count), norm.running_mean, norm.running_var, norm.weight, norm.bias)
        assert torch.equal(norm(images(count)), expected)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("count", [3, 6])
def test_images_that_cannot_be_parted_into_statistics_are_refused_in_training(count):
    with pytest.raises(ValueError, match=f"norm_batch 4: {count} images on each of 1 workers"):
        layer(4)(images(count))


@pytest.mark.parametrize(
    ("norm_batch", "legal"),
    [(1, {1, 2, 3, 4, 6, 12}), (4, {1, 3, 6, 12}), (6, {1, 2, 4, 6, 12}), (12, {1, 2, 3, 4, 6, 12})],
)
def test_workers_are_legal_exactly_where_shares_and_statistics_nest(norm_batch, legal):
    for workers in range(1, 15):
        if workers in legal:
            check(digits(batch=12, norm_batch=norm_batch), workers)
        else:
            with pytest.raises(Refusal, match=f"^workers {workers}: "):
                check(digits(batch=12, norm_batch=norm_batch), workers)


def test_a_cut_statistic_is_refused_with_the_nearest_legal_numbers():
    with pytest.raises(Refusal, match=re.escape("workers 3: must divide batch 128 into equal shares; try 2 or 4")):
        check(digits(batch=128, norm_batch=128), 3)
    with pytest.raises(Refusal, match=r"workers 2: 6 images on each .* norm_batch 4, .*; try 1 or 3"):
        check(digits(batch=12, norm_batch=4), 2)
    with pytest.raises(Refusal, match=r"workers 0: must divide batch 12 into equal shares; try 1$"):
        check(digits(batch=12, norm_batch=4), 0)
    with pytest.raises(Refusal, match=r"workers 24: must divide batch 12 into equal shares; try 12$"):
        check(digits(batch=12, norm_batch=4), 24)


# --- several workers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    crew = Crew(4)
    crew(meet, str(tmp_path_factory.mktemp("gang") / "meeting"))
    yield crew
    crew.dismiss()


def meet(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=4)


def share(rank: int, whole: Tensor) -> Tensor:
    return whole.chunk(4)[rank]


def shared_reading(rank: int, norm_batch: int, side: int, layout: str, seed: int = 0) -> dict[str, Tensor]:
    norm = layer(norm_batch)
    spread(norm, 8)
    inputs = share(rank, images(8, side, seed)).contiguous(memory_format=LAYOUTS[layout])
    got = reading(norm, inputs, share(rank, images(8, side, seed + 1)))
    assert got["output"].is_contiguous(memory_format=LAYOUTS[layout])
    settle(norm)
    return got | {"running_mean": norm.running_mean, "running_var": norm.running_var}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("norm_batch", "side"), [(8, 3), (4, 3), (2, 3), (1, 3), (8, 1), (4, 1)], ids=lambda each: str(each)
)
def test_four_workers_give_what_one_gives_with_the_whole_batch_forward_and_backward(crew, norm_batch, side, layout):
    expected = reading(layer(norm_batch), images(8, side), images(8, side, seed=1))
    got = crew(shared_reading, norm_batch, side, layout)
    for name in ("output", "images_gradient"):
        torch.testing.assert_close(torch.cat([g[name] for g in got]), expected[name], rtol=1e-11, atol=1e-11)
    for name in ("gamma_gradient", "beta_gradient"):
        torch.testing.assert_close(sum(g[name] for g in got), expected[name], rtol=1e-11, atol=1e-11)
    for name in ("running_mean", "running_var", "tracked"):
        for g in got:
            torch.testing.assert_close(g[name], expected[name], rtol=1e-12, atol=1e-12)
            assert torch.equal(g[name], got[0][name])


def far_from_zero(rank: int) -> tuple[Tensor, Tensor]:
    norm = layer(8, torch.float32)
    spread(norm, 8)
    output = norm(share(rank, images(8, 16, dtype=torch.float32) / 100 + 1000))
    return output.detach(), norm.running_var


def test_a_mean_far_above_the_deviation_does_not_cancel_the_variance(crew):
    inputs = images(8, 16, dtype=torch.float32) / 100 + 1000
    expected = layer(8)
    expected(inputs.double())
    for _, running_var in crew(far_from_zero):
        torch.testing.assert_close(
            (running_var.double() - 0.9) * 10, (expected.running_var - 0.9) * 10, rtol=0.01, atol=1e-6
        )


def in_bfloat16(rank: int) -> dict[str, Tensor]:
    norm = layer(8, torch.float32)
    spread(norm, 8)
    cotangent = images(8, seed=1, dtype=torch.bfloat16)
    return reading(norm, share(rank, images(8, dtype=torch.bfloat16)), share(rank, cotangent))


def test_bfloat16_images_keep_statistics_and_affine_gradients_in_float32(crew):
    expected = reading(
        layer(8), images(8, dtype=torch.bfloat16).double(), images(8, seed=1, dtype=torch.bfloat16).double()
    )
    got = crew(in_bfloat16)
    for name in ("output", "images_gradient"):
        whole = torch.cat([g[name] for g in got])
        assert whole.dtype is torch.bfloat16
        torch.testing.assert_close(whole.double(), expected[name], rtol=0.02, atol=0.02)
    for name in ("running_mean", "running_var"):
        assert got[0][name].dtype is torch.float32
        torch.testing.assert_close(got[0][name].double(), expected[name], rtol=1e-5, atol=1e-5)
    for name in ("gamma_gradient", "beta_gradient"):
        total = sum(g[name] for g in got)
        assert total.dtype is torch.float32
        torch.testing.assert_close(total.double(), expected[name], rtol=1e-4, atol=1e-3)


def behind_frozen_weights(rank: int) -> tuple[Tensor, Tensor | None]:
    """The first layer of a BN-only network: nothing below it learns. And a frozen layer under a learning one."""
    first, second = layer(8), layer(8).requires_grad_(False)
    spread(nn.Sequential(first, second), 8)
    second(first(share(rank, images(8)))).mul(share(rank, images(8, seed=1))).sum().backward()
    return first.weight.grad, second.weight.grad


def test_frozen_layers_above_and_below_still_give_the_exact_gradient(crew):
    first, second = layer(8), layer(8).requires_grad_(False)
    second(first(images(8))).mul(images(8, seed=1)).sum().backward()
    got = crew(behind_frozen_weights)
    torch.testing.assert_close(sum(gradient for gradient, _ in got), first.weight.grad, rtol=1e-9, atol=1e-9)
    assert all(gradient is None for _, gradient in got)


def leader_looks(rank: int) -> dict[str, Any] | None:
    """Only the leading worker runs a pass: a collective in it would wait for ever."""
    network = nn.Sequential(layer(8), layer(4), layer(2))
    spread(network, 8)
    placed = [norm.peers for norm in network]
    got = None
    if rank == 0:
        with alone(network):
            got = {"output": network(images(8)).detach(), "state": network.state_dict()}
        with pytest.raises(RuntimeError, match="a probe failed"), alone(network):
            raise RuntimeError("a probe failed")
    assert [norm.peers for norm in network] == placed
    return got


def test_alone_a_worker_sees_a_whole_batch_as_one_worker_does(crew):
    network = nn.Sequential(layer(8), layer(4), layer(2))
    output = network(images(8))
    got = crew(leader_looks)[0]
    assert torch.equal(got["output"], output)
    for name, value in network.state_dict().items():
        assert torch.equal(got["state"][name], value), name


def placed_often(rank: int) -> tuple[int, list[int]]:
    network = nn.Sequential(layer(8), layer(4), layer(2))
    groups = set()
    for _ in range(5):
        spread(network, 8)
        groups |= {norm.peers for norm in network}
    sizes = [0 if norm.peers is None else dist.get_world_size(norm.peers) for norm in network]
    with pytest.raises(Refusal, match="workers 4: 3 images on each"):
        spread(layer(4), 12)
    return len(groups), sizes


def test_groups_of_workers_are_made_once_and_hold_norm_batch_images(crew):
    assert crew(placed_often) == [(3, [4, 2, 0])] * 4


def settled(rank: int) -> tuple[bool, bool]:
    whole, parted = layer(8), layer(4)
    network = nn.Sequential(whole, parted)
    spread(network, 8)
    network(share(rank, images(8)))
    before = whole.running_var.clone(), parted.running_var.clone()
    settle(network)
    return torch.equal(before[0], whole.running_var), torch.equal(before[1], parted.running_var)


def test_settling_moves_only_statistics_that_differ_between_workers(crew):
    assert crew(settled) == [(True, False)] * 4


def half_a_share(rank: int) -> None:
    norm = layer(8)
    spread(norm, 8)
    with pytest.raises(ValueError, match="norm_batch 8: 1 images on each of 4 workers"):
        norm(share(rank, images(4)))


def test_a_share_that_does_not_fill_the_statistic_is_refused_before_any_worker_waits(crew):
    crew(half_a_share)
