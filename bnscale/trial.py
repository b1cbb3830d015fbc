"""A trial: one training run as a frozen value.

If something can change a number it is a field here; if it cannot (number of GPUs, host, how often
a probe looks) it is not. A trial has no defaults: a study spreads a recipe and its axes,
`Trial(**recipe, depth=110, lr=0.1, ...)`, so every choice of science is written down.
"""

import hashlib
import json
from difflib import get_close_matches
from enum import StrEnum
from functools import cache, cached_property, lru_cache
from typing import Annotated, Any, NamedTuple, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bnscale import rules
from bnscale.anatomy import FAMILIES, Site, placed
from bnscale.choices import (
    Affine,
    Augmentation,
    Data,
    DataFacts,
    DecayOn,
    Network,
    Norm,
    NormInit,
    OutputBias,
    Pixels,
    Placement,
    Precision,
    Trainable,
    WeightInit,
)

__all__ = [
    "Affine",
    "Augmentation",
    "Before",
    "Data",
    "DataFacts",
    "DecayOn",
    "Network",
    "Norm",
    "NormInit",
    "Outcome",
    "OutputBias",
    "Pixels",
    "Placement",
    "Precision",
    "Refusal",
    "Trainable",
    "Trial",
    "WeightInit",
    "near",
    "parse",
    "seed_for",
]


class Refusal(ValueError):
    """A user's mistake, in one sentence that names the field, the value, the rule and a way out."""


class Outcome(StrEnum):
    FINISHED = "finished"
    DIVERGED = "diverged"  # a result: the loss left the real numbers
    FAILED = "failed"  # an error: it says nothing about the science


class Before(NamedTuple):
    """Marks a field that came later: the one value that all code before it had.

    A trial with that value has the fingerprint it had before the field existed.
    """

    value: Any


class Trial(BaseModel):
    """One training run. Raises `Refusal` for a value that cannot be run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    data: Data
    pixels: Pixels
    validation: int = Field(ge=0)  # training images held out to choose nuisance axes
    augmentation: Augmentation
    label_noise: Annotated[float, Field(ge=0, le=1), Before(0.0)]  # probability that a training label is drawn anew

    network: Network
    depth: int  # layers with weights on the longest path, shortcuts not counted; of a VGG, two less
    width: int = Field(ge=1)  # multiple of 16 channels in the first stage; of a linear network, its dimension
    weight_init: Annotated[WeightInit, Before(WeightInit.HE_NORMAL)]
    output_bias: Annotated[OutputBias, Before(OutputBias.RANDOM)]

    norm: Annotated[Norm, Before(Norm.BATCH)]
    placement: Annotated[Placement, Before(Placement.EVERY)]
    affine: Annotated[Affine, Before(Affine.BOTH)]
    affine_at: Annotated[Placement, Before(Placement.EVERY)]  # of the norms placed, those with gamma and beta
    norm_init: NormInit
    norm_batch: int = Field(ge=1)  # images behind one batch statistic
    groups: Annotated[Annotated[int, Field(ge=1)] | None, Before(None)]  # of channels; group norm only
    renorm_r: Annotated[Annotated[float, Field(ge=1)] | None, Before(None)]  # largest r, renorm only
    renorm_d: Annotated[Annotated[float, Field(ge=0)] | None, Before(None)]  # largest |d|, renorm only
    # Shares of training between which they rise, in a line, from r 1 and d 0, which is batch normalization.
    renorm_start: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Before(None)]
    renorm_r_end: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Before(None)]
    renorm_d_end: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Before(None)]

    trainable: Trainable

    batch: int = Field(ge=1)  # images per update, over all workers; all training images: gradient descent
    epochs: Annotated[int, Field(ge=1)] | None  # exactly one of epochs and steps is given
    steps: Annotated[int, Field(ge=0)] | None  # 0: measured at its initialisation and not trained
    lr: float = Field(gt=0)
    milestones: tuple[float, ...]  # shares of training, in (0, 1), at which the rate drops
    plateau: Annotated[Annotated[int, Field(ge=1)] | None, Before(None)]  # epochs without progress before it drops
    lr_drop: float = Field(gt=0, le=1)  # factor at each milestone or plateau
    warmup: float = Field(ge=0, lt=1)  # share of training over which the rate climbs linearly from 0
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)  # times each parameter that decays, added to its gradient
    decay_on: Annotated[DecayOn, Before(DecayOn.ALL)]
    norm_decay: Annotated[Annotated[float, Field(ge=0)] | None, Before(None)]  # of gamma and beta, if not the same
    # Penalties in the objective: l1 times the sum of |gamma|, l2 times the sum of gamma^2, over all norm layers.
    gamma_l1: Annotated[float, Field(ge=0), Before(0.0)]
    gamma_l2: Annotated[float, Field(ge=0), Before(0.0)]
    beta_l1: Annotated[float, Field(ge=0), Before(0.0)]
    beta_l2: Annotated[float, Field(ge=0), Before(0.0)]
    precision: Precision
    seed: int = Field(ge=0)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
            changes = rules.resolved(self)
            if changes:
                super().__init__(**(self.model_dump() | changes))
        except ValidationError as error:
            raise Refusal("\n".join(_refusal(type(self), each) for each in error.errors())) from None

    @model_validator(mode="after")
    def _rules(self) -> Self:
        """The first rule that the fields together break."""
        wrong = rules.broken(self)
        if wrong:
            raise ValueError(wrong)
        return self

    # --- time: everything is a function of the step ---------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training images; the rest of an epoch's images wait for another epoch."""
        return (self.data.facts.train - self.validation) // self.batch

    @property
    def total_steps(self) -> int:
        return self.steps if self.epochs is None else self.epochs * self.steps_per_epoch  # type: ignore[return-value]

    def rate(self, step: int, plateaus: int = 0) -> float:
        """Learning rate of the update from `step` to `step + 1`, after so many plateaus."""
        total = self.total_steps
        climb = round(self.warmup * total)
        if step < climb:
            return self.lr * (step + 1) / climb
        drops = plateaus + sum(step >= round(m * total) for m in self.milestones)
        return self.lr * self.lr_drop**drops

    # --- what the fields imply ------------------------------------------------------------------

    @cached_property
    def facts(self) -> DataFacts:
        """What the data is, for this trial: the linear teacher has as many dimensions as the network is wide."""
        facts = self.data.facts
        return facts._replace(channels=self.width, classes=self.width) if self.data is Data.LINEAR_TEACHER else facts

    @cached_property
    def layers(self) -> int:
        """Layers with weights on the longest path, the output too; a VGG-16 for CIFAR has 14."""
        sites = FAMILIES[self.network].sites(self.depth, self.width, self.facts.side)
        return 1 + max((site.layer for site in sites), default=0)

    @cached_property
    def norms(self) -> list[Site]:
        """Where norms stand, in the order of the forward pass."""
        return [] if self.norm is Norm.NONE else self._placed(self.placement)

    @cached_property
    def affine_norms(self) -> list[Site]:
        """Of these, the ones with gamma or beta."""
        if self.norm.parameterless:
            return []
        if self.affine_at is Placement.EVERY:
            return self.norms
        chosen = {site.name for site in self._placed(self.affine_at)}
        return [site for site in self.norms if site.name in chosen]

    @property
    def renorm(self) -> dict[str, float]:
        """Of batch renormalization: largest r and |d|, and the shares of training between which they rise to these."""
        values = {name: getattr(self, name) for name in rules.RENORM}
        assert None not in values.values(), "a trial with batch renormalization has them all"
        return values

    def _placed(self, placement: Placement) -> list[Site]:
        return placed(self.network, self.depth, self.width, self.facts.side, placement)

    @property
    def data_title(self) -> str:
        """`CIFAR-10 (JPEG)`: to stand beside every number measured on it."""
        return self.data.facts.title + (" (JPEG)" if self.pixels is Pixels.JPEG else "")

    # --- randomness: a function of (trial, step) -------------------------------------------------

    def seed_for(self, purpose: str) -> int:
        """63 bits for one purpose, such as `weight/blocks.3.conv1` or `order/17`.

        Only `seed` and the purpose count: trials that differ in learning rate start from the same
        weights and see the same batches, and no tensor's draw depends on which others are drawn.
        """
        return seed_for(self.seed, purpose)

    # --- identity -------------------------------------------------------------------------------

    def canonical(self) -> str:
        """Canonical JSON of all resolved fields, less later fields at the value all earlier code had."""
        before = _before(type(self))
        resolved = self.model_dump()
        kept = {n: v for n, v in resolved.items() if n not in before or v != before[n]}
        return json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    @property
    def id(self) -> str:
        """`resnet866-bn-lr0.1-s2-1f3a9c20`: readable, and safe as a file name."""
        width = f"x{self.width}" if self.width > 1 else ""
        norm = f"-{self.norm}" if self.norm is not Norm.BATCH else ""
        place = f"-{self.placement}" if self.placement not in (Placement.EVERY, Placement.NONE) else ""
        what = f"{self.network}{self.depth}{width}{norm}{place}-{self.trainable}"
        return f"{what}-lr{self.lr:g}-s{self.seed}-{self.fingerprint[:8]}"

    @classmethod
    def recall(cls, fields: dict[str, Any]) -> Self:
        """The trial that stored fields describe, also where they were stored before a field existed."""
        return cls(**{name: parse(cls, name, value) for name, value in (_before(cls) | fields).items()})


@lru_cache
def _before(trial: type[Trial]) -> dict[str, Any]:
    """The one value that all code before it had, of each later field."""
    return {
        name: mark.value
        for name, field in trial.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Before)
    }


@cache
def _kind(trial: type[Trial], name: str) -> Any:
    """The annotation of a field; None where there is no such field."""
    return trial.model_fields[name].annotation if name in trial.model_fields else None


def seed_for(seed: int, purpose: str) -> int:
    """63 bits of SHA-256: the same on every machine and in every version."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1


def parse(trial: type[Trial], name: str, value: Any) -> Any:
    """A field's value from text or JSON: `bn` to `Trainable.BN`, `0.1` to a float, a list to a tuple.

    What cannot be understood is returned as it is: `Trial` refuses it with the field's own rule.
    """
    if isinstance(value, list):
        return tuple(float(v) for v in value) if name in trial.model_fields else value
    if not isinstance(value, str) or (kind := _kind(trial, name)) is None:
        return value
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind._value2member_map_.get(value, value)
    if name == "milestones":
        try:
            return tuple(float(v) for v in value.split("/") if v) if value != "none" else ()
        except ValueError:
            return value
    if value.lower() == "none":
        return None
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def near(name: str, names: list[str]) -> str:
    """How a complaint about a name ends: `; did you mean lr?`, or a full stop."""
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "."


def _refusal(trial: type[Trial], error: Any) -> str:
    """One pydantic complaint as field, value, rule, way out."""
    if not error["loc"]:
        return str(error["ctx"]["error"])
    name = str(error["loc"][0])
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    said = f"{name} {value!r}" if isinstance(value, str) else f"{name} {value}"
    fields = list(trial.model_fields)
    match kind:
        case "extra_forbidden":
            return f"{name}: no such field{near(name, fields)} The fields of a trial: {', '.join(fields)}"
        case "missing":
            return f"{name}: missing; a trial has no defaults, so a recipe or an axis must set it"
        case "enum" | "is_instance_of":
            choices = list(cast(type[StrEnum], trial.model_fields[name].annotation))
            members = [str(m) for m in choices]
            if value in members:
                choice = choices[members.index(value)]
                return f"{said}: is text and must be {type(choice).__name__}.{choice.name}"
            return f"{said}: must be one of {', '.join(members)}{near(str(value), members)}"
        case "greater_than":
            return f"{said}: must be greater than {context['gt']:g}"
        case "greater_than_equal":
            return f"{said}: must be at least {context['ge']:g}; try {context['ge']:g}"
        case "less_than":
            return f"{said}: must be less than {context['lt']:g}"
        case "less_than_equal":
            return f"{said}: must be at most {context['le']:g}; try {context['le']:g}"
        case "finite_number":
            return f"{said}: must be a finite number"
        case _ if isinstance(value, str):
            if name == "milestones":
                return f"{said}: must be shares of training, such as 0.5/0.75, or none"
            quoted = value.replace(".", "", 1).isdigit()
            return f"{said}: is text and must be a number" + (
                f"; write {name}={value} without quotes" if quoted else ""
            )
        case _:
            return f"{said}: {error['msg'][0].lower()}{error['msg'][1:]}"
