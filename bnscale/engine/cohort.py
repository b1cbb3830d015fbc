"""One worker, several trials in one pass: SGD on their gammas and betas at once.

The gammas and betas of all trials are one tensor, their momentum another, and an update is a few operations on these,
whatever the depth of the network and the number of trials. Every member has the numbers of the same trial alone, to
rounding: images of different trials meet in no sum. Shapes: K trials, P gammas and betas of each, A = K*P of all, in
the order of networks/cohort.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnscale.data import Resident, blank
from bnscale.engine import Gang
from bnscale.engine.evaluation import Evaluation
from bnscale.engine.objective import Objectives, decay_of
from bnscale.engine.state import Kept, frozen_sum
from bnscale.engine.way import Steps, Way, backend, computing, keep_bits, ways
from bnscale.networks import trained
from bnscale.networks.cohort import Stacked, members
from bnscale.networks.norm import NormLayer, fuse
from bnscale.networks.recompute import Activations
from bnscale.score import Score
from bnscale.storage import Storage
from bnscale.trial import Trial


class CohortEngine:
    """Trains trials of one kin on one device. `checkpoints` is where each one's are kept, None where nothing is."""

    def __init__(
        self,
        module: nn.Module,
        trials: Sequence[Trial],
        gang: Gang,
        checkpoints: Sequence[Storage | None],
        activations: Activations = Activations.KEPT,
        way: Way | None = None,
    ) -> None:
        """`module` is the network of any of the trials as it was built; its weights become those of all.

        `way`: this one alone, and not the fastest that works.
        """
        assert gang.workers == 1, "a gang trains one trial at a time"
        self.gang = gang
        self._activations = activations
        networks = members(module, trials)
        kept = _kept(networks, trials, checkpoints)
        body = module.to(gang.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._stacked = Stacked(body, networks, trials[0])
        self._momentum_A = torch.zeros_like(self._stacked.values_A)
        keep_bits(gang.device)
        self._ways = [way] if way else ways(trials[0], gang.device)
        self._set([Member(*each, self) for each in zip(trials, networks, kept, strict=True)])

    def _set(self, members: list["Member"]) -> None:
        """Set everything to these members, whose networks are stacked."""
        self.members = members
        stacked, trials = self._stacked, [member.trial for member in members]
        self._objectives = Objectives(stacked, trials[0])
        for place, member in enumerate(members):
            member.momenta = stacked.of(place, self._momentum_A)
        like = stacked.values_A
        self._places_KP = stacked.places()
        self._keep_A, self._rate_A = torch.zeros_like(like), torch.zeros_like(like)
        self._spread([trial.momentum for trial in trials], self._keep_A)
        self._rates: tuple[float, ...] | None = None  # what the tensor holds
        self._decay_A, self._l1_A, self._l2_A, trains_A = (torch.zeros_like(like) for _ in range(4))
        for place, (member, trial) in enumerate(zip(members, trials, strict=True)):
            decay, l1, l2, trains = (
                stacked.of(place, whole) for whole in (self._decay_A, self._l1_A, self._l2_A, trains_A)
            )
            penalties = {"weight": (trial.gamma_l1, trial.gamma_l2), "bias": (trial.beta_l1, trial.beta_l2)}
            for name, module in member.module.named_modules():
                for own, parameter in module.named_parameters(recurse=False) if isinstance(module, NormLayer) else ():
                    path = f"{name}.{own}"
                    l1[path].fill_(penalties[own][0])
                    l2[path].fill_(penalties[own][1])
                    trains[path].fill_(parameter.requires_grad)
                    decay[path].fill_(decay_of(module, parameter, trial) if parameter.requires_grad else 0)
        self._still_A = None if bool(trains_A.all()) else trains_A == 0
        self._penalised = any(trial.gamma_l1 or trial.gamma_l2 or trial.beta_l1 or trial.beta_l2 for trial in trials)
        self._steps = Steps(self, self._ways, blank(trials[0], self.gang.device))
        self._ways = self._ways[self._ways.index(self._steps.way) :]  # also for fewer members
        self._evaluation = Evaluation(self._objectives, self.way, len(members))
        self.changed()

    def _spread(self, values: Sequence[float], to_A: Tensor) -> None:
        """Give each trial's value to all its gammas and betas. Nobody waits for a GPU."""
        told_K = torch.tensor(values, dtype=to_A.dtype)
        if to_A.is_cuda:
            told_K = told_K.pin_memory().to(to_A.device, non_blocking=True)
        to_A[self._places_KP] = told_K[:, None]

    @property
    def backend(self) -> str:
        return backend(self._steps, self.members[0].trial, self.gang.device)

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Losses on the batch, penalties with them: float32, (K,). Of a recorded step they are there after `step`."""
        return self._steps.losses(images_BCHW, labels_B)

    def backward(self, losses_K: Tensor) -> None:
        self._steps.descend(losses_K)

    def step(self, *rates: float) -> None:
        """One update, each member's with its own learning rate."""
        if rates != self._rates:
            self._spread(rates, self._rate_A)
            self._rates = rates
        self._steps.move()
        for member in self.members:
            member.moved = True
        self.changed()

    # --- the parts of a step ---------------------------------------------------------------------

    def begin(self, way: Way) -> None:
        self.way = way
        if way is Way.FUSED:
            for network in (self._stacked.body, *self._stacked.members):
                fuse(network)

    def losses(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        with computing(self._stacked.body, self.way, self._activations):
            losses_K = self._objectives(images_BCHW, labels_B)
        return losses_K + self._penalties() if self._penalised else losses_K

    @torch.no_grad()
    def _penalties(self) -> Tensor:
        """Of each trial, (K,). Their gradient is `move`'s."""
        values_A = self._stacked.values_A
        penalties_A = self._l1_A * values_A.abs() + self._l2_A * values_A.square()
        return penalties_A[self._places_KP].sum(1)

    def descend(self, losses_K: Tensor) -> None:
        losses_K.sum().backward()

    @torch.no_grad()
    def move(self) -> None:
        """In torch's order, so that a trial alone rounds alike."""
        values_A, slope_A = self._stacked.values_A, self._stacked.gradients_A
        if self._penalised:
            slope_A.add_(self._l1_A * values_A.sign() + self._l2_A * 2 * values_A)
        slope_A.addcmul_(self._decay_A, values_A)
        if self._still_A is not None:
            slope_A.masked_fill_(self._still_A, 0)
        self._momentum_A.mul_(self._keep_A).add_(slope_A)
        values_A.addcmul_(self._rate_A, self._momentum_A, value=-1)
        self.forget()

    def forget(self) -> None:
        self._stacked.gradients_A.zero_()

    def changing(self) -> list[Tensor]:
        return [self._stacked.values_A, self._momentum_A, self._stacked.steps_KL, *self._stacked.body.buffers()]

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these members only. The others stay as they are."""
        del self._steps  # and with them a recording, whose memory the next one needs
        left = [self.members[place] for place in places]
        momenta = [dict(member.momenta) for member in left]
        self._stacked = Stacked(self._stacked.body, [member.module for member in left], left[0].trial)
        self._momentum_A = torch.zeros_like(self._stacked.values_A)
        self._set(left)
        for member, before in zip(left, momenta, strict=True):
            for name, momentum in before.items():
                member.momenta[name].copy_(momentum)

    # --- between the steps -------------------------------------------------------------------------

    def changed(self) -> None:
        """The networks are not what they were: no score holds any more."""
        self._scores: dict[tuple[str, Resident], list[Score]] = {}

    def score(self, member: "Member", part: str, data: Resident) -> Score:
        """One member's. Those of all are computed in one pass, and once a step."""
        if (part, data) not in self._scores:
            counted = zip(self.members, self._evaluation(part, data).tolist(), strict=True)
            self._scores[part, data] = [Score.of(each.trial, own) for each, own in counted]
        return self._scores[part, data][self.members.index(member)]

    def total(self, value: Tensor) -> Tensor:
        return value

    def agree(self, flag: bool) -> bool:
        return flag

    def close(self) -> None:
        """A recording holds what it computes with; without this the next trial would find it in memory."""
        del self._steps


class Member:
    """One trial of a cohort, as its probes and its checkpoints see it: a network like any other."""

    def __init__(self, trial: Trial, module: nn.Module, kept: Kept, cohort: CohortEngine) -> None:
        self.trial = trial
        self.module = module  # its gammas, betas and statistics are views into the cohort's
        self.gang = cohort.gang
        self.momenta: dict[str, Tensor] = {}  # views, too
        self.moved = False  # whether there has been an update of which momentum is left
        self._kept = kept
        self._cohort = cohort

    def total(self, value: Tensor) -> Tensor:
        return value

    def statistics(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    def momentum(self) -> dict[str, Tensor]:
        if not self.moved or not self.trial.momentum:
            return {}
        return {name: self.momenta[name] for name in trained(self.module)}

    def score(self, part: str, data: Resident) -> Score:
        return self._cohort.score(self, part, data)

    def save(self, step: int, facts: dict[str, Any]) -> None:
        self._kept.save(self.module, self.momentum(), step, facts)

    def restore(self, most: int | None = None) -> tuple[int, dict[str, Any]]:
        step, facts, momentum = self._kept.restore(self.module, most)
        for name, value in momentum.items():
            self.momenta[name].copy_(value)
        self.moved = bool(momentum)
        self._cohort.changed()
        return step, facts


def _kept(networks: Sequence[nn.Module], trials: Sequence[Trial], places: Sequence[Storage | None]) -> list[Kept]:
    """While weights lie in order: channels last they would be copied to be summed."""
    shared: str | None = None  # of the weights alone: a frozen gamma or beta is each trial's own
    kept = []
    for network, trial, place in zip(networks, trials, places, strict=True):
        frozen = None
        if place is not None:
            norms = [module for module in network.modules() if isinstance(module, NormLayer)]
            plain = all(part.requires_grad for norm in norms for part in norm.parameters(recurse=False))
            frozen = shared if plain and shared else frozen_sum(network, trial)
            shared = frozen if plain else shared
        kept.append(Kept(place, trial, frozen))
    return kept
