"""The catalogue: every word a trial may choose with its line, and how many parameters the networks have.

The lines are those of choices.py. Parameters are counted on networks that hold no numbers, so that 866 layers take a
fraction of a second.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bnscale.anatomy import FAMILIES
from bnscale.choices import (
    Affine,
    Augmentation,
    Choice,
    Data,
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
from bnscale.networks import assemble, trained
from bnscale.networks.norm import NormLayer
from bnscale.networks.trainable import restrict
from bnscale.trial import Refusal, Trial

SECTIONS: dict[str, tuple[type[Choice], str]] = {
    "network": (Network, "the families, and which depths they have"),
    "norm": (Norm, "what normalizes"),
    "placement": (Placement, "where norms stand; as affine_at, which have gamma and beta"),
    "affine": (Affine, "which of gamma and beta a norm has"),
    "trainable": (Trainable, "which tensors training may change"),
    "norm_init": (NormInit, "initial gamma and beta"),
    "weight_init": (WeightInit, "initial weights"),
    "output_bias": (OutputBias, "initial biases of the classifier"),
    "data": (Data, "what is learned"),
    "pixels": (Pixels, "what happened to the images before we got them"),
    "augmentation": (Augmentation, "what happens to the images of a batch"),
    "decay_on": (DecayOn, "what weight decay acts on, among what trains"),
    "precision": (Precision, "of the forward and the backward pass"),
}
"""The fields of a trial whose values are words."""

PAPERS: dict[Network, tuple[tuple[int, ...], int, Data]] = {
    Network.RESNET: ((14, 56, 110, 866), 1, Data.CIFAR10),
    Network.VGG: ((11, 13, 16, 19), 4, Data.CIFAR10),
    Network.VGG_RESIDUAL: ((38,), 2, Data.CIFAR10),
    Network.IMAGENET_RESNET: ((18, 34, 50, 101, 152, 200), 4, Data.CIFAR10),
    Network.LINEAR: ((25,), 10, Data.LINEAR_TEACHER),
}
"""Depths and width of the papers, and the data that they are counted on."""


def say_words(console: Console) -> None:
    """A table for each field: its words, and a line about each."""
    longest = max(len(word) for kind, _ in SECTIONS.values() for word in kind)
    for field, (kind, title) in SECTIONS.items():
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(field, no_wrap=True, min_width=longest)
        table.add_column(title)
        for word in kind:
            rule = f"\n{_depths(word)}" if isinstance(word, Network) else ""
            table.add_row(word, word.about + rule)
        console.print(table)
        console.print()


def _depths(network: Network) -> str:
    family = FAMILIES[network]
    widths = f"; width {' or '.join(map(str, family.widths))}" if family.widths else ""
    return family.rule + widths


# --- parameters -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """The parameters of a network, in the parts of Frankle et al. 2021, table 1."""

    parameters: int  # all
    gamma_beta: int  # of norms on shortcuts too
    shortcuts: int  # their convolutions
    output: int
    norms: int  # layers


def asked(network: str | None, depths: list[str] | None, width: str | None, data: str | None) -> list[Trial]:
    """The networks to count; what is None is as in the papers. Raises `Refusal` for what no trial can be.

    Where the network is None, of each depth the families that have it.
    """
    by_family = [
        [
            {
                "network": family,
                "depth": depth,
                "width": papers[1] if width is None else width,
                "data": papers[2] if data is None else data,
            }
            for depth in (papers[0] if depths is None else depths)
        ]
        for family, papers in ([(network, _papers(network))] if network is not None else PAPERS.items())
    ]
    if network is not None:
        return [_trial(**choice) for choice in by_family[0]]
    trials: list[Trial] = []
    refused: dict[Any, Refusal] = {}
    legal: set[Any] = set()
    for choice in (each for family in by_family for each in family):
        try:
            trials.append(_trial(**choice))
            legal.add(choice["depth"])
        except Refusal as mistake:
            refused.setdefault(choice["depth"], mistake)
    # A depth that one family lacks is another's; one that none has is a mistake.
    for depth in refused if depths is not None or not trials else ():
        if depth not in legal:
            raise refused[depth]
    return trials


def _papers(network: str) -> tuple[tuple[int, ...], int, Data]:
    """For a word that is no network anything serves: `Trial` refuses it."""
    return PAPERS[Network(network) if network in set(Network) else Network.RESNET]


def _trial(**choice: Any) -> Trial:
    """A trial of this network with batch norms everywhere. Nothing else about it changes a count."""
    batch = 128
    return Trial.recall(
        {
            "pixels": Pixels.ORIGINAL,
            "validation": 0,
            "augmentation": Augmentation.NONE,
            "norm_init": NormInit.ONES,
            "norm_batch": batch,
            "trainable": Trainable.ALL,
            "batch": batch,
            "epochs": 1,
            "steps": None,
            "lr": 0.1,
            "milestones": (),
            "lr_drop": 0.1,
            "warmup": 0.0,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "precision": Precision.FP32,
            "seed": 0,
            **choice,
        }
    )


def count(network: nn.Module, trial: Trial) -> Count:
    """What would train if each part were asked for: the words of `trainable` are the parts."""

    def trains(what: Trainable) -> int:
        restrict(network, trial.model_copy(update={"trainable": what}))
        return sum(parameter.numel() for parameter in trained(network).values())

    output = trains(Trainable.OUTPUT)
    return Count(
        parameters=trains(Trainable.ALL),
        gamma_beta=trains(Trainable.BN),
        shortcuts=trains(Trainable.SHORTCUT_OUTPUT) - output,
        output=output,
        norms=sum(isinstance(module, NormLayer) for module in network.modules()),
    )


def say_counts(trials: Iterable[Trial], console: Console) -> None:
    """A table for each data set: images and classes decide on the first and the last layer."""
    by_data: dict[Data, list[Trial]] = {}
    for trial in trials:
        by_data.setdefault(trial.data, []).append(trial)
    for place, (data, members) in enumerate(by_data.items()):
        if place:
            console.print()
        console.print(_heading(data, members))
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("network", no_wrap=True, min_width=max(map(len, Network)))
        for name in ("depth", "width", "parameters", "gamma,\nbeta", "shortcut\nconvs", "output", "norm\nlayers"):
            table.add_column(name, justify="right", vertical="bottom")
        for trial in members:
            with torch.device("meta"):
                network = assemble(trial)
            parts = count(network, trial)
            numbers = (parts.parameters, parts.gamma_beta, parts.shortcuts, parts.output, parts.norms)
            table.add_row(
                trial.network, str(trial.depth), str(trial.width), *(f"{number:,}" for number in numbers)
            )  # fmt: skip
        console.print(table)


def _heading(data: Data, members: list[Trial]) -> str:
    facts = data.facts
    what = (
        "as many inputs and outputs as the network is wide"
        if data is Data.LINEAR_TEACHER
        else f"{facts.side}x{facts.side} pixels of {facts.channels} channel{'s' if facts.channels > 1 else ''}, "
        f"{facts.classes} classes"
    )
    imagenet = any(trial.network is Network.IMAGENET_RESNET for trial in members)
    note = " The papers count ImageNet ResNets with 1,000 classes." if imagenet else ""
    return f"Parameters on {facts.title} ({what}), with norm batch, placement every, affine both.{note}"
