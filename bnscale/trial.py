"""A trial: one training run as a frozen value.

If something can change a number it is a field here; if it cannot (number of GPUs, host, how often
a probe looks) it is not. A trial has no defaults: a study spreads a recipe and its axes,
`Trial(**recipe, depth=110, lr=0.1, ...)`, so every choice of science is written down.
"""

import hashlib
import json
import math
from difflib import get_close_matches
from enum import StrEnum
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Refusal(ValueError):
    """A user's mistake, in one sentence that names the field, the value, the rule and a way out."""


class DataFacts(NamedTuple):
    """What a data set is, whatever its files look like."""

    title: str
    train: int  # images
    test: int  # images
    classes: int
    channels: int
    side: int  # pixels


class Data(StrEnum):
    DIGITS = "digits"
    MNIST = "mnist"
    FASHION_MNIST = "fashion_mnist"
    CIFAR10 = "cifar10"
    CIFAR100 = "cifar100"

    @property
    def facts(self) -> DataFacts:
        return _FACTS[self]


_FACTS = {
    # scikit-learn's digits come without a split; data.py draws this one, the same for everybody.
    Data.DIGITS: DataFacts("digits", 1437, 360, 10, 1, 8),
    Data.MNIST: DataFacts("MNIST", 60_000, 10_000, 10, 1, 28),
    Data.FASHION_MNIST: DataFacts("Fashion-MNIST", 60_000, 10_000, 10, 1, 28),
    Data.CIFAR10: DataFacts("CIFAR-10", 50_000, 10_000, 10, 3, 32),
    Data.CIFAR100: DataFacts("CIFAR-100", 50_000, 10_000, 100, 3, 32),
}


class Pixels(StrEnum):
    """What happened to the images before we got them. A lossy copy gives other numbers."""

    ORIGINAL = "original"
    JPEG = "jpeg"


class Augmentation(StrEnum):
    NONE = "none"
    SHIFT = "shift"  # up to 1/8 of the side in each direction, black outside: 4 pixels at 32
    FLIP_SHIFT = "flip_shift"  # the same, and a horizontal flip with probability 1/2


class Network(StrEnum):
    RESNET = "resnet"  # the CIFAR ResNet of He et al. 2016, as in Frankle's code


class Trainable(StrEnum):
    """Which tensors training may change. Every other one stays at its initialisation."""

    ALL = "all"
    BN = "bn"  # gamma and beta, of shortcuts too
    BN_OUTPUT = "bn_output"
    BN_SHORTCUT_OUTPUT = "bn_shortcut_output"
    SHORTCUT_OUTPUT = "shortcut_output"
    OUTPUT = "output"
    TWO_PER_CHANNEL = "two_per_channel"  # two random weights of each channel: as many as gamma and beta
    NONE = "none"


class NormInit(StrEnum):
    """Initial gamma and beta (Frankle's code, bn_initializers)."""

    UNIFORM = "uniform"  # gamma uniform on [0, 1], beta 0: the paper's
    ONES = "ones"  # gamma 1, beta 0: torch's
    ONES_ONES = "ones_ones"  # gamma 1, beta 1
    SYMMETRIC = "symmetric"  # gamma uniform on [-1, 1], beta 0


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"  # autocast: convolutions in bfloat16; gamma, beta and all statistics stay float32


class Before(NamedTuple):
    """Marks a field that came later: the one value that all code before it had.

    A trial with that value has the fingerprint it had before the field existed.
    """

    value: Any


class Outcome(StrEnum):
    FINISHED = "finished"
    DIVERGED = "diverged"  # a result: the loss left the real numbers
    FAILED = "failed"  # an error: it says nothing about the science


class Trial(BaseModel):
    """One training run. Raises `Refusal` for a value that cannot be run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    data: Data
    pixels: Pixels
    validation: int = Field(ge=0)  # training images held out to choose nuisance axes
    augmentation: Augmentation

    network: Network
    depth: int  # layers with weights on the longest path, shortcuts not counted
    width: int = Field(ge=1)  # multiple of 16 channels in the first stage
    norm_init: NormInit
    trainable: Trainable

    batch: int = Field(ge=1)  # images per update, over all workers
    norm_batch: int = Field(ge=1)  # images behind one batch statistic
    epochs: Annotated[int, Field(ge=1)] | None  # exactly one of epochs and steps is given
    steps: Annotated[int, Field(ge=1)] | None
    lr: float = Field(gt=0)
    milestones: tuple[float, ...]  # shares of training, in (0, 1), at which the rate drops
    lr_drop: float = Field(gt=0, le=1)  # factor at each milestone
    warmup: float = Field(ge=0, lt=1)  # share of training over which the rate climbs linearly from 0
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)  # on everything that trains, gamma and beta too
    precision: Precision
    seed: int = Field(ge=0)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise Refusal("\n".join(_refusal(type(self), each) for each in error.errors())) from None

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.network is Network.RESNET and (self.depth < 8 or (self.depth - 2) % 6):
            below = max(8, self.depth - (self.depth - 2) % 6)
            legal = [below] if below >= self.depth else [below, below + 6]
            raise ValueError(f"depth {self.depth}: a CIFAR ResNet has 6n+2 layers; try {' or '.join(map(str, legal))}")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"epochs {self.epochs}, steps {self.steps}: training ends after one or the other; "
                "give one and set the other to none"
            )
        left = self.data.facts.train - self.validation
        if left < 1:
            raise ValueError(
                f"validation {self.validation}: {self.data.facts.title} has {self.data.facts.train} training images, "
                f"and some must be left to train on; hold out fewer, such as {self.data.facts.train // 10}"
            )
        if self.batch > left:
            raise ValueError(
                f"batch {self.batch}: {self.data.facts.title} has {left} training images after "
                f"{self.validation} are held out; try {left} or fewer"
            )
        if self.batch % self.norm_batch:
            best = min(
                (d for d in range(1, self.batch + 1) if self.batch % d == 0), key=lambda d: abs(d - self.norm_batch)
            )
            raise ValueError(f"norm_batch {self.norm_batch}: must divide batch {self.batch}; try {best}")
        if self.norm_batch == 1 and self.last_side == 1:
            raise ValueError(
                f"norm_batch 1: the last stage of {self.data.facts.title} has maps of 1x1, and one value "
                "has no variance; try 2 or more"
            )
        outside = [m for m in self.milestones if not 0 < m < 1]
        if outside or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                f"milestones {self.milestones}: must be increasing shares of training between 0 and 1; "
                "epoch 80 of 160 is 80/160"
            )
        return self

    # --- time: everything is a function of the step ---------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training images; the rest of an epoch's images wait for another epoch."""
        return (self.data.facts.train - self.validation) // self.batch

    @property
    def total_steps(self) -> int:
        return self.steps if self.epochs is None else self.epochs * self.steps_per_epoch  # type: ignore[return-value]

    def rate(self, step: int) -> float:
        """Learning rate of the update that takes the network from `step` to `step + 1` updates."""
        total = self.total_steps
        climb = round(self.warmup * total)
        if step < climb:
            return self.lr * (step + 1) / climb
        drops = sum(step >= round(m * total) for m in self.milestones)
        return self.lr * self.lr_drop**drops

    # --- what the fields imply ------------------------------------------------------------------

    @property
    def last_side(self) -> int:
        """Height and width of the last stage's maps, in pixels: two of three stages halve them."""
        return math.ceil(math.ceil(self.data.facts.side / 2) / 2)

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
        return f"{self.network}{self.depth}{width}-{self.trainable}-lr{self.lr:g}-s{self.seed}-{self.fingerprint[:8]}"

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
