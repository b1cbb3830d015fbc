"""Cohorts: trials trained in one pass have the numbers that each has alone."""

from typing import Any

import pytest
from examples import digits

from bnscale.networks.cohort import kin
from bnscale.trial import Affine, DecayOn, Norm, NormInit, OutputBias, Placement, Precision, Trainable, Trial

# --- who may share a pass ------------------------------------------------------------------------------

MAY_DIFFER: list[dict[str, Any]] = [
    {"lr": 0.3},
    {"milestones": ()},
    {"milestones": (), "plateau": 1},
    {"lr_drop": 0.5},
    {"warmup": 0.2},
    {"momentum": 0.0},
    {"weight_decay": 0.0},
    {"decay_on": DecayOn.WEIGHTS},
    {"norm_decay": 0.1},
    {"gamma_l1": 0.1, "beta_l2": 0.1},
    {"gamma_l2": 0.1, "beta_l1": 0.1},
    {"norm_init": NormInit.NORMAL},
    {"trainable": Trainable.GAMMA},
    {"trainable": Trainable.BETA},
    {"affine": Affine.BETA},
    {"affine": Affine.GAMMA, "norm_init": NormInit.SYMMETRIC},
    {"affine_at": Placement.BRANCH},
]


@pytest.mark.parametrize("fields", MAY_DIFFER, ids=str)
def test_trials_that_differ_in_gamma_and_beta_and_their_optimisation_are_kin(fields):
    assert kin(digits(**fields)) == kin(digits()) is not None


def test_every_field_may_differ_within_a_cohort_or_parts_it():
    apart: list[dict[str, Any]] = [
        {"validation": 200}, {"label_noise": 0.5}, {"depth": 14}, {"width": 2}, {"steps": 20}, {"seed": 1},
        {"batch": 8, "norm_batch": 8}, {"precision": Precision.BF16}, {"placement": Placement.EVERY_2},
        {"output_bias": OutputBias.ZERO},
    ]  # fmt: skip
    for fields in apart:
        assert kin(digits(**fields)) not in (None, kin(digits())), fields


def test_an_epoch_counts_as_the_steps_that_it_has():
    epochs = digits(epochs=1, steps=None)
    assert kin(epochs) == kin(digits(steps=epochs.total_steps))


@pytest.mark.parametrize(
    "fields",
    [
        {"trainable": Trainable.ALL},
        {"trainable": Trainable.BN_OUTPUT},
        {"trainable": Trainable.NONE},
        {"norm": Norm.LAYER},
        {"norm": Norm.NOISY},
        {"norm_batch": 8},
        {"output_bias": OutputBias.EVEN},
    ],
    ids=str,
)
def test_what_has_no_stacked_form_trains_alone(fields):
    assert kin(digits(**fields)) is None


def test_a_trial_of_which_nothing_is_its_own_is_its_own_kin():
    once = kin(digits())
    assert isinstance(once, Trial)
    assert kin(once) == once
