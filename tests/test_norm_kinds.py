"""Every norm is what its paper writes down: values, gradients, running statistics; alone, in groups and on gangs."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from crew import Crew
from examples import digits
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from bnscale.anatomy import Site
from bnscale.networks.norm import _LAYERS, EPS, BatchNorm, BatchRenorm, GroupNorm, Noise, NormLayer
from bnscale.networks.resnet import Block
from bnscale.networks.workers import alone, settle, spread
from bnscale.trial import Affine, Norm, Trainable, Trial

CHANNELS = 6
RENORM = {"renorm_r": 1.5, "renorm_d": 0.3, "renorm_start": 0.0, "renorm_r_end": 0.0, "renorm_d_end": 0.0}
OVER_IMAGES = [norm for norm in Norm if norm.over_images]
OF_ONE_IMAGE = [Norm.LAYER, Norm.GROUP, Norm.INSTANCE]
POWERS = {Norm.L1: 1.0, Norm.L2: 2.0, Norm.LINF: math.inf}
NORMALIZING = [norm for norm in Norm if not norm.parameterless]
SHAPES = [(8, CHANNELS, 3, 3), (8, CHANNELS)]


def asked(norm: Norm, batch: int = 8, norm_batch: int = 8, **changes: Any) -> Trial:
    groups = {"groups": 3} if norm is Norm.GROUP else {}
    renorm = RENORM if norm is Norm.RENORM else {}
    values = {"norm": norm, "trainable": Trainable.ALL, "width": 3 if groups else 1} | groups | renorm | changes
    return digits(batch=batch, norm_batch=norm_batch, **values)


def layer(norm: Norm, norm_batch: int = 8, affine: Affine | None = Affine.BOTH, **changes: Any) -> Any:
    """As a trial gets it, with gammas and betas of all signs, in float64."""
    trial = asked(norm, norm_batch=norm_batch, **changes)
    found = _LAYERS[norm](trial, Site("norm", 1, CHANNELS, 3), affine).double()
    with torch.no_grad():
        if isinstance(found, NormLayer) and found.weight is not None:
            found.weight.copy_(torch.linspace(-1, 2, CHANNELS))
        if isinstance(found, NormLayer) and found.bias is not None:
            found.bias.copy_(torch.linspace(3, -1, CHANNELS))
    return found


def images(shape: tuple[int, ...] = SHAPES[0], seed: int = 0) -> Tensor:
    """Every channel with a mean and a deviation of its own."""
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, sd = torch.linspace(-2, 3, CHANNELS), torch.linspace(0.5, 2, CHANNELS)
    each = (1, -1) if len(shape) == 2 else (1, -1, 1, 1)
    return draws * sd.view(each).double() + mean.view(each).double()


def over(inputs: Tensor) -> list[int]:
    return [0, *range(2, inputs.dim())]


def as_written(norm: Norm, inputs: Tensor) -> Tensor:
    """The paper's formula by plain tensor operations, without gamma and beta."""
    mean = inputs.mean(over(inputs), keepdim=True)
    if norm in POWERS:
        p = POWERS[norm]
        size = inputs.abs().amax(over(inputs), keepdim=True) if p == math.inf else None
        size = (inputs.abs() ** p).mean(over(inputs), keepdim=True) ** (1 / p) if size is None else size
        return (inputs - mean) / (size.square() + EPS).sqrt()
    return (inputs - mean) / (inputs.var(over(inputs), correction=0, keepdim=True) + EPS).sqrt()


def scaled(norm: NormLayer, normalised: Tensor) -> Tensor:
    each = (1, -1, *(1 for _ in normalised.shape[2:]))
    out = normalised if norm.weight is None else normalised * norm.weight.view(each)
    return out if norm.bias is None else out + norm.bias.view(each)


def reading(norm: Any, inputs: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Everything that one training-mode pass forward and backward gives."""
    leaf = inputs.clone().requires_grad_()
    output = norm(leaf)
    output.backward(cotangent)
    return (
        {"output": output.detach(), "images": leaf.grad}
        | {name: p.grad.clone() for name, p in norm.named_parameters()}
        | {f"buffer {name}": b.clone() for name, b in norm.named_buffers()}
    )


# --- one image ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_group_layer_and_instance_norm_equal_torchs(layout):
    inputs = images().contiguous(memory_format=layout)
    theirs = {
        Norm.GROUP: nn.GroupNorm(3, CHANNELS, eps=EPS),
        Norm.LAYER: nn.LayerNorm([CHANNELS, 3, 3], eps=EPS),
        Norm.INSTANCE: nn.InstanceNorm2d(CHANNELS, eps=EPS, affine=True),
    }
    for kind, reference in theirs.items():
        ours, reference = layer(kind), reference.double()
        with torch.no_grad():
            for mine, yours in ((ours.weight, reference.weight), (ours.bias, reference.bias)):
                yours.copy_(mine if yours.dim() == 1 else mine.view(-1, 1, 1).expand_as(yours))
        leaf, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
        got, expected = ours(leaf), reference(other)
        torch.testing.assert_close(got, expected)
        for output in (got, expected):
            output.backward(images(seed=1))
        torch.testing.assert_close(leaf.grad, other.grad)
        summed = (
            reference.weight.grad if reference.weight.dim() == 1 else reference.weight.grad.sum([1, 2]),
            reference.bias.grad if reference.bias.dim() == 1 else reference.bias.grad.sum([1, 2]),
        )
        torch.testing.assert_close((ours.weight.grad, ours.bias.grad), summed)


@pytest.mark.parametrize("kind", OF_ONE_IMAGE)
def test_a_norm_of_one_image_sees_no_other_and_is_the_same_in_evaluation(kind):
    norm = layer(kind)
    whole = norm(images())
    for i in range(8):
        torch.testing.assert_close(norm(images()[i : i + 1]), whole[i : i + 1])
    assert torch.equal(norm.eval()(images()), whole)
    assert not list(norm.buffers())


def test_one_group_is_layer_norm_and_as_many_groups_as_channels_is_instance_norm():
    with torch.no_grad():
        for groups, kind in ((1, Norm.LAYER), (CHANNELS, Norm.INSTANCE)):
            torch.testing.assert_close(
                GroupNorm(CHANNELS, None, groups).double()(images()), layer(kind, affine=None)(images())
            )


# --- a batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=["maps", "vectors"])
@pytest.mark.parametrize("kind", [Norm.BATCH, *POWERS])
def test_values_and_gradients_are_those_of_the_formula(kind, shape):
    norm, inputs, cotangent = layer(kind), images(shape), images(shape, seed=1)
    got = reading(norm, inputs, cotangent)
    leaf = inputs.clone().requires_grad_()
    expected = scaled(norm, as_written(kind, leaf))
    parameters = dict(norm.named_parameters())
    gradients = torch.autograd.grad(expected, [leaf, *parameters.values()], cotangent)
    torch.testing.assert_close(got["output"], expected.detach())
    for name, gradient in zip(["images", *parameters], gradients, strict=True):
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", POWERS)
def test_gradients_of_the_lp_norms_are_differences_of_values(kind):
    norm = layer(kind)
    inputs = images((8, CHANNELS, 2, 2)).requires_grad_()
    assert gradcheck(norm, (inputs,), check_batched_grad=False)


def test_several_largest_values_share_the_gradient_of_the_largest():
    inputs = images((8, CHANNELS)).clamp(-2, 2)  # several at the bounds of most channels
    assert int(((inputs.abs() == 2).sum(0) > 1).sum()) > 2
    norm = layer(Norm.LINF)
    got = reading(norm, inputs, images((8, CHANNELS), seed=1))["images"]
    leaf = inputs.clone().requires_grad_()
    # torch's amax shares equally among the largest.
    (expected,) = torch.autograd.grad(scaled(norm, as_written(Norm.LINF, leaf)), leaf, images((8, CHANNELS), seed=1))
    torch.testing.assert_close(got, expected)


def test_l2_norm_is_batch_norm_times_deviation_over_root_mean_square():
    inputs = images()
    mean, variance = inputs.mean(over(inputs)), inputs.var(over(inputs), correction=0)
    factor = ((variance + EPS) / (variance + mean.square() + EPS)).sqrt()
    batch, l2 = layer(Norm.BATCH, affine=None)(inputs), layer(Norm.L2, affine=None)(inputs)
    torch.testing.assert_close(l2, batch * factor.view(1, -1, 1, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=["maps", "vectors"])
def test_batch_renormalization_with_r_one_and_d_zero_is_batch_normalization(shape):
    renorm, batch = layer(Norm.RENORM, renorm_r=1.0, renorm_d=0.0), layer(Norm.BATCH)
    for seed in range(3):
        got = reading(renorm, images(shape, seed), images(shape, seed + 9))
        expected = reading(batch, images(shape, seed), images(shape, seed + 9))
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}")
        renorm.zero_grad()
        batch.zero_grad()


def test_batch_renormalization_within_its_bounds_normalizes_training_as_evaluation_does():
    renorm = layer(Norm.RENORM, renorm_r=100.0, renorm_d=100.0)
    renorm.running_mean.copy_(torch.linspace(-1, 1, CHANNELS))
    renorm.running_var.copy_(torch.linspace(0.3, 3, CHANNELS))
    expected = renorm.eval()(images())
    torch.testing.assert_close(renorm.train()(images()), expected, rtol=1e-9, atol=1e-9)


def test_batch_renormalization_holds_r_and_d_within_bounds_that_rise_in_a_line():
    renorm = BatchRenorm(CHANNELS, None, 8, r_max=3.0, d_max=5.0, r_rise=(10.0, 20.0), d_rise=(10.0, 15.0)).double()
    inputs = images()
    normalised = as_written(Norm.BATCH, inputs)
    variance, mean = inputs.var(over(inputs), correction=0) + EPS, inputs.mean(over(inputs))
    for tracked, r_risen, d_risen in ((0, 0, 0), (10, 0, 0), (12.5, 0.25, 0.5), (15, 0.5, 1), (20, 1, 1), (99, 1, 1)):
        renorm.num_batches_tracked = torch.tensor(tracked)
        renorm.running_mean.fill_(1.0)
        renorm.running_var.fill_(0.01)
        sigma = math.sqrt(0.01 + EPS)
        r_max, d_max = 1 + 2 * r_risen, 5 * d_risen
        r = (variance.sqrt() / sigma).clamp(1 / r_max, r_max).view(1, -1, 1, 1)
        d = ((mean - 1.0) / sigma).clamp(-d_max, d_max).view(1, -1, 1, 1)
        torch.testing.assert_close(renorm(inputs), normalised * r + d)


def test_the_correction_of_batch_renormalization_has_no_gradient():
    renorm, inputs = layer(Norm.RENORM, renorm_r=2.0, renorm_d=1.0), images()
    renorm.running_var.fill_(0.5)
    r = ((inputs.var(over(inputs), correction=0) + EPS) / (0.5 + EPS)).sqrt().clamp(1 / 2, 2)
    d = (inputs.mean(over(inputs)) / math.sqrt(0.5 + EPS)).clamp(-1, 1)
    leaf = inputs.clone().requires_grad_()
    expected = scaled(renorm, as_written(Norm.BATCH, leaf) * r.view(1, -1, 1, 1) + d.view(1, -1, 1, 1))
    (gradient,) = torch.autograd.grad(expected, leaf, images(seed=1))
    torch.testing.assert_close(reading(renorm, inputs, images(seed=1))["images"], gradient)


# --- batch normalization's backward pass ----------------------------------------------------------


def test_the_gradient_of_batch_normalization_is_the_closed_form():
    """dL/dx = gamma / s (g - mean(g) - x' mean(g x')): Ioffe & Szegedy 2015, section 3, gathered into one line."""
    norm, inputs, g = layer(Norm.BATCH), images(), images(seed=1)
    got = reading(norm, inputs, g)
    s = (inputs.var(over(inputs), correction=0, keepdim=True) + EPS).sqrt()
    x = (inputs - inputs.mean(over(inputs), keepdim=True)) / s
    gamma = norm.weight.detach().view(1, -1, 1, 1)
    mean_g, mean_gx = (v.mean(over(inputs), keepdim=True) for v in (g, g * x))
    torch.testing.assert_close(got["images"], gamma / s * (g - mean_g - x * mean_gx))
    torch.testing.assert_close(got["weight"], (g * x).sum(over(inputs)))
    torch.testing.assert_close(got["bias"], g.sum(over(inputs)))
    # A gradient that takes mean and deviation for constants lacks the last two terms, which are not small here.
    assert float((mean_g + x * mean_gx).abs().mean()) > 0.1 * float(g.abs().mean())


@pytest.mark.parametrize("norm_batch", [8, 4])
@pytest.mark.parametrize("affine", [*Affine, None])
def test_batch_normalization_can_be_differentiated_twice(norm_batch, affine):
    norm = layer(Norm.BATCH, norm_batch=norm_batch, affine=affine)
    inputs = images((8, CHANNELS, 2, 1))[:, :2].clone().requires_grad_()
    norm = BatchNorm(2, affine, norm_batch).double()
    parameters = tuple(p.detach().clone().requires_grad_() for p in norm.parameters())
    names = [name for name, _ in norm.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        fresh = {name: b.clone() for name, b in norm.named_buffers()}
        return torch.func.functional_call(norm, dict(zip(names, values, strict=True)) | fresh, (x,))

    assert gradcheck(call, (inputs, *parameters))
    assert gradgradcheck(call, (inputs, *parameters))


# --- running statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OVER_IMAGES)
def test_evaluation_divides_by_the_running_size_after_taking_the_running_mean(kind):
    norm = layer(kind)
    for seed in range(400):
        norm(images(seed=seed))
    many = torch.cat([images(seed=seed) for seed in range(360, 400)])
    mean = many.mean(over(many))
    square = {
        Norm.L1: torch.stack([images(seed=s).abs().mean(over(many)) for s in range(300, 400)]).square().mean(0),
        Norm.L2: many.square().mean(over(many)),
        Norm.LINF: torch.stack([images(seed=s).abs().amax(over(many)) for s in range(300, 400)]).square().mean(0),
    }.get(kind, many.var(over(many)))
    torch.testing.assert_close(norm.running_mean, mean, rtol=0.05, atol=0.1)
    torch.testing.assert_close(norm.running_var, square, rtol=0.15, atol=0.05)
    inputs, (m, v) = images(seed=999), (norm.running_mean, norm.running_var)
    expected = F.batch_norm(inputs, m, v, norm.weight, norm.bias, False, 0.0, EPS)
    assert torch.equal(norm.eval()(inputs), expected * 9 / 8 if kind is Norm.NOISY else expected)
    assert norm.num_batches_tracked == 400


@pytest.mark.parametrize("kind", OVER_IMAGES)
def test_each_ghost_group_has_its_own_statistics(kind):
    norm, inputs = layer(kind, norm_batch=2), images()
    if kind is Norm.NOISY:
        norm = BatchNorm(CHANNELS, Affine.BOTH, 2).double()  # noise is of the whole batch; tested below
    whole = reading(norm, inputs, images(seed=1))
    parts = []
    for i in range(0, 8, 2):
        own = layer(kind if kind is not Norm.NOISY else Norm.BATCH, norm_batch=2)
        own.load_state_dict({k: v for k, v in norm.state_dict().items() if "running" not in k}, strict=False)
        own.num_batches_tracked.zero_()
        parts.append(reading(own, inputs[i : i + 2], images(seed=1)[i : i + 2]))
    torch.testing.assert_close(whole["output"], torch.cat([p["output"] for p in parts]))
    torch.testing.assert_close(whole["images"], torch.cat([p["images"] for p in parts]))
    for name in ("buffer running_mean", "buffer running_var"):
        torch.testing.assert_close(whole[name], torch.stack([p[name] for p in parts]).mean(0))


# --- gamma and beta -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NORMALIZING)
def test_gamma_alone_beta_alone_and_neither_are_both_with_the_other_at_rest(kind):
    for affine, rest in ((Affine.GAMMA, {"bias": 0.0}), (Affine.BETA, {"weight": 1.0}), (None, {})):
        part, both = layer(kind, affine=affine), layer(kind)
        at_rest = rest or {"bias": 0.0, "weight": 1.0}
        with torch.no_grad():
            for name, value in at_rest.items():
                getattr(both, name).fill_(value)
        got, expected = (reading(norm, images(), images(seed=1)) for norm in (part, both))
        assert {n for n, _ in part.named_parameters()} == {"weight", "bias"} - at_rest.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(part.eval()(images()), both.eval()(images()))


@pytest.mark.parametrize("affine", [*Affine, None])
@pytest.mark.parametrize("kind", NORMALIZING)
def test_bfloat16_images_stay_so_and_statistics_and_affine_gradients_stay_float32(kind, affine):
    norm = layer(kind, affine=affine).float()
    half, cotangent = images().bfloat16(), images(seed=1).bfloat16()
    got = reading(norm, half, cotangent)
    assert got["output"].dtype is got["images"].dtype is torch.bfloat16
    assert all(value.dtype is torch.float32 for name, value in got.items() if name in ("weight", "bias"))
    if kind is Norm.NOISY:
        return  # other noise is drawn in other precision of the sum
    expected = reading(layer(kind, affine=affine), half.double(), cotangent.double())
    for name, value in expected.items():
        torch.testing.assert_close(got[name].double(), value.double(), rtol=0.03, atol=0.05)


# --- noise ----------------------------------------------------------------------------------------


def test_noise_moves_the_moments_of_activations_as_its_distribution_implies():
    """Per step, mean = mu and variance = sigma^2 + small constants that cancel between steps. For two draws of
    mu ~ U(-1/2, 1/2), E|mu - mu'| = 1/3. For sigma ~ U(1, 5/4), E|sigma^2 - sigma'^2| = E|sigma - sigma'| E(sigma +
    sigma') = (1/12)(9/4) = 0.1875, for difference and sum of two uniforms are independent in sign and uncorrelated in
    size. Santurkar et al. 2018, figure 8, plots 0.30 to 0.37 and 0.18 to 0.24.
    """
    norm = BatchNorm(40, None, 128)
    noisy = nn.Sequential(norm, Noise(0, "noise/here"))
    inputs = torch.randn(128, 40, 6, 6, generator=torch.Generator().manual_seed(0))
    outputs = [noisy(inputs) for _ in range(60)]
    means = torch.stack([o.mean([0, 2, 3]) for o in outputs])
    variances = torch.stack([o.var([0, 2, 3]) for o in outputs])
    assert float(means.diff(dim=0).abs().mean()) == pytest.approx(1 / 3, rel=0.05)
    assert float(variances.diff(dim=0).abs().mean()) == pytest.approx(0.1875, rel=0.05)
    # And per value, around that step's mu and sigma: m within 0.1, s with deviation 0.1.
    scale, shift = noisy[1].draw(inputs, 3)
    middle = shift - shift.mean([0, 2, 3], keepdim=True)
    assert float(middle.abs().max()) <= 0.1 + 0.005
    assert float(middle.var()) == pytest.approx(0.2**2 / 12, rel=0.02)
    assert float((scale - scale.mean([0, 2, 3], keepdim=True)).std()) == pytest.approx(0.1, rel=0.02)


def test_noise_is_a_function_of_seed_layer_and_step_and_of_nothing_else():
    inputs = images()

    def drawn(seed: int, purpose: str, step: int, like: Tensor = inputs) -> Tensor:
        return torch.stack(Noise(seed, purpose).draw(like, step))

    first = drawn(0, "noise/a", 5)
    assert torch.equal(first, drawn(0, "noise/a", 5))
    assert torch.equal(first, drawn(0, "noise/a", 5, inputs.contiguous(memory_format=torch.channels_last) * 3))
    for other in (drawn(1, "noise/a", 5), drawn(0, "noise/b", 5), drawn(0, "noise/a", 6)):
        assert not torch.equal(first, other)


def test_noise_counts_its_training_passes_and_is_its_mean_in_evaluation():
    noise, inputs = layer(Norm.NOISE), images()
    first, second = noise(inputs), noise(inputs)
    assert not torch.equal(first, second)
    scale, shift = noise.draw(inputs, 1)
    torch.testing.assert_close(second, inputs * scale + shift)
    assert torch.equal(noise.eval()(inputs), inputs * 9 / 8)
    assert noise.steps == 2
    many = torch.stack([torch.stack(noise.draw(inputs, step)).mean([1, 3, 4]) for step in range(400)]).mean([0, 2])
    torch.testing.assert_close(many, torch.tensor([9 / 8, 0.0], dtype=many.dtype), rtol=0, atol=0.03)


def test_a_probe_on_copied_buffers_hears_the_noise_of_the_next_step_and_takes_none_away():
    noisy, inputs = layer(Norm.NOISY), images()
    noisy(inputs)
    copies = {name: b.clone() for name, b in noisy.named_buffers()}
    looked = torch.func.functional_call(noisy, copies, (inputs,))
    torch.testing.assert_close(looked, noisy(inputs))


# --- several workers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    crew = Crew(4)
    crew(meet, str(tmp_path_factory.mktemp("gang") / "meeting"))
    yield crew
    crew.dismiss()


def meet(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=4)


def shared(rank: int, kind: Norm, norm_batch: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    norm = layer(kind, norm_batch)
    spread(norm, 8)
    got: dict[str, Tensor] = {}
    for seed in range(2):  # the second pass meets running statistics that moved
        norm.zero_grad()
        got = reading(norm, images(shape, seed).chunk(4)[rank], images(shape, seed + 9).chunk(4)[rank])
        settle(norm)
    return got | {f"buffer {name}": b.clone() for name, b in norm.named_buffers()}


@pytest.mark.parametrize("shape", SHAPES, ids=["maps", "vectors"])
@pytest.mark.parametrize("norm_batch", [8, 4, 2])
@pytest.mark.parametrize("kind", [*OVER_IMAGES, Norm.NOISE])
def test_one_worker_and_four_agree_for_every_norm_over_images(crew, kind, norm_batch, shape):
    one = layer(kind, norm_batch)
    expected: dict[str, Tensor] = {}
    for seed in range(2):
        one.zero_grad()
        expected = reading(one, images(shape, seed), images(shape, seed + 9))
    got = crew(shared, kind, norm_batch, shape)
    for name, value in expected.items():
        if name in ("output", "images"):
            whole = torch.cat([g[name] for g in got])
        else:
            whole = got[0][name] if name.startswith("buffer") else sum(g[name] for g in got)
        torch.testing.assert_close(whole, value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def block(kind: Norm) -> Block:
    """One with a convolution and a norm on its shortcut, as where a stage begins."""
    torch.manual_seed(0)
    return Block("blocks.0", CHANNELS, CHANNELS, 2, lambda name: layer(kind)).double()


class Messages(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.namespace == "c10d"
        return function(*args, **(kwargs or {}))


def shared_block(rank: int, kind: Norm) -> tuple[dict[str, Tensor], int]:
    of = block(kind)
    spread(of, 8)
    with Messages() as messages:
        got = reading(of, images(WIDE).chunk(4)[rank], images(seed=1).chunk(4)[rank])
    return got, messages.count


WIDE = (8, CHANNELS, 6, 6)


@pytest.mark.parametrize("kind", OVER_IMAGES)
def test_a_block_whose_shortcuts_statistics_travel_with_its_second_norms_is_the_block_of_one_worker(crew, kind):
    expected = reading(block(kind), images(WIDE), images(seed=1))
    got = crew(shared_block, kind)
    for name, value in expected.items():
        if name in ("output", "images"):
            whole = torch.cat([g[name] for g, _ in got])
        else:
            whole = got[0][0][name] if name.startswith("buffer") else sum(g[name] for g, _ in got)
        torch.testing.assert_close(whole, value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    ties = 3 if kind is Norm.LINF else 0
    # Forward and backward, of three norms: but noise is added to each by itself.
    assert {count for _, count in got} == {6 if kind is Norm.NOISY else 4 + ties}


def alone_in_a_gang(rank: int) -> Tensor:
    noisy = layer(Norm.NOISY)
    spread(noisy, 8)
    with alone(noisy):
        return noisy(images()).detach()


def test_alone_in_a_gang_a_worker_draws_the_noise_of_the_whole_batch(crew):
    expected = layer(Norm.NOISY)(images()).detach()
    for got in crew(alone_in_a_gang):
        torch.testing.assert_close(got, expected)
