"""The catalogue lists every word with its line, and counts what the papers count."""

import sys
from collections.abc import Callable
from io import StringIO

import pytest
import torch
from rich.console import Console

from bnscale import catalogue, choices, cli
from bnscale.anatomy import FAMILIES
from bnscale.catalogue import Count
from bnscale.choices import Choice, Network
from bnscale.networks import assemble
from bnscale.networks.imagenet import ImageNetResNet
from bnscale.networks.norm import norms_of
from bnscale.trial import Trial


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `bnscale networks` prints; for a mistake, what it says of it."""

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bnscale", "networks", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code in ((2,) if err else (0, None))
        assert not (out and err), "a mistake is all that is said"
        return err or out

    return call


def rows(said: str) -> list[list[str]]:
    """The lines of the tables of counts, in words."""
    return [line.split() for line in said.splitlines() if line.split(" ")[0] in set(Network)]


def count_of(**choice: object) -> Count:
    trial = catalogue.asked(**{"network": None, "depths": None, "width": None, "data": None} | choice)[0]
    with torch.device("meta"):
        return catalogue.count(assemble(trial), trial)


# --- words ------------------------------------------------------------------------------------------

KINDS = [kind for kind in vars(choices).values() if isinstance(kind, type) and issubclass(kind, Choice) and len(kind)]
FIELDS = {kind: field for field, (kind, _) in catalogue.SECTIONS.items()}


def catalogue_at(width: int) -> str:
    console = Console(file=StringIO(), width=width, markup=False)
    catalogue.say_words(console)
    catalogue.say_counts(catalogue.asked(None, None, None, None), console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_of_every_choice_is_listed_with_its_line(kind):
    said = catalogue_at(width=300).split("\n\n")
    section = next(part.splitlines()[1:] for part in said if part.split()[0] == FIELDS[kind])
    assert [line for line in section if line[0] != " "] == [f"{word:18}  {word.about}" for word in kind]
    assert all(word.about for word in kind)


def test_every_field_whose_values_are_words_has_a_section():
    fields = {name: field.annotation for name, field in Trial.model_fields.items()}
    words = {name for name, kind in fields.items() if isinstance(kind, type) and issubclass(kind, Choice)}
    assert words == catalogue.SECTIONS.keys() | {"affine_at", "pixels"}  # affine_at's words are the placements
    assert all(fields[name] is kind for name, (kind, _) in catalogue.SECTIONS.items())


def test_every_family_is_listed_with_its_depths_and_counted_at_the_papers_depths(command):
    said = command()
    for network, family in FAMILIES.items():
        assert family.rule in said
        depths, width, data = catalogue.PAPERS[network]
        assert [row[:3] for row in rows(said) if row[0] == network and row[1].isdigit()] == [
            [network, str(depth), str(width)] for depth in depths
        ]
        assert f"on {data.facts.title} (" in said


@pytest.mark.parametrize("width", [80, 112])
def test_no_word_or_number_is_cut_at_the_width_of_a_terminal(width):
    said = catalogue_at(width)
    assert max(map(len, said.splitlines())) <= width
    assert "…" not in said
    assert ["imagenet_resnet", "200", "4", "62,645,322", "176,000", "2,768,896", "20,490", "203"] in rows(said)


# --- parameters -------------------------------------------------------------------------------------


def test_counts_are_frankles(command):
    said = rows(command("--network", "resnet", "--depth", "14, 866", "--data", "cifar10"))
    assert said == [
        ["resnet", "14", "1", "175,258", "1,120", "2,560", "650", "15"],
        ["resnet", "866", "1", "13,979,930", "64,736", "2,560", "650", "867"],
    ]
    assert rows(command("--network", "resnet", "--depth", "14", "--width", "32")) == [
        ["resnet", "14", "32", "177,279,498", "35,840", "2,621,440", "20,490", "15"]
    ]
    assert [row[3:5] for row in rows(command("--network", "vgg"))] == [
        ["9,231,114", "5,504"],
        ["9,416,010", "5,888"],
        ["14,728,266", "8,448"],
        ["20,040,522", "11,008"],
    ]


@pytest.mark.parametrize(
    ("depth", "total", "gamma_beta", "shortcuts", "output"),
    [
        (18, 11_689_512, 9_600, 172_032, 513_000),
        (34, 21_797_672, 17_024, 172_032, 513_000),
        (50, 25_557_032, 53_120, 2_768_896, 2_049_000),
        (101, 44_549_160, 105_344, 2_768_896, 2_049_000),
        (200, 64_673_832, 176_000, 2_768_896, 2_049_000),
    ],
)
def test_counts_with_the_classes_of_imagenet_are_frankles(depth, total, gamma_beta, shortcuts, output):
    trial = catalogue.asked("imagenet_resnet", [str(depth)], None, None)[0]
    with torch.device("meta"):
        network = ImageNetResNet(depth, 3, 1000, norms_of(trial))
    parts = catalogue.count(network, trial)
    assert (parts.parameters, parts.gamma_beta, parts.shortcuts, parts.output) == (
        total, gamma_beta, shortcuts, output
    )  # fmt: skip


def test_the_linear_network_counts_its_matrices_and_the_norms_between_them():
    assert count_of(network="linear") == Count(25 * 100 + 24 * 20, 24 * 20, 0, 100, 24)
    assert count_of(network="linear", width="7", depths=["3"]) == Count(3 * 49 + 2 * 14, 28, 0, 49, 2)


def test_an_option_leaves_the_counts_alone_and_narrows_them(command):
    assert "he_normal" not in command("--network", "vgg")
    assert [row[:3] for row in rows(command("--depth", "14"))] == [
        ["resnet", "14", "1"],
        ["vgg_residual", "14", "2"],
        ["linear", "14", "10"],
    ]
    assert {row[0] for row in rows(command("--width", "2"))} == set(Network) - {Network.IMAGENET_RESNET}
    assert {row[0] for row in rows(command("--data", "linear_teacher"))} == {"linear"}
    hundred, ten = (count_of(network="vgg_residual", data=data) for data in ("cifar100", "cifar10"))
    assert hundred.parameters - ten.parameters == 90 * 33 == hundred.output - ten.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--network", "resnet", "--depth", "25"), "depth 25: a CIFAR ResNet has 6n+2 layers; try 20 or 26\n"),
        (("--network", "resnet", "--depth", "14,15"), "depth 15: a CIFAR ResNet has 6n+2 layers; try 14 or 20\n"),
        (("--depth", "14,0"), "depth 0: a CIFAR ResNet has 6n+2 layers; try 8\n"),
        (("--depth", "deep"), "depth 'deep': is text and must be a number\n"),
        (("--width", "0"), "width 0: must be at least 1; try 1\n"),
        (("--network", "imagenet_resnet", "--width", "2"), "width 2: an ImageNet ResNet has 64 channels in its first"),
        (("--network", "vgg", "--data", "linear_teacher"), "network vgg: linear_teacher has vectors and no images;"),
    ],
)
def test_a_mistake_is_refused_as_a_trial_refuses_it(words, said, command):
    assert command(*words).startswith(said)


def test_a_word_that_is_none_is_refused_with_the_nearest(command):
    assert command("--network", "resnt").startswith("network 'resnt': must be one of resnet, vgg,")
    assert command("--network", "resnt").endswith("; did you mean resnet?\n")
    assert command("--data", "cifar").startswith("data 'cifar': must be one of digits,")
    assert len(command("--data", "cifar").splitlines()) == 1
