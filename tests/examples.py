"""A small trial to change one field of: digits, 8 layers, ten steps."""

from typing import Any

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

FIELDS: dict[str, Any] = {
    "data": Data.DIGITS,
    "pixels": Pixels.ORIGINAL,
    "validation": 100,
    "augmentation": Augmentation.FLIP_SHIFT,
    "label_noise": 0.0,
    "network": Network.RESNET,
    "depth": 8,
    "width": 1,
    "weight_init": WeightInit.HE_NORMAL,
    "output_bias": OutputBias.RANDOM,
    "norm": Norm.BATCH,
    "placement": Placement.EVERY,
    "affine": Affine.BOTH,
    "affine_at": Placement.EVERY,
    "norm_init": NormInit.UNIFORM,
    "groups": None,
    "renorm_r": None,
    "renorm_d": None,
    "renorm_start": None,
    "renorm_r_end": None,
    "renorm_d_end": None,
    "trainable": Trainable.BN,
    "batch": 16,
    "norm_batch": 16,
    "epochs": None,
    "steps": 10,
    "lr": 0.1,
    "milestones": (0.5,),
    "plateau": None,
    "lr_drop": 0.1,
    "warmup": 0.0,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "decay_on": DecayOn.ALL,
    "norm_decay": None,
    "gamma_l1": 0.0,
    "gamma_l2": 0.0,
    "beta_l1": 0.0,
    "beta_l2": 0.0,
    "precision": Precision.FP32,
    "seed": 0,
}


def digits(**changes: Any) -> Trial:
    return Trial(**(FIELDS | changes))
