"""What would make numbers that mean something else than they say: refused before launch, or a trial of its own."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import bnscale, study_file, train
from examples import digits
from pictures import write_hub, write_idx
from torch import Tensor

from bnscale import data, query
from bnscale.choices import _FACTS as FACTS
from bnscale.data import Resident
from bnscale.engine import Alone, Gang
from bnscale.engine.local import LocalEngine
from bnscale.networks import build
from bnscale.storage import storage
from bnscale.store import Store
from bnscale.train import Course, _Nowhere, initialised
from bnscale.train import train as loop
from bnscale.trial import (
    Affine,
    Augmentation,
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
    Trial,
    WeightInit,
)

CPU = torch.device("cpu")


def updated(trial: Trial, folder: Path) -> dict[str, Tensor]:
    """Every parameter and running statistic after the trial's updates, on images of `folder`."""
    images = Resident(trial, folder, CPU)
    engine = LocalEngine(initialised(trial, images), trial, Gang(), storage(folder / trial.id))
    for _ in loop([Course(trial, _Nowhere(), {})], Alone(engine), images, 1e9, lambda: False):
        pass
    return {name: value.clone() for name, value in engine.module.state_dict().items()}


# --- 31: a batch of one image ----------------------------------------------------------------------

VGG = {"network": Network.VGG, "depth": 11}  # its last maps are 1x1: one image has one value there


def test_31_an_epoch_that_leaves_one_image_over_leaves_it_for_another_epoch(tmp_path: Path) -> None:
    trial = digits(**VGG, batch=167, norm_batch=167, steps=9, trainable=Trainable.ALL, lr=0.01)
    left = 1437 - trial.validation
    assert left % trial.batch == 1
    images = Resident(trial, tmp_path, CPU)
    assert [len(images.batch(step)[1]) for step in range(9)] == 9 * [167]
    # Where readings are taken a last batch of one image may be: they go by the running statistics.
    train(trial.model_copy(update={"validation": 1437 - 167}), tmp_path)
    assert query.open(tmp_path).sql("select outcome, step from trials").rows == [("finished", 9)]
    assert query.open(tmp_path).sql("select count(*) from curve where isfinite(loss)").rows == [(3,)]


def test_31_a_statistic_over_one_value_is_refused_before_launch(tmp_path: Path) -> None:
    file = study_file(tmp_path, "grid(trainable=[Trainable.ALL])")
    words = ["status", "--preset", "laptop", "--set", "network=vgg", "--set", "depth=11", "--store", tmp_path / "store"]
    told = bnscale("study", file, *words, "--set", "norm_batch=1")
    assert (told.code, told.out) == (2, "")
    assert told.err.startswith("norm_batch 1: the maps of layers.")
    assert told.err.endswith("are 1x1, and one value has no variance; try 2\n")
    assert bnscale("study", file, *words, "--set", "norm_batch=2").code == 0


# --- 32: nothing to train ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("norm=none", "trainable bn: a CIFAR ResNet with norm none, placement every and affine_at every has no gamma"),
        ("affine_at=none", "trainable bn: a CIFAR ResNet with norm batch, placement every and affine_at none has no g"),
        ("trainable=gamma affine=beta", "trainable gamma: a CIFAR ResNet with "),
        ("trainable=shortcut_output network=vgg depth=11", "trainable shortcut_output: a VGG has no convolution on a"),
    ],
)
def test_32_a_trial_without_a_parameter_to_train_is_refused_in_the_plan(
    tmp_path: Path, settings: str, said: str
) -> None:
    sets = [word for setting in settings.split() for word in ("--set", setting)]
    file = study_file(tmp_path)
    told = bnscale("study", file, "plan", "--preset", "laptop", "--store", tmp_path / "store", *sets)
    assert (told.code, told.out) == (2, "")
    assert told.err.startswith(said)
    assert "; try " in told.err


def test_32_training_none_reads_and_moves_nothing(tmp_path: Path) -> None:
    trial = digits(trainable=Trainable.NONE, steps=3)
    train(trial, tmp_path)
    session = query.open(tmp_path)
    assert session.sql("select outcome, step, trainable_parameters from trials").rows == [("finished", 3, 0)]
    assert session.sql("select count(*) from curve").rows == [(3,)]
    after = updated(trial, tmp_path)
    for name, parameter in build(trial).named_parameters():
        assert torch.equal(parameter, after[name]), name


# --- 33: knobs without effect -----------------------------------------------------------------------

RENORM: dict[str, Any] = {
    "norm": Norm.RENORM, "renorm_r": 1.2, "renorm_d": 0.1, "renorm_start": 0.0, "renorm_r_end": 0.4,
    "renorm_d_end": 0.4,
}  # fmt: skip
EPOCHS: dict[str, Any] = {"steps": None, "epochs": 1, "validation": 1405}  # two steps each
# Of each field another legal value, and what must stand beside it for the field to have a meaning.
KNOBS: dict[str, tuple[dict[str, Any], Any]] = {
    "data": ({"validation": 0}, Data.MNIST),
    "pixels": ({"validation": 0, "data": Data.CIFAR10}, Pixels.JPEG),
    "validation": ({}, 200),
    "augmentation": ({}, Augmentation.NONE),
    "label_noise": ({}, 0.5),
    "network": ({}, Network.VGG_RESIDUAL),
    "depth": ({}, 14),
    "width": ({}, 2),
    "weight_init": ({}, WeightInit.BINARY),
    "output_bias": ({}, OutputBias.EVEN),
    "norm": ({}, Norm.LAYER),
    "placement": ({}, Placement.EVERY_2),
    "affine": ({}, Affine.GAMMA),
    "affine_at": ({}, Placement.FIRST),
    "norm_init": ({}, NormInit.ONES),
    "norm_batch": ({}, 8),
    "groups": ({"norm": Norm.GROUP, "groups": 4}, 8),
    "renorm_r": (RENORM, 3.0),
    "renorm_d": (RENORM, 5.0),
    "renorm_start": (RENORM, 0.4),
    "renorm_r_end": (RENORM, 1.0),
    "renorm_d_end": (RENORM, 1.0),
    "trainable": ({}, Trainable.OUTPUT),
    "batch": ({}, 32),
    "epochs": (EPOCHS, 2),
    "steps": ({}, 2),
    "lr": ({}, 0.05),
    "milestones": ({}, ()),
    "plateau": (EPOCHS | {"epochs": 12, "lr": 1.0, "milestones": ()}, 1),
    "lr_drop": ({}, 0.5),
    "warmup": ({}, 0.5),
    "momentum": ({}, 0.5),
    "weight_decay": ({}, 0.1),
    "decay_on": ({}, DecayOn.WEIGHTS),
    "norm_decay": ({}, 0.1),
    "gamma_l1": ({}, 0.1),
    "gamma_l2": ({}, 0.1),
    "beta_l1": ({}, 0.1),
    "beta_l2": ({}, 0.1),
    "precision": ({}, Precision.BF16),
    "seed": ({}, 1),
}


def test_33_every_field_of_a_trial_is_turned_below() -> None:
    assert list(KNOBS) == sorted(KNOBS, key=list(Trial.model_fields).index)
    assert KNOBS.keys() == Trial.model_fields.keys()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST, and CIFAR-10 as it is and as JPEG, a handful of images each."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        for name in (Data.MNIST, Data.CIFAR10):
            patch.setitem(FACTS, name, name.facts._replace(train=20, test=6))
        write_idx(folder, Data.MNIST)
        for form in ("PNG", "JPEG"):
            write_hub(folder / form, Data.CIFAR10, form)
        data._load.cache_clear()
        yield folder
        data._load.cache_clear()


@cache
def trained(trial: Trial, images: Path) -> dict[str, Tensor]:
    if trial.data is not Data.CIFAR10:
        return updated(trial, images)
    data._load.cache_clear()  # two folders hold it
    return updated(trial, images / ("JPEG" if trial.pixels is Pixels.JPEG else "PNG"))


@pytest.mark.parametrize("field", Trial.model_fields)
def test_33_two_values_of_it_train_two_networks(field: str, images: Path) -> None:
    beside, other = KNOBS[field]
    fields = {"steps": 4} | beside
    one, two = digits(**fields), digits(**(fields | {field: other}))
    assert one.id != two.id
    before, after = trained(one, images), trained(two, images)
    assert before.keys() != after.keys() or any(
        value.shape != after[name].shape or not torch.equal(value, after[name]) for name, value in before.items()
    )


# --- 35: a default that changed ---------------------------------------------------------------------


def test_35_a_value_that_changed_between_two_versions_of_a_study_makes_new_trials_beside_the_old(
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    file = study_file(tmp_path, seeds="range(1)")
    train(digits(), store)
    words = ("--preset", "laptop", "--store", store)
    assert ", 1 done" in bnscale("study", file, "plan", *words).out
    study_file(tmp_path, seeds="range(1)", changes="{'momentum': 0.8}")
    assert "1 trials, 0 done" in bnscale("study", file, "plan", *words).out
    train(digits(momentum=0.8), store)
    assert [manifest.has_result for manifest in Store(store).manifests()] == [True, True]
    rows = query.open(store).sql(
        "select momentum, count(*) from trials join curve using (trial) group by all order by 1"
    )
    assert rows.rows == [(0.8, 3), (0.9, 3)]
