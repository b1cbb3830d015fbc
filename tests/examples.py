"""A small trial to change one field of: digits, 8 layers, ten steps."""

from typing import Any

from bnscale.trial import Augmentation, Data, Network, NormInit, Pixels, Precision, Trainable, Trial

FIELDS: dict[str, Any] = {
    "data": Data.DIGITS,
    "pixels": Pixels.ORIGINAL,
    "validation": 100,
    "augmentation": Augmentation.FLIP_SHIFT,
    "network": Network.RESNET,
    "depth": 8,
    "width": 1,
    "norm_init": NormInit.UNIFORM,
    "trainable": Trainable.BN,
    "batch": 16,
    "norm_batch": 16,
    "epochs": None,
    "steps": 10,
    "lr": 0.1,
    "milestones": (0.5,),
    "lr_drop": 0.1,
    "warmup": 0.0,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "precision": Precision.FP32,
    "seed": 0,
}


def digits(**changes: Any) -> Trial:
    return Trial(**(FIELDS | changes))
