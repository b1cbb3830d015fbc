"""Cohorts: trials that are trained in one pass, as they differ in nothing but gamma, beta and their optimisation."""

from typing import Any

from bnscale.trial import Affine, DecayOn, Norm, NormInit, OutputBias, Placement, Trainable, Trial

# What gives each trial its own gamma and beta, and its own way of training them; the rest of two members is the same.
_OWN: dict[str, Any] = {
    "trainable": Trainable.BN,
    "affine": Affine.BOTH,
    "affine_at": Placement.EVERY,
    "norm_init": NormInit.ONES,
    "lr": 1.0,
    "milestones": (),
    "plateau": None,
    "lr_drop": 1.0,
    "warmup": 0.0,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "decay_on": DecayOn.ALL,
    "norm_decay": None,
    "gamma_l1": 0.0,
    "gamma_l2": 0.0,
    "beta_l1": 0.0,
    "beta_l2": 0.0,
}


def kin(trial: Trial) -> Trial | None:
    """The trial with one value for all that members of a cohort may differ in: trials may share a cohort iff their kin
    are equal. None: it always trains alone."""
    if trial.trainable not in (Trainable.BN, Trainable.GAMMA, Trainable.BETA):
        return None  # weights that train are each trial's own, and so is what every convolution gives
    if trial.norm is not Norm.BATCH or trial.norm_batch != trial.batch:
        return None  # only plain batch norms over the whole batch have a stacked form
    if trial.output_bias is OutputBias.EVEN:
        return None  # biases that hang on gamma and beta: each trial has its own
    length = {"epochs": None, "steps": trial.total_steps}  # however it was put
    return Trial(**trial.model_dump() | _OWN | length)
