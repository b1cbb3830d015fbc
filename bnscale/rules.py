"""What a trial must hold to: the first rule that its fields together break, and what makes no difference to it.

Each rule says field, value, rule and a way out, and none needs a tensor: where norms stand is anatomy.py's.
"""

import math
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from bnscale.anatomy import FAMILIES, Site
from bnscale.choices import (
    Affine,
    Augmentation,
    DecayOn,
    Network,
    Norm,
    NormInit,
    OutputBias,
    Pixels,
    Placement,
    Trainable,
    WeightInit,
)

if TYPE_CHECKING:
    from bnscale.trial import Trial

# Ioffe 2017, section 3, but for the shares: there steps of one ImageNet run, from 5,000 to 40,000 (r) and 25,000 (d).
RENORM = {"renorm_r": 3.0, "renorm_d": 5.0, "renorm_start": 0.05, "renorm_r_end": 0.3, "renorm_d_end": 0.2}


def broken(trial: "Trial") -> str | None:
    """The first rule that it breaks, as a sentence; later ones take for granted that earlier ones hold."""
    rules = (_network_rules, _norm_rules, _trainable_rules, _penalty_rules, _training_rules)
    return next(chain.from_iterable(rule(trial) for rule in rules), None)


def resolved(trial: "Trial") -> dict[str, Any]:
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
        wanted |= dict.fromkeys(RENORM)
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


def _trains(trial: "Trial", part: Affine) -> bool:
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


def _network_rules(trial: "Trial") -> Iterable[str]:
    family = FAMILIES[trial.network]
    if trial.data.facts.regression:
        if trial.network is not Network.LINEAR:
            yield f"network {trial.network}: {trial.data} has vectors and no images; try {Network.LINEAR}"
        if trial.augmentation is not Augmentation.NONE:
            yield f"augmentation {trial.augmentation}: {trial.data} has no images; try {Augmentation.NONE}"
        if trial.pixels is not Pixels.ORIGINAL:
            yield f"pixels {trial.pixels}: {trial.data} has no images; try {Pixels.ORIGINAL}"
        if trial.label_noise:
            yield f"label_noise {trial.label_noise}: {trial.data} has targets and no labels; try 0"
    if not family.legal(trial.depth):
        yield f"depth {trial.depth}: {family.rule}; try {_either(family.near(trial.depth))}"
    if family.widths and trial.width not in family.widths:
        yield (
            f"width {trial.width}: an {family.title} has {16 * family.widths[0]} channels in its first stage; "
            f"try {_either(family.widths)}"
        )
    if trial.network is Network.LINEAR and trial.output_bias is not OutputBias.RANDOM:
        yield f"output_bias {trial.output_bias}: a {family.title} has no biases; try {OutputBias.RANDOM}"


def _trainable_rules(trial: "Trial") -> Iterable[str]:
    family, trains = FAMILIES[trial.network], trial.trainable
    no_norms = f" with norm {trial.norm}, placement {trial.placement} and affine_at {trial.affine_at}"
    lacking = {
        f"{no_norms} has no gamma or beta": not trial.affine_norms
        and trains in (Trainable.BN, Trainable.BN_OUTPUT, Trainable.BN_SHORTCUT_OUTPUT),
        f"{no_norms} and affine {trial.affine} has no gamma": trains is Trainable.GAMMA
        and not _trains(trial, Affine.GAMMA),
        f"{no_norms} and affine {trial.affine} has no beta": trains is Trainable.BETA
        and not _trains(trial, Affine.BETA),
        " has no convolution on a shortcut": not family.shortcuts
        and trains in (Trainable.BN_SHORTCUT_OUTPUT, Trainable.SHORTCUT_OUTPUT),
        " has no convolution": trial.network is Network.LINEAR and trains is Trainable.TWO_PER_CHANNEL,
    }
    for what, lacks in lacking.items():
        if lacks:
            yield f"trainable {trains}: a {family.title}{what} to train; try {Trainable.ALL} or {Trainable.OUTPUT}"


def _norm_rules(trial: "Trial") -> Iterable[str]:
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
        for name, value in RENORM.items():
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


def _group_rules(trial: "Trial") -> Iterable[str]:
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


def _penalty_rules(trial: "Trial") -> Iterable[str]:
    for part in (Affine.GAMMA, Affine.BETA):
        for name in (f"{part}_l1", f"{part}_l2"):
            value = getattr(trial, name)
            if value and not _trains(trial, part):
                yield f"{name} {value}: there is no {part} that trains with trainable {trial.trainable}; try 0"


def _training_rules(trial: "Trial") -> Iterable[str]:
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


def _values(trial: "Trial", site: Site) -> int:
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
