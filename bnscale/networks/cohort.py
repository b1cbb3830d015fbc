"""Cohorts: trials that are trained in one pass, as they differ in nothing but gamma, beta and their optimisation.

Their frozen weights are the same and so are their images, so K networks are one network on K times the images: every
convolution is one call for all, and only norms tell the trials apart. Trial k has the images k*B to (k+1)*B.

Shapes: K trials, B images of each, N = K*B, C channels, H, W pixels, S = B*H*W values behind one statistic, L norm
layers, P gammas and betas of one trial, A = K*P of all: norm after norm, the gammas of all trials and then their betas,
so that those of a norm lie together.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnscale.networks import assemble, fused
from bnscale.networks.initial import gamma_beta, generator
from bnscale.networks.norm import EPS, BatchNorm, NormLayer, norms_of
from bnscale.networks.trainable import restrict
from bnscale.trial import Affine, DecayOn, Norm, NormInit, OutputBias, Placement, Trainable, Trial

# What gives each trial its own gamma and beta, and its own way of training them; the rest of two members is the same.
_OWN: dict[str, Any] = {
    "trainable": Trainable.BN,
    "affine": Affine.BOTH,
    "affine_at": Placement.EVERY,
    "norm_init": NormInit.ONES,
    "lr": 1.0,
    "milestones": (),
    "plateau": None,
    "lr_drop": 1.0,
    "warmup": 0.0,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "decay_on": DecayOn.ALL,
    "norm_decay": None,
    "gamma_l1": 0.0,
    "gamma_l2": 0.0,
    "beta_l1": 0.0,
    "beta_l2": 0.0,
}


def kin(trial: Trial) -> Trial | None:
    """The trial with one value for all that members of a cohort may differ in: trials may share a cohort iff their kin
    are equal. None: it always trains alone."""
    if trial.trainable not in (Trainable.BN, Trainable.GAMMA, Trainable.BETA):
        return None  # weights that train are each trial's own, and so is what every convolution gives
    if trial.norm is not Norm.BATCH or trial.norm_batch != trial.batch:
        return None  # only plain batch norms over the whole batch have a stacked form
    if trial.output_bias is OutputBias.EVEN:
        return None  # biases that hang on gamma and beta: each trial has its own
    length = {"epochs": None, "steps": trial.total_steps}  # however it was put
    return Trial(**trial.model_dump() | _OWN | length)


class StackedNorm(BatchNorm):
    """The batch norms of K trials at one site: each trial's images by their own statistic, gamma and beta, (K, C) each.

    One that `spreads` gets the B images that all trials have in common, as the first norm does behind the first
    convolution, and gives each trial its own of them: (B, C, H, W) to (N, C, H, W).
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        gamma_KC: nn.Parameter,
        beta_KC: nn.Parameter,
        mean_KC: Tensor,
        var_KC: Tensor,
        batch: int,
        *,
        spreads: bool,
    ) -> None:
        super().__init__(gamma_KC.shape[1], Affine.BOTH, len(gamma_KC) * batch)
        self.weight, self.bias = gamma_KC, beta_KC
        self.running_mean, self.running_var = mean_KC, var_KC
        del self.num_batches_tracked  # `Stacked` counts for all its norms at once
        self.spreads = spreads

    def fuses(self, images_NCHW: Tensor) -> bool:
        return self.fused and (self.training or not torch.is_grad_enabled()) and fused.fits(images_NCHW)

    def rectified(self, images_NCHW: Tensor, plus_NCHW: Tensor | None) -> Tensor:
        given = self.given(images_NCHW)
        if not self.training:
            each_NCHW = torch.cat([images_NCHW] * len(self.weight)) if self.spreads else images_NCHW
            return fused.evaluated(each_NCHW, plus_NCHW, *given, EPS)
        if not self.spreads:
            return fused.rectified(images_NCHW, plus_NCHW, *given, self.momentum, EPS)
        assert plus_NCHW is None, "nothing is added behind the first convolution"
        rows = zip(*given, strict=True)
        return torch.cat([fused.rectified(images_NCHW, None, *row, self.momentum, EPS) for row in rows])

    def given(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.bias, self.running_mean, self.running_var

    def forward(self, images_NCHW: Tensor) -> Tensor:
        # Of operations a compiler makes a few kernels for all trials. On a GPU without one, too, torch's kernel once a
        # trial would take K times the launches.
        kernels = images_NCHW.device.type == "cpu" and not torch.compiler.is_compiling()
        return self.in_kernels(images_NCHW) if kernels else self.in_operations(images_NCHW)

    def in_kernels(self, images_NCHW: Tensor) -> Tensor:
        """By torch's kernel, once a trial: the very operations of a trial that is alone."""
        trials = len(self.weight)
        parts = [images_NCHW] * trials if self.spreads else images_NCHW.split(len(images_NCHW) // trials)
        rows = zip(self.running_mean, self.running_var, self.weight, self.bias, parts, strict=True)
        return torch.cat(
            [
                F.batch_norm(part_BCHW, mean_C, var_C, gamma_C, beta_C, self.training, self.momentum, EPS)
                for mean_C, var_C, gamma_C, beta_C, part_BCHW in rows
            ]
        )

    def in_operations(self, images_NCHW: Tensor) -> Tensor:
        """In operations on all trials at once."""
        maps = images_NCHW.dim() == 4
        last = images_NCHW.permute(0, 2, 3, 1) if maps else images_NCHW
        trials = 1 if self.spreads else len(self.weight)
        x_KSC = last.reshape(trials, -1, last.shape[-1])
        wide_KSC = x_KSC.to(torch.promote_types(x_KSC.dtype, self.weight.dtype))
        mean_KC, var_KC = self._moments(wide_KSC) if self.training else (self.running_mean, self.running_var)
        scale_KC = self.weight * (var_KC + EPS).rsqrt()
        y_KSC = (wide_KSC - mean_KC[:, None]) * scale_KC[:, None] + self.bias[:, None]
        y = y_KSC.to(images_NCHW.dtype).view(-1, *last.shape[1:])
        return y.permute(0, 3, 1, 2) if maps else y

    def _moments(self, x_KSC: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each trial, or of what they have in common; the running ones move."""
        var_KC, mean_KC = torch.var_mean(x_KSC, 1, correction=0)
        with torch.no_grad():
            values = x_KSC.shape[1]
            self.running_mean.lerp_(mean_KC.expand_as(self.running_mean), self.momentum)
            self.running_var.lerp_((var_KC * (values / (values - 1))).expand_as(self.running_var), self.momentum)
        return mean_KC, var_KC

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, trials={len(self.weight)}" + (", spreads" if self.spreads else "")


class Stacked(nn.Module):
    """K networks as one: the B images of a step in, N outputs out, trial after trial. Or those of an evaluation.

    `body` becomes the network that computes: each norm of it makes room for a `StackedNorm`. Gammas and betas of all
    trials are `values_A`, of which the norms' parameters are pieces, as their gradients are pieces of `gradients_A`; a
    gamma or beta that a trial does not have is 1 or 0 there. `members`, of the same weights, are measured and saved:
    their gammas, betas and running statistics become views into the same tensors.
    """

    def __init__(self, body: nn.Module, members: Sequence[nn.Module], trial: Trial) -> None:
        """`trial` is any of them. Of a stacked network some members may be stacked anew, with the same body."""
        super().__init__()
        self.body = body.train()
        self.members = [member.train() for member in members]
        first = trial.norms[0]
        self._spreads = first.layer == 1 and not first.head  # so it stands right behind the first convolution
        self._shapes: dict[str, tuple[slice, int]] = {}  # of each gamma and beta: where it is, and channels
        norms = [_norms(member) for member in self.members]
        channels = [norm.channels for norm in norms[0].values()]
        weight = next(body.parameters())
        self.values_A = weight.new_empty(len(norms) * 2 * sum(channels))
        self.gradients_A = torch.zeros_like(self.values_A)
        self.steps_KL = torch.empty(len(norms), len(channels), dtype=torch.int64, device=weight.device)
        for place, name in enumerate(norms[0]):
            self._stack(name, place, [own[name] for own in norms], spreads=self._spreads and name == first.name)

    @torch.no_grad()
    def _stack(self, name: str, place: int, norms: Sequence[BatchNorm], *, spreads: bool) -> None:
        """Put one norm of all members in the place of the body's."""
        stacked = []
        for own in ("weight", "bias"):
            start = next((piece.stop for piece, _ in reversed(self._shapes.values())), 0)
            channels = norms[0].channels
            self._shapes[f"{name}.{own}"] = slice(start, start + len(norms) * channels), channels
            whole_KC = self._piece(f"{name}.{own}", self.values_A)
            for row_C, norm in zip(whole_KC, norms, strict=True):
                part = getattr(norm, own)
                row_C.copy_(norm.gamma_beta(row_C)[own == "bias"])
                if part is not None:
                    setattr(norm, own, nn.Parameter(row_C, requires_grad=part.requires_grad))
            stacked.append(nn.Parameter(whole_KC))
            stacked[-1].grad = self._piece(f"{name}.{own}", self.gradients_A)
        mean_KC, var_KC = (
            torch.stack([getattr(norm, own) for norm in norms]).to(self.values_A)
            for own in ("running_mean", "running_var")
        )
        for trial, norm in enumerate(norms):
            self.steps_KL[trial, place] = norm.num_batches_tracked
            norm.num_batches_tracked = self.steps_KL[trial, place]
            norm.running_mean, norm.running_var = mean_KC[trial], var_KC[trial]
        self.body.set_submodule(
            name, StackedNorm(stacked[0], stacked[1], mean_KC, var_KC, norms[0].norm_batch, spreads=spreads)
        )

    def _piece(self, name: str, values_A: Tensor) -> Tensor:
        """One norm's gammas or betas, (K, C)."""
        piece, channels = self._shapes[name]
        return values_A[piece].view(-1, channels)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if self.training:
            self.steps_KL.add_(1)
        if self._spreads:
            return self.body(images_BCHW)
        # The first norm stands where trials have been at work on their own already.
        repeats = [len(self.members)] + [1] * (images_BCHW.dim() - 1)
        layout = torch.channels_last if images_BCHW.dim() == 4 else torch.contiguous_format
        return self.body(images_BCHW.repeat(repeats).contiguous(memory_format=layout))

    def of(self, trial: int, values_A: Tensor) -> dict[str, Tensor]:
        """Of a tensor like `values_A`, the pieces that belong to one trial, by the names of its own parameters."""
        there = dict(self.members[trial].named_parameters())
        return {name: self._piece(name, values_A)[trial] for name in self._shapes if name in there}

    def places(self) -> Tensor:
        """Of each trial, where its gammas and betas lie in `values_A`: (K, P)."""
        whole_A = torch.arange(self.values_A.numel(), device=self.values_A.device)
        return torch.cat([self._piece(name, whole_A) for name in self._shapes], 1)


def members(network: nn.Module, trials: Sequence[Trial]) -> list[nn.Module]:
    """A network of each of the trials at its initialisation, as `build` gives it, but for weights: all have those of
    `network`, which are frozen."""
    return [_member(network, trial) for trial in trials]


@torch.no_grad()
def _member(network: nn.Module, trial: Trial) -> nn.Module:
    with torch.device("meta"):  # nothing is drawn that is thrown away
        own = assemble(trial)
    at = norms_of(trial)
    for name, module in list(own.named_modules()):
        if isinstance(module, NormLayer):
            norm = cast(NormLayer, at(name))
            gamma_beta(norm, trial.norm_init, generator(trial, f"norm/{name}"))
            own.set_submodule(name, norm)
        else:
            weights = network.get_submodule(name)
            for part, _ in list(module.named_parameters(recurse=False)):
                setattr(module, part, getattr(weights, part))
    restrict(own, trial)
    return own


def _norms(network: nn.Module) -> dict[str, BatchNorm]:
    return {name: module for name, module in network.named_modules() if isinstance(module, BatchNorm)}
