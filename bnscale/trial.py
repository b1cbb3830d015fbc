"""A trial: one training run as a frozen value.

If something can change a number it is a field here; if it cannot (number of GPUs, host, how often
a probe looks) it is not. A trial has no defaults: a study spreads a recipe and its axes,
`Trial(**recipe, depth=110, lr=0.1, ...)`, so every choice of science is written down.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    steps: Annotated[int, Field(ge=1)] | None
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
            resolved = _resolved(self)
            if resolved:
                super().__init__(**(self.model_dump() | resolved))
        except ValidationError as error:
            raise Refusal("\n".join(_refusal(type(self), each) for each in error.errors())) from None

    @model_validator(mode="after")
    def _rules(self) -> Self:
        """The first rule that the fields together break."""
        for rules in (_network_rules, _norm_rules, _trainable_rules, _penalty_rules, _training_rules):
            for broken in rules(self):
                raise ValueError(broken)
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
        values = {name: getattr(self, name) for name in _IOFFE}
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
        before = {
            name: mark.value
            for name, field in type(self).model_fields.items()
            for mark in field.metadata
            if isinstance(mark, Before)
        }
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
        known = {
            name: mark.value
            for name, field in cls.model_fields.items()
            for mark in field.metadata
            if isinstance(mark, Before)
        } | fields
        return cls(**{name: parse(cls, name, value) for name, value in known.items()})


def seed_for(seed: int, purpose: str) -> int:
    """63 bits of SHA-256: the same on every machine and in every version."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1


def parse(trial: type[Trial], name: str, value: Any) -> Any:
    """A field's value from text or JSON: `bn` to `Trainable.BN`, `0.1` to a float, a list to a tuple.

    What cannot be understood is returned as it is: `Trial` refuses it with the field's own rule.
    """
    if name not in trial.model_fields:
        return value
    kind = trial.model_fields[name].annotation
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(value) if value in set(kind) else value
    if isinstance(value, list):
        return tuple(float(v) for v in value)
    if not isinstance(value, str):
        return value
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
            members = [str(m) for m in trial.model_fields[name].annotation]  # type: ignore[union-attr]
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


# --- rules ------------------------------------------------------------------------------------------


def _resolved(trial: Trial) -> dict[str, Any]:
    """Fields whose values make no difference, with the one value of them that the same training always has."""
    wanted: dict[str, Any] = {}
    if not trial.norms:
        wanted |= {"norm": Norm.NONE, "placement": Placement.NONE}
    elif trial.norm is Norm.GROUP and trial.groups == 1:
        wanted["norm"] = Norm.LAYER
    elif trial.norm is Norm.GROUP and {site.channels for site in trial.norms} == {trial.groups}:
        wanted["norm"] = Norm.INSTANCE
    norm = wanted.get("norm", trial.norm)
    if not norm.over_images:
        wanted["norm_batch"] = trial.batch
    if norm is not Norm.GROUP:
        wanted["groups"] = None
    if norm is not Norm.RENORM:
        wanted |= dict.fromkeys(_IOFFE)
    if not trial.affine_norms:
        wanted |= {"affine": Affine.BOTH, "affine_at": Placement.NONE, "norm_init": NormInit.ONES, "norm_decay": None}
    elif trial.affine_norms == trial.norms:
        wanted["affine_at"] = Placement.EVERY
    if trial.affine is Affine.BETA and trial.norm_init is not NormInit.ONES_ONES:
        wanted["norm_init"] = NormInit.ONES
    if trial.affine is Affine.GAMMA and trial.norm_init is NormInit.ONES_ONES:
        wanted["norm_init"] = NormInit.ONES
    same_decay = trial.weight_decay if trial.decay_on is DecayOn.ALL else 0.0
    if trial.norm_decay == same_decay or not _trains(trial, Affine.BOTH):
        wanted["norm_decay"] = None
    if trial.network is Network.LINEAR and trial.weight_init is WeightInit.DELTA_ORTHOGONAL:
        wanted["weight_init"] = WeightInit.ORTHOGONAL
    return {name: value for name, value in wanted.items() if getattr(trial, name) != value}


def _trains(trial: Trial, part: Affine) -> bool:
    """Whether training changes gamma, beta or either of them."""
    sets = {
        Affine.GAMMA: (Trainable.GAMMA, Affine.BETA),
        Affine.BETA: (Trainable.BETA, Affine.GAMMA),
    }
    if part is Affine.BOTH:
        return any(_trains(trial, each) for each in sets)
    alone, without = sets[part]
    with_norms = (Trainable.ALL, Trainable.BN, Trainable.BN_OUTPUT, Trainable.BN_SHORTCUT_OUTPUT, alone)
    return bool(trial.affine_norms) and trial.affine is not without and trial.trainable in with_norms


def _network_rules(trial: Trial) -> Iterable[str]:
    family = FAMILIES[trial.network]
    if trial.data.facts.regression:
        if trial.network is not Network.LINEAR:
            yield f"network {trial.network}: {trial.data} has vectors and no images; try {Network.LINEAR}"
        if trial.augmentation is not Augmentation.NONE:
            yield f"augmentation {trial.augmentation}: {trial.data} has no images; try {Augmentation.NONE}"
        if trial.pixels is not Pixels.ORIGINAL:
            yield f"pixels {trial.pixels}: {trial.data} has no images; try {Pixels.ORIGINAL}"
    if not family.legal(trial.depth):
        yield f"depth {trial.depth}: {family.rule}; try {_either(family.near(trial.depth))}"
    if family.widths and trial.width not in family.widths:
        yield (
            f"width {trial.width}: an {family.title} has {16 * family.widths[0]} channels in its first stage; "
            f"try {_either(family.widths)}"
        )
    if trial.network is Network.LINEAR and trial.output_bias is not OutputBias.RANDOM:
        yield f"output_bias {trial.output_bias}: a {family.title} has no biases; try {OutputBias.RANDOM}"


def _trainable_rules(trial: Trial) -> Iterable[str]:
    family, trains = FAMILIES[trial.network], trial.trainable
    no_norms = f" with norm {trial.norm}, placement {trial.placement} and affine_at {trial.affine_at}"
    lacking = {
        f"{no_norms} has no gamma or beta": not trial.affine_norms
        and trains in (Trainable.BN, Trainable.BN_OUTPUT, Trainable.BN_SHORTCUT_OUTPUT),
        f"{no_norms} and affine {trial.affine} has no gamma": trains is Trainable.GAMMA
        and (not trial.affine_norms or trial.affine is Affine.BETA),
        f"{no_norms} and affine {trial.affine} has no beta": trains is Trainable.BETA
        and (not trial.affine_norms or trial.affine is Affine.GAMMA),
        " has no convolution on a shortcut": not family.shortcuts
        and trains in (Trainable.BN_SHORTCUT_OUTPUT, Trainable.SHORTCUT_OUTPUT),
        " has no convolution": trial.network is Network.LINEAR and trains is Trainable.TWO_PER_CHANNEL,
    }
    for what, lacks in lacking.items():
        if lacks:
            yield f"trainable {trains}: a {family.title}{what} to train; try {Trainable.ALL} or {Trainable.OUTPUT}"


def _norm_rules(trial: Trial) -> Iterable[str]:
    title = FAMILIES[trial.network].title
    if Placement.NONE is trial.placement or trial.norm is Norm.NONE:
        return
    if not trial.norms:
        other = Placement.NONE if trial.placement is Placement.EVERY else Placement.EVERY
        yield f"placement {trial.placement}: a {title} of depth {trial.depth} has no such place; try {other}"
    if trial.affine_at is not Placement.NONE and not trial.affine_norms and not trial.norm.parameterless:
        yield (
            f"affine_at {trial.affine_at}: no norm stands there with placement {trial.placement}; "
            f"try {Placement.EVERY}, for all norms, or {Placement.NONE}"
        )
    if trial.norm is Norm.GROUP:
        yield from _group_rules(trial)
    if trial.norm is Norm.RENORM:
        for name, value in _IOFFE.items():
            if getattr(trial, name) is None:
                yield f"{name} None: batch renormalization needs it; try {value}"
                return
        for name in ("renorm_r_end", "renorm_d_end"):
            if getattr(trial, name) < trial.renorm_start:
                yield f"{name} {getattr(trial, name)}: must not be before renorm_start; try {trial.renorm_start}"
    for site in trial.norms:
        if trial.norm is not Norm.NOISE and _values(trial, site) == 1:
            where = f"the maps of {site.name} on {trial.data.facts.title} are 1x1, and one value has no variance"
            divisor = next((d for d in range(2, trial.batch + 1) if trial.batch % d == 0), None)
            if not trial.norm.over_images:
                yield f"norm {trial.norm}: {where}; try {Norm.BATCH}"
            elif divisor:
                yield f"norm_batch {trial.norm_batch}: {where}; try {divisor}"
            else:
                yield f"batch {trial.batch}: {where}; try 2 or more, with norm_batch"
            return


def _group_rules(trial: Trial) -> Iterable[str]:
    channels = math.gcd(*(site.channels for site in trial.norms))
    legal = [
        groups
        for groups in range(1, channels + 1)
        if channels % groups == 0 and all(site.channels * site.side**2 > groups for site in trial.norms)
    ]
    if trial.groups in legal:
        return
    if not legal:
        yield f"norm {trial.norm}: with any groups some have a single value, which has no variance; try {Norm.BATCH}"
    if trial.groups is None:
        yield f"groups None: group norm needs a number of groups; try {max(g for g in legal if g <= 8)}"
        return
    near = [*(g for g in legal if g < trial.groups)][-1:] + [*(g for g in legal if g > trial.groups)][:1]
    wrong = next((site for site in trial.norms if site.channels % trial.groups), None)
    if wrong is not None:
        why = f"does not divide the {wrong.channels} channels of {wrong.name}"
    else:
        lone = next(site for site in trial.norms if site.channels * site.side**2 == trial.groups)
        why = f"the maps of {lone.name} on {trial.data.facts.title} are 1x1, and one value has no variance"
    yield f"groups {trial.groups}: {why}; try {_either(near)}"


# Ioffe 2017, section 3, but for the shares: there steps of one ImageNet run, from 5,000 to 40,000 (r) and 25,000 (d).
_IOFFE = {"renorm_r": 3.0, "renorm_d": 5.0, "renorm_start": 0.05, "renorm_r_end": 0.3, "renorm_d_end": 0.2}


def _penalty_rules(trial: Trial) -> Iterable[str]:
    for part in (Affine.GAMMA, Affine.BETA):
        for name in (f"{part}_l1", f"{part}_l2"):
            value = getattr(trial, name)
            if value and not _trains(trial, part):
                yield f"{name} {value}: there is no {part} that trains with trainable {trial.trainable}; try 0"


def _training_rules(trial: Trial) -> Iterable[str]:
    facts = trial.data.facts
    if (trial.epochs is None) == (trial.steps is None):
        yield (
            f"epochs {trial.epochs}, steps {trial.steps}: training ends after one or the other; "
            "give one and set the other to none"
        )
    left = facts.train - trial.validation
    if left < 1:
        yield (
            f"validation {trial.validation}: {facts.title} has {facts.train} training images, "
            f"and some must be left to train on; hold out fewer, such as {facts.train // 10}"
        )
    elif trial.batch > left:
        yield (
            f"batch {trial.batch}: {facts.title} has {left} training images after "
            f"{trial.validation} are held out; try {left} or fewer"
        )
    if trial.norm.over_images and trial.batch % trial.norm_batch:
        divisors = (d for d in range(1, trial.batch + 1) if trial.batch % d == 0)
        best = min(divisors, key=lambda d: abs(d - trial.norm_batch))
        yield f"norm_batch {trial.norm_batch}: must divide batch {trial.batch}; try {best}"
    outside = [m for m in trial.milestones if not 0 < m < 1]
    if outside or list(trial.milestones) != sorted(set(trial.milestones)):
        yield (
            f"milestones {trial.milestones}: must be increasing shares of training between 0 and 1; "
            "epoch 80 of 160 is 80/160"
        )


def _values(trial: Trial, site: Site) -> int:
    """Values that one statistic of this site is taken over."""
    pixels = site.side**2
    match trial.norm:
        case Norm.INSTANCE:
            return pixels
        case Norm.LAYER:
            return pixels * site.channels
        case Norm.GROUP:
            return pixels * site.channels // (trial.groups or 1)
        case _:
            return pixels * trial.norm_batch


def _either(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))
