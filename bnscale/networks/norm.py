"""What normalizes: each layer gives every channel its own scale gamma and shift beta, or leaves them out.

Statistics over images stand on `norm_batch` of them, however many workers share the batch. Where `norm_batch` is this
worker's share, the layer is torch's own. Where it is less, each contiguous group of `norm_batch` images has its own
statistics (ghost batches: Hoffer et al. 2017, arXiv:1705.08741). Where it is more, consecutive workers combine theirs.
So the number of workers changes the order of summation and nothing else.

Shapes: N images of this worker, C channels, H, W pixels (none behind the last pooling), P workers behind one statistic.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bnscale.anatomy import Site
from bnscale.networks import fused
from bnscale.networks.statistic import Size, Statistic, Term, exchanged, normalised, own, statistic
from bnscale.trial import Affine, Norm, Trial, seed_for

EPS = 1e-5  # under every root


def rectified(
    norm: nn.Module, relu: nn.Module, images_NCHW: Tensor, plus: Callable[[], Tensor] | None = None
) -> Tensor:
    """relu(norm(images) + plus()), in one operation where the norm can and no hook asks for what lies between.

    The images may be overwritten.
    """
    if isinstance(norm, BatchNorm) and norm.fuses(images_NCHW) and not (_hooked(norm) or _hooked(relu)):
        return norm.rectified(images_NCHW, plus() if plus else None)
    images_NCHW = norm(images_NCHW)
    return relu(images_NCHW.add_(plus()) if plus else images_NCHW)


def fuse(network: nn.Module) -> None:
    """From now on, each norm and the relu behind it are computed in one operation, where `fused` has one."""
    for norm in network.modules():
        if isinstance(norm, BatchNorm):
            norm.fused = True


@contextmanager
def composed(network: nn.Module) -> Iterator[None]:
    """Inside, each norm is an operation of its own, which can be differentiated more than once."""
    fused = [norm for norm in network.modules() if isinstance(norm, BatchNorm) and norm.fused]
    for norm in fused:
        norm.fused = False
    try:
        yield
    finally:
        for norm in fused:
            norm.fused = True


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class NormLayer(nn.Module):
    """gamma_C * normalised_NCHW + beta_C, where `affine` says which of gamma and beta there are."""

    weight: nn.Parameter | None  # gamma
    bias: nn.Parameter | None  # beta

    def __init__(self, channels: int, affine: Affine | None) -> None:
        super().__init__()
        self.channels = channels
        gamma, beta = affine in (Affine.BOTH, Affine.GAMMA), affine in (Affine.BOTH, Affine.BETA)
        self.register_parameter("weight", nn.Parameter(torch.ones(channels)) if gamma else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if beta else None)

    def gamma_beta(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Both, as kernels take them: a part that is missing is 1 or 0, in float32 where the images are half as wide.

        Left out instead, torch 2.15 loses beta in batch norm's second derivative and fails on bfloat16 in group norm.
        """
        wide = torch.promote_types(images_NCHW.dtype, torch.float32)
        gamma_C = images_NCHW.new_ones(self.channels, dtype=wide) if self.weight is None else self.weight
        beta_C = images_NCHW.new_zeros(self.channels, dtype=wide) if self.bias is None else self.bias
        return gamma_C, beta_C

    def extra_repr(self) -> str:
        has = [name for name, part in (("gamma", self.weight), ("beta", self.bias)) if part is not None]
        return ", ".join([str(self.channels), *has])


class GroupNorm(NormLayer):
    """Each image and group of channels by its own mean and variance, in training and evaluation alike.

    One group is layer normalization over all channels and pixels (Ba et al. 2016); as many groups as channels is
    instance normalization (Ulyanov et al. 2016); between them lies group normalization (Wu & He 2018, equation 7).
    """

    def __init__(self, channels: int, affine: Affine | None, groups: int) -> None:
        super().__init__(channels, affine)
        self.groups = groups

    def forward(self, images_NCHW: Tensor) -> Tensor:
        gamma_beta = self.gamma_beta(images_NCHW)
        last = images_NCHW.dim() == 4 and images_NCHW.is_contiguous(memory_format=torch.channels_last)
        if last and self.groups == self.channels:
            # On small maps torch's kernel for channels last takes twice as long as its other one and two copies.
            images_NCHW = F.group_norm(images_NCHW.contiguous(), self.groups, *gamma_beta, EPS)
            return images_NCHW.contiguous(memory_format=torch.channels_last)
        return F.group_norm(images_NCHW, self.groups, *gamma_beta, EPS)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


class BatchNorm(NormLayer):
    """Batch normalization (Ioffe & Szegedy 2015, algorithm 1) over `norm_batch` images a statistic.

    The running variance is the unbiased one over `norm_batch` images. With several ghost groups the running statistics
    move once a step, by the mean over the groups. A new layer is alone; `workers.spread` places it on a gang.

    Raises ValueError in training mode for a share of images that cannot hold `norm_batch`.
    """

    momentum = 0.1
    size = Size.DEVIATION
    running_mean: Tensor
    running_var: Tensor  # the square of what images are divided by in evaluation
    num_batches_tracked: Tensor

    def __init__(self, channels: int, affine: Affine | None, norm_batch: int) -> None:
        super().__init__(channels, affine)
        self.norm_batch = norm_batch
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.peers: dist.ProcessGroup | None = None  # the workers behind one statistic; None: this one alone
        self.fused = False  # with relu behind it, where it `fuses`

    def fuses(self, images_NCHW: Tensor) -> bool:
        """Whether `rectified` stands for the norm of these images and what follows: in training, as one statistic of
        one worker; in evaluation, where nobody asks for a gradient."""
        return self.fused and self._plain(images_NCHW) and fused.fits(images_NCHW)

    def _plain(self, images_NCHW: Tensor) -> bool:
        if not self.training:
            return not torch.is_grad_enabled()
        return type(self) is BatchNorm and self.peers is None and images_NCHW.shape[0] == self.norm_batch

    def rectified(self, images_NCHW: Tensor, plus_NCHW: Tensor | None) -> Tensor:
        """relu(norm(images) + plus)."""
        given = self.given(images_NCHW)
        if not self.training:
            return fused.evaluated(images_NCHW, plus_NCHW, *given, EPS)
        return fused.rectified(images_NCHW, plus_NCHW, *given, self.momentum, EPS)

    def given(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gamma, beta and the running statistics, for a kernel that computes with them; in training, once a step."""
        if self.training:
            self.num_batches_tracked.add_(1)
        return (*self.gamma_beta(images_NCHW), self.running_mean, self.running_var)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        if not self.training:
            return self._native(images_NCHW, self.running_mean, self.running_var, 0.0)
        self._check(images_NCHW)
        return self._train(images_NCHW)

    def _check(self, images_NCHW: Tensor) -> None:
        share = images_NCHW.shape[0]
        workers = 1 if self.peers is None else dist.get_world_size(self.peers)
        if workers * share % self.norm_batch or (workers > 1 and workers * share != self.norm_batch):
            raise ValueError(
                f"norm_batch {self.norm_batch}: {share} images on each of {workers} workers cannot be parted into it"
            )

    def _train(self, images_NCHW: Tensor) -> Tensor:
        if self.peers is not None or images_NCHW.shape[0] > self.norm_batch:
            return self._grouped(images_NCHW)
        self.num_batches_tracked.add_(1)
        return self._native(images_NCHW, self.running_mean, self.running_var, self.momentum)

    def _grouped(self, images_NCHW: Tensor) -> Tensor:
        """Each group of `norm_batch` images by its own statistic; the running ones move by the mean over the groups."""
        if images_NCHW.shape[0] <= self.norm_batch:
            normalised_NCHW, mean_C, square_C = self._group(images_NCHW)
        else:
            results = [self._group(group) for group in images_NCHW.split(self.norm_batch)]
            groups, means, squares = zip(*results, strict=True)
            normalised_NCHW = torch.cat(groups)
            mean_C, square_C = torch.stack(means).mean(0), torch.stack(squares).mean(0)
        self._move(mean_C, square_C)
        return normalised_NCHW

    def _move(self, mean_C: Tensor, square_C: Tensor) -> None:
        """The running statistics, by those of a batch."""
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(square_C, self.momentum)
        self.num_batches_tracked.add_(1)

    def _group(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images that share one statistic, normalized; its mean, and what the running variance moves by."""
        if self.peers is not None:
            return self._by(images_NCHW)
        # With momentum 1 torch's kernel hands out the group's statistics as "running" ones.
        mean_C, variance_C = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        return self._native(images_NCHW, mean_C, variance_C, 1.0), mean_C, variance_C

    def _by(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = statistic(images_NCHW, self.size, self.channels, self.peers)
        return normalised([self._term(images_NCHW, found)], EPS, self.peers), found.mean_C, found.running_C

    def _term(self, images_NCHW: Tensor, found: Statistic) -> Term:
        return Term(images_NCHW, *self.gamma_beta(images_NCHW), found)

    def _native(self, images_NCHW: Tensor, mean_C: Tensor, square_C: Tensor, momentum: float) -> Tensor:
        """torch's kernel; in training mode it moves `mean_C` and `square_C` towards the batch's."""
        training = self.training
        return F.batch_norm(images_NCHW, mean_C, square_C, *self.gamma_beta(images_NCHW), training, momentum, EPS)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm_batch={self.norm_batch}"


class LpNorm(BatchNorm):
    """Mean removed, and divided by the average l_p norm of the values as they were before.

    gamma * (x - mean(x)) / (mean |x|^p)^(1/p) + beta, and with p infinite the largest |x| below the line
    (Santurkar et al. 2018, section 3.3 and figure 14). Its running size is the mean of squared sizes over the steps.
    """

    def __init__(self, channels: int, affine: Affine | None, norm_batch: int, size: Size) -> None:
        super().__init__(channels, affine, norm_batch)
        self.size = size

    def _train(self, images_NCHW: Tensor) -> Tensor:
        return self._grouped(images_NCHW)

    def _group(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._by(images_NCHW)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.size.value}"


class BatchRenorm(BatchNorm):
    """Batch normalization, corrected so that training sees what evaluation will see (Ioffe 2017, algorithm 1).

    gamma * (r * normalised + d) + beta with r = batch deviation / running deviation within [1/r_max, r_max] and
    d = (batch mean - running mean) / running deviation within [-d_max, d_max]; neither has a gradient. The bounds rise
    from 1 and 0, which is batch normalization, to `r_max` and `d_max` between the updates `r_rise` and `d_rise`.
    """

    def __init__(
        self,
        channels: int,
        affine: Affine | None,
        norm_batch: int,
        r_max: float,
        d_max: float,
        r_rise: tuple[float, float],
        d_rise: tuple[float, float],
    ) -> None:
        super().__init__(channels, affine, norm_batch)
        self.r_max, self.d_max, self.r_rise, self.d_rise = r_max, d_max, r_rise, d_rise

    def _train(self, images_NCHW: Tensor) -> Tensor:
        return self._grouped(images_NCHW)

    def _group(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.peers is not None:
            return self._by(images_NCHW)
        found = statistic(images_NCHW, self.size, self.channels, None)
        term = self._term(images_NCHW, found)
        images_NCHW = F.batch_norm(images_NCHW, None, None, term.gamma_C, term.beta_C, True, 0.0, EPS)
        return images_NCHW, found.mean_C, found.running_C

    def _term(self, images_NCHW: Tensor, found: Statistic) -> Term:
        with torch.no_grad():
            running_C = (self.running_var + EPS).sqrt()
            r_max = 1 + (self.r_max - 1) * self._risen(*self.r_rise)
            d_max = self.d_max * self._risen(*self.d_rise)
            r_C = ((found.square_C + EPS).sqrt() / running_C).clamp(1 / r_max, r_max)
            d_C = ((found.mean_C - self.running_mean) / running_C).clamp(-d_max, d_max)
        gamma_C, beta_C = self.gamma_beta(images_NCHW)
        return Term(images_NCHW, gamma_C * r_C, gamma_C * d_C + beta_C, found)

    def _risen(self, start: float, end: float) -> Tensor:
        """The share of the way from one update to another that is behind: a tensor, so that no device is waited for."""
        gone = self.num_batches_tracked - start
        return (gone / (end - start)).clamp(0, 1) if end > start else (gone >= 0).float()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max:g}, d_max={self.d_max:g}"


class Noise(nn.Module):
    """s * images + m in training, and with their means, 9/8 and 0, in evaluation (Santurkar et al. 2018, algorithm 1).

    Anew at each step, each channel draws mu from U(-1/2, 1/2) and sigma from U(1, 5/4), and then each of its values,
    pixels counting as images, m from U(mu - 0.1, mu + 0.1) and s from N(sigma, 0.1^2). All are functions of the
    trial's seed, the layer and the step; a worker of a gang takes its share of what one would draw for the whole batch.
    They come from torch's generator of the device, so a GPU draws other numbers than a CPU.

    The paper says nothing of evaluation. Without the mean scale every layer there would hand on less than in training:
    VGG-16 of 16 to 128 channels then fell from 52 % of 2,000 test images to 19 %, after an epoch of CIFAR-10 (JPEG).
    """

    mean_scale = 9 / 8

    steps: Tensor  # training passes so far

    def __init__(self, seed: int, purpose: str) -> None:
        super().__init__()
        self.seed, self.purpose = seed, purpose
        self.place = (0, 1)  # rank and workers that share the batch
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        if not self.training:
            return images_NCHW * self.mean_scale
        scale_NCHW, shift_NCHW = self.draw(images_NCHW, int(self.steps))
        self.steps.add_(1)
        return images_NCHW.mul(scale_NCHW).add_(shift_NCHW)

    @torch.no_grad()
    def draw(self, images_NCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """This worker's s and m for images of this shape."""
        rank, workers = self.place
        share, channels, *pixels = images_NCHW.shape
        device = images_NCHW.device
        draws = torch.Generator(device).manual_seed(seed_for(self.seed, f"{self.purpose}/{step}"))
        mu_C = torch.rand(channels, generator=draws, device=device) - 0.5
        sigma_C = 1 + torch.rand(channels, generator=draws, device=device) / 4
        # Channels last, as the images lie in memory: what is drawn must not depend on how they lie.
        shape = (workers * share, *pixels, channels)
        shift = torch.empty(shape, device=device).uniform_(-0.1, 0.1, generator=draws).add_(mu_C)
        scale = torch.empty(shape, device=device).normal_(0, 0.1, generator=draws).add_(sigma_C)
        mine = slice(rank * share, (rank + 1) * share)
        return tuple(drawn[mine].movedim(-1, 1).to(images_NCHW.dtype) for drawn in (scale, shift))  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return self.purpose


class NoisyBatchNorm(BatchNorm):
    """Batch normalization, then noise whose mean and scale change at every step: shift that is put back on purpose."""

    def __init__(self, channels: int, affine: Affine | None, norm_batch: int, noise: Noise) -> None:
        super().__init__(channels, affine, norm_batch)
        self.noise = noise

    def _plain(self, images_NCHW: Tensor) -> bool:
        return False  # what is added stands between the norm and the relu

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.noise(super().forward(images_NCHW))


# --- layers whose statistics travel together ---------------------------------------------------------


def shared(*norms: nn.Module) -> bool:
    """Whether these are batch norms in training behind whose statistics there are the same several workers, so that
    `begun` and `summed` serve them. Noise is added to each by itself."""
    return all(
        isinstance(norm, BatchNorm)
        and not isinstance(norm, NoisyBatchNorm)
        and norm.training
        and norm.peers is not None
        for norm in norms
    )


def begun(norm: nn.Module, images_NCHW: Tensor) -> Callable[[], Tensor]:
    """What `norm(images)` gives, by the call of what comes back; the workers exchange its statistic from here on."""
    return _begun([norm], [images_NCHW])


def summed(norms: Sequence[nn.Module], images: Sequence[Tensor]) -> Tensor:
    """The sum of what each norm makes of its images: one message for all of them forward, and one backward."""
    return _begun(norms, images)()


def _begun(norms: Sequence[nn.Module], images: Sequence[Tensor]) -> Callable[[], Tensor]:
    several: list[tuple[BatchNorm, Tensor]] = []
    for norm, images_NCHW in zip(norms, images, strict=True):
        assert isinstance(norm, BatchNorm), "see `shared`"
        norm._check(images_NCHW)
        several.append((norm, images_NCHW))
    peers = several[0][0].peers
    arrived = exchanged([own(images_NCHW, norm.size, norm.channels) for norm, images_NCHW in several], peers)

    def finish() -> Tensor:
        terms = []
        for (norm, images_NCHW), found in zip(several, arrived(), strict=True):
            terms.append(norm._term(images_NCHW, found))  # before the running statistics move: renorm looks at them
            norm._move(found.mean_C, found.running_C)
        return normalised(terms, EPS, peers)

    return finish


# --- which layer a trial asks for -------------------------------------------------------------------


def _noise(trial: Trial, site: Site) -> Noise:
    return Noise(trial.seed, f"noise/{site.name}")


def _renorm(trial: Trial, site: Site, affine: Affine | None) -> BatchRenorm:
    at = {name: share * trial.total_steps for name, share in trial.renorm.items()}
    r_rise, d_rise = ((at["renorm_start"], at[end]) for end in ("renorm_r_end", "renorm_d_end"))
    r_max, d_max = trial.renorm["renorm_r"], trial.renorm["renorm_d"]
    return BatchRenorm(site.channels, affine, trial.norm_batch, r_max, d_max, r_rise, d_rise)


_LAYERS: dict[Norm, Callable[[Trial, Site, Affine | None], nn.Module]] = {
    Norm.BATCH: lambda trial, site, affine: BatchNorm(site.channels, affine, trial.norm_batch),
    Norm.LAYER: lambda trial, site, affine: GroupNorm(site.channels, affine, 1),
    Norm.GROUP: lambda trial, site, affine: GroupNorm(site.channels, affine, trial.groups or 1),
    Norm.INSTANCE: lambda trial, site, affine: GroupNorm(site.channels, affine, site.channels),
    Norm.RENORM: _renorm,
    Norm.L1: lambda trial, site, affine: LpNorm(site.channels, affine, trial.norm_batch, Size.L1),
    Norm.L2: lambda trial, site, affine: LpNorm(site.channels, affine, trial.norm_batch, Size.L2),
    Norm.LINF: lambda trial, site, affine: LpNorm(site.channels, affine, trial.norm_batch, Size.LINF),
    Norm.NOISY: lambda trial, site, affine: NoisyBatchNorm(
        site.channels, affine, trial.norm_batch, _noise(trial, site)
    ),
    Norm.NOISE: lambda trial, site, affine: _noise(trial, site),
}


def norms_of(trial: Trial) -> Callable[[str], nn.Module]:
    """What stands at a site, by the site's name: a norm layer, or nothing where the trial places none."""
    sites = {site.name: site for site in trial.norms}
    affine = {site.name for site in trial.affine_norms}

    def at(name: str) -> nn.Module:
        if name not in sites:
            return nn.Identity()
        return _LAYERS[trial.norm](trial, sites[name], trial.affine if name in affine else None)

    return at
