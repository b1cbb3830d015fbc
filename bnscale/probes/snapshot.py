"""What a probe sees: the network of a trial after some number of updates.

Whatever a probe computes goes through copies of the buffers, so that running statistics, gradients and
the stream of batches are what they would have been without it. Legend: N images, C channels.
"""

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bnscale import loss
from bnscale.data import Resident
from bnscale.networks.layers import mode
from bnscale.networks.norm import NormLayer, composed
from bnscale.networks.workers import alone, gathered
from bnscale.score import EVALUATION_BATCH, Score, sums
from bnscale.trial import Precision, Trial

T = TypeVar("T")


class Row(Protocol):
    """A frozen dataclass whose fields are columns; `step` is one of them."""

    @property
    def step(self) -> int: ...


class Workers(Protocol):
    """The part of an engine that a snapshot needs: the sum over workers, settled statistics, momentum, scores."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def gang(self) -> Any: ...
    def total(self, value: Tensor) -> Tensor: ...
    def statistics(self) -> dict[str, Tensor]: ...
    def momentum(self) -> dict[str, Tensor]: ...
    def score(self, part: str, data: Resident) -> Score: ...


class Snapshot:
    """A network at one step. Collective in a gang: every worker makes it and runs the same probes."""

    def __init__(self, trial: Trial, step: int, engine: Workers, data: Resident) -> None:
        self.trial = trial
        self.step = step  # updates taken
        self.epoch = step / trial.steps_per_epoch
        self.network = engine.module
        self.data = data
        self._engine = engine
        self._gradients: dict[str, Tensor] = {}  # on the next batch
        self._kept: dict[Callable[[Snapshot], Any], Any] = {}

    @cached_property
    def statistics(self) -> dict[str, Tensor]:
        """Copies of the buffers, averaged over workers where these saw different images."""
        return self._engine.statistics()

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, in the order of the network."""
        return dict(self.network.named_parameters())

    @cached_property
    def norms(self) -> list[tuple[str, NormLayer]]:
        """Norm layers by path, in the order of the forward pass."""
        return [(name, m) for name, m in self.network.named_modules() if isinstance(m, NormLayer)]

    def evaluate(self, part: str, changed: dict[str, Tensor] | None = None) -> Score:
        """The network in evaluation mode on a part of the data, with some parameters `changed` or as it is.

        The workers of a gang share the images, and the trials of a cohort one pass.
        """
        if changed is None and not _hooked(self.network):
            return self._engine.score(part, self.data)
        gang = self._engine.gang
        batches = self.data.batches(part, EVALUATION_BATCH, slice(gang.rank, None, gang.workers))
        mine_14 = sums(self.trial, lambda images_NCHW: self.logits(images_NCHW, changed), batches, self.data.device)
        return Score.of(self.trial, self._engine.total(mine_14)[0].tolist())

    @torch.no_grad()
    def logits(self, images_NCHW: Tensor, changed: dict[str, Tensor] | None = None) -> Tensor:
        """Float32 logits in evaluation mode, with running statistics."""
        with mode(self.network, training=False), self._precision():
            return functional_call(self.network, self.statistics | (changed or {}), (images_NCHW,)).float()

    def batch(self, ahead: int = 0) -> tuple[Tensor, Tensor]:
        """Images and targets of the next update but `ahead`; behind the end of training, those that would follow."""
        return self.data.batch(self.step + ahead)

    def forward(
        self, images_NCHW: Tensor, changed: dict[str, Tensor], buffers: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Float32 outputs in training mode, with some parameters `changed`.

        Statistics are these images' own, and this worker holds all of them. `buffers` are moved as training moves the
        network's own; without them, copies of these are.
        """
        buffers = self.buffers() if buffers is None else buffers
        single = (mode(self.network, training=True), alone(self.network), gathered(self.network, len(images_NCHW)))
        with single[0], single[1], single[2], self._precision():
            return functional_call(self.network, changed | buffers, (images_NCHW,)).float()

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the network's."""
        return {name: value.clone() for name, value in self.statistics.items()}

    @torch.no_grad()
    def loss(self, batch: tuple[Tensor, Tensor], changed: dict[str, Tensor]) -> float:
        """On a batch in training mode with some parameters changed; infinite where it left the float32 numbers."""
        images_NCHW, targets = batch
        value = float(loss.of_batch(self.trial, self.forward(images_NCHW, changed), targets))
        return value if math.isfinite(value) else math.inf

    def gradients(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Gradient of the loss on the next batch with respect to these parameters, computed once for all probes."""
        names = list(names)
        missing = [name for name in names if name not in self._gradients]
        if missing:
            self._gradients |= self.gradients_on(self.batch(), missing)
        return {name: self._gradients[name] for name in names}

    def gradients_on(self, batch: tuple[Tensor, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Gradient of the loss on a batch with respect to these parameters, trained or not; penalties and weight decay
        left out. Training mode, as in `forward`.
        """
        return self.slope(batch, names, {})[1]

    def slope(
        self, batch: tuple[Tensor, Tensor], names: Iterable[str], changed: dict[str, Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss on a batch with some parameters `changed`, infinite where it left the float32 numbers, and its
        gradient there, as in `gradients_on`."""
        value, wanted = self._function(batch, names, changed)
        gradient = dict(zip(wanted, torch.autograd.grad(value, list(wanted.values())), strict=True))
        number = float(value.detach())
        return number if math.isfinite(number) else math.inf, gradient

    def differentiable(
        self, batch: tuple[Tensor, Tensor], names: Iterable[str], changed: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on a batch in training mode with some parameters `changed`, as a function of these parameters, which
        are the leaves of its graph; penalties and weight decay left out. It has derivatives of derivatives."""
        with composed(self.network):
            return self._function(batch, names, changed)

    def _function(
        self, batch: tuple[Tensor, Tensor], names: Iterable[str], changed: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images_NCHW, targets = batch
        parameters = self.parameters | changed
        wanted = {name: parameters[name].detach().requires_grad_() for name in names}
        fixed = {name: p.detach() for name, p in parameters.items() if name not in wanted}
        return loss.of_batch(self.trial, self.forward(images_NCHW, fixed | wanted), targets), wanted

    def share(self, gradients: dict[str, Tensor]) -> None:
        """Let other probes have gradients on the next batch that one computed for itself."""
        self._gradients |= gradients

    def names(self) -> list[str]:
        """Of the parameters that training changes."""
        return [name for name, parameter in self.parameters.items() if parameter.requires_grad]

    @cached_property
    def momentum(self) -> dict[str, Tensor]:
        """By parameter, the sum of gradients that momentum keeps, decay and penalties with them: the last update over
        its learning rate. To be read only. Empty without momentum, before the first update, and after the last: no
        checkpoint keeps it there, and a trial that went on from one would read nothing.
        """
        return {} if self.step == self.trial.total_steps else self._engine.momentum()

    @property
    def gradient(self) -> dict[str, Tensor]:
        """Of the loss on the next batch, with respect to what trains."""
        return self.gradients(self.names())

    @cached_property
    def updated(self) -> dict[str, Tensor]:
        """What trains, after the next update: right for plain gradient descent, which is what training does where
        `probe.plain_descent` finds nothing lacking."""
        rate = self.trial.rate(self.step)
        return {name: self.parameters[name].detach() - rate * part for name, part in self.gradient.items()}

    def kept(self, measure: Callable[["Snapshot"], T]) -> T:
        """What `measure` gives, computed once for all probes of this snapshot."""
        if measure not in self._kept:
            self._kept[measure] = measure(self)
        return cast(T, self._kept[measure])

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.data.device.type, torch.bfloat16, enabled=self.trial.precision is Precision.BF16)


def _hooked(network: nn.Module) -> bool:
    """Whether somebody sees what goes through a part of it: of several networks in one pass he would not."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
